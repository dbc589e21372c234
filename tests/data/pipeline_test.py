"""Batches: deterministic, resumable, complete."""

import dataclasses
import itertools
import json
import math
import re

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


def write(folder, splits, metadata, code=lambda i: i):
    """Record i has 10 + i frames; its semantic tokens count up from i and its acoustic ones are `code(i)`."""
    lengths, frames = {}, {}
    for split, count in splits:
        records = [
            {
                "id": f"{split}/{i}",
                "semantic": (np.arange(10 + i) + i).astype(np.int32) % 64,
                "acoustic": np.full((2 * (10 + i), 6), code(i), np.int32),
                "num_samples": 640 * (10 + i),
                "speaker": "s",
                "is_end": True,
            }
            for i in range(count)
        ]
        token_dataset.write_shard(folder / token_dataset.shard_name(split, 0, 1), records, 6)
        lengths[split] = [count]
        frames[split] = [len(record["semantic"]) for record in records]
    token_dataset.write_info(folder, lengths, frames, metadata)
    return str(folder)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A dataset of 23 + 5 records."""
    return write(tmp_path_factory.mktemp("tokens"), (("train", 23), ("validation", 5)), METADATA)


@pytest.fixture(scope="module")
def other_tokens(tokens, tmp_path_factory):
    """A dataset of 7 + 2 records, whose acoustic tokens are 31, 30, …."""
    return write(tmp_path_factory.mktemp("other"), (("train", 7), ("validation", 2)), METADATA, lambda i: 31 - i)


def config_of(tokens, stage="coarse", **fields):
    config = tiny_language_model_config(stage)
    config.update({"data_dir": tokens, "batch_size": 4, **fields})
    return config


def mixture_of(*folders, stage="coarse", rates, **fields):
    config = config_of("", stage, **fields)
    config.mixture.update({"data_dirs": folders, "rates": rates})
    return config


def rows_of(batches):
    """The rows of batches, one behind the other."""
    for batch in batches:
        for row in range(len(batch["decoder_input_tokens"])):
            yield {name: array[row] for name, array in batch.items()}


def records_in(row):
    """Which records a row of the coarse stage holds, told by the first acoustic token of each."""
    targets, counts = row["decoder_target_tokens"], row["decoder_loss_weights"] > 0
    segments = row.get("decoder_segment_ids", counts.astype(int))
    return [int(targets[counts & (segments == number)][0]) - 3 - 64 for number in range(1, segments.max() + 1)]


def token_input(config):
    return TokenInput(config, stage_from_config(config))


def test_records_survive_the_round_trip(tokens):
    dataset = token_dataset.TokenDataset(tokens)
    assert dataset.metadata == METADATA and set(dataset.splits) == {"train", "validation"}
    record = dataset.source("train")[7]
    np.testing.assert_array_equal(record["semantic"], np.arange(17) + 7)
    assert record["acoustic"].shape == (34, 6) and record["is_end"]


@pytest.mark.parametrize("kind", ["alone", "packed", "mixture"])
def test_position_resumes_exactly_from_any_step(kind, tokens, other_tokens):
    fields = {"batch_size": 2, "packing": kind == "packed"}
    config = config_of(tokens, **fields)
    if kind == "mixture":
        config = mixture_of(tokens, other_tokens, rates=(0.3, 1), **fields)
    config.stage.crop_seconds = 0.6
    batches = token_input(config).training(np.arange(2))
    stop = int(np.random.default_rng().integers(1, 200))
    for _ in range(stop):
        next(batches)
    position = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(100)]
    again = token_input(config).training(np.arange(2))
    again.set_state(position)
    for step, batch in enumerate(expected, stop):
        for name, array in next(again).items():
            np.testing.assert_array_equal(array, batch[name], err_msg=f"step {step}")


def test_an_epoch_holds_every_record_once(tokens):
    rows = rows_of(token_input(config_of(tokens, batch_size=1)).training(np.arange(1)))
    seen = [records_in(row)[0] for row in itertools.islice(rows, 46)]
    assert sorted(seen[:23]) == sorted(seen[23:]) == list(range(23)) and seen[:23] != seen[23:]


def test_a_batch_does_not_depend_on_how_many_processes_read_it(tokens):
    source = token_input(config_of(tokens, packing=True))
    whole = list(itertools.islice(source.training(np.arange(4)), 12))
    shares = [itertools.islice(source.training(rows), 12) for rows in (np.array([0, 1]), np.array([2, 3]))]
    for batch, first, second in zip(whole, *shares, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([first[name], second[name]]))


@pytest.mark.parametrize("packing", [False, True])
def test_two_hosts_and_then_one_see_every_record_of_an_epoch_once(tokens, packing):
    config = config_of(tokens, packing=packing, batch_size=2)
    config.stage.crop_seconds = 2.0
    source = token_input(config)
    first_epoch = []
    for row in rows_of(source.training(np.arange(2))):
        first_epoch.append(records_in(row))
        if sum(map(len, first_epoch)) == 23:
            break
    num_rows = len(first_epoch)
    assert num_rows == 23 if not packing else num_rows < 15
    for stop in range(1, num_rows // 2):
        hosts = [source.training(np.array([row])) for row in range(2)]
        by_host = [[records_in(row) for row in rows_of(itertools.islice(host, stop))] for host in hosts]
        positions = [json.loads(json.dumps(host.get_state())) for host in hosts]
        assert positions[0] == positions[1]
        alone = token_input(config).training(np.arange(2))
        alone.set_state(positions[0])
        rest = [records_in(row) for row in itertools.islice(rows_of(alone), num_rows - 2 * stop)]
        seen = sum([*by_host[0], *by_host[1], *rest], [])
        assert sorted(seen) == list(range(23))


def test_members_of_a_mixture_take_turns_each_through_its_own_epochs(tokens, other_tokens):
    config = mixture_of(tokens, other_tokens, rates=(3, 1), batch_size=4)
    # Acoustic tokens up to 22 are the one's, the others the other's.
    rows = [records_in(row)[0] for row in itertools.islice(rows_of(token_input(config).training(np.arange(4))), 92)]
    first, second = [code for code in rows if code < 23], [code for code in rows if code >= 23]
    assert all(sum(code >= 23 for code in rows[i : i + 4]) == 1 for i in range(0, 92, 4))
    assert len(first) == 3 * 23 and len(second) == 23
    for epoch in range(3):
        assert sorted(first[23 * epoch : 23 * (epoch + 1)]) == list(range(23))
        assert sorted(second[7 * epoch : 7 * (epoch + 1)]) == list(range(25, 32))
    assert first[:23] != first[23:46] and second[:7] != second[7:14]


def test_a_mixture_holds_out_the_records_of_every_member(tokens, other_tokens):
    config = mixture_of(tokens, other_tokens, rates=(1000, 1))
    rows = [row for row in rows_of(token_input(config).evaluation(np.arange(4))) if row["valid_B"]]
    assert [records_in(row)[0] for row in rows] == [0, 1, 2, 3, 4, 31, 30]


def test_metadata_of_a_mixture_weighs_its_members(tokens, tmp_path):
    other = write(tmp_path, (("train", 2),), dataclasses.replace(METADATA, mean_run_length=3.0))
    mixed = token_input(mixture_of(tokens, other, rates=(3, 1))).tokens
    # Of four frames three keep two tokens, one keeps a third.
    assert mixed.pop("mean_run_length") == pytest.approx(4 / (2 + 1 / 3))
    expected = dataclasses.asdict(METADATA)
    del expected["mean_run_length"]
    assert mixed == expected


def test_mixtures_that_contradict_themselves_are_refused(tokens, other_tokens, tmp_path):
    cases = {
        "config.mixture.rates=(1,); give 2 numbers": mixture_of(tokens, other_tokens, rates=(1,)),
        "config.mixture.rates=(1, 0); give 2 numbers": mixture_of(tokens, other_tokens, rates=(1, 0)),
        "config.mixture.rates=(1, 'much'); give 2 numbers": mixture_of(tokens, other_tokens, rates=(1, "much")),
        "config.mixture.rates=(1, inf); give 2 numbers": mixture_of(tokens, other_tokens, rates=(1, math.inf)),
        "not a folder for each member: config.mixture.data_dirs": mixture_of(tokens, "", rates=(1, 1)),
        "both a dataset and a mixture: config.data_dir=x": mixture_of(tokens, rates=(1,), data_dir="x"),
        "no token dataset: nowhere": mixture_of(tokens, "nowhere", rates=(1, 1)),
        "config.mixture.data_dirs=gs://lab/tokens; mount": mixture_of(tokens, "gs://lab/tokens", rates=(1, 1)),
    }
    for name in ("codec", "semantic_tokenizer"):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, (("train", 2),), dataclasses.replace(METADATA, **{name: "other"}))
        message = f"tokens of another {name} than the mixture's first member: {folder}"
        cases[message] = mixture_of(tokens, str(folder), rates=(1, 1))
    small = tmp_path / "small"
    small.mkdir()
    write(small, (("train", 2),), dataclasses.replace(METADATA, num_clusters=32))
    cases[f"config.stage.num_clusters=64 but the tokens have 32: {small}"] = mixture_of(
        tokens, str(small), rates=(1, 1)
    )
    for message, config in cases.items():
        with pytest.raises(UserError, match=re.escape(message)):
            token_input(config)


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
    rows = rows_of(token_input(config_of(tokens, batch_size=1, packing=True)).training(np.arange(1)))
    first_row, seen = next(rows), []
    segments = first_row["decoder_segment_ids"]
    starts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
    assert len(starts) > 1 and not first_row["decoder_input_tokens"][starts].any()
    for row in itertools.chain([first_row], rows):
        seen += records_in(row)
        if len(seen) >= 3 * 23:
            break
    assert len(seen) == 3 * 23 and all(sorted(seen[i : i + 23]) == list(range(23)) for i in (0, 23, 46))


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


def test_a_recording_that_cannot_be_read_is_left_out_and_named_once(recordings):
    rows = [f'{{"path": "{recordings}/{i}.wav", "split": "{"train" if i < 4 else "validation"}"}}' for i in range(6)]
    (recordings / "rows.jsonl").write_text("\n".join(rows))
    for i in (2, 4):
        # From the second crop on.
        wave_W, _ = soundfile.read(recordings / f"{i}.wav", dtype="float32")
        wave_W[25_000:] = np.nan
        soundfile.write(recordings / f"{i}.wav", wave_W, 16000, subtype="FLOAT")
    lines: list[str] = []
    source = AudioInput(audio_config(recordings / "rows.jsonl"), lines.append)
    batches = list(itertools.islice(source.training(np.arange(5)), 40))
    seen = np.concatenate([(batch["wave_BW"][:, 0] * 10 + 1e-4).astype(int) for batch in batches])
    assert all(np.isfinite(batch["wave_BW"]).all() for batch in batches)
    # One of its two stretches is mostly readable, the other's turn goes to recording 3.
    assert set(seen) == set(range(4)) and np.mean(seen == 3) > 0.35
    again = itertools.islice(
        AudioInput(audio_config(recordings / "rows.jsonl"), lines.append).training(np.arange(5)), 9
    )
    for batch, other in zip(batches, again):
        np.testing.assert_array_equal(batch["wave_BW"], other["wave_BW"])
    held_out = list(source.evaluation(np.arange(5)))
    counted = np.concatenate([batch["lengths_B"] * batch["valid_B"] for batch in held_out])
    assert counted.tolist()[:8] == [24000, 0, 0, 0, 24000, 24000, 24000, 24000] and not counted[8:].any()
    assert all(np.isfinite(batch["wave_BW"]).all() for batch in held_out)
    assert sorted(re.findall(r"^left out: .*not finite.*/(\d).wav", "\n".join(lines), re.M)) == ["2", "2", "4"]
    for i in range(4):
        soundfile.write(recordings / f"{i}.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(UserError, match="no recording can be read"):
        next(AudioInput(audio_config(recordings / "rows.jsonl"), lines.append).training(np.arange(5)))


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
