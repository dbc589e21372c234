"""`audiolm evaluate --suite=codec`: its figures against ones worked out here, and what it says of bad input."""

import html
import json
import re

import numpy as np
import pytest
import soundfile

from audiolm_jax import audio, bundle
from audiolm_jax.codec import losses
from audiolm_jax.evaluation import codec as suite
from audiolm_jax.evaluation import judges, opus
from tests import tiny
from tests.audio_test import bad_files
from tests.cli_test import assert_user_error, run

RATE, SECONDS = 16_000, (0.6, 1.2, 0.58)


@pytest.fixture(scope="module")
def folder(bundle_folder):
    return bundle_folder / "codec"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Noise in bands, as long as `SECONDS`."""
    path = tmp_path_factory.mktemp("recordings")
    for index, seconds in enumerate(SECONDS):
        wave_W = 0.2 * np.random.default_rng(index).standard_normal(round(seconds * RATE))
        soundfile.write(path / f"{index}.wav", np.convolve(wave_W, np.ones(4 + index) / 4, "same"), RATE)
    return path


def evaluate(capsys, folder, data, output, *arguments):
    return run(
        capsys, "evaluate", "--suite=codec", f"--codec={folder}", f"--data={data}", f"--output={output}", *arguments
    )


def results_of(output):
    return json.loads((output / "results.json").read_text())


def rebuilt(codec, wave_W, levels):
    return np.asarray(codec.decode(codec.encode(wave_W[None])[..., :levels]))[0, : len(wave_W)]


def si_sdr(reference_W, other_W):
    target_W = reference_W * (other_W @ reference_W) / (reference_W @ reference_W)
    return 10 * np.log10((np.sum(target_W**2) + 1e-8) / (np.sum((other_W - target_W) ** 2) + 1e-8))


def log_mel_distance(reference_W, other_W):
    return float(np.mean(losses.log_mel_distance(reference_W[None], other_W[None], RATE)))


def test_figures(capsys, folder, recordings, tmp_path, monkeypatch):
    # Recording 1 falls into two pieces.
    monkeypatch.setattr(suite, "PIECE_SECONDS", 1.0)
    monkeypatch.setenv("PATH", str(tmp_path))
    output = tmp_path / "out"
    wanted = ("--judge=si_sdr", "--judge=log_mel_distance", "--seed=7")
    status, out, _, error = evaluate(capsys, folder, recordings, output, *wanted)
    assert status == 0 and out == f"report: {output}/report.html\n" and "2.4/2.4 s" in error
    results = results_of(output)
    assert set(results) == {
        *("suite", "seed", "fingerprints", "settings", "data_fingerprint", "metrics", "notes"),
    }
    assert (results["suite"], results["seed"]) == ("codec", 7)
    settings = results["settings"]
    assert (settings["data"], settings["judges"]) == (str(recordings), ["si_sdr", "log_mel_distance"])
    assert results["fingerprints"] == {"codec": bundle.read_part(folder).fingerprint()}
    page = (output / "report.html").read_text()
    details = html.unescape(page[page.index("<dl>") :])
    for told in (results["fingerprints"]["codec"], results["data_fingerprint"], '"seed": 7', '"codebook_size": '):
        assert told in details
    assert results["notes"] == ["Opus: not measured, no opusenc and opusdec; apt-get install opus-tools brings them"]
    metrics, codec = results["metrics"], bundle.load_codec(folder)
    names = {f"codec_{n}.{what}" for n in (1, 2, 3) for what in ("kilobits", "si_sdr", "log_mel_distance")}
    assert set(metrics) == names | {f"codebook_perplexity.{n}" for n in (1, 2, 3)}

    waves = [audio.read(recordings / f"{index}.wav", RATE) for index in range(3)]
    pieces = [[waves[0]], np.array_split(waves[1], 2), [waves[2]]]
    for levels in (1, 2, 3):
        for measure in (si_sdr, log_mel_distance):
            means = [np.mean([measure(piece_W, rebuilt(codec, piece_W, levels)) for piece_W in cut]) for cut in pieces]
            found = metrics[f"codec_{levels}.{measure.__name__}"]
            assert found["value"] == pytest.approx(np.mean(means), abs=1e-2) and found["count"] == 3
            assert min(means) - 0.01 <= found["low"] <= found["value"] <= found["high"] <= max(means) + 0.01
        assert metrics[f"codec_{levels}.kilobits"]["value"] == pytest.approx(levels * np.log2(tiny.CODES) * 50 / 1000)
        codes_N = np.concatenate([np.asarray(codec.encode(p[None]))[0, :, levels - 1] for cut in pieces for p in cut])
        shares = np.unique(codes_N, return_counts=True)[1] / len(codes_N)
        perplexity = metrics[f"codebook_perplexity.{levels}"]["value"]
        assert perplexity == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))

    page = (output / "report.html").read_text()
    assert page.count("<audio") == 3 * 4 and len(re.findall('alt="Curve: ', page)) == 2
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and "Opus: not measured" in page
    assert f"{metrics['codec_2.si_sdr']['value']:.3g} [" in page


@pytest.mark.skipif(opus.missing() is not None, reason="no opus-tools")
def test_beside_opus_with_every_judge_there_is(capsys, folder, recordings, tmp_path):
    output = tmp_path / "out"
    assert evaluate(capsys, folder, recordings / "1.wav", output)[0] == 0
    results = results_of(output)
    chosen, notes = judges.choose([])
    assert results["notes"] == notes and {"si_sdr", "log_mel_distance"} <= set(chosen)
    for system in ("codec_1", "codec_2", "codec_3", "opus_6", "opus_12", "opus_24"):
        assert all(results["metrics"][f"{system}.{name}"]["count"] == 1 for name in chosen), system
    metrics = results["metrics"]
    assert metrics["opus_24.si_sdr"]["value"] > metrics["opus_6.si_sdr"]["value"] > metrics["codec_3.si_sdr"]["value"]
    assert "Opus, 24 kbit/s" in (output / "report.html").read_text()


def test_what_cannot_be_read_or_judged_is_said(capsys, folder, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    bad_files(mixed)
    soundfile.write(mixed / "good.wav", 0.1 * np.random.default_rng(0).standard_normal(8000), RATE)
    soundfile.write(mixed / "silence.wav", np.zeros(8000), RATE)
    status, *_, error = evaluate(capsys, folder, mixed, tmp_path / "out", "--judge=si_sdr")
    assert status == 0 and "left out: " in error and "nan.wav" in error
    results = results_of(tmp_path / "out")
    assert "4 of 6 recordings could not be read and were left out" in results["notes"]
    assert "SI-SDR, dB: no score for 1 of 2 recordings, too short or silent" in results["notes"]
    assert results["metrics"]["codec_3.si_sdr"]["count"] == 1
    assert results["metrics"]["codec_3.kilobits"]["count"] == 2
    # Of silence alone there is nothing to draw.
    status, *_, error = evaluate(capsys, folder, mixed / "silence.wav", tmp_path / "silent", "--judge=si_sdr")
    assert status == 0 and "Warning" not in error
    assert 'alt="Curve' not in (tmp_path / "silent" / "report.html").read_text()


def test_refuses(capsys, folder, recordings, bundle_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no sound")
    output = tmp_path / "out"
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.full(100, np.nan), RATE, subtype="FLOAT")
    for codec, data, arguments, message in (
        (folder, empty, (), "no recordings"),
        (folder, tmp_path / "nowhere", (), "input not found"),
        (folder, nan, (), "no recording could be read"),
        (folder, recordings, ("--judge=ear",), "unknown judge: --judge=ear"),
        (folder, recordings, ("--split=dev",), "no recordings of this split: --split=dev; use one of train"),
        (folder, recordings, ("--suite=choir",), "unknown suite: --suite=choir"),
        (tmp_path / "nowhere", recordings, (), "no such folder"),
        (bundle_folder / "coarse", recordings, (), "not a codec but a coarse"),
        (folder, recordings, ("--output=" + str(empty),), "output already exists"),
    ):
        assert_user_error(evaluate(capsys, codec, data, output, *arguments), message)
    for missing in ("codec", "data"):
        there = {"codec": f"--codec={folder}", "data": f"--data={recordings}"}
        del there[missing]
        result = run(capsys, "evaluate", "--suite=codec", f"--output={output}", *there.values())
        assert_user_error(result, f"suite codec needs --{missing}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "nan.wav"]
