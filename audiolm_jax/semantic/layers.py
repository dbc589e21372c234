"""Stacks of blocks, and the hidden states between them.

Shape suffixes: B batch, T frames, D model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax


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


def slice_blocks(params: Any, start: int, stop: int) -> Any:
    """The parameters of the blocks start … stop − 1 of a stack, which are stacked along the first axis."""
    return jax.tree.map(lambda leaf: leaf[start:stop], params)
