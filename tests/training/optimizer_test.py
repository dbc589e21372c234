"""Schedules at the steps that matter, and AdamW's weight decay."""

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


def test_unknown_schedule():
    with pytest.raises(UserError, match="unknown schedule"):
        make_schedule(fields(schedule="linear"), 10)
