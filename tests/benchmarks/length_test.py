"""benchmarks/length.py: what it calls a seam is one, and it runs through."""

import json
import sys

import numpy as np
import pytest
import soundfile

from audiolm_jax.codec.codec import Codec
from tests.benchmarks import load


@pytest.fixture(scope="module")
def length():
    return load("length")


def noise(num_samples, seed=0):
    return np.random.default_rng(seed).uniform(-0.3, 0.3, (1, num_samples)).astype(np.float32)


def test_rank_is_half_where_borders_are_like_the_inside(length):
    inside = np.random.default_rng(0).exponential(size=1000)
    alike = length.compare(np.random.default_rng(1).exponential(size=200), inside)
    assert alike["rank"] == pytest.approx(0.5, abs=0.05) and alike["p"] > 0.01 and alike["count"] == 200
    larger = length.compare(inside[:10] + inside.max(), inside)
    assert larger["rank"] == 0 and larger["p"] < 1e-6 and larger["inside"][2] == pytest.approx(np.median(inside))


def test_changes_are_measured_where_a_frame_begins(length, model):
    # Eight periods a frame, and a step at frame 5.
    wave_1W = 0.2 * np.sin(2 * np.pi * np.arange(3200) / 40)[None].astype(np.float32)
    wave_1W[:, 5 * 320 :] += 0.5
    found = length.changes(wave_1W, model.codec)
    step = np.abs(np.diff(wave_1W[0]))[319::320]
    np.testing.assert_allclose(found["sample jump"][0, 1:], step, rtol=1e-5)
    assert found["sample jump"].shape == found["log-mel distance"].shape == (1, 10)
    distance_T = found["log-mel distance"][0]
    assert np.isnan(distance_T[0]) and distance_T[5] > 0.3 and np.delete(distance_T, [0, 5]).max() < 0.01


def seams_of(length, model):
    windows = model.stream(noise(16000), seconds=60.0, num_samples=2, ignore_end=True)
    wave_BW, borders = length.watch(windows)
    codes_BTQ = np.stack([row.acoustic for row in windows.rows])
    rows = length.measure_seams(wave_BW, codes_BTQ, borders, model.codec)
    return borders, {(row["kind"], row["measure"]): row for row in rows}


@pytest.mark.slow
def test_a_stream_has_no_seams_where_a_decoder_that_forgets_has(length, model, monkeypatch):
    borders, seams = seams_of(length, model)
    assert borders["decoded block"] == list(range(100, 3050, 50)) and borders["prompt"] == [50]
    assert borders["coarse window"] == list(range(100, 3050, 70))
    for kind in ("decoded block", "coarse window", "fine chunk"):
        assert seams[kind, "sample jump"]["rank"] > 0.4 and seams[kind, "log-mel distance"]["rank"] > 0.4, kind
    decode_chunk = Codec.decode_chunk
    monkeypatch.setattr(Codec, "decode_chunk", lambda codec, codes_BTQ, _: decode_chunk(codec, codes_BTQ))
    _, broken = seams_of(length, model)
    for kind in ("decoded block", "control: a decoder that forgets"):
        assert broken[kind, "log-mel distance"]["rank"] < 0.1 and broken[kind, "log-mel distance"]["p"] < 1e-6, kind


@pytest.mark.slow
def test_it_runs_through(length, bundle_folder, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "prompt.wav", noise(20000)[0], 16000)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(length, "ROOT", tmp_path)
    monkeypatch.setattr(length, "RESULTS", tmp_path / "results")
    arguments = [
        f"--bundle={bundle_folder}",
        f"--prompt={tmp_path / 'prompt.wav'}",
        "--prompt-seconds=1",
        "--seconds=6",
    ]
    monkeypatch.setattr(sys, "argv", ["length.py", *arguments, "--rows=2"])
    length.main()
    (path,) = (tmp_path / "results").iterdir()
    result = json.loads(path.read_text())
    assert [run["seconds"] for run in result["runs"]] == [1, 1, 2, 2, 4, 4, 6, 6]
    for run in result["runs"]:
        assert 0 < run["first_sound"] <= run["wait"] <= run["total"]
        assert 0 < run["arrays_peak"] < run["resident_start"] <= run["resident_peak"]
    assert result["streamed_less_whole"] == 0 and result["streamed_less_offline"] < 1e-5
    page = (tmp_path / "docs" / "length.md").read_text()
    assert "| 6 | " in page and "control: another row goes on" in page and "semantic 4 s, coarse 2 s, fine 1 s" in page
    assert (tmp_path / "docs" / f"length-{result['slug']}.png").stat().st_size > 10_000
