"""Weights that many devices share, as a product needs them."""

import flax.linen as nn
import jax


def gathered(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A weight, whole along the model's width (the logical axis "embed") on every device.

    Left to itself the partitioner keeps the parts where they are and adds up products with one part after the other:
    for a small weight and many positions, several times the traffic to and from memory of the product alone.

    Args:
      weight: in the compute type, in which it is sent.
      axes: its logical axis names.
    """
    return nn.with_logical_constraint(weight, tuple("embed_activation" if axis == "embed" else axis for axis in axes))
