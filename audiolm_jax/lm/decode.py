"""Cached decoding of one stage: prefill, then sampling in a jitted loop.

Rows of different length are padded on the LEFT: every row writes the same cache slot at each step,
and attention depends on distances only, so a padded row equals that row alone.

The cache grows: each loop runs over a cache of a fixed number of slots, and when that is full it goes on in a larger
one. A step so reads little more of the cache than it needs, memory follows the length, and the compiled programs, one
for each cache size, serve requests of every length.

Activations are columns, [D, M] with M = B · T: see `decoder_weights`.

On a mesh each device decodes its rows with its heads and feed-forward units. Where the weights and the state of the
loop lie says it all (`weight_shardings`, `LanguageModel.place`); no cache ever leaves its device.

Shape suffixes: B batch, U different prefixes, P prefix positions, T positions, S cache slots, M columns (B · T),
N heads, H head width, D model, F feed-forward, K codes, Q levels.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audiolm_jax.lm.attention import relative_position_bias
from audiolm_jax.lm.sampling import Sampling, sample
from audiolm_jax.lm.stages import BOS, Stage
from audiolm_jax.lm.transformer import TransformerConfig, condition_lengths
from audiolm_jax.lm.weights import (
    HEAD_AXIS,
    ROW_AXES,
    Weights,
    check_mesh,
    decoder_weights,
    for_a_single_row,
    in_huge_pages,
    product,
    sharded_weights,
)
from audiolm_jax.rotary import rotate

Cache = list[dict[str, jax.Array]]


def _rms_norm(config: TransformerConfig, scale_D: jax.Array, x_DM: jax.Array) -> jax.Array:
    wide_DM = x_DM.astype(config.param_dtype)
    variance_M = jnp.mean(jnp.square(wide_DM), axis=0)
    return (wide_DM * jax.lax.rsqrt(variance_M + 1e-6) * scale_D[:, None]).astype(config.dtype)


def init_cache(config: TransformerConfig, batch: int, num_slots: int) -> Cache:
    """An empty key/value cache: for each layer {"k", "v"}, zeros [B, N, S, H] in the compute type.

    A single row has no batch axis, [N, S, H]: around an axis of length 1 XLA's CPU compiler copies the cache at each
    step instead of writing into it.
    """
    shape = (*_batch_axis(batch), config.num_heads, num_slots, config.head_dim)
    empty = {"k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype)}
    return [empty] * config.num_layers


def _batch_axis(batch: int) -> tuple[int, ...]:
    return (batch,) if batch > 1 else ()


def cache_slots(cache: Cache) -> int:
    """S of a cache."""
    return cache[0]["k"].shape[-2]


def forward_cached(
    config: TransformerConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    padding_B: jax.Array,
    cache: Cache,
    slot: jax.Array | int,
    prefix_B: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs the layers over tokens at slots slot … slot + T − 1, reading and writing the cache.

    Args:
      config: architecture.
      weights: see `decoder_weights`.
      tokens_BT: input tokens.
      padding_B: how many of the first slots of each row are padding.
      cache: see `init_cache`.
      slot: first slot of this call (may be traced).
      prefix_B: up to which slot, padding aside, every position sees every other; None: causal throughout.

    Returns:
      final hidden states [D, B, T] and the cache.
    """
    batch, num_queries = tokens_BT.shape
    num_keys = cache_slots(cache)
    query_T, key_S = slot + jnp.arange(num_queries), jnp.arange(num_keys)
    seen_BTS = (key_S <= query_T[:, None])[None]
    if prefix_B is not None:
        seen_BTS = seen_BTS | (key_S < prefix_B[:, None])[:, None]
    seen_BTS = seen_BTS & (key_S >= padding_B[:, None])[:, None]
    bias_1NTS = jnp.zeros((1, config.num_heads, 1, 1), config.param_dtype)
    if config.position == "relative_bias":
        bias_1NTS = relative_position_bias(weights["position_bias"], slot, num_queries, num_keys, config.max_distance)
    bias_BNTS = jnp.where(seen_BTS[:, None], bias_1NTS, jnp.finfo(config.param_dtype).min)
    bias_BNTS = bias_BNTS.reshape(*_batch_axis(batch), *bias_BNTS.shape[1:])
    x_DM = weights["embedding"][tokens_BT.ravel()].T
    written = []
    for layer, layer_cache in zip(weights["layers"], cache, strict=True):
        mixed_DM, layer_cache = _attention(config, layer, x_DM, bias_BNTS, layer_cache, slot)
        x_DM = x_DM + mixed_DM
        normed_DM = _rms_norm(config, layer["mlp_norm"], x_DM)
        hidden_FM = jax.nn.gelu(product(layer["wide"], normed_DM))
        if config.gated_mlp:
            hidden_FM = hidden_FM * product(layer["gate"], normed_DM)
        x_DM = x_DM + product(layer["narrow"], hidden_FM)
        written.append(layer_cache)
    return _rms_norm(config, weights["final_norm"], x_DM).reshape(-1, batch, num_queries), written


def _attention(config: TransformerConfig, layer: Weights, x_DM, bias_BNTS, cache, slot):
    """One layer's attention over the whole cache, into which this call's keys and values are written first."""
    num_queries, heads = bias_BNTS.shape[-2], (config.num_heads, config.head_dim)
    qkv = product(layer["qkv"], _rms_norm(config, layer["attention_norm"], x_DM))
    q_NHBT, k_NHBT, v_NHBT = jnp.moveaxis(qkv.reshape(heads[0], 3, heads[1], -1, num_queries), 1, 0)
    if config.position == "rotary":
        position_T = slot + jnp.arange(num_queries)
        q_NHBT, k_NHBT = _rotate(q_NHBT, position_T), _rotate(k_NHBT, position_T)
    # As the cache is laid out: [B, N, T, H], or [N, T, H] for a single row.
    rows = lambda x_NHBT: jnp.transpose(x_NHBT, (2, 0, 3, 1)).reshape(*bias_BNTS.shape[:-1], heads[1])
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=-2)
    cache = {"k": write(cache["k"], rows(k_NHBT)), "v": write(cache["v"], rows(v_NHBT))}
    logits_BNTS = jnp.einsum("...TH,...SH->...TS", rows(q_NHBT), cache["k"], preferred_element_type=config.param_dtype)
    shares_BNTS = jax.nn.softmax(logits_BNTS + bias_BNTS, axis=-1).astype(config.dtype)
    mixed_BNTH = jnp.einsum("...TS,...SH->...TH", shares_BNTS, cache["v"]).reshape(-1, heads[0], num_queries, heads[1])
    return product(layer["out"], jnp.transpose(mixed_BNTH, (1, 3, 0, 2)).reshape(config.embed_dim, -1)), cache


def _rotate(x_NHBT: jax.Array, position_T: jax.Array) -> jax.Array:
    return jnp.transpose(rotate(jnp.transpose(x_NHBT, (2, 3, 0, 1)), position_T), (2, 3, 0, 1))


def level_logits(
    config: TransformerConfig, weights: Weights, stage: Stage, hidden_DB, level, may_end_B, previous_B
) -> jax.Array:
    """Logits over what may legally follow: the codes of one level, and last the end token: [B, K + 1].

    Only this level's rows of the output matrix are read. Where de-duplication removed repeats, the
    previous token may not come again.

    Args:
      config, weights, stage: see `decoder_weights`.
      hidden_DB: final hidden state of the last position.
      level: target level of the token to come (may be traced).
      may_end_B: rows whose end token is legal here.
      previous_B: each row's last token.
    """
    size = stage.target.codebook_size
    logits = functools.partial(product, output_dtype=config.param_dtype)
    if isinstance(weights["levels"], list):
        logits_KB = jax.lax.switch(level, [functools.partial(logits, each) for each in weights["levels"]], hidden_DB)
    else:
        pick = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, level, keepdims=False)
        logits_KB = logits(jax.tree.map(pick, weights["levels"]), hidden_DB)
    legal_KB = jnp.ones((size + 1, 1), bool)
    if stage.target.deduplicate:
        legal_KB = previous_B != stage.level_start(level) + jnp.arange(size + 1)[:, None]
    legal_KB = jnp.where(jnp.arange(size + 1)[:, None] == size, may_end_B, legal_KB)
    return jnp.where(legal_KB, logits_KB, -jnp.inf).T


@functools.partial(jax.jit, static_argnames=("config", "num_slots"))
def _prefill(config, num_slots: int, weights, prefix_UP, padding_U, source_B):
    """The cache and last hidden state of each prefix, computed once, then copied to the rows that begin with it.

    Without `source_B`, every row has a prefix of its own.
    """
    num_prefixes, length = prefix_UP.shape
    cache = init_cache(config, num_prefixes, length)
    condition_U = condition_lengths(prefix_UP) if config.prefix_attention else None
    hidden_DUP, cache = forward_cached(config, weights, prefix_UP, padding_U, cache, 0, condition_U)
    if source_B is None:
        return hidden_DUP[..., -1], _with_slots(cache, num_slots)
    copy = lambda leaf: jnp.reshape(leaf, (num_prefixes, *leaf.shape[-3:]))[source_B]
    rows = jax.tree.map(copy, cache) if len(source_B) > 1 else cache
    return hidden_DUP[:, source_B, -1], _with_slots(rows, num_slots)


@functools.partial(jax.jit, static_argnames="num_slots")
def _grow(cache: Cache, num_slots: int) -> Cache:
    return _with_slots(cache, num_slots)


def _with_slots(cache: Cache, num_slots: int) -> Cache:
    pad = lambda leaf: jnp.pad(leaf, (*[(0, 0)] * (leaf.ndim - 2), (0, num_slots - leaf.shape[-2]), (0, 0)))
    return jax.tree.map(pad, cache)


@functools.partial(jax.jit, static_argnames=("config", "stage", "top_k"), donate_argnames="state")
def _sample_tokens(config, stage: Stage, top_k: int, settings, weights, rows: dict[str, jax.Array], state):
    """Samples until the cache is full or every row is done.

    Args:
      config, stage, weights: see `decoder_weights`.
      top_k, settings: of the sampling; the latter are its `traced`.
      rows: what stays the same: `prefix_length`, `padding_B`, `num_tokens_B`, `may_end_B`, `keys_B`.
      state: what a step changes: `index` (tokens sampled so far), `token_B` and `hidden_DB` of the last position,
        `cache`, `ended_B`, `done_B`.

    Returns:
      the state, and codes [B, S] at the slots sampled here, −1 where a row was done.
    """
    levels, num_slots = stage.target.num_levels, cache_slots(state["cache"])

    def unfinished(carry):
        state, _ = carry
        return (rows["prefix_length"] + state["index"] < num_slots) & ~jnp.all(state["done_B"])

    def step(carry):
        state, codes_BS = carry
        index, slot = state["index"], rows["prefix_length"] + state["index"]
        level = index % levels
        end_legal_B = rows["may_end_B"] & (level == 0) & (index > 0)
        logits_BK = level_logits(config, weights, stage, state["hidden_DB"], level, end_legal_B, state["token_B"])
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(rows["keys_B"], index)
        code_B = sample(keys_B, logits_BK, top_k, **settings)
        ended_B = state["ended_B"] | (~state["done_B"] & (code_B == stage.target.codebook_size))
        done_B = state["done_B"] | ended_B
        token_B = jnp.where(done_B, BOS, stage.level_start(level) + code_B)
        hidden_DB1, cache = forward_cached(config, weights, token_B[:, None], rows["padding_B"], state["cache"], slot)
        state = {
            "index": index + 1,
            "token_B": token_B,
            "hidden_DB": hidden_DB1[..., 0],
            "cache": cache,
            "ended_B": ended_B,
            "done_B": done_B | (index + 1 >= rows["num_tokens_B"]),
        }
        code_B1 = jnp.where(done_B, -1, code_B)[:, None]
        return state, jax.lax.dynamic_update_slice_in_dim(codes_BS, code_B1, slot, axis=1)

    codes_BS = jnp.full((len(state["token_B"]), num_slots), -1, jnp.int32)
    return jax.lax.while_loop(unfinished, step, (state, codes_BS))


def round_up(count: int, multiple: int) -> int:
    """The least multiple that is at least `count` (and at least one), so that similar requests share a program."""
    return max(multiple, -(-count // multiple) * multiple)


def size_class(count: int) -> int:
    """The least 2^n or 3 · 2^n that is at least `count`: few sizes, none more than half again too large."""
    power = 1 << (max(count, 1) - 1).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def slot_class(count: int) -> int:
    """The least cache size that holds `count` slots; the coarser, the larger."""
    return round_up(count, 128 if count <= 256 else 256 if count <= 1024 else 512)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """One stage: its task, architecture and parameters.

    Attributes:
      int8: decode with weights in 8 bits, see `decoder_weights`.
      mesh: decode on its devices, as `audiolm_jax.make_mesh` lays them out; on one device by default.

    Raises:
      UserError: a mesh that does not divide the heads or the feed-forward width, or has other axes.
    """

    stage: Stage
    config: TransformerConfig
    params: dict[str, Any]
    int8: bool = False
    mesh: Mesh | None = None

    def __post_init__(self):
        if self.mesh is not None:
            check_mesh(self.mesh, self.config, self.stage.name)

    @functools.cached_property
    def weights(self) -> Weights:
        """See `decoder_weights`; made when first needed."""
        if self.mesh is not None:
            return sharded_weights(self.mesh, self.config, self.stage, self.params, self.int8)
        return in_huge_pages(decoder_weights(self.config, self.stage, self.params, self.int8))

    @functools.cached_property
    def head(self) -> jax.Array:
        """The output matrix [D, V] over the whole vocabulary, in the compute type, on every device of the mesh."""
        head_DV = jnp.asarray(self.params["head"], self.config.dtype)
        return head_DV if self.mesh is None else jax.device_put(head_DV, NamedSharding(self.mesh, PartitionSpec()))

    def step_weights(self, batch: int) -> Weights:
        """The weights for steps of so many rows."""
        turned = batch == 1 and self.mesh is None and jax.default_backend() == "cpu"
        return self._single_row_weights if turned else self.weights

    def batch_class(self, num_rows: int) -> int:
        """The batch in which so many rows are decoded; of several, each part of the mesh has as many."""
        batch = size_class(num_rows)
        return batch if batch == 1 else round_up(batch, self.num_row_shards)

    @property
    def num_row_shards(self) -> int:
        """Into how many parts the mesh cuts the rows of a batch."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in ROW_AXES)

    def place(self, batch: int, arrays: dict[str, Any]) -> dict[str, Any]:
        """Arrays of a batch on the mesh: rows cut by data and fsdp, a single one whole; heads of the cache by tensor.

        From these and the weights the partitioner finds the rest by itself. Without a mesh, the arrays as they are.
        """
        if self.mesh is None:
            return arrays
        rows = ROW_AXES if batch > 1 else None
        specs = {
            "cache": PartitionSpec(rows, HEAD_AXIS) if batch > 1 else PartitionSpec(HEAD_AXIS),
            "hidden_DB": PartitionSpec(None, rows),
            "prefix_length": PartitionSpec(),
            "index": PartitionSpec(),
        }
        places = {name: NamedSharding(self.mesh, specs.get(name, PartitionSpec(rows))) for name in arrays}
        return {name: jax.device_put(array, places[name]) for name, array in arrays.items()}

    @functools.cached_property
    def _single_row_weights(self) -> Weights:
        return in_huge_pages(for_a_single_row(self.weights))


def decode_stage(
    lm: LanguageModel,
    prefixes: Sequence[np.ndarray],
    num_frames: Sequence[int],
    may_end: Sequence[bool],
    keys_B: jax.Array,
    sampling: Sampling,
) -> tuple[list[np.ndarray], list[bool]]:
    """Samples the target of several sequences at once.

    Programs are compiled for classes of batch size, prefix length and cache size; a request within known classes
    compiles nothing. Rows with the same prefix share its prefill.

    Args:
      lm: the stage.
      prefixes: for each row what comes before, as `Stage.prefix` builds it; lengths may differ.
      num_frames: frames to sample for each row.
      may_end: whether a row may sample the end token (after at least one frame).
      keys_B: typed PRNG keys, one a row: a row's tokens do not depend on the others.
      sampling: settings.

    Returns:
      codes of each row, int32 [frames, levels] with fewer frames where the end token was sampled, and
      whether it was.
    """
    num_rows, levels = len(prefixes), lm.stage.target.num_levels
    batch = lm.batch_class(num_rows)
    extra = batch - num_rows
    prefix_length, rows, state = _start(
        lm,
        [*prefixes, *[prefixes[0]] * extra],
        np.pad(np.array(num_frames, np.int32) * levels, (0, extra)),
        np.pad(np.array(may_end, bool) & lm.stage.predicts_end, (0, extra)),
        keys_B[np.minimum(np.arange(batch), num_rows - 1)],
    )
    pieces = []
    while not np.all(state["done_B"]):
        if state["index"] > 0:
            state["cache"] = _grow(state["cache"], slot_class(cache_slots(state["cache"]) + 1))
        first = prefix_length + int(state["index"])
        weights = lm.step_weights(batch)
        state, codes_BS = _sample_tokens(lm.config, lm.stage, sampling.top_k, sampling.traced, weights, rows, state)
        pieces.append(np.asarray(codes_BS)[:, first : prefix_length + int(state["index"])])
    codes_BT = np.concatenate([np.zeros((batch, 0), np.int32), *pieces], axis=1)
    sampled = []
    for codes_T, frames in zip(codes_BT[:num_rows], num_frames, strict=True):
        # A row that ends does so before a frame; a row that is done waits for the others.
        count = min(int(np.sum(codes_T >= 0)) // levels, frames)
        sampled.append(codes_T[: count * levels].reshape(count, levels))
    return sampled, np.asarray(state["ended_B"])[:num_rows].tolist()


def _start(lm: LanguageModel, prefixes: Sequence[np.ndarray], num_tokens_B, may_end_B, keys_B):
    """The prefix length, and `rows` and `state` of `_sample_tokens`, with the prefixes prefilled."""
    batch = len(prefixes)
    different, source_B = _different_prefixes(prefixes)
    # A mesh that cuts the batch prefills each row where it lies: cheaper than moving caches between devices.
    apart = lm.num_row_shards > 1 and len(different) > 1
    if apart:
        different, source_B = list(prefixes), np.arange(batch, dtype=np.int32)
    prefix_UP, padding_U = _padded_left(different)
    prefix_length = prefix_UP.shape[1]
    given = lm.place(len(different), {"prefix_UP": prefix_UP, "padding_U": padding_U})
    given |= {"source_B": None} if apart else lm.place(batch, {"source_B": source_B})
    hidden_DB, cache = _prefill(lm.config, slot_class(prefix_length + 1), lm.weights, **given)
    rows = {
        "prefix_length": np.int32(prefix_length),
        "padding_B": padding_U[source_B],
        "num_tokens_B": num_tokens_B,
        "may_end_B": may_end_B,
        "keys_B": keys_B,
    }
    state = {
        "index": np.int32(0),
        "token_B": prefix_UP[source_B, -1],
        "hidden_DB": hidden_DB,
        "cache": cache,
        "ended_B": np.zeros(batch, bool),
        "done_B": num_tokens_B <= 0,
    }
    return prefix_length, lm.place(batch, rows), lm.place(batch, state)


def _different_prefixes(prefixes: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Each prefix once (and the first again, up to a class of sizes), and which of them each row has."""
    numbers: dict[bytes, int] = {}
    source_B = np.array([numbers.setdefault(prefix.tobytes(), len(numbers)) for prefix in prefixes], np.int32)
    different = [np.frombuffer(tokens, np.int32) for tokens in numbers]
    return different + [different[0]] * (size_class(len(different)) - len(different)), source_B


def _padded_left(prefixes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Prefixes as one array of a class of lengths [U, P], and the padding of each [U]."""
    lengths_U = np.array([len(prefix) for prefix in prefixes])
    longest = int(lengths_U.max())
    length = round_up(longest, 64) if longest > 64 else max(8, size_class(longest))
    prefix_UP = np.full((len(prefixes), length), BOS, np.int32)
    for row, prefix in enumerate(prefixes):
        prefix_UP[row, length - len(prefix) :] = prefix
    return prefix_UP, (length - lengths_U).astype(np.int32)
