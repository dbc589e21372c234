"""`metrics.jsonl`: full precision, cut back to the restored step, torn lines dropped."""

import json

import numpy as np

from audiolm_jax.training import metrics
from audiolm_jax.training.metrics import FILE, Clock, MetricsWriter, read_metrics


def test_rows_after_the_restored_step_are_cut(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in range(1, 8):
            writer.write(step, {"loss": np.float32(1) / 3 * step})
    with open(tmp_path / FILE, "a") as file:
        file.write('{"step": 8, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 8))
    with MetricsWriter(tmp_path, 5) as writer:
        writer.write(6, {"loss": 6.0, "vector": np.array([1.0, 2.0])})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["vector"] == [1.0, 2.0]
    assert rows[1]["loss"] == float(np.float32(1) / 3 * 2)
    assert any(path.name.startswith("events.out.tfevents") for path in tmp_path.iterdir())
    assert all(json.loads(line) for line in (tmp_path / FILE).read_text().splitlines())


def test_goodput_is_the_share_of_time_that_went_into_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    clock = Clock()
    for kind, seconds in (("startup", 3.0), ("compile", 5.0), ("data", 0.5), ("checkpoint", 1.0), ("data", 0.5)):
        with clock.measure(kind):
            now[0] += seconds
        now[0] += 2.0
    assert clock.seconds() == {
        "seconds_startup": 3.0, "seconds_compile": 5.0, "seconds_data": 1.0, "seconds_checkpoint": 1.0,
        "seconds_evaluation": 0.0, "seconds_step": 10.0, "goodput": 0.5,
    }  # fmt: skip
