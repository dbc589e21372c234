"""The pointwise functions that configs name."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from audiolm_jax.errors import UserError

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}


def activation_of(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function of that name, one of `ACTIVATIONS`.

    Raises:
      UserError: an unknown name.
    """
    if name not in ACTIVATIONS:
        raise UserError("unknown activation", name, f"use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
