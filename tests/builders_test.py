"""`tfds.load` by name: the same records as `audiolm tokenize`."""

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from audiolm_jax import builders, commands
from audiolm_jax.data import manifest, token_dataset, tokenize
from tests.data import fakes
from tests.data.tokenize_test import ignore, recordings  # noqa: F401


@pytest.mark.parametrize("name", ["librilight_tokens", "piano_tokens", "folder_tokens"])
def test_builder_gives_the_records_of_tokenize(recordings, tmp_path, monkeypatch, name):  # noqa: F811
    monkeypatch.setattr(commands, "load_tokenizers", fakes.load)
    listed = recordings[0].path.parent / "list.jsonl"
    parts = {"recordings": str(listed), "codec": "x", "semantic_tokenizer": "y"}
    loaded = tfds.data_source(name, data_dir=tmp_path, builder_kwargs=parts)
    tokenize.tokenize(tokenize.Request(manifest.read_manifest(listed), tmp_path / "ours"), fakes.load("x", "y"), ignore)
    theirs = token_dataset.TokenDataset(str(tmp_path / name / "1.0.0"))
    ours = token_dataset.TokenDataset(str(tmp_path / "ours"))
    assert theirs.metadata == ours.metadata and theirs.metadata.codec == "x" * 8
    assert set(theirs.splits) == set(ours.splits) == {"train", "validation"}
    assert {split: len(records) for split, records in loaded.items()} == {"train": 8, "validation": 4}
    for split in ours.splits:
        np.testing.assert_array_equal(theirs.num_frames(split), ours.num_frames(split))
        assert len(theirs.source(split)) == len(ours.source(split)) > 3
        for one, other in zip(theirs.source(split), ours.source(split), strict=True):
            assert one.keys() == other.keys()
            for field in one:
                np.testing.assert_array_equal(one[field], other[field])
    assert token_dataset.verify(tmp_path / name / "1.0.0", ignore) > 6


@pytest.mark.slow
def test_tf_data_of_a_builder(recordings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(commands, "load_tokenizers", fakes.load)
    listed = recordings[0].path.parent / "list.jsonl"
    parts = {"recordings": str(listed), "codec": "x", "semantic_tokenizer": "y", "file_format": "tfrecord"}
    loaded = tfds.load("folder_tokens", split="validation", data_dir=tmp_path, builder_kwargs=parts)
    expected = [recording for recording in recordings if recording.split == "validation"]
    for record, recording in zip(loaded.as_numpy_iterator(), expected, strict=True):
        wave_W, _ = soundfile.read(recording.path, dtype="float32")
        assert record["id"].decode() == recording.id
        np.testing.assert_array_equal(record["semantic"], fakes.semantic(wave_W))
        np.testing.assert_array_equal(record["acoustic"], fakes.acoustic(wave_W))


def test_prepared_tokens_load_by_name_alone(recordings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(commands, "load_tokenizers", fakes.load)
    listed = str(recordings[0].path.parent / "list.jsonl")
    with pytest.raises(Exception, match="nothing to make tokens of"):
        tfds.data_source("piano_tokens", data_dir=tmp_path)
    parts = {"recordings": listed, "codec": "x", "semantic_tokenizer": "y"}
    builders.PianoTokens(data_dir=tmp_path, **parts).download_and_prepare()
    builder = tfds.builder("piano_tokens", data_dir=tmp_path)
    assert [record["id"] for record in builder.as_data_source("validation")] == [b"r01", b"r04", b"r07", b"r10"]
    assert builder.info.metadata["semantic_tokenizer"] == "y" * 8
