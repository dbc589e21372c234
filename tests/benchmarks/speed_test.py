"""benchmarks/speed.py: its smallest size runs through, and its table says what was measured."""

import json
import os
import subprocess
import sys

import pytest

from tests.benchmarks import SCRIPTS, load


@pytest.fixture(scope="module")
def speed():
    return load("speed")


def facts(peak=None):
    decode = {"chunks": 1, "tokens": 100, "prefix": 10, "step_weights": 1e6, "step_bytes": 4e6, "cache_bytes": 1e6}
    train = {"tokens": 50, "parameters": 2e6, "layers": 1e6, "flops_6n": 3e8, "flops_causal": 4e8}
    return {
        "decode": {stage: decode for stage in ("semantic", "coarse", "fine")},
        "train": {stage: train for stage in ("semantic", "coarse", "fine")},
        "codec": {"parameters": 1e6, "flops": {"encode": 1e8, "decode": 1e8}},
        "matmul_rate": 1e9,
        "bandwidth": 1e9,
        **({"peak": peak} if peak else {}),
    }


def seconds(factor=1.0):
    times = {"step/1": 0.008, "step/16": 0.1, "step/coarse": 0.01, "step/fine": 0.01}
    times |= {"codec/encode": 0.2, "codec/decode": 0.2}
    times |= {f"startup/{name}": 1.0 for name in ("help", "import", "import_all")}
    for stage in ("semantic", "coarse", "fine"):
        times |= {f"decode/{stage}": 1.0, f"prefill/{stage}": 0.1, f"train/{stage}": 0.6}
        times |= {f"compile/decode/{stage}": 3.0, f"compile/train/{stage}": 5.0}
    return {name: [0.1, factor * time, 99.0] for name, time in times.items()}


def rows_of(speed, ours, peer=None):
    return {row["key"]: row for row in speed.with_targets(speed.make_rows(ours, peer, speed.SIZES["peer"]))}


def test_rows_compare_medians_with_floor_and_peer(speed):
    rows = rows_of(speed, {"facts": facts(), "seconds": seconds()}, {"facts": {}, "seconds": seconds(5.0)})
    decode = rows["decode/semantic"]
    assert (decode["ours"], decode["peer"], decode["x_peer"]) == pytest.approx((100, 20, 5))
    assert decode["x_floor"] == pytest.approx(1.0 / (100 * 5e6 / 1e9))  # weights and the cache of one row
    assert decode["target"] == "x peer ≥ 4: met"
    assert rows["decode/fine"]["target"] == "x peer ≥ 30: missed"
    assert rows["step/1"]["floor"] == pytest.approx(4.0)  # ms: the weights alone
    assert rows["step/1"]["target"] == "x floor ≤ 1.8: missed"
    assert rows["step/16"]["floor"] == pytest.approx(32.0)  # FLOPs exceed the bytes of weights and 16 caches
    assert rows["utilisation/coarse"]["ours"] == pytest.approx(50.0)
    assert rows["compile/train/semantic"]["ours"] == pytest.approx(4.4)


def test_on_a_known_accelerator_floors_come_from_its_data_sheet(speed):
    rows = rows_of(speed, {"facts": facts({"flops": 1e12, "bandwidth": 1e12}), "seconds": seconds()})
    assert rows["step/1"]["floor"] == pytest.approx(4e-3)
    assert rows["utilisation/fine"]["ours"] == pytest.approx(100 * 4e8 / 1e12 / 0.6)
    assert rows["decode/semantic"]["peer"] is None and rows["decode/semantic"]["target"] == ""


@pytest.mark.slow
def test_the_smallest_size_runs_through(tmp_path):
    output = tmp_path / "tiny.json"
    command = [sys.executable, str(SCRIPTS / "speed.py"), "--sizes=tiny", f"--output={output}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["machine"]["processor"] and result["machine"]["cores"] >= 1 and result["commit"]
    rows = {row["key"]: row for row in result["rows"]}
    assert {"decode/fine", "prefill/coarse", "step/2", "train/semantic", "codec/decode", "continuation"} <= set(rows)
    for key, row in rows.items():
        # A step is a difference, and here one of microseconds.
        assert row["ours"] > 0 or key.startswith(("step", "compile"))
        assert f"| {row['what']} |" in done.stdout
    assert all(row["floor"] > 0 for key, row in rows.items() if key.startswith(("decode", "train", "step")))
