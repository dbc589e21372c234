"""Training the codec: what a step computes, and what it leaves alone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from audiolm_jax.codec import losses
from audiolm_jax.codec.objective import discriminators_from_config, soundstream_objective
from audiolm_jax.codec.quantizer import QuantizerTraining
from audiolm_jax.codec.soundstream import Decoder, Encoder, SoundStreamConfig
from audiolm_jax.config import soundstream_config


def small_config(**discriminator):
    config = soundstream_config()
    config.batch_size = 4
    config.crop_seconds = 0.032
    config.model.update({"channels": 2, "strides": (2, 4), "embed_dim": 4, "num_quantizers": 2, "codebook_size": 8})
    config.quantizer.update({"kmeans_iterations": 3})
    config.discriminator.update({
        "waveform_channels": (2, 2, 2), "waveform_scales": 2, "stft_channels": 1, "stft_window": 128, "stft_hop": 64,
        **discriminator,
    })  # fmt: skip
    config.loss.update({"num_mels": 8, "min_log2_window": 6, "max_log2_window": 7})
    return config


def tones(batch=4, size=512, seed=0):
    rng = np.random.default_rng(seed)
    phase_B1, hertz_B1 = rng.uniform(0, 6.28, (batch, 1)), rng.uniform(200, 2000, (batch, 1))
    return (0.3 * np.sin(phase_B1 + 2 * np.pi * hertz_B1 * np.arange(size) / 16_000)).astype(np.float32)


def build(config, generator_optimizer, discriminator_optimizer=None):
    objective = soundstream_objective(config, generator_optimizer, discriminator_optimizer or optax.sgd(1.0))
    state = nn.meta.unbox(jax.jit(objective.init)(jax.random.key(0)))
    return objective, state


def changed(before, after):
    return any(bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


@pytest.mark.parametrize("balancer", [False, True])
def test_a_step_descends_the_gradients_of_both_sides(balancer, float64):
    """One SGD step of size 1 moves each side by the gradient of its loss against the other, as it was.

    With the balancer, a loss counts by its weight's share over the norm of its gradient for the waveform.
    """
    config = small_config(waveform_scales=1, multi_stft_windows=(64,) if balancer else ())
    config.quantizer.dropout = False
    config.loss.update({"waveform_weight": 2.0, "balancer": balancer})
    objective, state = build(config, optax.sgd(1.0))
    state = jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    model, discriminators = SoundStreamConfig(**config.model), discriminators_from_config(config)
    wave_BW, key = jnp.asarray(tones(), jnp.float64), jax.random.key(1)
    weights = {"reconstruction": 1.0, "waveform": 2.0, "adversarial": 1.0, "feature": 100.0}

    def reconstruct(generator):
        x_BTD = Encoder(model).apply({"params": generator["encoder"]}, wave_BW)
        settings = {name: config.quantizer[name] for name in ("decay", "dead_code_threshold", "dead_code_share")}
        training = QuantizerTraining(**settings, dropout=False)
        quantized = model.quantizer.train({}, state["codebooks"], x_BTD, key, training)
        return Decoder(model).apply({"params": generator["decoder"]}, quantized.vectors_BTD), quantized.commitment

    def judge(params, wave_BW):
        return discriminators.apply({"params": params}, wave_BW)

    def losses_of(found_BW):
        real, fake = judge(state["discriminator"], wave_BW), judge(state["discriminator"], found_BW)
        settings = {name: config.loss[name] for name in ("num_mels", "min_log2_window", "max_log2_window")}
        return {
            "reconstruction": jnp.mean(losses.reconstruction_loss(wave_BW, found_BW, sample_rate=16_000, **settings)),
            "waveform": jnp.mean(jnp.abs(wave_BW - found_BW)),
            "adversarial": losses.adversarial_loss(fake),
            "feature": losses.feature_loss(real, fake),
        }

    def generator_loss(generator, factors):
        found_BW, commitment = reconstruct(generator)
        values = losses_of(found_BW)
        return sum(factors[name] * values[name] for name in weights) + commitment

    def discriminator_loss(params):
        return losses.discriminator_loss(judge(params, wave_BW), judge(params, reconstruct(state["generator"])[0]))

    @jax.jit
    def expectations(state):
        factors = weights
        if balancer:
            grads_BW = jax.jacrev(losses_of)(reconstruct(state["generator"])[0])
            norms = {name: jnp.sum(jnp.linalg.norm(grads_BW[name], axis=1)) for name in weights}
            factors = {name: weight / sum(weights.values()) / norms[name] for name, weight in weights.items()}
        return {
            "generator": (
                generator_loss(state["generator"], weights),
                jax.grad(generator_loss)(state["generator"], factors),
            ),
            "discriminator": jax.value_and_grad(discriminator_loss)(state["discriminator"]),
        }

    new_state, metrics = jax.jit(objective.step)(state, {"wave_BW": wave_BW}, key)
    for name, (value, grads) in expectations(state).items():
        assert metrics["loss" if name == "generator" else "discriminator"] == pytest.approx(float(value), rel=1e-9)
        prefix = "" if name == "generator" else "discriminator_"
        assert metrics[f"{prefix}gradient_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-7)
        expected = jax.tree.map(lambda parameter, grad: parameter - grad, state[name], grads)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9), new_state[name], expected)
        assert changed(state[name], new_state[name])
    assert {leaf.dtype for leaf in jax.tree.leaves(new_state["generator"])} == {jnp.dtype("float64")}
    assert new_state["step"] == 1 and new_state["step"].dtype == jnp.int32
    shares = {name: float(value) for name, value in metrics.items() if name.startswith("share_")}
    expected_shares = {f"share_{name}": weight / 104 for name, weight in weights.items()} if balancer else {}
    assert shares == {name: pytest.approx(share, rel=1e-6) for name, share in expected_shares.items()}


@pytest.fixture(scope="module")
def trained():
    """A codec trained for thirty steps, its discriminators from the twentieth on; and how it went."""
    config = small_config(start_step=20)
    objective, state = build(config, optax.adam(3e-3), optax.adam(1e-3))
    batches = [{"wave_BW": tones(seed=seed)} for seed in range(objective.warm_start_batches)]
    start = state = objective.warm_start(state, batches, jax.random.key(3))
    step, states, history = jax.jit(objective.step), {}, []
    for index in range(30):
        state, metrics = step(state, {"wave_BW": tones(seed=index % 3)}, jax.random.key(index))
        history.append(jax.device_get(metrics))
        states[index + 1] = state
    return config, objective, start, states, history


def test_training_lowers_the_reconstruction_loss(trained):
    _, _, _, _, history = trained
    first, last = (np.mean([row["reconstruction"] for row in rows]) for rows in (history[:3], history[-3:]))
    assert last < 0.8 * first


def test_discriminators_wait_for_their_start(trained):
    _, _, start, states, history = trained
    assert not changed(start["discriminator"], states[20]["discriminator"])
    assert not changed(start["discriminator_opt"], states[20]["discriminator_opt"])
    assert changed(start["discriminator"], states[21]["discriminator"])
    for name in ("discriminator", "adversarial", "discriminator_gradient_norm"):
        assert [row[name] > 0 for row in history] == [False] * 20 + [True] * 10
    accuracies = np.array([[row["accuracy_real"], row["accuracy_fake"]] for row in history])
    assert (
        np.all(accuracies[:20] == 0) and np.all((accuracies >= 0) & (accuracies <= 1)) and np.any(accuracies[20:] > 0)
    )


def test_metrics_are_scalars_and_name_every_level(trained):
    _, _, _, _, history = trained
    assert {np.shape(value) for value in history[0].values()} == {()}
    assert {"loss", "reconstruction", "adversarial", "feature", "commitment", "discriminator"} <= set(history[0])
    assert {"perplexity_0", "perplexity_1", "dead_codes_0", "dead_codes_1"} <= set(history[0])
    assert {"log_mel_low", "log_mel_middle", "log_mel_high", "gradient_norm"} <= set(history[0])
    assert all(np.isfinite(value) for row in history for value in row.values())


def test_warm_start_fits_the_codebooks_to_the_encoder(trained):
    config, objective, start, _, _ = trained
    # 8 codes at 10 frames each, 4 · 64 frames a batch.
    assert objective.warm_start_batches == 1
    model = SoundStreamConfig(**config.model)
    x_BTD = Encoder(model).apply({"params": start["generator"]["encoder"]}, tones(seed=0))
    codes_BTQ = model.quantizer.encode({}, start["codebooks"], x_BTD)
    quantized_BTD = model.quantizer.decode({}, start["codebooks"], codes_BTQ)
    assert np.mean((x_BTD - quantized_BTD) ** 2) < 0.3 * np.var(x_BTD, axis=(0, 1)).mean()


def test_evaluation_ignores_padding_and_filler_rows(trained):
    _, objective, _, states, _ = trained
    evaluate = jax.jit(lambda wave_BW, lengths_B: objective.eval_step(
        states[30], {"wave_BW": wave_BW, "lengths_B": lengths_B}, jax.random.key(0)
    ))  # fmt: skip
    wave_BW, noise_BW = tones(), 100.0 * tones(seed=1)
    twice = evaluate(np.concatenate([wave_BW[:2], wave_BW[:2]]), np.int32([512, 512, 512, 512]))
    filled = evaluate(np.concatenate([wave_BW[:2], noise_BW[2:]]), np.int32([512, 512, 0, 0]))
    assert set(twice) == {"loss", "log_mel_distance", "si_sdr"}
    assert filled["si_sdr"][1] == 2 and filled["log_mel_distance"][1] == 2 * 4
    for name, (total, count) in twice.items():
        np.testing.assert_allclose(filled[name], (total / 2, count / 2), rtol=1e-4)
    assert evaluate(wave_BW, np.int32([300, 0, 0, 0]))["log_mel_distance"][1] == 2


def test_weights_are_what_inference_needs(trained):
    _, objective, _, states, _ = trained
    weights = objective.weights(states[30])
    assert set(weights) == {"generator", "codebooks"} and set(weights["generator"]) == {"encoder", "decoder"}
