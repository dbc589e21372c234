"""Running mean and variance that neither overflow nor cancel (Chan, Golub & LeVeque, 1979).

A dictionary {"count": scalar, "mean": [D], "squares": [D]}, squares being the sum of squared
deviations from the mean; JAX's arrays, or NumPy's, which are added up in their own precision.
Shape suffixes: M points, D dimensions.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

Moments = dict[str, Any]


def empty(num_dims: int) -> Moments:
    """The moments of no points."""
    return {"count": jnp.zeros(()), "mean": jnp.zeros(num_dims), "squares": jnp.zeros(num_dims)}


def nothing() -> Moments:
    """The moments of no points of any width, to which float64 arrays of NumPy are added in their own precision."""
    return {name: np.zeros(()) for name in ("count", "mean", "squares")}


def update(moments: Moments, x_MD, mask_M) -> Moments:
    """Adds the points whose mask is True."""
    return merge(moments, of(x_MD, mask_M))


def of(x_MD, mask_M) -> Moments:
    """The moments of the points whose mask is True, in two steps: from a rough mean, and from the mean."""
    weights_M1 = mask_M.astype(x_MD.dtype)[:, None]
    count = weights_M1.sum()
    share = 1.0 / (count + (count == 0))
    rough_D = (x_MD * weights_M1).sum(axis=0) * share
    deviations_MD = (x_MD - rough_D) * weights_M1
    shift_D = deviations_MD.sum(axis=0) * share
    squares_D = (deviations_MD**2).sum(axis=0) - count * shift_D**2
    return {"count": count, "mean": rough_D + shift_D, "squares": squares_D * (squares_D > 0)}


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of two sets of points together."""
    total = first["count"] + second["count"]
    share = second["count"] / (total + (total == 0))
    shift_D = second["mean"] - first["mean"]
    return {
        "count": total,
        "mean": first["mean"] + shift_D * share,
        "squares": first["squares"] + second["squares"] + shift_D**2 * (first["count"] * share),
    }


def deviation(moments: Moments):
    """Standard deviation [D] of the points; 0 of none."""
    return (moments["squares"] / (moments["count"] + (moments["count"] == 0))) ** 0.5
