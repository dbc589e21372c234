"""benchmarks/codec_stream.py: what a chunk's figures are, and that it runs through."""

import sys
import time

import numpy as np
import pytest

from tests.benchmarks import load


@pytest.fixture(scope="module")
def stream():
    return load("codec_stream")


def test_chunks_are_timed_without_the_first_call(stream):
    calls = []

    def step(chunk, state):
        time.sleep(0.3 if not calls else 0.002)
        calls.append((chunk, state))
        return np.zeros(1), len(calls)

    times = stream.time_chunks(step, ["a", "b", "c"])
    assert [chunk for chunk, _ in calls] == ["a", "a", "b", "c"] and [state for _, state in calls] == [None, 1, 2, 3]
    assert len(times) == 3 and 0.002 <= min(times) and max(times) < 0.3


def test_it_runs_through(stream, bundle_folder, monkeypatch, capsys):
    arguments = [f"--codec={bundle_folder / 'codec'}", "--chunks=1,2", "--seconds=0.1", "--core=-1"]
    monkeypatch.setattr(sys, "argv", ["codec_stream.py", *arguments])
    stream.main()
    header, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows] == [["codec", "1", "20"], ["codec", "2", "40"]]
    for row in rows:
        found = dict(zip(header, row, strict=True))
        latency = float(found["chunk, ms"]) + float(found["encode, ms"]) + float(found["decode, ms"])
        assert float(found["latency, ms"]) == pytest.approx(latency, abs=0.1)
        assert float(found["encode, x real time"]) > 0
