"""Schedules at the steps that matter; AdamW's weight decay; Adafactor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from audiolm_jax.config import language_model_config
from audiolm_jax.errors import UserError
from audiolm_jax.training.optimizer import make_optimizer, make_schedule


def fields(**changed):
    optimizer = language_model_config("semantic").optimizer
    optimizer.update({"learning_rate": 1.0, "warmup_steps": 10, "clip_norm": 0.0, **changed})
    return optimizer


def test_warm_up_then_decay():
    for schedule, at_60 in (("constant", 1.0), ("rsqrt", (10 / 60) ** 0.5), ("cosine", 0.5)):
        rate = make_schedule(fields(schedule=schedule), 110)
        np.testing.assert_allclose([rate(0), rate(4), rate(9), rate(10)], [0.1, 0.5, 1.0, 1.0], atol=1e-6)
        np.testing.assert_allclose(rate(60), at_60, atol=1e-6)
    assert float(make_schedule(fields(schedule="cosine"), 110)(110)) == pytest.approx(0, abs=1e-6)
    assert float(make_schedule(fields(warmup_steps=0, schedule="constant"), 110)(0)) == 1.0


def test_weight_decay_leaves_scales_and_biases_alone():
    optimizer = make_optimizer(fields(warmup_steps=0, schedule="constant", weight_decay=0.5), 10)
    params = {"kernel": jnp.ones((2, 2)), "norm": {"scale": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    zeros = {"kernel": jnp.zeros((2, 2)), "norm": {"scale": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["kernel"], 0.5)
    np.testing.assert_allclose(moved["norm"]["scale"], 1.0)
    np.testing.assert_allclose(moved["norm"]["bias"], 1.0)


def test_clipping_bounds_the_gradient():
    params = {"kernel": jnp.zeros(2)}
    huge = {"kernel": jnp.array([300.0, 400.0])}
    clipped = make_optimizer(fields(clip_norm=1.0), 10)
    _, state = clipped.update(huge, clipped.init(params), params)
    first_moment = next(leaf for leaf in optax.tree_utils.tree_get_all_with_path(state, "mu"))[1]
    np.testing.assert_allclose(first_moment["kernel"], 0.1 * np.array([0.6, 0.8]), rtol=1e-4)


def adafactor_fields(**changed):
    return fields(
        name="adafactor", warmup_steps=0, schedule="constant", learning_rate=0.01, weight_decay=0.0, **changed
    )


def test_adafactor_is_optax_s_own():
    generator = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(generator.standard_normal((2, 128, 160))), "bias": jnp.ones(5)}
    ours = make_optimizer(adafactor_fields(decay_rate=0.7), 10)
    theirs = optax.adafactor(0.01, decay_rate=0.7)
    state, expected_state = ours.init(params), theirs.init(params)
    for seed in range(3):
        grads = jax.tree.map(lambda p, seed=seed: jax.random.normal(jax.random.key(seed), p.shape), params)
        updates, state = ours.update(grads, state, params)
        expected, expected_state = theirs.update(grads, expected_state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
    moments = optax.tree_utils.tree_get(state, "v_row")["kernel"]
    assert moments.shape == (2, 128)


def test_adafactor_weight_decay_leaves_scales_alone():
    decaying = adafactor_fields()
    decaying.weight_decay = 0.5
    optimizer = make_optimizer(decaying, 10)
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert np.all(updates["kernel"] < 0) and np.all(updates["scale"] == 0)


def test_unknown_optimizer():
    with pytest.raises(UserError, match="unknown optimizer: config.optimizer.name=sgd"):
        make_optimizer(fields(name="sgd"), 10)


def test_unknown_schedule():
    with pytest.raises(UserError, match="unknown schedule"):
        make_schedule(fields(schedule="linear"), 10)
