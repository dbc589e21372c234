import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.semantic import conformer

CONFIG = conformer.ConformerConfig(embed_dim=12, num_heads=3, mlp_dim=20, conv_kernel=5, dropout_rate=0.5)


def random_params(module: nn.Module, *arguments):
    """Initial parameters with every leaf replaced with noise, so that no bias is zero and no scale one."""
    params = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *arguments))["params"]
    leaves, structure = jax.tree.flatten(params)
    generator = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [jnp.float32(0.4 * generator.normal(size=leaf.shape)) for leaf in leaves])


@pytest.fixture(scope="module")
def ragged():
    x_BTD = jnp.float32(np.random.default_rng(1).normal(size=(3, 9, 12)))
    lengths_B = np.array([9, 6, 1])  # Frames.
    return x_BTD, jnp.arange(9) < lengths_B[:, None], lengths_B


@pytest.fixture(scope="module")
def stack(ragged):
    module = conformer.ConformerStack(CONFIG, num_layers=2)
    params = random_params(module, ragged[0], ragged[1])
    return jax.jit(lambda x_BTD, mask_BT: module.apply({"params": params}, x_BTD, mask_BT)), params


def test_relative_shift_picks_each_pairs_distance():
    logits_BNTR = np.random.default_rng(0).normal(size=(2, 3, 5, 9))
    expected_BNTS = np.stack(
        [np.stack([logits_BNTR[..., t, 4 - t + s] for s in range(5)], axis=-1) for t in range(5)], axis=-2
    )
    shifted_BNTS = conformer.relative_shift(jnp.asarray(logits_BNTR), 5)
    np.testing.assert_array_equal(shifted_BNTS, expected_BNTS.astype(np.float32))


@pytest.mark.parametrize("block_positions", [2, 3, 64])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_attention_in_blocks_equals_the_whole(ragged, stack, block_positions, remat):
    x_BTD, mask_BT, *_ = ragged
    _, params = stack
    blocked = dataclasses.replace(CONFIG, block_positions=block_positions, remat=remat)

    def loss(params, config):
        module = conformer.ConformerStack(config, num_layers=2)
        return jnp.sum(jnp.sin(module.apply({"params": params}, x_BTD, mask_BT)), where=mask_BT[..., None])

    (ours, our_grads), (whole, grads) = (jax.value_and_grad(loss)(params, config) for config in (blocked, CONFIG))
    np.testing.assert_allclose(ours, whole, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), our_grads, grads)


def test_sinusoids_are_the_codes_of_the_distances():
    codes_RD = conformer.sinusoids(4, 6)
    assert codes_RD.shape == (7, 6)
    for row, distance in zip(codes_RD, [3, 2, 1, 0, -1, -2, -3]):
        angles = distance / 10_000 ** (np.array([0, 2, 4]) / 6)
        np.testing.assert_allclose(row, np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-6)


def test_attention_is_a_loop_over_queries_and_keys(ragged):
    x_BTD, mask_BT, lengths_B = ragged
    module = conformer.RelativeAttention(CONFIG)
    positions_RD = conformer.sinusoids(9, 12)
    params = random_params(module, x_BTD, positions_RD, mask_BT)
    ours_BTD = np.asarray(jax.jit(module.apply)({"params": params}, x_BTD, positions_RD, mask_BT))

    p = jax.tree.map(np.asarray, params)
    apply = lambda name, x: (x @ p[name]["kernel"] + p[name]["bias"]).reshape(*x.shape[:-1], 3, 4)
    for b, length in enumerate(lengths_B):
        q_TNH, k_TNH, v_TNH = (apply(name, np.asarray(x_BTD[b])) for name in ("query", "key", "value"))
        for t in range(length):
            heads = []
            for n in range(3):
                logits = []
                for s in range(length):
                    r_H = apply("position", positions_RD[8 - (t - s)])[n]
                    content = (q_TNH[t, n] + p["content_bias"][n]) @ k_TNH[s, n]
                    logits.append((content + (q_TNH[t, n] + p["position_bias"][n]) @ r_H) / 2.0)
                weights = np.exp(logits - np.max(logits))
                heads.append((weights / weights.sum()) @ v_TNH[:length, n])
            expected_D = np.concatenate(heads) @ p["out"]["kernel"] + p["out"]["bias"]
            np.testing.assert_allclose(ours_BTD[b, t], expected_D, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [1, 4, 5])
def test_depthwise_convolution_is_numpys(kernel, causal):
    generator = np.random.default_rng(0)
    x_BTD, kernel_KD = generator.normal(size=(2, 7, 3)), generator.normal(size=(kernel, 3))
    ours_BTD = np.asarray(jax.jit(conformer.depthwise_convolution, static_argnums=2)(x_BTD, kernel_KD, causal))
    for b in range(2):
        for d in range(3):
            full_T = np.convolve(x_BTD[b, :, d], kernel_KD[::-1, d])
            expected_T = full_T[0 if causal else kernel // 2 :][:7]
            np.testing.assert_allclose(ours_BTD[b, :, d], expected_T, atol=1e-5)


def test_each_row_is_that_clip_alone(stack, ragged):
    run, _ = stack
    x_BTD, mask_BT, lengths_B = ragged
    together_BTD = run(x_BTD, mask_BT)
    for b, length in enumerate(lengths_B):
        alone_BTD = run(x_BTD[b : b + 1, :length], jnp.ones((1, length), bool))
        np.testing.assert_allclose(together_BTD[b, :length], alone_BTD[0], atol=1e-5)


def test_frames_that_do_not_exist_get_no_gradient(stack, ragged):
    run, _ = stack
    x_BTD, mask_BT, _ = ragged
    existing_sum = lambda x_BTD: jnp.sum(jnp.where(mask_BT[..., None], run(x_BTD, mask_BT), 0.0) ** 3)
    gradient_BTD = np.asarray(jax.jit(jax.grad(existing_sum))(x_BTD))
    np.testing.assert_array_equal(gradient_BTD[~np.asarray(mask_BT)], 0.0)
    assert (np.abs(gradient_BTD[np.asarray(mask_BT)]).max(axis=-1) > 0).all()


def test_a_row_without_frames_is_finite(stack, ragged):
    run, _ = stack
    assert np.isfinite(run(ragged[0], jnp.zeros((3, 9), bool))).all()


def test_a_stack_is_its_blocks_one_after_another(stack, ragged):
    run, params = stack
    x_BTD, mask_BT, _ = ragged
    expected_BTD = run(x_BTD, mask_BT)
    for i in range(2):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        arguments = (x_BTD, conformer.sinusoids(9, 12), mask_BT, True)
        x_BTD, _ = jax.jit(conformer.Block(CONFIG).apply, static_argnums=4)({"params": block}, *arguments)
    np.testing.assert_allclose(x_BTD, expected_BTD, atol=1e-5)


def test_remat_recomputes_and_changes_no_gradient(stack, ragged):
    _, params = stack
    x_BTD, mask_BT, _ = ragged

    def loss(remat):
        module = conformer.ConformerStack(dataclasses.replace(CONFIG, remat=remat), num_layers=2)
        rngs = {"dropout": jax.random.key(5)}
        return lambda params: jnp.sum(module.apply({"params": params}, x_BTD, mask_BT, False, rngs=rngs) ** 2)

    for remat in ("none", *conformer.REMAT_POLICIES):
        assert ("remat" in str(jax.make_jaxpr(jax.grad(loss(remat)))(params))) == (remat != "none")
    expected, recomputed = (jax.jit(jax.grad(loss(remat)))(params) for remat in ("none", "full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), expected, recomputed)


def test_dropout_acts_in_training_only(stack, ragged):
    run, params = stack
    x_BTD, mask_BT, _ = ragged
    module = conformer.ConformerStack(CONFIG, num_layers=2)
    rngs = lambda seed: {"dropout": jax.random.key(seed)}
    train = jax.jit(lambda seed: module.apply({"params": params}, x_BTD, mask_BT, False, rngs=rngs(seed)))
    assert not np.allclose(train(0), train(1))
    assert not np.allclose(train(0), run(x_BTD, mask_BT))
