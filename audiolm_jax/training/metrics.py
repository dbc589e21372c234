"""Where a run's figures go: `metrics.jsonl` (one object a logged step) and TensorBoard events beside it.

Objects in a bucket cannot be appended to: in a workdir on gs:// or s3:// the rows stand in parts,
`metrics/FIRST_STEP.jsonl`, one for each stretch between two checkpoints.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from audiolm_jax import files
from audiolm_jax.training.watch import Watch

FILE, PARTS = "metrics.jsonl", "metrics"


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a run, in order; a torn last line, which a killed process can leave, is dropped."""
    folder = epath.Path(workdir)
    sources = [folder / FILE, *sorted((folder / PARTS).glob("*.jsonl"))]
    return [row for source in sources if source.exists() for row in _rows(source)]


def _rows(path: epath.Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def is_timing(name: str) -> bool:
    """Whether a metric says how fast the run was, not what it computed."""
    return name.startswith("seconds_") or name in ("steps_per_second", "goodput", "model_flops_utilization")


class MetricsWriter:
    """Appends a row a step; a context manager, for one process of a run.

    Rows later than `restored_step` come from a process that died after its last checkpoint: they
    are cut off first, so that every step stands in the files once.
    """

    def __init__(self, workdir: epath.Path, restored_step: int):
        from tensorboardX import SummaryWriter  # Takes half a second; a command that fails early need not wait.

        self._appends = files.is_local(workdir)
        self._folder = workdir
        self._rows: list[str] = []
        self._cut(restored_step)
        if self._appends:
            self._file = open(workdir / FILE, "a")
            self._tensorboard = SummaryWriter(str(workdir), purge_step=restored_step + 1)
        else:
            self._part = workdir / PARTS / f"{restored_step:09}.jsonl"

    def _cut(self, restored_step: int):
        for path in [self._folder / FILE, *(self._folder / PARTS).glob("*.jsonl")]:
            if path.exists():
                kept = [row for row in _rows(path) if row["step"] <= restored_step]
                files.write_bytes(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_):
        if self._appends:
            self._file.close()
            self._tensorboard.close()

    def write(self, step: int, values: dict[str, Any]):
        """Writes scalars and vectors (as lists) at full precision, what is not finite as null; then on disk."""
        row = {"step": step}
        for name, value in values.items():
            numbers = np.asarray(value, np.float64)
            row[name] = _finite_or_none(numbers.tolist())
            if self._appends:
                for i, scalar in enumerate(np.atleast_1d(numbers)):
                    tag = name if numbers.ndim == 0 else f"{name}/{i}"
                    self._tensorboard.add_scalar(tag, scalar, step)
        line = json.dumps(row) + "\n"
        if self._appends:
            self._file.write(line)
            files.flush_to_disk(self._file)
        else:
            self._rows.append(line)
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._part.write_text("".join(self._rows))

    def next_part(self, step: int):
        """Begins a new part, where the files are parts: `step` is about to be saved."""
        if not self._appends:
            self._part, self._rows = self._folder / PARTS / f"{step:09}.jsonl", []


def _finite_or_none(value):
    if isinstance(value, list):
        return [_finite_or_none(element) for element in value]
    return value if math.isfinite(value) else None


class Clock:
    """Where a process's time goes, in seconds: what is not measured as anything else went into steps."""

    KINDS = ("startup", "compile", "data", "checkpoint", "evaluation")

    def __init__(self):
        self._start = time.monotonic()
        self._spent = dict.fromkeys(self.KINDS, 0.0)

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent[kind] += time.monotonic() - start

    def seconds(self) -> dict[str, float]:
        """Seconds by kind since the start, those of steps, and `goodput`: the share of time that went into steps."""
        total = time.monotonic() - self._start
        step = max(0.0, total - sum(self._spent.values()))
        kinds = {**self._spent, "step": step}
        return {**{f"seconds_{kind}": spent for kind, spent in kinds.items()}, "goodput": step / max(total, 1e-9)}


class StepLog:
    """Holds one step's metrics back until the next step runs, so that fetching them never stalls the device.

    Args:
      writer: None in the processes that write nothing.
      watch: over what is written.
      bar: progress.
      clock: of the process.
      utilization_per_step: a step's model FLOPs over what all devices can do in a second; None where it is unknown.
    """

    def __init__(
        self, writer: MetricsWriter | None, watch: Watch, bar, clock: Clock, utilization_per_step: float | None
    ):
        self._writer, self._watch, self._bar, self._clock = writer, watch, bar, clock
        self._utilization_per_step = utilization_per_step
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._last = (_seconds_of_steps(clock.seconds()), bar.n)

    def add(self, step: int, metrics: dict[str, Any]):
        self._pending = (step, dict(metrics))

    def extend(self, values: dict[str, np.ndarray]):
        assert self._pending is not None
        self._pending[1].update(values)

    def flush(self) -> dict[str, np.ndarray]:
        """Writes what was held back; returns it."""
        if self._pending is None:
            return {}
        step, metrics = self._pending
        self._pending = None
        values = jax.device_get(metrics)
        timing = self._clock.seconds()
        elapsed, steps = _seconds_of_steps(timing) - self._last[0], step - self._last[1]
        self._last = (_seconds_of_steps(timing), step)
        timing["steps_per_second"] = steps / max(elapsed, 1e-9)
        if self._utilization_per_step is not None:
            timing["model_flops_utilization"] = self._utilization_per_step * timing["steps_per_second"]
        if self._writer is not None:
            self._writer.write(step, {**values, **self._watch.look(step, values), **timing})
        self._bar.set_postfix(loss=f"{float(values['loss']):.4g}", refresh=False)
        return values


def _seconds_of_steps(timing: dict[str, float]) -> float:
    """Time in which steps could be taken: while data are waited for, devices may work, or idle for want of them."""
    return timing["seconds_step"] + timing["seconds_data"]
