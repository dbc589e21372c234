"""What a trainable is: a value made of pure functions, moved by `training.loop`."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

State = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Totals = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Symptom:
    """What a run shows when it goes wrong.

    Attributes:
      name: of its mark in the metrics, which is 1 while it shows and else 0.
      metrics: the names of those it is read from.
      describe: (moving averages of these metrics, their lowest so far) -> what is wrong, in words; None if nothing is.
    """

    name: str
    metrics: tuple[str, ...]
    describe: Callable[[Mapping[str, float], Mapping[str, float]], str | None]


@dataclasses.dataclass(frozen=True)
class Objective:
    """One training objective (SoundStream, w2v-BERT or a language model).

    A state is a dictionary of pytrees that holds `step` (int32 scalar) and whatever the objective
    updates. Array leaves of the initial state may be boxed in `flax.linen.LogicallyPartitioned`;
    the loop unboxes them and shards them by the names of their axes.

    Attributes:
      init: key -> state. Traced by `jax.eval_shape` first, so it must not look at values.
      step: (state, batch, key) -> (state, metrics). Metrics are scalars; `loss` is among them.
      eval_step: (state, batch, key) -> {name: (total, count)}. The batch has `valid_B` as well: rows
        with a 0 only fill up the last batch and must not count. The mean over a held-out set is the
        sum of totals over the sum of counts; both may be vectors (one entry a quantizer level, say).
      weights: state -> its entries that inference needs, under the same names: what a part's export
        holds and `init_from` starts from.
      warm_start: (state, batches, key) -> state, run once before step 0 on the first batches of the
        training data (codebooks, feature statistics); None where there is nothing to do.
      warm_start_batches: how many batches `warm_start` is given.
      optional_weights: entries of the state that only training needs, and that `init_from` brings along where they
        were saved and fit; else they start afresh.
      symptoms: what the loop watches the metrics for.
    """

    init: Callable[[jax.Array], State]
    step: Callable[[State, Batch, jax.Array], tuple[State, Metrics]]
    eval_step: Callable[[State, Batch, jax.Array], Totals]
    weights: Callable[[State], State]
    warm_start: Callable[[State, Iterable[Batch], jax.Array], State] | None = None
    warm_start_batches: int = 0
    optional_weights: tuple[str, ...] = ()
    symptoms: tuple[Symptom, ...] = ()


def sum_over_blocks(function, block_positions: int, *arrays: jax.Array):
    """Sums a function's values over blocks of positions (the arrays' second axis), elementwise.

    What the function computes of a block on the way, such as logits as wide as the vocabulary, is not kept for the
    backward pass but computed anew. 0 makes it one block and keeps everything.
    """
    if block_positions == 0:
        return function(*arrays)
    function = jax.checkpoint(function)
    starts = range(0, arrays[0].shape[1], block_positions)
    values = [function(*(array[:, start : start + block_positions] for array in arrays)) for start in starts]
    return jax.tree.map(lambda *terms: sum(terms[1:], terms[0]), *values)
