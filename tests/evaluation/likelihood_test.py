"""`audiolm evaluate --suite=likelihood`: its figures against a plain forward pass, and what it says of bad input."""

import json
import math

import numpy as np
import pytest
import soundfile

from audiolm_jax import audio, commands
from audiolm_jax.data import transforms
from audiolm_jax.evaluation import statistics
from tests import tiny
from tests.audio_test import bad_files
from tests.cli_test import assert_user_error, run
from tests.lm.likelihoods import plain_losses

RATE = 16_000
# The second is longer than the crops of all stages.
SECONDS = (0.7, 4.9, 1.3)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    generator = np.random.default_rng(0)
    for number, seconds in enumerate(SECONDS):
        soundfile.write(folder / f"{number}.wav", 0.1 * generator.standard_normal(round(seconds * RATE)), RATE)
    return folder


@pytest.fixture(scope="module")
def tokens(bundle_folder, recordings, tmp_path_factory):
    output = tmp_path_factory.mktemp("tokens") / "tokens"
    parts = {role: str(bundle_folder / role) for role in ("codec", "semantic_tokenizer")}
    commands.tokenize(commands.TokenizeOptions(**parts, input_path=str(recordings), output=str(output)))
    return output


def evaluate(capsys, bundle, data, output, *arguments):
    given = ["--suite=likelihood", f"--bundle={bundle}", f"--data={data}", f"--output={output}"]
    return run(capsys, "evaluate", *given, *arguments)


def metrics_of(output):
    return json.loads((output / "results.json").read_text())["metrics"]


def plain(model, stage, record):
    """Nats and tokens of a record by the plain forward pass."""
    lm, nats, count = model.stages[stage], 0.0, 0
    for window in transforms.windows(record, lm.stage):
        sequence, loss_start = lm.stage.sequence(window["semantic"], window["acoustic"], window["is_end"])
        losses_T = plain_losses(lm.config, lm.params, sequence)[loss_start - 1 :]
        nats, count = nats + losses_T.sum(), count + len(losses_T)
    return nats, count


def test_figures(capsys, model, bundle_folder, recordings, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLINGS", 200)
    assert evaluate(capsys, bundle_folder, recordings, tmp_path / "waves")[0] == 0
    found = metrics_of(tmp_path / "waves")
    names = ("nats_per_token", "perplexity_per_token", "nats_per_second", "bits_per_second")
    assert set(found) == {f"{s}.{n}" for s in tiny.STAGES for n in names} | {f"all.{name}" for name in names[2:]}
    records = []
    for number in range(len(SECONDS)):
        wave_BW = audio.read(recordings / f"{number}.wav", RATE)[None]
        semantic_T, acoustic_TQ = model.tokenizer.encode(wave_BW)[0], np.asarray(model.codec.encode(wave_BW))[0]
        records.append({"semantic": semantic_T, "acoustic": acoustic_TQ, "is_end": True})
    of_all = 0.0
    for stage in tiny.STAGES:
        nats, counts = zip(*(plain(model, stage, record) for record in records))
        of_all += sum(nats)
        per_token, per_second = sum(nats) / sum(counts), sum(nats) / sum(SECONDS)
        assert found[f"{stage}.nats_per_token"]["value"] == pytest.approx(per_token, abs=1e-5)
        assert found[f"{stage}.perplexity_per_token"]["value"] == pytest.approx(math.exp(per_token), rel=1e-5)
        assert found[f"{stage}.nats_per_second"]["value"] == pytest.approx(per_second, rel=1e-5)
        assert found[f"{stage}.bits_per_second"]["value"] == pytest.approx(per_second / math.log(2), rel=1e-5)
        each = [n / count for n, count in zip(nats, counts)]
        interval = found[f"{stage}.nats_per_token"]
        assert min(each) - 1e-5 <= interval["low"] < interval["value"] < interval["high"] <= max(each) + 1e-5
        assert interval["count"] == len(SECONDS)
    assert found["all.nats_per_second"]["value"] == pytest.approx(of_all / sum(SECONDS), rel=1e-5)

    assert evaluate(capsys, bundle_folder, tokens, tmp_path / "tokens")[0] == 0
    for name, estimate in metrics_of(tmp_path / "tokens").items():
        assert estimate["value"] == pytest.approx(found[name]["value"], rel=1e-5), name


def test_what_cannot_be_read_is_said(capsys, bundle_folder, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLINGS", 50)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    bad_files(mixed)
    (mixed / "good.wav").write_bytes((recordings / "0.wav").read_bytes())
    status, *_, error = evaluate(capsys, bundle_folder, mixed, tmp_path / "out")
    assert status == 0 and "left out: " in error and "nan.wav" in error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["notes"] == ["4 of 5 recordings could not be read and were left out"]
    assert results["metrics"]["fine.nats_per_token"]["count"] == 1


def test_refuses(capsys, bundle_folder, recordings, tokens, tmp_path):
    empty, output = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    part = tiny.codec_part()
    part.weights["codebooks"]["embedding"] = part.weights["codebooks"]["embedding"] + 1
    other_bundle = tiny.write_bundle(tmp_path / "other", part)
    for bundle, data, arguments, message in (
        (bundle_folder, empty, (), "no recordings"),
        (bundle_folder, tmp_path / "nowhere", (), "input not found"),
        (bundle_folder, recordings, ("--split=dev",), "no recordings of this split"),
        (bundle_folder, tokens, ("--split=dev",), "no such split: --split=dev; use one of "),
        (other_bundle, tokens, (), "tokens of another codec than the bundle's"),
        (recordings, recordings, (), "not a bundle"),
    ):
        assert_user_error(evaluate(capsys, bundle, data, output, *arguments), message)
    assert not output.exists()
