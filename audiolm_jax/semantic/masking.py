"""Which frames are hidden from w2v-BERT, and which it must tell from the true one.

Shape suffixes: B batch, T frames, X distractors.
"""

import jax
import jax.numpy as jnp

from audiolm_jax.semantic.features import length_mask


def span_mask(key: jax.Array, lengths_B: jax.Array, size: int, start_probability: float, span: int) -> jax.Array:
    """Masks spans of frames as wav2vec 2.0 does (arXiv 2006.11477 §3.1).

    Every frame starts a span with `start_probability`; spans may overlap and end with the row. A row in which
    none starts gets one at a random frame, so each row that has a frame has a masked one.

    Returns:
      boolean [B, size], False past each row's length.
    """
    start_key, forced_key = jax.random.split(key)
    exists_BT = length_mask(lengths_B, size)
    starts_BT = jax.random.bernoulli(start_key, start_probability, exists_BT.shape) & exists_BT
    position_B = jnp.floor(jax.random.uniform(forced_key, lengths_B.shape) * lengths_B).astype(jnp.int32)
    forced_BT = jnp.arange(size) == position_B[:, None]
    starts_BT = jnp.where(jnp.any(starts_BT, axis=1, keepdims=True), starts_BT, forced_BT)
    started_BT = jnp.cumsum(starts_BT, axis=1)
    started_before_BT = jnp.pad(started_BT, ((0, 0), (span, 0)))[:, :size]
    return (started_BT > started_before_BT) & exists_BT


def sample_distractors(key: jax.Array, spans_BT: jax.Array, num_distractors: int) -> jax.Array:
    """Draws, for each masked frame, other masked frames of the same row, uniformly and with replacement.

    Returns:
      int32 [B, T, X] frame indices, never the frame's own where the row has two masked frames or
      more; elsewhere, and for frames that are not masked, of no meaning.
    """
    count_B11 = jnp.sum(spans_BT, axis=1)[:, None, None]
    rank_BT = jnp.cumsum(spans_BT, axis=1) - 1
    masked_first_BT = jnp.argsort(~spans_BT, axis=1, stable=True)
    uniform_BTX = jax.random.uniform(key, (*spans_BT.shape, num_distractors))
    choice_BTX = jnp.floor(uniform_BTX * (count_B11 - 1)).astype(jnp.int32)
    # Rounding may carry a product up to the bound itself.
    choice_BTX = jnp.clip(choice_BTX, 0, jnp.maximum(count_B11 - 2, 0))
    choice_BTX += choice_BTX >= rank_BT[..., None]
    choice_BTX = jnp.minimum(choice_BTX, spans_BT.shape[1] - 1)
    return jnp.take_along_axis(masked_first_BT[:, None], choice_BTX, axis=2).astype(jnp.int32)
