"""Where a run's figures go: `metrics.jsonl` (one object a logged step) and TensorBoard events beside it."""

import json
import os
import pathlib
from typing import Any

import numpy as np

FILE = "metrics.jsonl"


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a torn last line, which a killed process can leave, is dropped."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


class MetricsWriter:
    """Appends a row a step; a context manager.

    Rows later than `restored_step` come from a process that died after its last checkpoint: they
    are cut off first, so that every step stands in the file once.
    """

    def __init__(self, workdir: pathlib.Path, restored_step: int):
        from tensorboardX import SummaryWriter  # Takes half a second; a command that fails early need not wait.

        path = workdir / FILE
        kept = [row for row in read_metrics(path) if row["step"] <= restored_step]
        scratch = path.with_suffix(".jsonl.incomplete")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(scratch, path)
        self._file = open(path, "a")
        self._tensorboard = SummaryWriter(str(workdir), purge_step=restored_step + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_):
        self._file.close()
        self._tensorboard.close()

    def write(self, step: int, values: dict[str, Any]):
        """Writes scalars and vectors (as lists) at full precision; on disk when this returns."""
        row = {"step": step}
        for name, value in values.items():
            row[name] = np.asarray(value, np.float64).tolist()
            for i, scalar in enumerate(np.atleast_1d(np.asarray(value))):
                tag = name if np.ndim(value) == 0 else f"{name}/{i}"
                self._tensorboard.add_scalar(tag, scalar, step)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
