"""Pointwise functions, by the names that configs give them."""

import functools

import flax.linen as nn

from audiolm_jax.errors import UserError

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}


def check_activation(name: str):
    """Raises a UserError where there is no such function."""
    if name not in ACTIVATIONS:
        where = f"config.model.activation={name}"
        raise UserError("unknown activation", where, f"use one of {', '.join(ACTIVATIONS)}")
