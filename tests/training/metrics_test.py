"""`metrics.jsonl`: full precision, cut back to the restored step, torn lines dropped."""

import json

import numpy as np
import pytest
import tqdm

from audiolm_jax.training import metrics
from audiolm_jax.training.metrics import FILE, Clock, MetricsWriter, StepLog, read_metrics
from audiolm_jax.training.watch import Watch


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


def test_steps_per_second_count_the_wait_for_data_and_no_evaluation(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    clock = Clock()
    with MetricsWriter(tmp_path, 0) as writer:
        log = StepLog(writer, Watch((), (), print), tqdm.tqdm(disable=True), clock, 0.1)
        for step in range(1, 7):
            with clock.measure("data"):
                now[0] += 1.5
            now[0] += 0.5
            log.flush()
            if step % 2 == 0:
                log.add(step, {"loss": np.float32(1.0)})
                with clock.measure("evaluation"):
                    now[0] += 100.0
        log.flush()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    # A row is written once the next step is under way, the last one at once.
    assert [row["steps_per_second"] for row in rows] == pytest.approx([2 / 6.0, 2 / 4.0, 2 / 2.0])
    assert [row["model_flops_utilization"] for row in rows] == pytest.approx([0.1 / 3, 0.05, 0.1])
