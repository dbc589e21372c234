"""`audiolm evaluate` stopped in the middle and started again: nothing is measured twice, the results are the same."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import journal, likelihood, pairs, recordings, statistics
from audiolm_jax.evaluation.suites import Request, evaluate
from tests.evaluation import fakes
from tests.evaluation.classification_test import write_classifier
from tests.evaluation.pair_sets import noise_pairs, write_sets
from tests.evaluation.phonetics_test import data  # noqa: F401

RATE = 16_000


def write_recordings(folder, count):
    folder.mkdir(parents=True)
    for index in range(count):
        wave_W = 0.1 * np.random.default_rng(index).standard_normal(RATE // 2)
        soundfile.write(folder / f"{index}.wav", wave_W, RATE)
    return folder


def write_detection_pairs(folder, count):
    """A manifest as `audiolm detection-data` writes it, of acoustic generations."""
    write_recordings(folder, 2 * count)
    rows = []
    for index in range(2 * count):
        kind = ("real", "generated")[index % 2]
        row = {"path": f"{index}.wav", "id": f"acoustic/{kind}/run/{index // 2}_00", "label": kind}
        rows.append(json.dumps({**row, "speaker": "anna", "split": "validation"}) + "\n")
    (folder / "manifest.jsonl").write_text("".join(rows))
    return folder / "manifest.jsonl"


def stop_at(monkeypatch, item):
    """Measuring the item of that number, from 0, is as if Ctrl-C were pressed; counts those that are measured."""
    measured, once = [], journal.Journal.once

    def counted(self, key, measure):
        def counting():
            if len(measured) == item:
                raise KeyboardInterrupt
            measured.append(key)
            return measure()

        return once(self, key, counting)

    monkeypatch.setattr(journal.Journal, "once", counted)
    return measured


@pytest.mark.parametrize(
    "suite",
    (
        *("codec", "abx", "swuggy", "sblimp", "storycloze", "salmon", "likelihood", "acoustic", "continuation"),
        *("sampling", "piano", "fad", "detector", "speaker"),
    ),
)
def test_stopped_and_started_again(suite, bundle_folder, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(statistics, "RESAMPLINGS", 50)
    monkeypatch.setattr(recordings, "BATCH_ROWS", 1)
    for module in (pairs, likelihood):
        monkeypatch.setattr(module, "BATCH_RECORDINGS", 2)
    if suite in ("acoustic", "continuation", "sampling", "piano", "fad"):
        fakes.install(monkeypatch)
    few = str(write_recordings(tmp_path / "recordings", 5))
    generated = {"bundle": str(bundle_folder), "data": few, "num_samples": 1, "min_seconds": 0.4}
    continued = {**generated, "prompt_seconds": 0.2, "seconds": 0.2}
    settings = {
        "codec": {
            "codec": str(bundle_folder / "codec"),
            "data": few,
            "judges": ["si_sdr", "log_mel_distance"],
        },
        **{
            name: {"bundle": str(bundle_folder), "data": str(data_set)}
            for name, data_set in write_sets(tmp_path / "sets", noise_pairs(6)).items()
        },
        "likelihood": {
            "bundle": str(bundle_folder),
            "data": str(write_recordings(tmp_path / "ten", 10)),
        },
        "detector": {
            "detector": str(write_classifier(tmp_path / "detector", ("real", "generated"))),
            "data": str(write_detection_pairs(tmp_path / "pairs", 4)),
        },
        "speaker": {
            "classifier": str(write_classifier(tmp_path / "classifier", ("voice", "other"))),
            "data": str(write_recordings(tmp_path / "voices" / "voice", 8).parent),
            "split": "train",
        },
        "abx": {"semantic_tokenizer": [str(bundle_folder / "semantic_tokenizer")], "data": str(data)},
        "acoustic": generated,
        "continuation": continued,
        "sampling": {**continued, "num_samples": 2, "temperatures": [0.7]},
        "piano": continued,
        "fad": {
            "semantic_tokenizer": [str(bundle_folder / "semantic_tokenizer")],
            "data": few,
            "generated": [str(write_recordings(tmp_path / "generated", 2))],
        },
    }[suite]
    undisturbed = Request(suite=suite, output=str(tmp_path / "undisturbed"), **settings)
    stopped = Request(suite=suite, output=str(tmp_path / "stopped"), **settings)
    with monkeypatch.context() as patch:
        everything = stop_at(patch, None)
        evaluate(undisturbed)
    assert len(everything) > 4
    before = 0
    for item in (2, len(everything) - 3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            part = stop_at(patch, item)
            evaluate(stopped)
        assert part == everything[before : before + item]
        before += item
        assert not (tmp_path / "stopped").exists()
    with monkeypatch.context() as patch:
        rest = stop_at(patch, None)
        evaluate(stopped)
    assert rest == everything[before:] and len(rest) == 1
    for name in (path.name for path in (tmp_path / "undisturbed").iterdir()):
        texts = [(tmp_path / run / name).read_text() for run in ("undisturbed", "stopped")]
        assert texts[0] == texts[1], name
    assert not list(tmp_path.glob(".*"))


def test_another_request_starts_anew(tmp_path):
    output, measured = str(tmp_path / "out"), []

    def measure():
        measured.append(1)
        return {"x_T": np.arange(3), "pair": [1.5, None]}

    for request in ({"seed": 0}, {"seed": 0}, {"seed": 1}):
        with pytest.raises(KeyboardInterrupt), journal.kept_beside(output, request) as items:
            found = items.once("a", measure)
            assert found["pair"] == [1.5, None] and found["x_T"].tolist() == [0, 1, 2]
            raise KeyboardInterrupt
    assert len(measured) == 2
    with journal.kept_beside(output, {"seed": 1}):
        with pytest.raises(UserError, match="another process is measuring"):
            with journal.kept_beside(output, {"seed": 1}):
                pass
    assert not list(tmp_path.iterdir())


def test_changed_data_starts_anew(bundle_folder, tmp_path):
    folder = write_recordings(tmp_path / "recordings", 2)
    request = Request("codec", str(tmp_path / "out"), codec=str(bundle_folder / "codec"), data=str(folder))
    before = request.identity()
    assert request.identity() == before
    soundfile.write(folder / "1.wav", np.ones(RATE), RATE)
    assert request.identity() != before


def test_data_are_known_again_elsewhere(tmp_path):
    folders = [write_recordings(tmp_path / name, 2) for name in ("a", "b")]
    fingerprint = lambda path: Request("codec", "out", data=str(path)).data_fingerprint()
    first, second = map(fingerprint, folders)
    assert first == second != fingerprint(folders[0] / "0.wav")
    shutil.copy(folders[0] / "0.wav", tmp_path / "other.wav")
    assert fingerprint(tmp_path / "other.wav") == fingerprint(folders[1] / "0.wav")
    soundfile.write(folders[1] / "1.wav", np.ones(RATE), RATE)
    assert fingerprint(folders[1]) != first
    (folders[0] / "1.wav").rename(folders[0] / "2.wav")
    assert fingerprint(folders[0]) != first


@pytest.mark.slow
def test_killed(bundle_folder, tmp_path):
    folder = write_recordings(tmp_path / "recordings", 40)
    common = [sys.executable, "-m", "audiolm_jax", "evaluate", "--suite=codec", "--judge=si_sdr"]
    common += [f"--codec={bundle_folder / 'codec'}", f"--data={folder}"]
    subprocess.run([*common, f"--output={tmp_path / 'whole'}"], check=True)
    kills = 0
    for items in (3, 20):
        process = subprocess.Popen([*common, f"--output={tmp_path / 'killed'}"])
        while process.poll() is None and len(list(tmp_path.glob(".killed.unfinished/*.msgpack"))) < items:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2 and not (tmp_path / "killed").exists()
    subprocess.run([*common, f"--output={tmp_path / 'killed'}"], check=True)
    whole, killed = ((tmp_path / name / "results.json").read_bytes() for name in ("whole", "killed"))
    assert whole == killed and not list(tmp_path.glob(".*"))
