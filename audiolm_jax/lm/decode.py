"""Cached decoding: prefill and sampling of one stage inside a single jit.

Rows of different length are padded on the LEFT: every row writes the same cache slot at each step,
and attention depends on distances only, so a padded row equals that row alone.

Shape suffixes: B batch, P prefix positions, T positions, S cache slots, N heads, H head width, D model, K codes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax.lm.sampling import Sampling, sample
from audiolm_jax.lm.stages import BOS, EOS, Stage
from audiolm_jax.lm.transformer import Block, RMSNorm, TransformerConfig, unstack_layers

Cache = list[dict[str, jax.Array]]


def init_cache(config: TransformerConfig, batch: int, num_slots: int) -> Cache:
    """An empty key/value cache: for each layer {"k", "v"}, zeros [B, S, N, H] in the compute type."""
    shape = (batch, num_slots, config.num_heads, config.head_dim)
    empty = {"k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype)}
    return [empty] * config.num_layers


def forward_cached(
    config: TransformerConfig, params: dict[str, Any], tokens_BT: jax.Array, padding_B: jax.Array, cache: Cache, slot
) -> tuple[jax.Array, Cache]:
    """Runs the layers over tokens at slots slot … slot + T − 1, reading and writing the cache.

    Args:
      config: architecture.
      params: as `transformer.unstack_layers` gives them.
      tokens_BT: input tokens.
      padding_B: how many of the first slots of each row are padding.
      cache: see `init_cache`.
      slot: first slot of this call.

    Returns:
      final hidden states [B, T, D] and the cache.
    """
    x_BTD = params["embedding"]["embedding"][tokens_BT].astype(config.dtype)
    written = []
    for layer_params, layer_cache in zip(params["layers"], cache, strict=True):
        x_BTD, layer_cache = Block(config).apply(
            {"params": layer_params}, x_BTD, params.get("position_bias"), None, True, layer_cache, slot, padding_B
        )
        written.append(layer_cache)
    return RMSNorm(config).apply({"params": params["final_norm"]}, x_BTD), written


def level_logits(config: TransformerConfig, params, stage: Stage, hidden_BD, level, may_end_B, previous_B):
    """Logits over what may legally follow: the codes of one level, and last the end token: [B, K + 1].

    Only this level's columns of the output matrix are read. Where de-duplication removed repeats, the
    previous token may not come again.

    Args:
      hidden_BD: final hidden state of the last position.
      level: target level of the token to come (may be traced).
      may_end_B: rows whose end token is legal here.
      previous_B: each row's last token.
    """
    head_DV, size, start = params["head"].astype(config.dtype), stage.target.codebook_size, stage.level_start(level)
    block_DK = jax.lax.dynamic_slice_in_dim(head_DV, start, size, axis=1)
    columns_DK = jnp.concatenate([block_DK, head_DV[:, EOS : EOS + 1]], axis=1)
    logits_BK = jnp.einsum("BD,DK->BK", hidden_BD, columns_DK, preferred_element_type=config.param_dtype)
    if stage.target.deduplicate:
        repeats_BK = previous_B[:, None] == start + jnp.arange(size + 1)
        logits_BK = jnp.where(repeats_BK.at[:, size].set(False), -jnp.inf, logits_BK)
    return logits_BK.at[:, size].set(jnp.where(may_end_B, logits_BK[:, size], -jnp.inf))


@functools.partial(jax.jit, static_argnames=("config", "stage", "sampling", "max_frames"))
def _decode(
    config, stage: Stage, sampling: Sampling, max_frames, params, prefix_BP, padding_B, num_frames_B, may_end_B, keys_B
):
    params = unstack_layers(params)
    batch, prefix_length = prefix_BP.shape
    levels = stage.target.num_levels
    max_tokens = max_frames * levels
    cache = init_cache(config, batch, prefix_length + max_tokens)
    hidden_BTD, cache = forward_cached(config, params, prefix_BP, padding_B, cache, 0)

    def unfinished(carry):
        index, done_B = carry["index"], carry["done_B"]
        return (index < max_tokens) & ~jnp.all(done_B)

    def step(carry):
        index = carry["index"]
        level = index % levels
        end_legal_B = may_end_B & (level == 0) & (index > 0)
        logits_BK = level_logits(config, params, stage, carry["hidden_BD"], level, end_legal_B, carry["token_B"])
        code_B = sample(jax.vmap(jax.random.fold_in, (0, None))(keys_B, index), logits_BK, sampling)
        ended_B = carry["ended_B"] | (~carry["done_B"] & (code_B == stage.target.codebook_size))
        done_B = carry["done_B"] | ended_B
        codes_BT = carry["codes_BT"].at[:, index].set(jnp.where(done_B, -1, code_B))
        token_B = jnp.where(done_B, BOS, stage.level_start(level) + code_B)
        hidden_B1D, cache = forward_cached(
            config, params, token_B[:, None], padding_B, carry["cache"], prefix_length + index
        )
        return {
            "index": index + 1,
            "token_B": token_B,
            "hidden_BD": hidden_B1D[:, 0],
            "cache": cache,
            "codes_BT": codes_BT,
            "ended_B": ended_B,
            "done_B": done_B | (index + 1 >= num_frames_B * levels),
        }

    carry = {
        "index": jnp.int32(0),
        "token_B": prefix_BP[:, -1],
        "hidden_BD": hidden_BTD[:, -1],
        "cache": cache,
        "codes_BT": jnp.full((batch, max_tokens), -1, jnp.int32),
        "ended_B": jnp.zeros(batch, bool),
        "done_B": num_frames_B <= 0,
    }
    carry = jax.lax.while_loop(unfinished, step, carry)
    return carry["codes_BT"].reshape(batch, max_frames, levels), carry["ended_B"]


def bucket(length: int, multiple: int) -> int:
    """`length` rounded up, so that similar requests share one compiled program."""
    return max(multiple, -(-length // multiple) * multiple)


def decode_stage(
    config: TransformerConfig,
    stage: Stage,
    params: dict[str, Any],
    prefixes: list[np.ndarray],
    num_frames: list[int],
    may_end: list[bool],
    keys_B: jax.Array,
    sampling: Sampling,
) -> tuple[list[np.ndarray], list[bool]]:
    """Samples the target of several sequences at once.

    Args:
      config, params: the stage's transformer, parameters as trained.
      stage: the task.
      prefixes: for each row what comes before, as `Stage.prefix` builds it; lengths may differ.
      num_frames: frames to sample for each row.
      may_end: whether a row may sample the end token (after at least one frame).
      keys_B: typed PRNG keys, one a row: a row's tokens do not depend on the others.
      sampling: settings.

    Returns:
      codes of each row, int32 [frames, levels] with fewer frames where the end token was sampled, and
      whether it was.
    """
    lengths_B = np.array([len(prefix) for prefix in prefixes])
    prefix_length = bucket(int(lengths_B.max()), 64)
    prefix_BP = np.full((len(prefixes), prefix_length), BOS, np.int32)
    for row, prefix in enumerate(prefixes):
        prefix_BP[row, prefix_length - len(prefix) :] = prefix
    max_frames = bucket(max(num_frames), 25)
    codes_BTQ, ended_B = _decode(
        config,
        stage,
        sampling,
        max_frames,
        params,
        prefix_BP,
        (prefix_length - lengths_B).astype(np.int32),
        np.array(num_frames, np.int32),
        np.array(may_end, bool) & stage.predicts_end,
        keys_B,
    )
    codes_BTQ, ended_B = np.asarray(codes_BTQ), np.asarray(ended_B)
    rows = []
    for codes_TQ, frames in zip(codes_BTQ, num_frames, strict=True):
        codes_TQ = codes_TQ[:frames]
        rows.append(codes_TQ[codes_TQ[:, 0] >= 0])
    return rows, ended_B.tolist()
