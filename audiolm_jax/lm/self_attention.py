"""Which implementation of attention runs where, and that each device attends for its own rows and heads.

Shape suffixes: B batch, T positions, N heads, H head width, R buckets.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from audiolm_jax.lm.attention import ATTENTION_OUTPUT, causal_attention, relative_position_bias
from audiolm_jax.lm.flash_attention import flash_attention

IMPLEMENTATIONS = ("fused", "xla")


def self_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    table_RN: jax.Array | None,
    segment_ids_BT: jax.Array | None,
    prefix_B: jax.Array | None,
    max_distance: int,
    block_positions: int,
    implementation: str,
) -> jax.Array:
    """`attention.causal_attention`, on a mesh by each device for its own rows and heads.

    Left to the partitioner, the gradient of the bias would be summed over the batch — so over devices — before it is
    summed over distances: T · S numbers a head on the network instead of one a bucket.

    Args:
      q_BTNH, k_BTNH, v_BTNH, table_RN, segment_ids_BT, prefix_B, max_distance: see `attention.causal_attention`.
      block_positions: the same, where XLA attends.
      implementation: "fused": on a TPU `flash_attention`, on an NVIDIA GPU cuDNN where it can, elsewhere XLA. "xla".

    Returns:
      [B, T, N, H] in v's type.
    """
    attend = functools.partial(causal_attention, max_distance=max_distance, block_positions=block_positions)
    if implementation == "fused":
        device = _device_kind()
        if "TPU" in device:
            attend = functools.partial(flash_attention, max_distance=max_distance)
        elif "NVIDIA" in device and _cudnn_can(q_BTNH, segment_ids_BT, prefix_B):
            attend = functools.partial(_cudnn_attention, max_distance=max_distance)
    if jax.sharding.get_abstract_mesh().empty:
        return attend(q_BTNH, k_BTNH, v_BTNH, table_RN, segment_ids_BT, prefix_B)
    heads = nn.logical_to_mesh_axes(("batch", "length", "heads", "kv"))
    table = None if table_RN is None else nn.logical_to_mesh_axes(("buckets", "heads"))
    segments = None if segment_ids_BT is None else PartitionSpec(*heads[:2])
    prefix = None if prefix_B is None else PartitionSpec(heads[0])

    def local(q_BTNH, k_BTNH, v_BTNH, table_RN, segment_ids_BT, prefix_B):
        if table_RN is not None:
            # A copy for every share of the batch: it is the copies' gradients, of a few buckets, that are summed.
            table_RN = jax.lax.pcast(table_RN, heads[0], to="varying")
        return attend(q_BTNH, k_BTNH, v_BTNH, table_RN, segment_ids_BT, prefix_B)

    return jax.shard_map(local, in_specs=(heads, heads, heads, table, segments, prefix), out_specs=heads)(
        q_BTNH, k_BTNH, v_BTNH, table_RN, segment_ids_BT, prefix_B
    )


def _device_kind() -> str:
    """Of the mesh in use, whose devices may be described only, or of the devices there are."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return (described or jax.devices()[0]).device_kind


def _cudnn_can(q_BTNH: jax.Array, segment_ids_BT: jax.Array | None, prefix_B: jax.Array | None) -> bool:
    """Whether cuDNN's kernel takes these: 16 bits, heads of at most 128 in steps of 8, rows causal throughout."""
    width = q_BTNH.shape[-1]
    narrow = q_BTNH.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
    return narrow and segment_ids_BT is None and prefix_B is None


def _cudnn_attention(q_BTNH, k_BTNH, v_BTNH, table_RN, segment_ids_BT, prefix_B, max_distance: int) -> jax.Array:
    """cuDNN's flash attention; its bias is an array [1, N, T, T], whose gradient it sums over the batch."""
    assert segment_ids_BT is None and prefix_B is None
    length = q_BTNH.shape[1]
    # A bias must be of even length; no position sees one that is added at the end.
    if length % 2:
        q_BTNH, k_BTNH, v_BTNH = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q_BTNH, k_BTNH, v_BTNH))
    bias_1NTS = None
    if table_RN is not None:
        even = q_BTNH.shape[1]
        bias_1NTS = relative_position_bias(table_RN, 0, even, even, max_distance).astype(q_BTNH.dtype)
    mixed_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BTNH, v_BTNH, bias_1NTS, scale=1.0, is_causal=True, implementation="cudnn"
    )
    return checkpoint_name(mixed_BTNH[:, :length], ATTENTION_OUTPUT)
