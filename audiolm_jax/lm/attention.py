"""Attention with T5's relative position bias or rotary positions, in plain XLA: the reference for any faster kernel.

Shape suffixes: B batch, T queries, S keys, N heads, H head width.
"""

import jax
import jax.numpy as jnp
import numpy as np


def relative_position_bucket(distance: jax.Array, num_buckets: int, max_distance: int) -> jax.Array:
    """T5's causal bucket of the distance query − key (Raffel et al., 2020, §2.1).

    The first half of the buckets holds one distance each, the second half grows logarithmically up
    to `max_distance`, beyond which all share the last. Distances below 0 (the future) fall in bucket 0.

    Returns:
      int32 array of `distance`'s shape.
    """
    distance = jnp.maximum(distance, 0)
    num_exact = num_buckets // 2
    ratio = jnp.maximum(distance, 1).astype(jnp.float32) / num_exact
    scale = (num_buckets - num_exact) / np.log(max_distance / num_exact)
    logarithmic = num_exact + (jnp.log(ratio) * scale).astype(jnp.int32)
    return jnp.where(distance < num_exact, distance, jnp.minimum(logarithmic, num_buckets - 1)).astype(jnp.int32)


def relative_position_bias(table_RN: jax.Array, query_T: jax.Array, key_S: jax.Array, max_distance: int) -> jax.Array:
    """Bias [1, N, T, S] that is added to the attention logits of queries and keys at these positions.

    Args:
      table_RN: learned, buckets x heads, one table for all layers.
      query_T, key_S: positions.
      max_distance: see `relative_position_bucket`.
    """
    buckets_TS = relative_position_bucket(query_T[:, None] - key_S[None, :], table_RN.shape[0], max_distance)
    return jnp.transpose(table_RN[buckets_TS], (2, 0, 1))[None]


def rotate(x_BTNH: jax.Array, position_T: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864): dimensions i and i + H/2 of each head turn together.

    Products of rotated queries and keys depend on the distance of their positions alone.

    Args:
      x_BTNH: queries or keys; H even.
      position_T: their positions.
      base: pair i turns by base^(−2i/H) radians a position.
    """
    half = x_BTNH.shape[-1] // 2
    precision = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    rates_h = base ** (-np.arange(half) / half)
    angles_T1h = position_T[:, None, None].astype(precision) * rates_h.astype(precision)
    cos_T1h, sin_T1h = jnp.cos(angles_T1h), jnp.sin(angles_T1h)
    first, second = jnp.split(x_BTNH.astype(precision), 2, axis=-1)
    turned = [first * cos_T1h - second * sin_T1h, second * cos_T1h + first * sin_T1h]
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def attend(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, bias_BNTS: jax.Array | None, mask_BTS: jax.Array):
    """Softmax attention in float32 (or wider); no 1/sqrt(H), which T5 folds into the query's initialisation.

    Args:
      q_BTNH, k_BSNH, v_BSNH: queries, keys, values.
      bias_BNTS: added to the logits; broadcasts over the batch. None adds nothing.
      mask_BTS: True where the query may see the key; broadcasts over the batch.

    Returns:
      [B, T, N, H] in v's type.
    """
    precision = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    logits_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=precision)
    if bias_BNTS is not None:
        logits_BNTS = logits_BNTS + bias_BNTS.astype(precision)
    logits_BNTS = jnp.where(mask_BTS[:, None], logits_BNTS, jnp.finfo(precision).min)
    weights_BNTS = jax.nn.softmax(logits_BNTS, axis=-1).astype(v_BSNH.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)
