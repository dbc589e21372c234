"""How likely a stage finds sequences of tokens, by the cached pass and with the weights that generation decodes with.

A sequence goes through the layers in blocks over a cache, so that the memory for logits and attention follows the block
and not the length. Rows are padded on the left, as in decoding.

Shape suffixes: B batch, T positions, I blocks, P positions of a block, D model, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax.lm.decode import LanguageModel, forward_cached, init_cache, round_up, size_class
from audiolm_jax.lm.objective import token_losses
from audiolm_jax.lm.stages import BOS
from audiolm_jax.lm.transformer import condition_lengths

BLOCK_POSITIONS = 256
BATCH_POSITIONS = 1 << 14


def next_token_losses(lm: LanguageModel, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Negative log-probability of each token given those before it, among all tokens of the vocabulary, in nats.

    Equal sequences get equal losses, to the last bit; a row depends on the others in rounding alone.

    Args:
      lm: the stage, on its mesh. With `int8` the layers are in 8 bits, the output matrix is not.
      sequences: tokens, BOS first; lengths may differ.

    Returns:
      for each sequence its losses, one fewer than its tokens.
    """
    keys = [np.asarray(tokens, np.int32).tobytes() for tokens in sequences]
    different = sorted((np.frombuffer(key, np.int32) for key in dict.fromkeys(keys)), key=len)
    losses: dict[bytes, np.ndarray] = {}
    for batch in _batches(lm, different):
        found = _batch_losses(lm, batch)
        losses.update((tokens.tobytes(), losses_T) for tokens, losses_T in zip(batch, found, strict=True))
    return [losses[key] for key in keys]


def _batches(lm: LanguageModel, ordered: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Sequences that come by length, so many at a time as have `BATCH_POSITIONS` together, padding included."""
    batch: list[np.ndarray] = []
    for tokens in ordered:
        if batch and lm.batch_class(len(batch) + 1) * _length_class(len(tokens) - 1) > BATCH_POSITIONS:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch


def _length_class(count: int) -> int:
    """The positions for so many: few different numbers, multiples of a block from there on."""
    return max(8, size_class(count)) if count <= BLOCK_POSITIONS else round_up(count, BLOCK_POSITIONS)


def _batch_losses(lm: LanguageModel, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    batch, length = lm.batch_class(len(rows)), _length_class(max(map(len, rows)) - 1)
    inputs_BT, targets_BT = np.full((2, batch, length), BOS, np.int32)
    padding_B = np.zeros(batch, np.int32)
    for row, tokens in enumerate(rows):
        padding_B[row] = length - len(tokens) + 1
        inputs_BT[row, padding_B[row] :], targets_BT[row, padding_B[row] :] = tokens[:-1], tokens[1:]
    arrays = {"inputs_BT": inputs_BT, "targets_BT": targets_BT, "padding_B": padding_B}
    # A condition whose positions see one another must be in the cache as a whole.
    block = length if lm.config.prefix_attention else min(length, BLOCK_POSITIONS)
    losses_BT = np.asarray(_losses(lm.config, block, lm.weights, lm.head, **lm.place(batch, arrays)))
    return [losses_T[padding:] for losses_T, padding in zip(losses_BT[: len(rows)], padding_B)]


@functools.partial(jax.jit, static_argnames=("config", "block"))
def _losses(config, block: int, weights, head_DV, inputs_BT, targets_BT, padding_B) -> jax.Array:
    """Losses [B, T] of the targets, block after block."""
    batch, length = inputs_BT.shape
    prefix_B = condition_lengths(inputs_BT) if config.prefix_attention else None
    in_blocks = lambda tokens_BT: jnp.swapaxes(tokens_BT.reshape(batch, -1, block), 0, 1)

    def step(cache, now):
        slot, inputs_BP, targets_BP = now
        hidden_DBP, cache = forward_cached(config, weights, inputs_BP, padding_B, cache, slot, prefix_B)
        logits_BPV = jnp.einsum("DBP,DV->BPV", hidden_DBP, head_DV, preferred_element_type=config.param_dtype)
        return cache, token_losses(logits_BPV, targets_BP)[0]

    blocks = jnp.arange(0, length, block), in_blocks(inputs_BT), in_blocks(targets_BT)
    _, losses_IBP = jax.lax.scan(step, init_cache(config, batch, length), blocks)
    return jnp.swapaxes(losses_IBP, 0, 1).reshape(batch, length)
