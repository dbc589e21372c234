"""Factorised codes against transformers' DAC, and their bookkeeping against plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from audiolm_jax.codec.factorised import CODEBOOK_TO_COMMITMENT, FactorisedQuantizer
from audiolm_jax.codec.quantizer import QuantizerTraining
from tests.codec.objective_test import build, small_config, tones
from tests.training.devices import on_eight_devices

SETTINGS = QuantizerTraining(decay=0.9, dead_code_threshold=2.0, dead_code_share=0.1, dropout=False)
FACTORISED = FactorisedQuantizer(num_quantizers=3, codebook_size=16, embed_dim=6, codebook_dim=3)


def random_state(seed=0):
    """Parameters of which none is zero, and no usage so far."""
    key, bias_key = jax.random.split(jax.random.key(seed))
    parameters, codebooks = FACTORISED.init(key)
    for name, key in zip(("in", "out"), jax.random.split(bias_key)):
        parameters[name]["bias"] = 0.3 * jax.random.normal(key, parameters[name]["bias"].shape)
    return parameters, codebooks


def frames(batch=4, length=9, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, length, 6)).astype(np.float32)


def encode_by_loops(parameters, x_BTD):
    """Codes [B, T, Q] and what each level leaves of the frames."""
    parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters)
    left, codes = [np.asarray(x_BTD, np.float64)], []
    for level in range(3):
        codes_NP = parameters["codes"][level]
        z_BTP = left[-1] @ parameters["in"]["kernel"][level] + parameters["in"]["bias"][level]
        unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
        codes.append(np.argmax(unit(z_BTP) @ unit(codes_NP).T, axis=-1))
        vectors_BTD = codes_NP[codes[-1]] @ parameters["out"]["kernel"][level] + parameters["out"]["bias"][level]
        left.append(left[-1] - vectors_BTD)
    return np.stack(codes, axis=-1), left


def test_encode_picks_the_nearest_direction_of_each_projected_residual():
    (parameters, codebooks), x_BTD = random_state(), frames()
    expected_BTQ, left = encode_by_loops(parameters, x_BTD)
    codes_BTQ = FACTORISED.encode(parameters, codebooks, x_BTD)
    assert codes_BTQ.dtype == jnp.int32 and len(np.unique(codes_BTQ)) > 8
    np.testing.assert_array_equal(codes_BTQ, expected_BTQ)
    np.testing.assert_array_equal(FACTORISED.encode(parameters, codebooks, x_BTD, 2), expected_BTQ[..., :2])
    for levels in (2, 3):
        decoded_BTD = FACTORISED.decode(parameters, codebooks, codes_BTQ[..., :levels])
        np.testing.assert_allclose(decoded_BTD, x_BTD - left[levels], atol=1e-5)


def test_losses_and_gradients_are_those_of_dac():
    """transformers' DAC in training mode, without dropout."""
    torch = pytest.importorskip("torch")
    modeling_dac = pytest.importorskip("transformers.models.dac.modeling_dac")
    (parameters, codebooks), x_BTD, pull_BTD = random_state(), frames(), frames(seed=2)
    sizes = {"n_codebooks": 3, "codebook_size": 16, "codebook_dim": 3, "encoder_hidden_size": 3}
    theirs = modeling_dac.DacResidualVectorQuantizer(modeling_dac.DacConfig(downsampling_ratios=[2], **sizes)).train()
    for level, quantizer in enumerate(theirs.quantizers):
        for name, conv in (("in", quantizer.in_proj), ("out", quantizer.out_proj)):
            kernel_IO, bias_O = (torch.tensor(np.asarray(parameters[name][part][level])) for part in ("kernel", "bias"))
            conv.weight.data, conv.bias.data = kernel_IO.T[..., None], bias_O
        quantizer.codebook.weight.data = torch.tensor(np.asarray(parameters["codes"][level]))
    x = torch.tensor(x_BTD.swapaxes(1, 2), requires_grad=True)
    vectors, _, _, commitment_B, codebook_B = theirs(x)
    expected = (vectors * torch.tensor(pull_BTD.swapaxes(1, 2))).sum() + (0.25 * commitment_B + codebook_B).mean()
    expected.backward()

    def loss(parameters, x_BTD):
        found = FACTORISED.train(parameters, codebooks, x_BTD, jax.random.key(0), SETTINGS)
        # Ours is an average over levels, and the commitment's weight is outside.
        return jnp.sum(found.vectors_BTD * pull_BTD) + 3 * 0.25 * found.commitment

    assert CODEBOOK_TO_COMMITMENT * 0.25 == 1.0
    value, (grads, x_grad_BTD) = jax.value_and_grad(loss, argnums=(0, 1))(parameters, x_BTD)
    assert value == pytest.approx(expected.item(), rel=1e-4)
    np.testing.assert_allclose(x_grad_BTD, x.grad.swapaxes(1, 2), rtol=1e-4, atol=1e-4)
    for level, quantizer in enumerate(theirs.quantizers):
        for name, conv in (("in", quantizer.in_proj), ("out", quantizer.out_proj)):
            np.testing.assert_allclose(grads[name]["kernel"][level], conv.weight.grad[..., 0].T, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(grads[name]["bias"][level], conv.bias.grad, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(grads["codes"][level], quantizer.codebook.weight.grad, rtol=1e-4, atol=1e-4)
        assert np.abs(grads["codes"][level]).max() > 0.01


def test_padded_frames_count_nowhere():
    (parameters, codebooks), x_BTD = random_state(), frames(batch=2, length=8)
    x_BTD[1, 5:] = 1e3
    mask_BT = np.ones((2, 8), bool)
    mask_BT[1, 5:] = False

    def loss(parameters, x_BTD, mask_BT):
        found = FACTORISED.train(parameters, codebooks, x_BTD, jax.random.key(0), SETTINGS, mask_BT)
        return found.commitment, found

    results = [
        jax.value_and_grad(loss, has_aux=True)(parameters, *arguments)
        for arguments in ((x_BTD, mask_BT), (x_BTD[mask_BT][None], None))
    ]
    ((ragged, found), grads), ((alone, expected), expected_grads) = results
    assert ragged == pytest.approx(float(alone), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)
    np.testing.assert_allclose(found.codebooks["cluster_size"], expected.codebooks["cluster_size"], rtol=1e-5)
    np.testing.assert_array_equal(found.dead_Q, expected.dead_Q)


def test_usage_is_a_moving_average():
    (parameters, _), x_BTD = random_state(), frames(batch=8, length=20)
    before_QN = np.random.default_rng(3).uniform(0, 2, (3, 16)).astype(np.float32)
    found = FACTORISED.train(parameters, {"cluster_size": before_QN}, x_BTD, jax.random.key(0), SETTINGS)
    codes_MQ = encode_by_loops(parameters, x_BTD)[0].reshape(-1, 3)
    for level in range(3):
        size_N = 0.9 * before_QN[level] + 0.1 * np.bincount(codes_MQ[:, level], minlength=16)
        np.testing.assert_allclose(found.codebooks["cluster_size"][level], size_N, rtol=1e-5)
        share_N = size_N / size_N.sum()
        assert found.perplexity_Q[level] == pytest.approx(np.exp(-np.sum(share_N * np.log(share_N))), rel=1e-4)
        # A tenth of 160 frames for 16 codes, which is less than 2.
        assert found.dead_Q[level] == np.sum(size_N < 1.0) > 0


def test_dropout_keeps_a_uniform_number_of_levels_per_example():
    (parameters, codebooks), x_BTD = random_state(), frames(batch=300, length=2)
    dropping = dataclasses.replace(SETTINGS, dropout=True)
    found = FACTORISED.train(parameters, codebooks, x_BTD, jax.random.key(0), dropping)
    left = encode_by_loops(parameters, x_BTD)[1]
    matches_NB = np.stack([
        np.abs(x_BTD - left[levels] - found.vectors_BTD).max(axis=(1, 2)) < 1e-4 for levels in (1, 2, 3)
    ])  # fmt: skip
    np.testing.assert_array_equal(matches_NB.sum(axis=0), 1)
    counts_N = matches_NB.sum(axis=1)
    assert np.all(np.abs(counts_N - 100) < 35), counts_N
    # Level q counts the frames that reach it.
    reached_Q = np.array([300, counts_N[1:].sum(), counts_N[2]]) * 2
    np.testing.assert_allclose(found.codebooks["cluster_size"].sum(axis=1), 0.1 * reached_Q, rtol=1e-4)


def test_fit_counts_and_changes_nothing():
    (parameters, codebooks), x_MD = random_state(), frames().reshape(-1, 6)
    fitted, books = FACTORISED.fit(parameters, codebooks, x_MD, jax.random.key(0), 5, frames_per_step=72.0)
    jax.tree.map(np.testing.assert_array_equal, fitted, parameters)
    codes_MQ = encode_by_loops(parameters, x_MD[None])[0][0]
    expected_QN = [2.0 * np.bincount(codes_MQ[:, level], minlength=16) for level in range(3)]
    np.testing.assert_allclose(books["cluster_size"], expected_QN, rtol=1e-5)


def factorised_config():
    config = small_config(start_step=10)
    config.model.update({"snake": True, "codebook_dim": 2})
    return config


def test_a_soundstream_with_snakes_and_factorised_codes_learns():
    objective, state = build(factorised_config(), optax.adam(3e-3), optax.adam(1e-3))
    batches = [{"wave_BW": tones(seed=seed)} for seed in range(objective.warm_start_batches)]
    start = state = objective.warm_start(state, batches, jax.random.key(3))
    step, history = jax.jit(objective.step), []
    for index in range(20):
        state, metrics = step(state, {"wave_BW": tones(seed=index % 3)}, jax.random.key(index))
        history.append(jax.device_get(metrics))
    assert all(np.isfinite(value) for row in history for value in row.values())
    first, last = (np.mean([row["reconstruction"] for row in rows]) for rows in (history[:3], history[-3:]))
    assert last < 0.9 * first
    generator, initial = state["generator"], start["generator"]
    # Alphas begin at 1; these and every parameter of the quantizer are learned.
    alphas = [name for name in jax.tree_util.tree_leaves_with_path(initial) if name[0][-1].key == "alpha"]
    assert len(alphas) == 2 * (2 * 3 * 2 + 2 + 1) and all(np.all(alpha == 1.0) for _, alpha in alphas)
    for name in ("in", "codes", "out"):
        jax.tree.map(
            lambda after, before: np.testing.assert_array_less(0, np.abs(after - before).max()),
            generator["quantizer"][name],
            initial["quantizer"][name],
        )
    assert set(objective.weights(state)["generator"]) == {"encoder", "decoder", "quantizer"}


@pytest.mark.slow
def test_eight_devices_train_as_one_does():
    results = on_eight_devices("tests.codec.factorised_on_meshes")
    single = results.pop("single")
    for name, result in results.items():
        np.testing.assert_allclose(result["losses"], single["losses"], rtol=1e-9, err_msg=name)
        assert result["distance"] < 1e-9 < single["moved"], name
