"""Attention with T5's relative position bias, in plain XLA: the reference for any faster kernel.

Shape suffixes: B batch, T queries, S keys, N heads, H head width, R buckets.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# By this name attention's output is kept for the backward pass where a checkpointing policy says so.
ATTENTION_OUTPUT = "attention_output"


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


def relative_position_bias(
    table_RN: jax.Array, first_query: jax.Array | int, num_queries: int, num_keys: int, max_distance: int
) -> jax.Array:
    """Bias [1, N, T, S] that is added to the attention logits of these queries over keys at positions 0 … S − 1.

    Looked up once a distance; the rest is copying, so that its gradient is sums, not a scatter over T · S places.

    Args:
      table_RN: learned, buckets x heads, one table for all layers.
      first_query: position of the first query; the others follow it.
      num_queries, num_keys: T and S.
      max_distance: see `relative_position_bucket`.
    """
    num_distances = num_queries + num_keys
    distance = first_query + num_queries - 1 - jnp.arange(num_distances)
    by_distance = table_RN[relative_position_bucket(distance, table_RN.shape[0], max_distance)].T
    # bias[t, s] = by_distance[T − 1 − t + s]: rows of copies, each read one place earlier than the one before.
    copies = jnp.tile(by_distance, (1, num_queries))[:, num_queries - 1 : -1]
    return copies.reshape(1, -1, num_queries, num_distances - 1)[..., :num_keys]


def attend(q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, bias_BNTS: jax.Array | None, mask_BTS: jax.Array):
    """Softmax attention in float32 (or wider); no 1/sqrt(H), which T5 folds into the query's initialisation.

    Args:
      q_BNTH, k_BNSH, v_BNSH: queries, keys, values.
      bias_BNTS: added to the logits; broadcasts over the batch. None adds nothing.
      mask_BTS: True where the query may see the key; broadcasts over the batch.

    Returns:
      [B, N, T, H] in v's type.
    """
    precision = jnp.promote_types(q_BNTH.dtype, jnp.float32)
    logits_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, preferred_element_type=precision)
    if bias_BNTS is not None:
        logits_BNTS = logits_BNTS + bias_BNTS.astype(precision)
    logits_BNTS = jnp.where(mask_BTS[:, None], logits_BNTS, jnp.finfo(precision).min)
    weights_BNTS = jax.nn.softmax(logits_BNTS, axis=-1).astype(v_BNSH.dtype)
    return jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS, v_BNSH)


def causal_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    table_RN: jax.Array | None,
    segment_ids_BT: jax.Array | None,
    prefix_B: jax.Array | None,
    max_distance: int,
    block_positions: int,
) -> jax.Array:
    """`attend` over a whole sequence: every position sees itself and those before it, within its segment.

    In blocks, the logits exist for some queries at a time, and only over the keys that these can see; the backward pass
    computes them anew. So memory grows with T rather than T · T, and half of the products are never made.

    Args:
      q_BTNH, k_BTNH, v_BTNH: queries, keys, values.
      table_RN: of `relative_position_bias`; None adds none.
      segment_ids_BT: where several sequences are packed into a row, which one each position belongs to; or None.
      prefix_B: how many of a row's first positions every position sees, later ones too; None: causal throughout.
      max_distance: of the bias.
      block_positions: queries of a block; 0 takes all at once and keeps their logits for the backward pass.

    Returns:
      [B, T, N, H] in v's type.
    """
    # Heads first, once for all blocks: a head's positions then follow one another in memory.
    q_BNTH, k_BNTH, v_BNTH = (jnp.swapaxes(x_BTNH, 1, 2) for x_BTNH in (q_BTNH, k_BTNH, v_BTNH))
    if block_positions == 0:
        mixed_BNTH = _attend_block(segment_ids_BT, prefix_B, max_distance, 0, q_BNTH, k_BNTH, v_BNTH, table_RN)
    else:
        settings = (max_distance, block_positions)
        mixed_BNTH = _blocked_attention(q_BNTH, k_BNTH, v_BNTH, table_RN, segment_ids_BT, prefix_B, *settings)
    return checkpoint_name(jnp.swapaxes(mixed_BNTH, 1, 2), ATTENTION_OUTPUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _blocked_attention(q_BNTH, k_BNTH, v_BNTH, table_RN, segment_ids_BT, prefix_B, max_distance, block_positions):
    mixed = []
    for start, stop, seen in _blocks(q_BNTH.shape[2], block_positions, prefix_B):
        visible = (k_BNTH[:, :, :seen], v_BNTH[:, :, :seen], table_RN)
        mixed.append(_attend_block(segment_ids_BT, prefix_B, max_distance, start, q_BNTH[:, :, start:stop], *visible))
    return jnp.concatenate(mixed, axis=2)


def _blocks(length: int, block_positions: int, prefix_B: jax.Array | None) -> list[tuple[int, int, int]]:
    """First and last query (exclusive) of each block, and how many keys its queries may see."""
    starts = range(0, length, block_positions)
    stops = [min(start + block_positions, length) for start in starts]
    return [(start, stop, stop if prefix_B is None else length) for start, stop in zip(starts, stops, strict=True)]


def _attend_block(segment_ids_BT, prefix_B, max_distance: int, start: int, q_BNTH, k_BNSH, v_BNSH, table_RN):
    """The queries from position `start` on over the keys from position 0 on."""
    stop, num_keys = start + q_BNTH.shape[2], k_BNSH.shape[2]
    bias_1NTS = None
    if table_RN is not None:
        bias_1NTS = relative_position_bias(table_RN, start, stop - start, num_keys, max_distance)
    mask_BTS = (jnp.arange(start, stop)[:, None] >= jnp.arange(num_keys))[None]
    if prefix_B is not None:
        mask_BTS = mask_BTS | (jnp.arange(num_keys) < prefix_B[:, None, None])
    if segment_ids_BT is not None:
        mask_BTS = mask_BTS & (segment_ids_BT[:, start:stop, None] == segment_ids_BT[:, None, :num_keys])
    return attend(q_BNTH, k_BNSH, v_BNSH, bias_1NTS, mask_BTS)


def _blocked_attention_forward(q_BNTH, k_BNTH, v_BNTH, table_RN, segment_ids_BT, prefix_B, *settings):
    mixed_BNTH = _blocked_attention(q_BNTH, k_BNTH, v_BNTH, table_RN, segment_ids_BT, prefix_B, *settings)
    return mixed_BNTH, (q_BNTH, k_BNTH, v_BNTH, table_RN, segment_ids_BT, prefix_B)


def _blocked_attention_backward(max_distance, block_positions, saved, grad_BNTH):
    q_BNTH, k_BNTH, v_BNTH, table_RN, segment_ids_BT, prefix_B = saved
    # Keys and values get their gradient from every block of queries that sees them.
    wide = jnp.promote_types(k_BNTH.dtype, jnp.float32)
    k_grad_BNTH, v_grad_BNTH = jnp.zeros(k_BNTH.shape, wide), jnp.zeros(v_BNTH.shape, wide)
    table_grad_RN = jax.tree.map(jnp.zeros_like, table_RN)
    q_grads = []
    for start, stop, seen in _blocks(q_BNTH.shape[2], block_positions, prefix_B):
        block = functools.partial(_attend_block, segment_ids_BT, prefix_B, max_distance, start)
        _, pull_back = jax.vjp(block, q_BNTH[:, :, start:stop], k_BNTH[:, :, :seen], v_BNTH[:, :, :seen], table_RN)
        q_grad_BNTH, k_share_BNSH, v_share_BNSH, table_share_RN = pull_back(grad_BNTH[:, :, start:stop])
        q_grads.append(q_grad_BNTH)
        k_grad_BNTH = _add_to_the_first(k_grad_BNTH, k_share_BNSH)
        v_grad_BNTH = _add_to_the_first(v_grad_BNTH, v_share_BNSH)
        table_grad_RN = jax.tree.map(jnp.add, table_grad_RN, table_share_RN)
    q_grad_BNTH = jnp.concatenate(q_grads, axis=2)
    return q_grad_BNTH, k_grad_BNTH.astype(k_BNTH.dtype), v_grad_BNTH.astype(v_BNTH.dtype), table_grad_RN, None, None


def _add_to_the_first(total_BNTH: jax.Array, share_BNSH: jax.Array) -> jax.Array:
    """Adds to the first S positions. Of the scatter that `.at[].add` makes, jax 0.11's partitioner crashes."""
    first_BNSH = total_BNTH[:, :, : share_BNSH.shape[2]] + share_BNSH
    return jax.lax.dynamic_update_slice_in_dim(total_BNTH, first_BNSH, 0, axis=2)


_blocked_attention.defvjp(_blocked_attention_forward, _blocked_attention_backward)
