"""Hidden states of a row of blocks, from one pass that ends with the last of those wanted.

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
        raise UserError(what, "config.model", "change num_heads or embed_dim")


def states_between(
    run: Callable[[jax.Array, int, int], jax.Array], x_BTD: jax.Array, layers: Sequence[int]
) -> tuple[jax.Array, ...]:
    """Hidden states [B, T, D] of each of `layers`; layer n is the output of block n, 0 the input of the first.

    Args:
      run: (x, first, last) -> output of block `last`, x being that of block `first`.
      x_BTD: input of the first block.
      layers: in any order.
    """
    found, done = {0: x_BTD}, 0
    for layer in sorted({*layers} - {0}):
        x_BTD = run(x_BTD, done, layer)
        found[layer] = x_BTD
        done = layer
    return tuple(found[layer] for layer in layers)


def hidden_states(
    block: nn.Module, params: Mapping[str, Any], x_BTD: jax.Array, inputs: tuple[Any, ...], layers: Sequence[int]
) -> tuple[jax.Array, ...]:
    """Hidden states of blocks that are alike, compiled as one; see `states_between`.

    Args:
      block: (x, *inputs) -> x.
      params: its parameters, those of all blocks stacked along the first axis.
      x_BTD: input of the first block.
      inputs: what every block gets besides.
      layers: in any order.
    """

    def one(layer, x_BTD):
        # Of the weights, no more than one block's is ever copied.
        return block.apply({"params": jax.tree.map(lambda leaf_L: leaf_L[layer], params)}, x_BTD, *inputs)

    return states_between(lambda x_BTD, first, last: jax.lax.fori_loop(first, last, one, x_BTD), x_BTD, layers)
