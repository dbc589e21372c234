"""Training examples: crops, alignment of the streams, padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiolm_jax.data import transforms
from audiolm_jax.lm.stages import BOS, EOS, make_stage

LAYOUT = {
    "num_clusters": 10_000, "codebook_size": 20_000, "num_quantizers": 6, "num_coarse_quantizers": 2,
    "semantic_rate": 25, "acoustic_rate": 50, "deduplicate": False,
}  # fmt: skip


def record_of(frames, odd=False, is_end=True):
    """Every frame holds its own time, so that alignment shows."""
    acoustic_T = np.arange(2 * frames - odd)
    return {
        "semantic": np.arange(frames, dtype=np.int32),
        "acoustic": np.repeat(acoustic_T[:, None], 6, axis=1).astype(np.int32),
        "is_end": is_end,
    }


@given(frames=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), odd=st.booleans(), is_end=st.booleans())
@settings(max_examples=60, deadline=None)
def test_crops_keep_the_streams_aligned(frames, seed, odd, is_end):
    stage = make_stage("coarse", crop_seconds=2.0, **LAYOUT)
    crop = transforms.crop(record_of(frames, odd, is_end), stage, np.random.default_rng(seed))
    start, count = crop["semantic"][0], len(crop["semantic"])
    assert count == min(frames, 50)
    at_end = start + count == frames
    np.testing.assert_array_equal(crop["semantic"], np.arange(start, start + count))
    np.testing.assert_array_equal(crop["acoustic"][:, 0], np.arange(2 * start, 2 * (start + count) - (odd and at_end)))
    assert crop["is_end"] == (is_end and at_end)


def test_every_crop_is_equally_likely():
    stage = make_stage("semantic", crop_seconds=2.0, **LAYOUT)
    generator = np.random.default_rng(0)
    starts = [transforms.crop(record_of(60), stage, generator)["semantic"][0] for _ in range(4400)]
    counts = np.bincount(starts, minlength=11)
    assert len(counts) == 11 and counts.min() > 320 and counts.max() < 480


@given(frames=st.integers(1, 400), odd=st.booleans())
@settings(max_examples=40, deadline=None)
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
    generator = np.random.default_rng(0)
    for _ in range(50):
        crop = transforms.crop(record_of(80), stage, generator)
        example = transforms.encode(crop, stage)
        ends = np.sum((example["decoder_target_tokens"] == EOS) & (example["decoder_loss_weights"] > 0))
        assert ends == (crop["semantic"][-1] == 79)


def test_a_full_crop_with_its_end_token_fits():
    stage = make_stage("coarse", crop_seconds=2.0, **LAYOUT)
    example = transforms.encode(record_of(50), stage)
    assert example["decoder_target_tokens"][-1] == EOS and example["decoder_loss_weights"][-1] == 1
    assert example["decoder_loss_weights"].sum() == 2 * 100 + 1
