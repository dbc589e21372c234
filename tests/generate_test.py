"""Generation with random weights: lengths, seeds, company, windows, end tokens, likelihood."""

import jax
import jax.monitoring
import numpy as np
import pytest

import audiolm_jax
from audiolm_jax import bundle
from audiolm_jax.errors import UserError
from audiolm_jax.lm.sampling import Sampling
from audiolm_jax.lm.stages import run_starts
from audiolm_jax.lm.transformer import Transformer
from audiolm_jax.parts import write_part
from tests import tiny


def prompts(count=2, samples=16000, seed=0):
    return np.random.default_rng(seed).uniform(-0.3, 0.3, (count, samples)).astype(np.float32)


def assert_sound(out):
    assert np.isfinite(out.wave_BW).all()
    for wave_W, length in zip(out.wave_BW, out.lengths_B, strict=True):
        assert np.all(wave_W[length:] == 0)


def test_continuation_has_the_prompt_and_exactly_the_seconds(model):
    out = model.generate(prompts(2), seconds=1.5, num_samples=2, ignore_end=True)
    assert out.sample_rate == 16000 and out.lengths_B.tolist() == [40000] * 4
    assert out.wave_BW.shape == (4, 40000) and not out.ended_B.any()
    codes_BTQ = model.codec.encode(prompts(2))
    np.testing.assert_array_equal(out.acoustic_BTQ[::2, :50], codes_BTQ)
    np.testing.assert_array_equal(out.acoustic_BTQ[1::2, :50], codes_BTQ)
    np.testing.assert_array_equal(out.semantic_BT[::2, :25], model.tokenizer.encode(prompts(2)))
    assert out.acoustic_BTQ.shape == (4, 125, tiny.LEVELS)
    assert out.acoustic_BTQ.min() >= 0 and out.acoustic_BTQ.max() < tiny.CODES
    assert set(out.tokens_per_second) == {"semantic", "coarse", "fine"}
    assert_sound(out)


@pytest.mark.parametrize("samples", [640, 1000, 7777])
def test_any_prompt_length_gives_exactly_the_seconds(model, samples):
    out = model.generate(prompts(1, samples), seconds=0.5, ignore_end=True)
    assert out.lengths_B.tolist() == [samples + 8000]
    assert_sound(out)


def test_acoustic_generation_is_as_long_as_the_recording(model):
    out = model.generate(prompts(1, 20123), mode="acoustic")
    assert out.lengths_B.tolist() == [20123] and not out.ended_B.any()
    np.testing.assert_array_equal(out.semantic_BT, model.tokenizer.encode(prompts(1, 20123)))
    assert_sound(out)


def test_unconditional_generation(model):
    out = model.generate(mode="unconditional", seconds=1.0, num_samples=3, ignore_end=True)
    assert out.lengths_B.tolist() == [16000] * 3
    assert not np.array_equal(out.acoustic_BTQ[0], out.acoustic_BTQ[1])
    assert_sound(out)


def test_longer_than_every_crop(model):
    # 0.6 s of prompt and 7 s of new audio, where the crops are 4, 2 and 1 s.
    out = model.generate(prompts(1, 9600), seconds=7.0, ignore_end=True)
    assert out.lengths_B.tolist() == [9600 + 7 * 16000]
    assert out.acoustic_BTQ.shape == (1, 380, tiny.LEVELS) and out.acoustic_BTQ.min() >= 0
    for level in range(tiny.LEVELS):
        assert len(np.unique(out.acoustic_BTQ[0, 200:, level])) > 3
    long = model.generate(prompts(1, 16000 * 5), mode="acoustic")
    assert long.lengths_B.tolist() == [16000 * 5]


def test_same_seed_same_audio(model):
    first, again = (model.generate(prompts(1), seconds=0.6, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first.wave_BW, again.wave_BW)
    other = model.generate(prompts(1), seconds=0.6, seed=8)
    assert not np.array_equal(first.acoustic_BTQ, other.acoustic_BTQ)


def test_samples_of_a_prompt_differ(model):
    out = model.generate(prompts(1), seconds=0.6, num_samples=2, ignore_end=True)
    assert not np.array_equal(out.acoustic_BTQ[0], out.acoustic_BTQ[1])


def test_a_prompt_does_not_depend_on_its_company(model, float64):
    model = tiny.in_double_precision(model)
    wave_BW = prompts(3, 20000)
    lengths_B = np.array([20000, 9000, 15555])
    together = model.generate(wave_BW, seconds=1.0, num_samples=2, lengths_B=lengths_B)
    for row, length in enumerate(lengths_B):
        alone = model.generate(wave_BW[row : row + 1, :length], seconds=1.0, num_samples=2)
        for k in range(2):
            frames = -(-alone.lengths_B[k] // 320)
            assert together.lengths_B[2 * row + k] == alone.lengths_B[k]
            np.testing.assert_array_equal(together.acoustic_BTQ[2 * row + k, :frames], alone.acoustic_BTQ[k, :frames])


def test_settings_reach_their_stage(model):
    greedy = {name: Sampling(0.0) for name in tiny.STAGES}
    first = model.generate(prompts(1), seconds=0.6, num_samples=2, sampling=greedy, ignore_end=True)
    np.testing.assert_array_equal(first.acoustic_BTQ[0], first.acoustic_BTQ[1])
    warm = model.generate(
        prompts(1), seconds=0.6, num_samples=2, sampling={**greedy, "fine": Sampling(1.0)}, ignore_end=True
    )
    np.testing.assert_array_equal(warm.acoustic_BTQ[..., :1], first.acoustic_BTQ[..., :1])
    assert not np.array_equal(warm.acoustic_BTQ[0], warm.acoustic_BTQ[1])


def test_end_tokens_shorten_and_ignore_end_does_not(model):
    bold = {name: Sampling(4.0) for name in tiny.STAGES}
    out = model.generate(prompts(1), seconds=4.0, num_samples=12, sampling=bold)
    assert out.ended_B.any()
    for length, ended, codes_TQ in zip(out.lengths_B, out.ended_B, out.acoustic_BTQ, strict=True):
        assert (length < 5 * 16000) == ended and length >= 16000
        assert np.sum(codes_TQ[:, 0] >= 0) == -(-length // 320)
    assert_sound(out)
    kept = model.generate(prompts(1), seconds=4.0, num_samples=12, sampling=bold, ignore_end=True)
    assert not kept.ended_B.any() and set(kept.lengths_B) == {5 * 16000}


def test_log_likelihood_is_the_plain_sum(model):
    wave_BW, lengths_B = prompts(3, 30000), np.array([30000, 12345, 22222])
    scores_B = model.log_likelihood(wave_BW, lengths_B, normalize=False)
    lm = model.stages["semantic"]
    for row, length in enumerate(lengths_B):
        semantic_T = model.tokenizer.encode(wave_BW[row : row + 1, :length])[0]
        tokens = lm.stage.prefix(None, semantic_T[run_starts(semantic_T)])
        logits_TV = Transformer(lm.config).apply({"params": lm.params}, tokens[None])[0]
        log_probabilities_TV = jax.nn.log_softmax(logits_TV[:-1])
        expected = sum(float(log_probabilities_TV[t, token]) for t, token in enumerate(tokens[1:]))
        assert scores_B[row] == pytest.approx(expected, abs=1e-4)
        normalized = model.log_likelihood(wave_BW[row : row + 1, :length])
        assert normalized[0] == pytest.approx(expected / (len(tokens) - 1), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "improvise"}, "unknown mode"),
        ({"mode": "unconditional", "prompt_BW": prompts(1), "seconds": 1.0}, "a prompt is refused"),
        ({"mode": "continuation"}, "no prompt"),
        ({"mode": "acoustic", "prompt_BW": prompts(1), "seconds": 3.0}, "seconds are refused"),
        ({"prompt_BW": prompts(1), "seconds": 0.0}, "seconds out of range"),
        ({"prompt_BW": prompts(1), "num_samples": 0}, "num_samples"),
        ({"prompt_BW": prompts(1, 639)}, "shorter than one semantic token"),
        ({"prompt_BW": prompts(1)[0]}, r"\[B, W\]"),
        ({"prompt_BW": prompts(1) * np.nan}, "finite|NaN"),
    ],
)
def test_bad_requests(model, arguments, message):
    with pytest.raises(UserError, match=message):
        model.generate(**arguments)


def test_streamed_is_not_streamed(model):
    request = {"prompt_BW": prompts(2, 20000), "lengths_B": np.array([20000, 12345]), "seconds": 6.3, "seed": 3}
    request |= {"sampling": {name: Sampling(2.0) for name in tiny.STAGES}, "num_samples": 2}
    whole = model.generate(**request)
    blocks = list(model.stream(**request))
    assert all(block.wave_BW.shape[1] <= 16000 for block in blocks)
    np.testing.assert_array_equal(np.concatenate([block.wave_BW for block in blocks], axis=1), whole.wave_BW)
    np.testing.assert_array_equal(sum(block.lengths_B for block in blocks), whole.lengths_B)
    # Rows of different length, each as its own codes sound.
    assert len(set(whole.lengths_B)) > 1
    for wave_W, codes_TQ, length in zip(whole.wave_BW, whole.acoustic_BTQ, whole.lengths_B, strict=True):
        alone_1W = model.codec.decode(codes_TQ[None, codes_TQ[:, 0] >= 0])
        np.testing.assert_allclose(wave_W[:length], alone_1W[0, :length], atol=1e-5)


def test_the_first_block_comes_before_the_rest_is_sampled(model):
    windows = model.stream(prompts(1, 16000), seconds=9.0, ignore_end=True)
    (row,) = windows.rows
    sampled = [len(row.acoustic) for _ in windows]
    # The prompt without a window; then, of windows of 2 s that carry 0.6 s, one after the other. The first window's
    # only whole chunk is of 0.9 s: no block.
    assert sampled[0] == 50 and sampled[1] == 170 and sampled[-1] == 500
    assert sorted(set(sampled)) == sampled[:1] + list(range(170, 501, 70)) + [500]


def test_stream_refuses_before_the_first_block(model):
    with pytest.raises(UserError, match="unknown mode"):
        model.stream(mode="improvise")


def test_a_second_call_compiles_nothing(model):
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    request = {"seconds": 3.0, "num_samples": 2, "ignore_end": True}
    model.generate(prompts(1, 16000, seed=1), **request)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        # The same prompt: another one of this length may have tokens for another size of prefix.
        model.generate(prompts(1, 16000, seed=1), seed=5, **request)
        assert compiled == []
        jax.jit(lambda x: x * 3.25)(1.0)
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize(("weights", "found"), [("bfloat16", "bfloat16"), ("int8", "int8"), ("float32", "float32")])
def test_weights_as_wished(model, bundle_folder, weights, found):
    small = audiolm_jax.load_bundle(bundle_folder, weights=weights)
    for lm in small.stages.values():
        assert str(jax.tree.leaves(lm.weights["layers"][0]["wide"])[0].dtype) == found
    out = small.generate(prompts(1), seconds=0.6, ignore_end=True)
    assert out.lengths_B.tolist() == [16000 + 9600]
    assert_sound(out)


def test_unknown_weights_are_refused(bundle_folder):
    with pytest.raises(UserError, match="unknown weights: int4"):
        audiolm_jax.load_bundle(bundle_folder, weights="int4")


@pytest.fixture(scope="module")
def acoustic_only(tmp_path_factory):
    """The baseline of the paper's piano experiment: a codec and one stage for all of its levels, nothing semantic."""
    folder = tmp_path_factory.mktemp("acoustic_only")
    codec = tiny.codec_part()
    stage = tiny.part_of(
        "coarse",
        settings={"tokens": {"codec": codec.fingerprint(), "semantic_tokenizer": "of the dataset"}},
        **{"stage.semantic_condition": False, "stage.num_coarse_quantizers": tiny.LEVELS},
    )
    stage.weights["params"]["head"] = stage.weights["params"]["head"] * 4
    for role, part in {"codec": codec, "coarse": stage}.items():
        (folder / role).mkdir()
        write_part(folder / role, part)
    bundle.write_bundle({role: str(folder / role) for role in ("codec", "coarse")}, folder / "bundle")
    return audiolm_jax.load_bundle(folder / "bundle")


def test_acoustic_tokens_alone_go_on_and_may_end(acoustic_only, float64):
    """Greedily, so that a plain loop over the full forward pass says what must come."""
    model = tiny.in_double_precision(acoustic_only)
    wave_BW = prompts(1, 7777)
    out = model.generate(wave_BW, seconds=0.5, sampling={"coarse": Sampling(0.0)}, ignore_end=True)
    assert out.lengths_B.tolist() == [7777 + 8000] and set(out.tokens_per_second) == {"coarse"}
    assert out.semantic_BT.shape == (1, 0)
    lm = model.stages["coarse"]
    assert lm.stage.condition is None
    frames = 7777 // 640 * 2
    given_TQ = np.asarray(model.codec.encode(wave_BW))[0, :frames]
    np.testing.assert_array_equal(out.acoustic_BTQ[0, :frames], given_TQ)
    tokens = lm.stage.prefix(None, lm.stage.target.flatten(given_TQ)).tolist()
    forward = jax.jit(Transformer(lm.config).apply)
    width = 1 + out.acoustic_BTQ.size
    while len(tokens) < width:
        padded = np.pad(tokens, (0, width - len(tokens)))
        logits_V = np.asarray(forward({"params": lm.params}, padded[None]))[0, len(tokens) - 1]
        start = lm.stage.level_start((len(tokens) - 1) % tiny.LEVELS)
        tokens.append(start + int(np.argmax(logits_V[start : start + tiny.CODES])))
    expected_TQ = lm.stage.target.unflatten(np.array(tokens[1:]) - lm.stage.target_offset)
    np.testing.assert_array_equal(out.acoustic_BTQ[0], expected_TQ)

    bold = {"coarse": Sampling(4.0)}
    out = acoustic_only.generate(prompts(1), seconds=6.0, num_samples=6, sampling=bold)
    assert out.ended_B.any() and np.all((out.lengths_B < 7 * 16000) == out.ended_B)
    assert_sound(out)


def test_what_needs_semantic_tokens_is_refused_without_them(acoustic_only):
    for ask in (
        lambda: acoustic_only.generate(prompts(1), mode="acoustic"),
        lambda: acoustic_only.log_likelihood(prompts(1)),
    ):
        with pytest.raises(UserError, match="no semantic stage"):
            ask()
