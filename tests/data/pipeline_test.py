"""Batches: deterministic, resumable, complete."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import soundfile

from audiolm_jax.config import soundstream_config, tiny_language_model_config
from audiolm_jax.data import token_dataset
from audiolm_jax.data.pipeline import AudioInput, TokenInput
from audiolm_jax.errors import UserError
from audiolm_jax.lm.objective import stage_from_config
from audiolm_jax.training.registry import build_input
from tests import tiny

METADATA = token_dataset.TokenMetadata("c" * 8, "s" * 8, 64, 32, 6, 25, 50, 16000, 1.5)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A dataset of 23 + 5 records whose semantic tokens count up from the record's number."""
    folder = tmp_path_factory.mktemp("tokens")
    lengths, frames = {}, {}
    for split, count in (("train", 23), ("validation", 5)):
        records = [
            {
                "id": f"{split}/{i}",
                "semantic": (np.arange(10 + i) + i).astype(np.int32) % 64,
                "acoustic": np.full((2 * (10 + i), 6), i, np.int32),
                "num_samples": 640 * (10 + i),
                "speaker": "s",
                "is_end": True,
            }
            for i in range(count)
        ]
        token_dataset.write_shard(folder / token_dataset.shard_name(split, 0, 1), records, 6)
        lengths[split] = [count]
        frames[split] = [len(record["semantic"]) for record in records]
    token_dataset.write_info(folder, lengths, frames, METADATA)
    return str(folder)


def config_of(tokens, stage="coarse", **fields):
    config = tiny_language_model_config(stage)
    config.update({"data_dir": tokens, "batch_size": 4, **fields})
    return config


def token_input(config):
    return TokenInput(config, stage_from_config(config))


def test_records_survive_the_round_trip(tokens):
    dataset = token_dataset.TokenDataset(tokens)
    assert dataset.metadata == METADATA and set(dataset.splits) == {"train", "validation"}
    record = dataset.source("train")[7]
    np.testing.assert_array_equal(record["semantic"], np.arange(17) + 7)
    assert record["acoustic"].shape == (34, 6) and record["is_end"]


def test_position_resumes_exactly(tokens):
    batches = token_input(config_of(tokens)).training(np.arange(4))
    for _ in range(9):
        next(batches)
    position = batches.get_state()
    expected = [next(batches) for _ in range(12)]
    again = token_input(config_of(tokens)).training(np.arange(4))
    again.set_state(position)
    for batch in expected:
        for name, array in next(again).items():
            np.testing.assert_array_equal(array, batch[name])


def test_an_epoch_holds_every_record_once(tokens):
    config = config_of(tokens, batch_size=1)
    batches = token_input(config).training(np.arange(1))
    first = [
        int(b["decoder_target_tokens"][0][b["decoder_loss_weights"][0] > 0][0]) for b in itertools.islice(batches, 46)
    ]
    assert sorted(first[:23]) == sorted(first[23:]) and len(set(first[:23])) == 23
    assert first[:23] != first[23:]


def test_a_batch_does_not_depend_on_how_many_processes_read_it(tokens):
    source = token_input(config_of(tokens, packing=True))
    whole = list(itertools.islice(source.training(np.arange(4)), 12))
    shares = [itertools.islice(source.training(rows), 12) for rows in (np.array([0, 1]), np.array([2, 3]))]
    for batch, first, second in zip(whole, *shares, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([first[name], second[name]]))


def test_processes_evaluate_the_same_number_of_batches(tokens):
    source = token_input(config_of(tokens))
    whole = list(source.evaluation(np.arange(4)))
    first, second = (list(source.evaluation(rows)) for rows in (np.array([0, 2]), np.array([1, 3])))
    assert len(whole) == len(first) == len(second) == 2
    for name in ("decoder_target_tokens", "valid_B"):
        for all_rows, even, odd in zip(whole, first, second, strict=True):
            np.testing.assert_array_equal(
                all_rows[name],
                np.stack([even[name], odd[name]], 1).reshape(even[name].shape[0] * 2, *even[name].shape[1:]),
            )


def test_packed_rows_hold_every_record_once_an_epoch(tokens):
    config = config_of(tokens, batch_size=1, packing=True)
    source = token_input(config)
    rows = list(itertools.islice(source.training(np.arange(1)), 60))
    alone = [int(row["decoder_segment_ids"].max()) for row in rows]
    assert max(alone) > 1
    seen, epochs = [], []
    for row in rows:
        segments, targets = row["decoder_segment_ids"][0], row["decoder_target_tokens"][0]
        weights = row["decoder_loss_weights"][0]
        for segment in range(1, segments.max() + 1):
            mine = segments == segment
            assert row["decoder_input_tokens"][0][mine][0] == 0
            seen.append(int(targets[mine & (weights > 0)][0]))
        if len(seen) == 23:
            epochs.append(sorted(seen))
            seen = []
    assert len(epochs) >= 3 and len(set(epochs[0])) == 23 and epochs[0] == epochs[1]


def test_evaluation_reads_everything_once(tokens):
    config = config_of(tokens, "semantic")
    config.stage.crop_seconds = 0.2
    batches = list(token_input(config).evaluation(np.arange(4)))
    weights = np.concatenate([b["decoder_loss_weights"] * b["valid_B"][:, None] for b in batches])
    # 10 … 14 tokens, of which none repeats, and an end token each.
    assert weights.sum() == sum(range(10, 15)) + 5
    assert {b["decoder_input_tokens"].shape[0] for b in batches} == {4}


def test_dataset_that_does_not_fit_is_refused_by_field(tokens):
    config = config_of(tokens)
    config.stage.codebook_size = 512
    with pytest.raises(UserError, match="config.stage.codebook_size=512 but the tokens have 32"):
        token_input(config)
    with pytest.raises(UserError, match="no token dataset"):
        token_input(config_of(tokens + "/nowhere"))
    with pytest.raises(UserError, match="no training data: config.data_dir"):
        token_input(config_of(""))


@pytest.fixture
def recordings(tmp_path):
    """Ramps whose value tells recording and time."""
    for i in range(6):
        ramp = (i + np.arange(16000 * (i + 1)) / 16000 / 10) / 10
        soundfile.write(tmp_path / f"{i}.wav", ramp, 16000, subtype="FLOAT")
    return tmp_path


def audio_config(folder, **fields):
    config = soundstream_config()
    config.update({"data_dir": str(folder), "batch_size": 5, "crop_seconds": 1.5, **fields})
    config.input.update({"num_threads": 2, "prefetch_batches": 2})
    return config


def test_audio_crops_are_continuous_and_cover_each_recording(recordings):
    source = AudioInput(audio_config(recordings), print)
    seen = set()
    for batch in itertools.islice(source.training(np.arange(5)), 30):
        assert batch["wave_BW"].shape == (5, 24000) and batch["wave_BW"].dtype == np.float32
        for wave_W, length in zip(batch["wave_BW"], batch["lengths_B"], strict=True):
            assert np.all(wave_W[length:] == 0)
            np.testing.assert_allclose(np.diff(wave_W[:length]), 1 / 16000 / 100, atol=1e-7)
            seen.add(int(wave_W[0] * 10 + 1e-4))
    held_out = {int(b["wave_BW"][0, 0] * 10 + 1e-4) for b in source.evaluation(np.arange(5))}
    assert len(seen) == 5 and seen | held_out == set(range(6)) and not seen & held_out


def test_audio_position_resumes_exactly(recordings):
    batches = AudioInput(audio_config(recordings), print).training(np.arange(5))
    for _ in range(5):
        next(batches)
    position, expected = batches.get_state(), None
    expected = [next(batches) for _ in range(5)]
    again = AudioInput(audio_config(recordings), print).training(np.arange(5))
    again.set_state(position)
    for batch in expected:
        np.testing.assert_array_equal(next(again)["wave_BW"], batch["wave_BW"])


def test_audio_evaluation_covers_every_sample(recordings):
    (held_out,) = set(range(6)) - {
        int(w[0] * 10 + 1e-4)
        for b in itertools.islice(AudioInput(audio_config(recordings), print).training(np.arange(5)), 40)
        for w in b["wave_BW"]
    }
    batches = list(AudioInput(audio_config(recordings), print).evaluation(np.arange(5)))
    lengths = np.concatenate([b["lengths_B"] * b["valid_B"] for b in batches])
    assert lengths.sum() == 16000 * (held_out + 1)


@pytest.fixture
def bucket_config(tmp_path):
    """Recordings of 0.5, 0.75 … 4 s, the first sample telling which, twice: for training and held out.

    Crops of 2 s and buckets of 0.5 s and 1 s, so batches of 12, 6 and 3 rows.
    """
    rows = []
    for number, quarters in enumerate(range(2, 17)):
        wave_W = np.full(quarters * 4000, (number + 1) / 100)
        soundfile.write(tmp_path / f"{number}.wav", wave_W, 16000, subtype="FLOAT")
        rows += [
            {"path": f"{number}.wav", "id": f"{split}{number}", "split": split} for split in ("train", "validation")
        ]
    manifest = tmp_path / "recordings.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return audio_config(manifest, batch_size=3, crop_seconds=2.0, bucket_seconds=(0.5, 1.0))


def recordings_in(batch):
    return np.round(batch["wave_BW"][:, 0] * 100).astype(int) - 1


def test_a_bucket_holds_what_fits_no_shorter_one(bucket_config):
    batches = list(itertools.islice(AudioInput(bucket_config, print).training(np.arange(3)), 300))
    seen = {}
    for batch in batches:
        seen.setdefault(batch["wave_BW"].shape, []).extend(recordings_in(batch))
        whole = np.minimum((recordings_in(batch) + 2) * 4000, 32000)
        np.testing.assert_array_equal(batch["lengths_B"], whole)
    assert {shape: set(found) for shape, found in seen.items()} == {
        (12, 8000): {0}, (6, 16000): {1, 2}, (3, 32000): set(range(3, 15)),
    }  # fmt: skip
    # As many stretches of each bucket as there are: 1, 2, and 4 recordings of one crop beside 8 of two.
    counts = np.array([len(seen[shape]) for shape in ((12, 8000), (6, 16000), (3, 32000))])
    np.testing.assert_allclose(counts / counts.sum(), np.array([1, 2, 20]) / 23, rtol=0.15)


def test_held_out_buckets_cover_every_sample_once(bucket_config):
    batches = list(AudioInput(bucket_config, print).evaluation(np.arange(3)))
    assert sum(int((b["lengths_B"] * b["valid_B"]).sum()) for b in batches) == sum(range(2, 17)) * 4000
    assert {b["wave_BW"].shape for b in batches} == {(12, 8000), (6, 16000), (3, 32000)}


def test_processes_share_the_rows_of_every_bucket(bucket_config):
    source = AudioInput(bucket_config, print)
    parts = np.array([0, 2]), np.array([1])
    whole, *shares = ([*itertools.islice(source.training(rows), 30)] for rows in (np.arange(3), *parts))
    for batch, two, one in zip(whole, *shares, strict=True):
        factor = len(batch["wave_BW"]) // 3
        by_row = batch["wave_BW"].reshape(3, factor, -1)
        np.testing.assert_array_equal(two["wave_BW"], by_row[[0, 2]].reshape(2 * factor, -1))
        np.testing.assert_array_equal(one["wave_BW"], by_row[1])


def test_position_in_buckets_resumes_exactly(bucket_config):
    batches = AudioInput(bucket_config, print).training(np.arange(3))
    for _ in range(7):
        next(batches)
    position = batches.get_state()
    expected = [next(batches) for _ in range(9)]
    again = AudioInput(bucket_config, print).training(np.arange(3))
    again.set_state(position)
    for batch in expected:
        np.testing.assert_array_equal(next(again)["wave_BW"], batch["wave_BW"])


@pytest.mark.parametrize("buckets", [(0.0, 1.0), (1.0, 3.0)])
def test_buckets_outside_a_crop_are_refused(bucket_config, buckets):
    bucket_config.bucket_seconds = buckets
    with pytest.raises(UserError, match="no longer than a crop: config.bucket_seconds=.*; crops last 2.0 s"):
        AudioInput(bucket_config, print)


def test_metadata_names_every_field_it_checks():
    config = tiny_language_model_config("semantic")
    for name in ("num_clusters", "num_quantizers", "semantic_rate", "acoustic_rate"):
        other = dataclasses.replace(METADATA, **{name: 7})
        with pytest.raises(UserError, match=f"config.stage.{name}="):
            other.check_stage(config.stage, "somewhere")


@pytest.mark.parametrize("objective", ["semantic", "soundstream"])
def test_data_in_a_bucket_must_be_mounted(objective):
    config = tiny.config_of(objective, data_dir="gs://lab/tokens")
    with pytest.raises(UserError, match="config.data_dir=gs://lab/tokens; mount the bucket with gcsfuse"):
        build_input(config, print)
