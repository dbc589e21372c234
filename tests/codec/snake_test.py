"""The snake activation against NumPy in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.codec.snake import Snake, sine_squared


@pytest.mark.parametrize("scale", [1.0, 30.0, 3000.0])
def test_square_of_the_sine_and_its_slope(scale):
    x_M = (np.random.default_rng(0).standard_normal(20_000) * scale).astype(np.float32)
    value_M, slope_M = jax.vmap(jax.value_and_grad(sine_squared))(x_M)
    exact_M = x_M.astype(np.float64)
    np.testing.assert_allclose(value_M, np.sin(exact_M) ** 2, atol=6e-7)
    np.testing.assert_allclose(slope_M, np.sin(2 * exact_M), atol=6e-7)


def test_in_other_types(float64):
    x_M = np.random.default_rng(1).standard_normal(1000) * 10
    value_M, slope_M = jax.vmap(jax.value_and_grad(sine_squared))(jnp.asarray(x_M))
    np.testing.assert_allclose(value_M, np.sin(x_M) ** 2, atol=1e-14)
    np.testing.assert_allclose(slope_M, np.sin(2 * x_M), atol=1e-14)
    half_M = jnp.asarray(x_M, jnp.bfloat16)
    assert sine_squared(half_M).dtype == jnp.bfloat16
    np.testing.assert_allclose(sine_squared(half_M), np.sin(half_M.astype(np.float64)) ** 2, atol=4e-3)


def test_each_channel_has_its_own_alpha():
    x_BTC, alpha_C = np.random.default_rng(2).standard_normal((2, 5, 3)), np.array([0.3, 1.0, 7.0])
    found_BTC = Snake().apply({"params": {"alpha": jnp.asarray(alpha_C, jnp.float32)}}, jnp.asarray(x_BTC, jnp.float32))
    np.testing.assert_allclose(found_BTC, x_BTC + np.sin(alpha_C * x_BTC) ** 2 / alpha_C, atol=1e-5)
