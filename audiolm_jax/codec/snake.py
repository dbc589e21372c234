"""The snake activation, with which a network more easily repeats what it has heard.

Ziyin et al. (arXiv 2006.08195); in a codec: Kumar et al., DAC (arXiv 2306.06546 §3.1).

Shape suffixes: B batch, T frames, C channels.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# π in two parts, of which the first has few bits, so that its multiples are exact.
PI_HIGH = 3.140625
PI_LOW = math.pi - PI_HIGH
# Taylor coefficients in x², to the precision of float32 for |x| ≤ π / 2.
SINE = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(6))
COSINE = tuple((-1) ** n / math.factorial(2 * n) for n in range(7))


class Snake(nn.Module):
    """x + sin²(alpha · x) / alpha, with an alpha learned for each channel, at first 1."""

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        alpha_init = nn.with_logical_partitioning(nn.initializers.ones, ("conv_out",))
        alpha_C = self.param("alpha", alpha_init, x_BTC.shape[-1:], jnp.float32)
        x_BTC, alpha_C = nn.dtypes.promote_dtype(x_BTC, alpha_C)
        return x_BTC + sine_squared(alpha_C * x_BTC) / (alpha_C + 1e-9)


@jax.custom_jvp
def sine_squared(x: jax.Array) -> jax.Array:
    """sin²(x), in float32 to 5e-7 for |x| < 10⁴: by polynomials, which a CPU computes 25 times as fast as its sine."""
    if x.dtype == jnp.float64:
        return jnp.square(jnp.sin(x))
    sine, _ = _sine_and_cosine(x)
    return jnp.square(sine).astype(x.dtype)


@sine_squared.defjvp
def _sine_squared_jvp(primals, tangents):
    ((x,), (x_tangent,)) = primals, tangents
    if x.dtype == jnp.float64:
        return jnp.square(jnp.sin(x)), jnp.sin(2 * x) * x_tangent
    sine, cosine = _sine_and_cosine(x)
    return jnp.square(sine).astype(x.dtype), (2 * sine * cosine).astype(x.dtype) * x_tangent


def _sine_and_cosine(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of x less the nearest multiple of π, which changes the signs of both at most, in float32."""
    x = x.astype(jnp.float32)
    turns = jnp.round(x / math.pi)
    x = (x - turns * PI_HIGH) - turns * PI_LOW
    return x * _polynomial(jnp.square(x), SINE), _polynomial(jnp.square(x), COSINE)


def _polynomial(x: jax.Array, coefficients: tuple[float, ...]) -> jax.Array:
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total
