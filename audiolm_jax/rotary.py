"""Rotary positions, for whatever attends.

Shape suffixes: B batch, T positions, N heads, H head width, h half of it.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rotate(x_BTNH: jax.Array, position_T: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864): dimensions i and i + H/2 of each head turn together.

    Products of rotated queries and keys depend on the distance of their positions alone.

    Args:
      x_BTNH: queries or keys; H even.
      position_T: their positions.
      base: pair i turns by base^(−2i/H) radians a position.
    """
    half = x_BTNH.shape[-1] // 2
    precision = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    rates_h = base ** (-np.arange(half) / half)
    angles_T1h = position_T[:, None, None].astype(precision) * rates_h.astype(precision)
    cos_T1h, sin_T1h = jnp.cos(angles_T1h), jnp.sin(angles_T1h)
    first, second = jnp.split(x_BTNH.astype(precision), 2, axis=-1)
    turned = [first * cos_T1h - second * sin_T1h, second * cos_T1h + first * sin_T1h]
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
