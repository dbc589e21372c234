"""Cached decoding: equal to the full forward pass, legal tokens only, rows independent of their company."""

import dataclasses

import flax.linen as nn
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.lm import decode, weights
from audiolm_jax.lm.decode import LanguageModel, decode_stage, forward_cached, init_cache, level_logits
from audiolm_jax.lm.sampling import Sampling
from audiolm_jax.lm.stages import EOS, make_stage
from audiolm_jax.lm.transformer import Transformer, TransformerConfig
from audiolm_jax.lm.weights import decoder_weights, for_a_single_row

LAYOUT = {
    "num_clusters": 16, "codebook_size": 8, "num_quantizers": 5, "num_coarse_quantizers": 2,
    "semantic_rate": 25, "acoustic_rate": 50, "deduplicate": True, "crop_seconds": 1.0,
}  # fmt: skip
PIANO = {**LAYOUT, "num_quantizers": 3, "num_coarse_quantizers": 3}
STAGES = [make_stage(name, **LAYOUT) for name in ("semantic", "coarse", "fine")]
STAGES += [make_stage("coarse", **PIANO), make_stage("coarse", **LAYOUT, semantic_condition=False)]
IDS = ["semantic", "coarse", "fine", "piano", "acoustic-only"]


def model_of(stage, seed=0, dtype="float32", **fields):
    sizes = {"num_layers": 2, "num_heads": 2, "embed_dim": 16, "mlp_dim": 32, "num_buckets": 8, "max_distance": 30}
    config = TransformerConfig(stage.vocab_size, dtype=dtype, **{**sizes, **fields})
    params = nn.unbox(Transformer(config).init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"])
    # A sharper output than at initialisation, so that sampling has something to choose from.
    return config, {**params, "head": params["head"] * 4}


def prefix_of(stage, frames, seed):
    generator = np.random.default_rng(seed)
    record = {
        "semantic": generator.integers(0, LAYOUT["num_clusters"], frames),
        "acoustic": generator.integers(0, LAYOUT["codebook_size"], (2 * frames, 5)),
    }
    condition = stage.condition.flatten(record[stage.condition.source]) if stage.condition else None
    return stage.prefix(condition, stage.target.flatten(record[stage.target.source])[: 4 * stage.target.num_levels])


@pytest.mark.parametrize(("position", "batch", "gated"), [("relative_bias", 3, False), ("rotary", 1, True)])
@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_cached_logits_equal_the_full_forward_pass(stage, position, batch, gated):
    config, params = model_of(stage, position=position, gated_mlp=gated)
    tokens_BT = np.random.default_rng(0).integers(0, stage.vocab_size, (batch, 30)).astype(np.int32)
    full_BTV = Transformer(config).apply({"params": params}, tokens_BT)
    loose, cache = decoder_weights(config, stage, params), init_cache(config, batch, 40)
    step_weights = for_a_single_row(loose) if batch == 1 else loose
    padding_B, pieces = jnp.zeros(batch, jnp.int32), []
    for start, stop in [(0, 11), (11, 12), (12, 20), *((t, t + 1) for t in range(20, 30))]:
        used = step_weights if stop == start + 1 else loose
        hidden_DBT, cache = forward_cached(config, used, tokens_BT[:, start:stop], padding_B, cache, start)
        pieces.append(jnp.einsum("DBT,DV->BTV", hidden_DBT, params["head"]))
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), full_BTV, atol=1e-5)


@pytest.mark.parametrize("position", ["relative_bias", "rotary"])
@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_ragged_prompts_give_the_logits_of_each_alone(stage, position):
    config, params = model_of(stage, position=position)
    loose = decoder_weights(config, stage, params)
    rows = [prefix_of(stage, frames, seed=frames) for frames in (3, 9, 6)]
    longest = max(map(len, rows))
    padding_B = np.array([longest - len(row) for row in rows])
    left_BT = np.stack([np.pad(row, (longest - len(row), 0), constant_values=5) for row in rows])
    hidden_DBT, _ = forward_cached(config, loose, left_BT, padding_B, init_cache(config, 3, longest + 7), 0)
    for row, tokens in enumerate(rows):
        alone_1TV = Transformer(config).apply({"params": params}, tokens[None])
        together_TV = hidden_DBT[:, row, padding_B[row] :].T @ params["head"]
        np.testing.assert_allclose(together_TV, alone_1TV[0], atol=1e-5)


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_ragged_prompts_sample_the_tokens_of_each_alone(stage, float64):
    config, params = model_of(stage, dtype="float64")
    rows = [prefix_of(stage, frames, seed=frames) for frames in (3, 9, 6)]
    counts, may_end = [7, 12, 9], [True, False, True]
    keys_B = jax.random.split(jax.random.key(5), 3)
    sampling = Sampling(0.9, top_k=6, top_p=0.95)
    together, ended = decode_stage(LanguageModel(stage, config, params), rows, counts, may_end, keys_B, sampling)
    for i in range(3):
        alone, alone_ended = decode_stage(
            LanguageModel(stage, config, params), [rows[i]], [counts[i]], [may_end[i]], keys_B[i : i + 1], sampling
        )
        np.testing.assert_array_equal(together[i], alone[0])
        assert ended[i] == alone_ended[0]
    assert any(len(np.unique(codes)) > 1 for codes in together)


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_only_legal_tokens_are_sampled_and_each_of_them_can_be(stage):
    config, params = model_of(stage)
    # The output prefers everything illegal: other levels, the condition, special and unused tokens.
    legal = np.arange(stage.target_offset, stage.target_offset + stage.target.vocabulary)
    head_DV = np.array(params["head"]) * 0.01
    head_DV[:, np.setdiff1d(np.arange(stage.vocab_size), legal)] += 3.0
    params = {**params, "head": jnp.asarray(head_DV)}
    rows = [prefix_of(stage, 5, seed) for seed in range(16)]
    codes, ended = decode_stage(
        LanguageModel(stage, config, params),
        rows,
        [40] * 16,
        [False] * 16,
        jax.random.split(jax.random.key(0), 16),
        Sampling(1.0),
    )
    assert not any(ended)
    codes_MQ = np.concatenate(codes)
    assert codes_MQ.shape == (16 * 40, stage.target.num_levels)
    for level in range(stage.target.num_levels):
        # Nothing outside of the level's codes, and every one of them, the last included.
        np.testing.assert_array_equal(np.unique(codes_MQ[:, level]), np.arange(stage.target.codebook_size))


def test_deduplicated_stage_never_repeats_a_token():
    stage = STAGES[0]
    config, params = model_of(stage)
    prefix = stage.prefix(None, np.array([3]))
    codes, _ = decode_stage(
        LanguageModel(stage, config, params),
        [prefix] * 8,
        [60] * 8,
        [False] * 8,
        jax.random.split(jax.random.key(0), 8),
        Sampling(1.0),
    )
    tokens_BT = np.concatenate([np.full((8, 1), 3), np.stack(codes)[..., 0]], axis=1)
    assert np.all(tokens_BT[:, 1:] != tokens_BT[:, :-1])


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[1]], ids=["semantic", "coarse"])
def test_end_token_stops_a_row_at_a_whole_frame(stage):
    config, params = model_of(stage)
    head_DV = np.array(params["head"])
    # The end token's logit is its column times the hidden state: make it win for about half of the states.
    head_DV[:, EOS] = 2.0 * head_DV[:, stage.target_offset]
    params = {**params, "head": jnp.asarray(head_DV)}
    rows, keys_B = [prefix_of(stage, 5, seed) for seed in range(12)], jax.random.split(jax.random.key(1), 12)
    codes, ended = decode_stage(
        LanguageModel(stage, config, params), rows, [30] * 12, [True] * 12, keys_B, Sampling(1.0)
    )
    assert 0 < sum(ended)
    for codes_TQ, has_ended in zip(codes, ended, strict=True):
        assert (len(codes_TQ) < 30) == has_ended and len(codes_TQ) >= 1
        assert codes_TQ.min() >= 0
    forbidden, never = decode_stage(
        LanguageModel(stage, config, params), rows, [30] * 12, [False] * 12, keys_B, Sampling(1.0)
    )
    assert not any(never) and all(len(codes_TQ) == 30 for codes_TQ in forbidden)


def test_greedy_decoding_follows_the_largest_legal_logit():
    stage = STAGES[1]
    config, params = model_of(stage)
    prefix = prefix_of(stage, 6, 0)
    codes, _ = decode_stage(
        LanguageModel(stage, config, params),
        [prefix],
        [5],
        [False],
        jax.random.split(jax.random.key(0), 1),
        Sampling(0.0),
    )
    tokens = list(prefix)
    for index in range(10):
        logits_V = Transformer(config).apply({"params": params}, np.array(tokens)[None])[0, -1]
        start = stage.level_start(index % 2)
        tokens.append(start + int(np.argmax(logits_V[start : start + 8])))
    np.testing.assert_array_equal(
        stage.target.unflatten(np.array(tokens[len(prefix) :]) - stage.target_offset), codes[0]
    )


def test_level_logits_are_columns_of_the_full_output():
    stage = STAGES[2]
    config, params = model_of(stage)
    hidden_BD = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    loose = decoder_weights(config, stage, params)
    logits_BK = level_logits(config, loose, stage, hidden_BD.T, 2, np.array([True, False]), np.zeros(2, int))
    full_BV = hidden_BD @ np.asarray(params["head"])
    start = stage.level_start(2)
    np.testing.assert_allclose(logits_BK[:, :8], full_BV[:, start : start + 8], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits_BK[0, 8], full_BV[0, EOS], rtol=1e-5, atol=1e-6)
    assert logits_BK[1, 8] == -np.inf


def test_same_keys_give_the_same_tokens_and_others_do_not():
    stage = STAGES[0]
    config, params = model_of(stage)
    lm, prefix = LanguageModel(stage, config, params), stage.prefix(None, np.zeros(0, int))
    keys_B = lambda seed: jax.random.split(jax.random.key(seed), 1)
    run = lambda seed: decode_stage(lm, [prefix], [40], [False], keys_B(seed), Sampling(1.0))[0][0]
    np.testing.assert_array_equal(run(3), run(3))
    assert not np.array_equal(run(3), run(4))


def test_another_temperature_or_nucleus_compiles_nothing():
    stage = STAGES[0]
    config, params = model_of(stage)
    lm, keys_B = LanguageModel(stage, config, params), jax.random.split(jax.random.key(3), 2)
    prefixes = [stage.prefix(None, np.array([token])) for token in (3, 5)]
    run = lambda *settings: np.stack(decode_stage(lm, prefixes, [40] * 2, [False] * 2, keys_B, Sampling(*settings))[0])
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    first = [run(0.9), run(0.9, 0, 0.8)]
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        other = [run(0.3), run(0.9, 0, 0.2)]
        assert compiled == []
        run(0.9, 4, 0.8)
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    for codes, others in zip(first, other, strict=True):
        assert not np.array_equal(codes, others)


def test_bfloat16_cache_is_in_the_compute_type():
    config = dataclasses.replace(model_of(STAGES[0])[0], dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(init_cache(config, 1, 8))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("prefix_attention", [False, True])
def test_cache_that_grows_samples_what_the_full_forward_pass_would(prefix_attention, float64):
    stage = STAGES[1]
    config, params = model_of(stage, dtype="float64", prefix_attention=prefix_attention)
    prefix = prefix_of(stage, 60, 0)
    # 256 slots, then 512, then 768.
    lm, keys_B = LanguageModel(stage, config, params), jax.random.split(jax.random.key(2), 1)
    (codes_TQ,), _ = decode_stage(lm, [prefix], [300], [False], keys_B, Sampling(1.0))
    tokens = np.concatenate([prefix, stage.target.flatten(codes_TQ) + stage.target_offset])
    assert len(tokens) > 512
    logits_TV = Transformer(config).apply({"params": params}, tokens[None])[0]
    for index, position in enumerate(range(len(prefix), len(tokens))):
        start = stage.level_start(index % 2)
        key = jax.random.fold_in(keys_B[0], index)
        # The end token is not legal, and has its place among the logits.
        legal_K = jnp.append(logits_TV[position - 1, start : start + 8], -jnp.inf)
        assert tokens[position] == start + jax.random.categorical(key, legal_K)


def test_rows_with_the_same_prefix_are_prefilled_once():
    stage = STAGES[0]
    config, params = model_of(stage)
    seen = []
    original = decode._prefill

    def watched(config, num_slots, weights, prefix_UP, padding_U, source_B):
        seen.append((prefix_UP.shape[0], source_B.tolist()))
        return original(config, num_slots, weights, prefix_UP, padding_U, source_B)

    first, second = (stage.prefix(None, np.array(tokens)) for tokens in ([3, 1, 4], [1, 5]))
    keys_B = jax.random.split(jax.random.key(0), 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_prefill", watched)
        lm = LanguageModel(stage, config, params)
        together, _ = decode_stage(lm, [first, second, first, first], [9] * 4, [False] * 4, keys_B, Sampling(1.0))
    assert seen == [(2, [0, 1, 0, 0])]
    assert not np.array_equal(together[0], together[2])
    alone, _ = decode_stage(lm, [first], [9], [False], keys_B[2:3], Sampling(1.0))
    np.testing.assert_array_equal(together[2], alone[0])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 12, 13, 1000])
def test_size_classes_hold_what_they_are_for(count):
    size = decode.size_class(count)
    assert count <= size <= max(1.5 * count, 1) and decode.size_class(size) == size
    assert decode.slot_class(count) >= count and decode.slot_class(decode.slot_class(count)) == decode.slot_class(count)


def test_weights_in_8_bits_are_near_the_trained():
    stage = STAGES[2]
    config, params = model_of(stage, embed_dim=64, mlp_dim=128)
    exact, rounded = (decoder_weights(config, stage, params, int8=int8) for int8 in (False, True))
    weight, small = exact["layers"][1]["wide"], rounded["layers"][1]["wide"]
    assert small["int8"].dtype == jnp.int8 and int(jnp.abs(small["int8"]).max()) == 127
    np.testing.assert_allclose(small["int8"] * small["scale"], weight, atol=float(jnp.abs(weight).max()) / 254 + 1e-7)
    tokens_BT = np.random.default_rng(0).integers(0, stage.vocab_size, (2, 20)).astype(np.int32)
    hidden = [
        forward_cached(config, loose, tokens_BT, jnp.zeros(2, int), init_cache(config, 2, 20), 0)[0]
        for loose in (exact, rounded)
    ]
    difference = float(jnp.linalg.norm(hidden[1] - hidden[0]) / jnp.linalg.norm(hidden[0]))
    assert 0 < difference < 0.02


def test_huge_pages_hold_the_same_weights():
    tree = {"large": jnp.arange(2**20, dtype=jnp.float32).reshape(1024, 1024), "small": jnp.ones(3)}
    moved = weights.in_huge_pages(tree)
    jax.tree.map(np.testing.assert_array_equal, moved, tree)
    assert moved["large"].unsafe_buffer_pointer() % weights.HUGE_PAGE == 0
    assert moved["small"] is tree["small"]
