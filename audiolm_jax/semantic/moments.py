"""Running mean and variance that neither overflow nor cancel (Chan, Golub & LeVeque, 1979).

A dictionary {"count": scalar, "mean": [D], "squares": [D]}, squares being the sum of squared
deviations from the mean. Shape suffixes: M points, D dimensions.
"""

import jax
import jax.numpy as jnp

Moments = dict[str, jax.Array]


def empty(num_dims: int) -> Moments:
    """The moments of no points."""
    return {"count": jnp.zeros(()), "mean": jnp.zeros(num_dims), "squares": jnp.zeros(num_dims)}


def update(moments: Moments, x_MD: jax.Array, mask_M: jax.Array) -> Moments:
    """Adds the points whose mask is True."""
    weights_M1 = mask_M.astype(jnp.float32)[:, None]
    count = jnp.sum(weights_M1)
    mean_D = jnp.sum(x_MD * weights_M1, axis=0) / jnp.maximum(count, 1.0)
    squares_D = jnp.sum(jnp.square(x_MD - mean_D) * weights_M1, axis=0)
    total = moments["count"] + count
    share = count / jnp.maximum(total, 1.0)
    shift_D = mean_D - moments["mean"]
    return {
        "count": total,
        "mean": moments["mean"] + shift_D * share,
        "squares": moments["squares"] + squares_D + jnp.square(shift_D) * moments["count"] * share,
    }


def deviation(moments: Moments) -> jax.Array:
    """Standard deviation [D] of the points; 0 of none."""
    return jnp.sqrt(moments["squares"] / jnp.maximum(moments["count"], 1.0))
