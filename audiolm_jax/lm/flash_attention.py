"""Fused attention for TPUs, T5's relative position bias inside: no array of the size of queries times keys in memory.

A Pallas kernel after FlashAttention (arXiv 2205.14135). What differs:

- The bias depends on distances only, and from `max_distance` on it is one number, which softmax does not feel when it
  is taken from all. So a tile of logits has a bias only near the diagonal, where it is one row of 2 · block numbers,
  skewed; and the gradient of the bias table is the tile's gradient skewed back and summed, for the same few tiles.
- Tiles are [keys, queries]: maxima and sums over keys are rows, as they are kept in memory.
- The backward pass is one kernel; the queries' gradient of a whole sequence stays on the chip meanwhile.
- Heads narrower than 128, a vector register's width, are processed in groups as wide; a head's queries are its group's
  with the other heads' numbers set to 0, so that products need no slices.

Shape suffixes: B batch, T positions, N heads, H head width, D heads times width, G groups of heads, R buckets,
X positions of a block, K keys and Q queries of a tile, W numbers of a row of bias (2 · block), O block offsets.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from audiolm_jax.lm.attention import ATTENTION_OUTPUT, relative_position_bucket

LANES = 128
# Added to nothing and subtracted from nothing but itself: the running maximum of a query that has seen no key yet.
LOWEST = -1e30


def flash_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    table_RN: jax.Array | None,
    segment_ids_BT: jax.Array | None,
    prefix_B: jax.Array | None,
    max_distance: int,
    block: int = 512,
    interpret: bool = False,
) -> jax.Array:
    """`attention.causal_attention` in one kernel, differentiable in q, k, v and the bias table.

    The backward pass holds a group's gradient of all queries on the chip: 8192 positions fit every TPU from v4 on.

    Args:
      q_BTNH, k_BTNH, v_BTNH, table_RN, segment_ids_BT, prefix_B, max_distance: see `attention.causal_attention`.
      block: positions of a tile's queries and of its keys, a power of 2; on a TPU a multiple of 128.
      interpret: run by XLA on any device, tile by tile: slow, to check the kernel.

    Returns:
      [B, T, N, H] in v's type.
    """
    batch, length, num_heads, width = q_BTNH.shape
    bias_NOW = None if table_RN is None else _bias_rows(table_RN, max_distance, block)
    group = _heads_of_a_group(num_heads, width)
    settings = _Settings(length, width, group, block, bias_NOW is None, max_distance, prefix_B is not None, interpret)
    prefix_B = jnp.zeros(batch, jnp.int32) if prefix_B is None else prefix_B.astype(jnp.int32)
    inputs = _varying_alike(q_BTNH, (bias_NOW, segment_ids_BT, prefix_B))
    flat = lambda x_BTNH: x_BTNH.reshape(batch, length, num_heads * width)
    out_BTD = _attention(settings, flat(q_BTNH), flat(k_BTNH), flat(v_BTNH), *inputs)
    return out_BTD.reshape(q_BTNH.shape)


def _heads_of_a_group(num_heads: int, width: int) -> int:
    group = max(1, LANES // width)
    return group if num_heads % group == 0 and width * group % LANES == 0 else num_heads


def _varying_alike(x: jax.Array, tree: Any) -> Any:
    """Inside `shard_map`, a kernel's inputs vary over the same mesh axes: copies where they do not vary as `x` does."""

    def alike(leaf: jax.Array) -> jax.Array:
        missing = tuple(_manual_axes(x).varying - _manual_axes(leaf).varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(alike, tree)


def _manual_axes(x: jax.Array):
    return jax.typeof(x).manual_axis_type


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the kernels are made for.

    Attributes:
      length: T.
      width: H.
      group: heads of a group.
      block: positions of a tile's sides.
      unbiased: no bias is added.
      max_distance: from here on the bias is one number.
      has_prefix: some positions see later ones.
      interpret: see `flash_attention`.
    """

    length: int
    width: int
    group: int
    block: int
    unbiased: bool
    max_distance: int
    has_prefix: bool
    interpret: bool

    @property
    def num_blocks(self) -> int:
        return pl.cdiv(self.length, self.block)

    @property
    def num_near(self) -> int:
        """Block offsets, queries' less keys', from 0 up to which a tile has a bias or is cut by the diagonal."""
        return 1 if self.unbiased else _num_near(self.max_distance, self.block)

    @property
    def ragged(self) -> bool:
        return self.length % self.block != 0


def _num_near(max_distance: int, block: int) -> int:
    return pl.cdiv(max_distance + block - 1, block)


def _bias_rows(table_RN: jax.Array, max_distance: int, block: int) -> jax.Array:
    """The bias by distance, less that of far keys, for every block offset that has any: [N, O, W].

    Row 0 is for later keys, row 1 + o for tiles o blocks below the diagonal. Number x of a row is for the distance
    o · block + x, or, from x = block on, o · block + x − W.
    """
    x_W = np.arange(2 * block)
    offset_O1 = np.arange(_num_near(max_distance, block))[:, None] * block
    distance_OW = np.concatenate([np.full((1, 2 * block), -1), offset_O1 + np.where(x_W < block, x_W, x_W - 2 * block)])
    bucket_OW = relative_position_bucket(jnp.asarray(distance_OW), table_RN.shape[0], max_distance)
    return jnp.moveaxis((table_RN - table_RN[-1])[bucket_OW], -1, 0)


def _skewed(row_1W: jax.Array, rows: int) -> jax.Array:
    """Row i is `row` moved i places to the right, around the end: [rows, W]."""
    while len(row_1W) < rows:
        row_1W = jnp.concatenate([row_1W, _moved(row_1W, len(row_1W))])
    return row_1W


def _unskewed_sum(x_KW: jax.Array) -> jax.Array:
    """The transpose of `_skewed`: the sum of all rows, row i moved i places to the left."""
    while len(x_KW) > 1:
        half = len(x_KW) // 2
        x_KW = x_KW[:half] + _moved(x_KW[half:], x_KW.shape[1] - half)
    return x_KW


def _moved(x_KW: jax.Array, places: int) -> jax.Array:
    return pltpu.roll(x_KW, places, 1)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One tile inside a kernel.

    Attributes:
      settings: of the kernel.
      near: whether it may be cut by the diagonal and has a bias.
      query_block, key_block: which blocks it is of.
      prefix: positions that all see.
    """

    settings: _Settings
    near: bool
    query_block: Any
    key_block: Any
    prefix: Any

    @property
    def bias_row(self):
        return jnp.clip(self.query_block - self.key_block, -1, self.settings.num_near - 1) + 1

    def load(self, ref, block) -> jax.Array:
        """[X, D of a group], zero beyond the sequence's end, where memory holds anything."""
        x_XD = ref[0]
        if not self.settings.ragged:
            return x_XD
        position_X1 = block * self.settings.block + jax.lax.broadcasted_iota(jnp.int32, (len(x_XD), 1), 0)
        return jnp.where(position_X1 < self.settings.length, x_XD, jnp.zeros_like(x_XD))

    def seen(self, query_segments_ref, key_segments_ref) -> jax.Array | None:
        """Whether keys are seen by queries, [K, Q]; None where all are."""
        block, conditions = self.settings.block, []
        query_KQ = self.query_block * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), 1)
        if self.near:
            key_KQ = self.key_block * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), 0)
            earlier_KQ = key_KQ <= query_KQ
            conditions.append(earlier_KQ | (key_KQ < self.prefix) if self.settings.has_prefix else earlier_KQ)
        if self.settings.ragged:
            conditions.append(query_KQ < self.settings.length)
        if query_segments_ref is not None:
            conditions.append(key_segments_ref[0] == query_segments_ref[0])
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    def logits(self, head: int, q_QD, k_KD, bias_ref, seen_KQ) -> jax.Array:
        """Of one head, its queries alone being not 0: [K, Q]."""
        logits_KQ = _product(k_KD, q_QD, (1, 1))
        if self.near and bias_ref is not None:
            row_1W = bias_ref[0, head, pl.ds(self.bias_row, 1)]
            logits_KQ += _skewed(row_1W, self.settings.block)[:, : self.settings.block]
        return logits_KQ if seen_KQ is None else jnp.where(seen_KQ, logits_KQ, LOWEST)

    def of_head(self, x_XD: jax.Array, head: int) -> jax.Array:
        """A group's queries, keys, … with the other heads' numbers set to 0."""
        if self.settings.group == 1:
            return x_XD
        column_XD, first = jax.lax.broadcasted_iota(jnp.int32, x_XD.shape, 1), head * self.settings.width
        own_XD = (column_XD >= first) & (column_XD < first + self.settings.width)
        return jnp.where(own_XD, x_XD, jnp.zeros_like(x_XD))


def _product(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Summed over one axis of each, in float32 or wider."""
    precision = jnp.promote_types(left.dtype, jnp.float32)
    return jax.lax.dot_general(left, right, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=precision)


def _for_each_kind_of_tile(settings: _Settings, query_block, key_block, prefix, process):
    """Calls `process` with the tile, unless none of its keys is seen."""
    offset = query_block - key_block
    needed = offset >= 0
    if settings.has_prefix:
        needed |= key_block * settings.block < prefix

    def of_kind(near: bool):
        process(_Tile(settings, near, query_block, key_block, prefix))

    pl.when(needed & (offset < settings.num_near))(functools.partial(of_kind, True))
    if settings.num_near < settings.num_blocks:
        pl.when(offset >= settings.num_near)(functools.partial(of_kind, False))


def _forward_kernel(
    settings: _Settings, prefix_ref, q_ref, k_ref, v_ref, bias_ref, query_segments_ref, key_segments_ref,
    out_ref, log_sum_ref, max_ref, sum_ref, mixed_ref,
):  # fmt: skip
    """One tile of the forward pass; the tiles of a block of queries come one after the other."""
    query_block, key_block = pl.program_id(2), pl.program_id(3)

    @pl.when(key_block == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, LOWEST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        mixed_ref[...] = jnp.zeros_like(mixed_ref)

    def process(tile: _Tile):
        q_QD = tile.load(q_ref, query_block)
        k_KD, v_KD = tile.load(k_ref, key_block), tile.load(v_ref, key_block)
        seen_KQ = tile.seen(query_segments_ref, key_segments_ref)
        for head in range(settings.group):
            logits_KQ = tile.logits(head, tile.of_head(q_QD, head), k_KD, bias_ref, seen_KQ)
            row, own = pl.ds(head, 1), pl.ds(head * settings.width, settings.width)
            max_1Q = jnp.maximum(max_ref[row], jnp.max(logits_KQ, axis=0, keepdims=True))
            weights_KQ = jnp.exp(logits_KQ - max_1Q)
            if seen_KQ is not None:
                weights_KQ = jnp.where(seen_KQ, weights_KQ, 0)
            scale_1Q = jnp.exp(max_ref[row] - max_1Q)
            max_ref[row] = max_1Q
            sum_ref[row] = sum_ref[row] * scale_1Q + jnp.sum(weights_KQ, axis=0, keepdims=True)
            mixed_DQ = _product(v_KD, weights_KQ.astype(v_KD.dtype), (0, 0))
            own_HQ = mixed_DQ[head * settings.width : (head + 1) * settings.width]
            mixed_ref[own] = mixed_ref[own] * scale_1Q + own_HQ

    _for_each_kind_of_tile(settings, query_block, key_block, prefix_ref[pl.program_id(0)], process)

    @pl.when(key_block == settings.num_blocks - 1)
    def _():
        for head in range(settings.group):
            own = pl.ds(head * settings.width, settings.width)
            mixed_ref[own] = mixed_ref[own] / sum_ref[pl.ds(head, 1)]
        out_ref[0] = mixed_ref[...].T.astype(out_ref.dtype)
        log_sum_ref[0, 0] = max_ref[...] + jnp.log(sum_ref[...])


def _backward_kernel(
    settings: _Settings, prefix_ref, q_ref, k_ref, v_ref, bias_ref, query_segments_ref, key_segments_ref,
    grad_ref, log_sum_ref, shared_ref,
    q_grad_ref, k_grad_ref, v_grad_ref, bias_grad_ref,
    q_sum_ref, k_sum_ref, v_sum_ref,
):  # fmt: skip
    """One tile of the backward pass; the tiles of a block of keys come one after the other."""
    key_block, query_block = pl.program_id(2), pl.program_id(3)
    first_query, last_query = query_block == 0, query_block == settings.num_blocks - 1

    @pl.when(first_query & (key_block == 0))
    def _():
        q_sum_ref[...] = jnp.zeros_like(q_sum_ref)
        if bias_grad_ref is not None:
            bias_grad_ref[...] = jnp.zeros_like(bias_grad_ref)

    @pl.when(first_query)
    def _():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    def process(tile: _Tile):
        q_QD, grad_QD = tile.load(q_ref, query_block), tile.load(grad_ref, query_block)
        k_KD, v_KD = tile.load(k_ref, key_block), tile.load(v_ref, key_block)
        seen_KQ = tile.seen(query_segments_ref, key_segments_ref)
        queries = pl.ds(query_block * settings.block, settings.block)
        for head in range(settings.group):
            own_q_QD, own_grad_QD = tile.of_head(q_QD, head), tile.of_head(grad_QD, head)
            logits_KQ = tile.logits(head, own_q_QD, k_KD, bias_ref, seen_KQ)
            weights_KQ = jnp.exp(logits_KQ - log_sum_ref[0, 0, pl.ds(head, 1)])
            slope_KQ = weights_KQ * (_product(v_KD, own_grad_QD, (1, 1)) - shared_ref[0, 0, pl.ds(head, 1)])
            if seen_KQ is not None:
                weights_KQ, slope_KQ = jnp.where(seen_KQ, weights_KQ, 0), jnp.where(seen_KQ, slope_KQ, 0)
            v_sum_ref[...] += _product(weights_KQ.astype(grad_QD.dtype), own_grad_QD, (1, 0))
            narrow_KQ = slope_KQ.astype(q_QD.dtype)
            k_sum_ref[...] += _product(narrow_KQ, own_q_QD, (1, 0))
            q_sum_ref[queries] += _product(narrow_KQ, tile.of_head(k_KD, head), (0, 0))
            if tile.near and bias_grad_ref is not None:
                slope_KW = jnp.concatenate([slope_KQ, jnp.zeros_like(slope_KQ)], axis=1)
                bias_grad_ref[0, 0, head, pl.ds(tile.bias_row, 1)] += _unskewed_sum(slope_KW)

    _for_each_kind_of_tile(settings, query_block, key_block, prefix_ref[pl.program_id(0)], process)

    @pl.when(last_query)
    def _():
        k_grad_ref[0] = k_sum_ref[...].astype(k_grad_ref.dtype)
        v_grad_ref[0] = v_sum_ref[...].astype(v_grad_ref.dtype)

    @pl.when(last_query & (key_block == settings.num_blocks - 1))
    def _():
        q_grad_ref[0] = q_sum_ref[: settings.length].astype(q_grad_ref.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings: _Settings, q_BTD, k_BTD, v_BTD, bias_NOW, segment_ids_BT, prefix_B):
    return _forward(settings, q_BTD, k_BTD, v_BTD, bias_NOW, segment_ids_BT, prefix_B)[0]


def _attention_forward(settings: _Settings, *inputs):
    out_BTD, log_sum_BGNT = _forward(settings, *inputs)
    # Kept where a policy keeps attention's output: the backward pass then needs no second forward pass.
    out_BTD, log_sum_BGNT = (checkpoint_name(array, ATTENTION_OUTPUT) for array in (out_BTD, log_sum_BGNT))
    return out_BTD, (*inputs, out_BTD, log_sum_BGNT)


def _attention_backward(settings: _Settings, saved, grad_BTD):
    *inputs, out_BTD, log_sum_BGNT = saved
    wide = log_sum_BGNT.dtype
    # What the weights of one query share of their gradient: Σ_key weight · d weight = Σ output · d output.
    by_head_BTGNH = (out_BTD.astype(wide) * grad_BTD.astype(wide)).reshape(
        *out_BTD.shape[:2], *log_sum_BGNT.shape[1:3], settings.width
    )
    shared_BGNT = jnp.moveaxis(jnp.sum(by_head_BTGNH, axis=-1), 1, -1)
    gradients = _backward(settings, *inputs, grad_BTD, log_sum_BGNT, shared_BGNT)
    return *gradients, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(settings: _Settings, q_BTD, k_BTD, v_BTD, bias_NOW, segment_ids_BT, prefix_B):
    """Outputs [B, T, D], and the logarithms of the softmax's sums [B, G, heads of a group, T]."""
    wide = jnp.promote_types(q_BTD.dtype, jnp.float32)
    batch, length, size = q_BTD.shape
    group, block, columns = settings.group, settings.block, settings.group * settings.width
    like_q = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=_manual_axes(q_BTD))
    specs = _InputSpecs(settings, "queries")
    log_sum_shape = (batch, size // columns, group, length)
    return _call(
        settings,
        _forward_kernel,
        inputs=(q_BTD, k_BTD, v_BTD, *_shared_inputs(settings, bias_NOW, segment_ids_BT)),
        in_specs=(specs.queries, specs.keys, specs.keys, *specs.shared(bias_NOW, segment_ids_BT)),
        prefix_B=prefix_B,
        out_shape=(
            like_q(v_BTD.shape, v_BTD.dtype),
            like_q(log_sum_shape, wide),
        ),
        out_specs=(specs.queries, specs.of_queries),
        scratch=[(group, block), (group, block), (columns, block)],
        products=2,
    )


def _backward(settings: _Settings, q_BTD, k_BTD, v_BTD, bias_NOW, segment_ids_BT, prefix_B, grad_BTD, *rows_BGNT):
    """Gradients of q, k, v and of the bias rows."""
    batch, length, size = q_BTD.shape
    group, block, columns = settings.group, settings.block, settings.group * settings.width
    like_q = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=_manual_axes(q_BTD))
    specs = _InputSpecs(settings, "keys")
    whole = pl.BlockSpec((1, length, columns), lambda b, g, k, q, prefix: (b, 0, g))
    bias_shape, bias_spec = None, None
    if bias_NOW is not None:
        by_group = (size // columns, group, *bias_NOW.shape[1:])
        bias_shape = like_q((batch, *by_group), bias_NOW.dtype)
        bias_spec = pl.BlockSpec((1, 1, *by_group[1:]), lambda b, g, k, q, prefix: (b, g, 0, 0, 0))
    q_grad, k_grad, v_grad, bias_grad = _call(
        settings,
        _backward_kernel,
        inputs=(q_BTD, k_BTD, v_BTD, *_shared_inputs(settings, bias_NOW, segment_ids_BT), grad_BTD, *rows_BGNT),
        in_specs=(
            specs.queries, specs.keys, specs.keys, *specs.shared(bias_NOW, segment_ids_BT),
            specs.queries, specs.of_queries, specs.of_queries,
        ),
        prefix_B=prefix_B,
        out_shape=(
            *[like_q(x_BTD.shape, x_BTD.dtype) for x_BTD in (q_BTD, k_BTD, v_BTD)],
            bias_shape,
        ),
        out_specs=(whole, specs.keys, specs.keys, bias_spec),
        scratch=[(settings.num_blocks * block, columns), (block, columns), (block, columns)],
        products=5,
    )  # fmt: skip
    if bias_NOW is not None:
        bias_grad = jnp.sum(bias_grad, axis=0).reshape(bias_NOW.shape)
    return q_grad, k_grad, v_grad, bias_grad


def _shared_inputs(settings: _Settings, bias_NOW, segment_ids_BT):
    """Bias by groups of heads, segments as rows and as columns."""
    if bias_NOW is not None:
        bias_NOW = bias_NOW.reshape(-1, settings.group, *bias_NOW.shape[1:])
    if segment_ids_BT is None:
        return bias_NOW, None, None
    segment_ids_BT = segment_ids_BT.astype(jnp.int32)
    return bias_NOW, segment_ids_BT[:, None], segment_ids_BT[..., None]


class _InputSpecs:
    """Which blocks of the inputs a tile needs.

    The grid is batch, group of heads, and blocks of queries and of keys, the `outer` before the other. Where a tile is
    not needed, its inner block is the nearest one that is: what is there already is not fetched again.
    """

    def __init__(self, settings: _Settings, outer: str):
        self._settings, self._outer = settings, outer
        block, columns = settings.block, settings.group * settings.width
        self.queries = pl.BlockSpec((1, block, columns), self._index(lambda b, g, q, k: (b, q, g)))
        self.keys = pl.BlockSpec((1, block, columns), self._index(lambda b, g, q, k: (b, k, g)))
        self.of_queries = pl.BlockSpec((1, 1, settings.group, block), self._index(lambda b, g, q, k: (b, g, 0, q)))

    def shared(self, bias_NOW, segment_ids_BT) -> tuple[pl.BlockSpec | None, ...]:
        """Of `_shared_inputs`."""
        block, bias = self._settings.block, None
        if bias_NOW is not None:
            shape = (1, self._settings.group, *bias_NOW.shape[1:])
            bias = pl.BlockSpec(shape, self._index(lambda b, g, q, k: (g, 0, 0, 0)))
        if segment_ids_BT is None:
            return bias, None, None
        queries = pl.BlockSpec((1, 1, block), self._index(lambda b, g, q, k: (b, 0, q)))
        keys = pl.BlockSpec((1, block, 1), self._index(lambda b, g, q, k: (b, k, 0)))
        return bias, queries, keys

    def _index(self, of_tile):
        causal, block = not self._settings.has_prefix, self._settings.block

        def queries_outside(b, g, query, key, prefix_ref):
            last = query if causal else jnp.maximum(query, jax.lax.div(prefix_ref[b] - 1, block))
            return of_tile(b, g, query, jnp.minimum(key, last))

        def keys_outside(b, g, key, query, prefix_ref):
            first = key if causal else jnp.where(key * block < prefix_ref[b], 0, key)
            return of_tile(b, g, jnp.maximum(query, first), key)

        return queries_outside if self._outer == "queries" else keys_outside


def _call(settings: _Settings, kernel, *, inputs, in_specs, prefix_B, out_shape, out_specs, scratch, products: int):
    batch, length, size = inputs[0].shape
    wide = jnp.promote_types(inputs[0].dtype, jnp.float32)
    grid = (batch, size // (settings.group * settings.width), settings.num_blocks, settings.num_blocks)
    held = [array for array in (*inputs, *out_shape) if array is not None]
    return pl.pallas_call(
        functools.partial(kernel, settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, wide) for shape in scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            # The half of queries and keys that causality leaves.
            flops=products * batch * size * length * (length + 1),
            transcendentals=batch * (size // settings.width) * length * (length + 1) // 2,
            bytes_accessed=sum(math.prod(array.shape) * array.dtype.itemsize for array in held),
        ),
        interpret=settings.interpret,
        name=kernel.__name__.strip("_"),
    )(prefix_B, *inputs)
