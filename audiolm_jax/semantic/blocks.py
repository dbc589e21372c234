"""Stacks of blocks, and the hidden states between them.

Shape suffixes: B batch, T frames, D model, L layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from audiolm_jax.errors import UserError


def check_heads(embed_dim: int, num_heads: int):
    """Raises a UserError where heads cannot share a width out."""
    if num_heads < 1 or embed_dim % num_heads:
        what = f"width {embed_dim} cannot be shared out to {num_heads} heads"
        raise UserError(what, f"config.model.num_heads={num_heads}", "choose a number that divides embed_dim")


def states_between(
    x_BTD: jax.Array, layers: Sequence[int], run: Callable[[jax.Array, int, int], jax.Array]
) -> tuple[jax.Array, ...]:
    """Hidden states of some layers, from one pass that ends with the last of them.

    Args:
      x_BTD: the input of the first block, which is layer 0.
      layers: which to return, in any order.
      run: (x_BTD, start, stop) -> what the blocks start, start + 1 … stop − 1 make of it; it is layer `stop`.
    """
    found, done = {0: x_BTD}, 0
    for layer in sorted({*layers} - {0}):
        found[layer] = x_BTD = run(x_BTD, done, layer)
        done = layer
    return tuple(found[layer] for layer in layers)


def hidden_states(
    block: nn.Module, params: Mapping[str, Any], x_BTD: jax.Array, inputs: tuple[Any, ...], layers: Sequence[int]
) -> tuple[jax.Array, ...]:
    """`states_between` of blocks that are alike, compiled as one.

    Args:
      block: (x, *inputs) -> x.
      params: its parameters, those of all blocks stacked along the first axis.
      x_BTD: input of the first block.
      inputs: what every block gets besides.
      layers: 0 is the input, n the output of the n-th block.

    Returns:
      [B, T, D] each.
    """

    def one(layer: jax.Array, x_BTD: jax.Array) -> jax.Array:
        # Of the weights, no more than one block's is ever copied.
        return block.apply({"params": jax.tree.map(lambda leaf_L: leaf_L[layer], params)}, x_BTD, *inputs)

    return states_between(x_BTD, layers, lambda x_BTD, start, stop: jax.lax.fori_loop(start, stop, one, x_BTD))
