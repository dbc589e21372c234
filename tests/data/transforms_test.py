"""Training examples: crops, alignment of the streams, flattening, packing and their inverses."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from audiolm_jax.data import transforms
from audiolm_jax.lm.stages import BOS, EOS, SEP, make_stage, run_starts

LAYOUT = {
    "num_clusters": 10_000, "codebook_size": 20_000, "num_quantizers": 6, "num_coarse_quantizers": 2,
    "semantic_rate": 25, "acoustic_rate": 50, "deduplicate": False,
}  # fmt: skip


def record_of(frames, odd=False, is_end=True):
    """Every frame holds its own time, so that alignment shows."""
    acoustic_T = np.arange(2 * frames - odd)
    return {
        "id": b"record",
        "semantic": np.arange(frames, dtype=np.int32),
        "acoustic": np.repeat(acoustic_T[:, None], 6, axis=1).astype(np.int32),
        "is_end": is_end,
    }


@given(
    frames=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 2**32),
    odd=st.booleans(),
    is_end=st.booleans(),
)
@settings(max_examples=60)
def test_crops_keep_the_streams_aligned(frames, seed, epoch, odd, is_end):
    stage = make_stage("coarse", crop_seconds=2.0, **LAYOUT)
    crop = transforms.crop(record_of(frames, odd, is_end), stage, seed, epoch)
    start, count = crop["semantic"][0], len(crop["semantic"])
    assert count == min(frames, 50)
    at_end = start + count == frames
    np.testing.assert_array_equal(crop["semantic"], np.arange(start, start + count))
    np.testing.assert_array_equal(crop["acoustic"][:, 0], np.arange(2 * start, 2 * (start + count) - (odd and at_end)))
    assert crop["is_end"] == (is_end and at_end)


@pytest.mark.parametrize("varied", ["id", "seed", "epoch"])
def test_every_crop_is_equally_likely(varied):
    stage = make_stage("semantic", crop_seconds=2.0, **LAYOUT)
    starts = []
    for trial in range(4400):
        chosen = {"id": 0, "seed": 0, "epoch": 0, varied: trial}
        record = {**record_of(60), "id": b"%d" % chosen["id"]}
        starts.append(transforms.crop(record, stage, chosen["seed"], chosen["epoch"])["semantic"][0])
    assert scipy.stats.chisquare(np.bincount(starts, minlength=11)).pvalue > 1e-3


@given(frames=st.integers(1, 400), odd=st.booleans())
@settings(max_examples=40)
def test_windows_cover_the_record_once(frames, odd):
    stage = make_stage("coarse", crop_seconds=2.0, **LAYOUT)
    windows = list(transforms.windows(record_of(frames, odd), stage))
    np.testing.assert_array_equal(np.concatenate([w["semantic"] for w in windows]), np.arange(frames))
    np.testing.assert_array_equal(np.concatenate([w["acoustic"][:, 0] for w in windows]), np.arange(2 * frames - odd))
    assert [w["is_end"] for w in windows] == [False] * (len(windows) - 1) + [True]


@pytest.mark.parametrize("name", ["semantic", "coarse", "fine"])
def test_examples_predict_each_token_from_its_past(name):
    stage = make_stage(name, crop_seconds=2.0, **LAYOUT)
    record = record_of(30)
    example = transforms.encode(record, stage)
    tokens, loss_start = stage.sequence(record["semantic"], record["acoustic"], True)
    inputs, targets, weights = (example[f"decoder_{f}"] for f in ("input_tokens", "target_tokens", "loss_weights"))
    assert inputs.shape == targets.shape == weights.shape == (stage.sequence_length,)
    count = len(tokens) - 1
    assert inputs[0] == BOS
    np.testing.assert_array_equal(inputs[1:count], targets[: count - 1])
    np.testing.assert_array_equal(targets[weights > 0], tokens[loss_start:])
    assert np.all(weights[count:] == 0) and np.all(inputs[count:] == BOS)
    assert (targets[weights > 0][-1] == EOS) == stage.predicts_end


def test_no_end_token_at_the_end_of_a_crop():
    stage = make_stage("semantic", crop_seconds=2.0, **LAYOUT)
    for epoch in range(50):
        crop = transforms.crop(record_of(80), stage, 0, epoch)
        example = transforms.encode(crop, stage)
        ends = np.sum((example["decoder_target_tokens"] == EOS) & (example["decoder_loss_weights"] > 0))
        assert ends == (crop["semantic"][-1] == 79)


def test_a_full_crop_with_its_end_token_fits():
    stage = make_stage("coarse", crop_seconds=2.0, **LAYOUT)
    example = transforms.encode(record_of(50), stage)
    assert example["decoder_target_tokens"][-1] == EOS and example["decoder_loss_weights"][-1] == 1
    assert example["decoder_loss_weights"].sum() == 2 * 100 + 1


@st.composite
def layouts(draw):
    """A stage of any shape: levels, codes, rates, crop, with and without de-duplication."""
    levels = draw(st.integers(1, 12))
    name = draw(st.sampled_from(["semantic", "coarse", "fine"] if levels > 1 else ["semantic", "coarse"]))
    semantic_rate = draw(st.integers(1, 50))
    return make_stage(
        name,
        num_clusters=draw(st.integers(1, 2000)),
        codebook_size=draw(st.integers(1, 2**14)),
        num_quantizers=levels,
        num_coarse_quantizers=draw(st.integers(1, levels - 1 if name == "fine" else levels)),
        semantic_rate=semantic_rate,
        acoustic_rate=semantic_rate * draw(st.integers(1, 3)),
        crop_seconds=draw(st.integers(1, 40)) / semantic_rate,
        deduplicate=draw(st.booleans()),
        semantic_condition=draw(st.booleans()),
    )


def tokens_of(stage, frames, generator):
    """A record of so many semantic frames, among whose tokens some repeat."""
    codes = {"semantic": (stage.target.codebook_size, 1), "acoustic": (stage.target.codebook_size, 12)}
    for segment in filter(None, (stage.condition, stage.target)):
        codes[segment.source] = (segment.codebook_size, 12)
    repeats = generator.integers(1, 4, frames)
    return {
        "id": b"%d" % generator.integers(10**9),
        "semantic": np.repeat(generator.integers(0, codes["semantic"][0], frames), repeats)[:frames].astype(np.int32),
        "acoustic": generator.integers(
            0, codes["acoustic"][0], (frames * stage.acoustic_rate // stage.semantic_rate, 12)
        ).astype(np.int32),
        "is_end": bool(generator.integers(2)),
    }


def codes_in(tokens, segment, offset):
    """Codes [T, levels] of a segment's tokens: the inverse of its offsets and flattening."""
    levels = np.arange(len(tokens)) % segment.num_levels
    codes = tokens - offset - levels * segment.codebook_size
    assert np.all((codes >= 0) & (codes < segment.codebook_size))
    return codes.reshape(-1, segment.num_levels)


def streams_in(inputs, targets, stage):
    """Condition and target of one packed sequence, each as codes, and whether it ends: the inverse of `pack`."""
    tokens = np.append(inputs[:1], targets)
    assert tokens[0] == BOS
    np.testing.assert_array_equal(inputs[1:], tokens[1:-1])
    ended, streams = tokens[-1] == EOS, {}
    tokens = tokens[1 : -1 if ended else None]
    if stage.condition:
        (place,) = np.flatnonzero(tokens == SEP)
        streams["condition"] = codes_in(tokens[:place], stage.condition, 3)
        tokens = tokens[place + 1 :]
    before = stage.condition.num_levels * stage.condition.codebook_size if stage.condition else 0
    streams["target"] = codes_in(tokens, stage.target, 3 + before)
    return streams, ended


@given(stage=layouts(), sizes=st.lists(st.integers(1, 80), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150)
def test_what_is_cropped_flattened_and_packed_is_found_again(stage, sizes, seed):
    generator = np.random.default_rng(seed)
    crops, positions = [], 0
    for frames in sizes:
        crop = transforms.crop(tokens_of(stage, frames, generator), stage, seed, 0)
        positions += stage.max_positions(len(crop["semantic"]))
        if positions <= stage.sequence_length:
            crops.append(crop)
    packed = transforms.pack(crops, stage)
    inputs, targets, weights, segments = (
        packed[f"decoder_{name}"] for name in ("input_tokens", "target_tokens", "loss_weights", "segment_ids")
    )
    assert list(dict.fromkeys(segments[segments > 0])) == list(range(1, len(crops) + 1))
    assert np.all(np.diff(np.flatnonzero(segments)) == 1) and not weights[segments == 0].any()
    for number, crop in enumerate(crops, 1):
        mine = segments == number
        streams, ended = streams_in(inputs[mine], targets[mine], stage)
        assert ended == (crop["is_end"] and stage.predicts_end)
        for name, segment in (("condition", stage.condition), ("target", stage.target)):
            if segment is None:
                continue
            levels = slice(segment.first_level, segment.first_level + segment.num_levels)
            codes_TQ = crop[segment.source].reshape(len(crop[segment.source]), -1)[:, levels]
            if segment.deduplicate:
                runs = [next(group) for _, group in itertools.groupby(codes_TQ[:, 0])]
                codes_TQ = np.array(runs)[:, None]
            np.testing.assert_array_equal(streams[name], codes_TQ)
        # The loss is on the target and the end alone.
        assert weights[mine].sum() == streams["target"].size + ended
        assert np.all(np.diff(weights[mine]) >= 0)
    if len(crops) == 1:
        alone = transforms.encode(crops[0], stage)
        assert all(np.array_equal(alone[name], packed[name]) for name in alone) and len(alone) == 3


@given(runs=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=40))
@settings(max_examples=100)
def test_what_is_deduplicated_comes_back_from_the_lengths_of_its_runs(runs):
    tokens_T = np.repeat([code for code, _ in runs], [length for _, length in runs]).astype(int)
    starts = run_starts(tokens_T)
    kept = tokens_T[starts]
    assert np.all(kept[1:] != kept[:-1])
    lengths = np.diff(np.append(np.flatnonzero(starts), len(tokens_T)))
    np.testing.assert_array_equal(np.repeat(kept, lengths), tokens_T)
