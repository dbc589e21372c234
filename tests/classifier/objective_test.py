"""Training the classifier: what a step computes, what it learns, and that a resumed run is an uninterrupted one."""

import json

import jax
import numpy as np
import pytest
import soundfile

import audiolm_jax
from audiolm_jax import audio
from audiolm_jax.classifier.objective import label_totals
from audiolm_jax.data import manifest, pipeline
from audiolm_jax.errors import UserError
from audiolm_jax.parts import read_part
from audiolm_jax.training import loop, registry
from audiolm_jax.training.metrics import is_timing, read_metrics
from tests import tiny

RATE, SPEAKERS = 16_000, ("alto", "bass", "tenor")


@pytest.fixture(scope="module")
def choir(tmp_path_factory):
    """Three "speakers", each with a pitch of its own, in notes of any loudness and length."""
    folder = tmp_path_factory.mktemp("choir")
    generator = np.random.default_rng(3)
    for speaker, pitch in zip(SPEAKERS, (440, 220, 330), strict=True):
        (folder / speaker).mkdir()
        for number in range(12):
            time = np.arange(round(RATE * generator.uniform(0.5, 2.0))) / RATE
            wave_W = sum(np.sin(2 * np.pi * pitch * k * time + generator.uniform(0, 6)) / k for k in (1, 2, 3))
            wave_W = generator.uniform(0.05, 0.3) * wave_W + 0.02 * generator.standard_normal(len(time))
            soundfile.write(folder / speaker / f"{number}.wav", wave_W, RATE)
    return folder


def config_of(choir, **fields):
    config = tiny.config_of(
        "classifier",
        **{"data_dir": str(choir), "batch_size": 8, "log_every_steps": 1, "model.channels": (4, 8, 8), **fields},
    )
    config.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 4})
    return config


def test_learns_held_out_recordings_of_known_speakers(choir, tmp_path):
    config = config_of(choir, num_train_steps=60, eval_every_steps=60, checkpoint_every_steps=60, validation_share=0.2)
    assert loop.train(config, tmp_path / "w") == 0
    last = read_metrics(tmp_path / "w")[-1]
    assert last["eval_accuracy"] > 0.8 and last["accuracy"] > 0.8 and last["eval_loss"] < np.log(3) / 2
    part = read_part(tmp_path / "w")
    assert part.config.model.labels == SPEAKERS
    classifier = audiolm_jax.load_classifier(tmp_path / "w")
    held_out = [r for r in pipeline.read_recordings(part.config) if r.split == "validation"]
    assert len(held_out) > 3
    found = [SPEAKERS[int(classifier.predict(r.read(RATE)[None])[0].argmax())] for r in held_out]
    assert np.mean([speaker == r.speaker for speaker, r in zip(found, held_out, strict=True)]) > 0.8


def test_resumed_equals_uninterrupted(choir, tmp_path):
    fields = {"eval_every_steps": 3, "checkpoint_every_steps": 3, "ema_decay": 0.5, "optimizer.schedule": "constant"}
    assert loop.train(config_of(choir, num_train_steps=6, **fields), tmp_path / "whole") == 0
    for steps in (3, 6):
        assert loop.train(config_of(choir, num_train_steps=steps, **fields), tmp_path / "resumed") == 0
    runs = [
        [{k: v for k, v in row.items() if not is_timing(k)} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "resumed")
    ]
    assert runs[0] == runs[1] and [row["step"] for row in runs[0]] == list(range(1, 7))
    whole, resumed = (read_part(tmp_path / name) for name in ("whole", "resumed"))
    assert set(whole.weights) == {"params", "batch_stats", "statistics"}
    jax.tree.map(np.testing.assert_array_equal, whole.weights, resumed.weights)


def test_totals_are_a_loop_over_rows():
    generator = np.random.default_rng()
    logits_BK, labels_B = generator.standard_normal((5, 3)), np.array([0, 2, 1, 1, 0])
    counts_B = np.array([True, True, False, True, True])
    totals = label_totals(logits_BK, labels_B, counts_B)
    kept = [(row_K, label) for row_K, label, counts in zip(logits_BK, labels_B, counts_B) if counts]
    losses = [np.log(np.exp(row_K).sum()) - row_K[label] for row_K, label in kept]
    np.testing.assert_allclose(totals["loss"], (sum(losses), 4), rtol=1e-5)
    assert totals["accuracy"] == (sum(row_K.argmax() == label for row_K, label in kept), 4)


def rows_of(batches):
    return [
        {name: array[row] for name, array in batch.items()}
        for batch in batches
        for row in range(len(batch["labels_B"]))
    ]


def test_batches_carry_the_labels_of_a_manifest(choir, tmp_path):
    lines = [
        {"path": str(choir / f"{speaker}/{number}.wav"), "id": f"{speaker}{number}", "speaker": speaker, "split": split}
        | ({"label": "low"} if speaker == "bass" else {"label": "high"} if number else {})
        for speaker in SPEAKERS
        for number, split in ((0, "train"), (1, "train"), (2, "validation"))
    ]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reported = []
    config = config_of(path, **{"split_by": "speaker", "crop_seconds": 2.5, "model.labels": ("high", "low")})
    source = registry.build_input(config, reported.append)
    assert reported == ["left out: 2 recordings of 2 other labels, such as alto, tenor"]
    held_out = [row for row in rows_of(source.evaluation(np.arange(8))) if row["valid_B"]]
    for row in held_out:
        waves = {speaker: audio.read(choir / speaker / "2.wav", RATE) for speaker in SPEAKERS}
        heard_W = row["wave_BW"][: row["lengths_B"]]
        (speaker,) = (name for name, wave_W in waves.items() if np.array_equal(wave_W, heard_W))
        assert row["labels_B"] == (1 if speaker == "bass" else 0)
    assert len(held_out) == 3
    manifest.write_manifest(tmp_path / "again.jsonl", manifest.read_manifest(path), {})
    assert manifest.read_manifest(tmp_path / "again.jsonl") == manifest.read_manifest(path)
    assert registry.complete(config_of(path, split_by="speaker")).model.labels == ("alto", "high", "low", "tenor")


def test_splits_by_recording_or_as_the_data_say(choir):
    splits = {}
    for split_by in ("recording", "speaker"):
        recordings = pipeline.read_recordings(config_of(choir, split_by=split_by, validation_share=0.2))
        splits[split_by] = (
            {r.speaker for r in recordings if r.split == "train"},
            [r.id for r in recordings if r.split == "validation"],
        )
    assert splits["recording"][0] == set(SPEAKERS) and 3 < len(splits["recording"][1]) < 12
    assert len(splits["speaker"][0]) == 2 and len(splits["speaker"][1]) == 12


def test_refuses(choir, tmp_path):
    (tmp_path / "one").mkdir()
    soundfile.write(tmp_path / "one" / "a.wav", np.full(8000, 0.1), RATE)
    for config, message in (
        (config_of(choir, split_by="colour"), "unknown way to split: config.split_by=colour"),
        (config_of(tmp_path), "recordings of 1 labels"),
        (config_of(choir, **{"model.labels": ("x", "y")}), "no recording in the training split"),
        (config_of(choir, **{"model.channels": (4, 0)}), "channels must be 1 or more"),
        (config_of(""), "no training data: config.data_dir"),
    ):
        with pytest.raises(UserError, match=message):
            loop.train(config, tmp_path / "w")
