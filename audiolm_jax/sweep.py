"""A grid over config fields: a training run for each point, on this machine or a cluster, and one table of results."""

import csv
import dataclasses
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import tqdm
from etils import epath

from audiolm_jax import config as configs
from audiolm_jax import files
from audiolm_jax.errors import UserError
from audiolm_jax.training.checkpoint import find_checkpoint
from audiolm_jax.training.metrics import read_metrics

BACKENDS = ("local", "slurm", "gke", "tpu")
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
SUBMITTED_FILE = "submitted.json"
# Columns of the table beside the fields that differ.
FIGURES = ("status", "step", "eval_loss", "best_eval_loss", "loss", "steps_per_second")


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of a grid.

    Attributes:
      name: of its folder, made of what distinguishes it: the same in every invocation.
      fields: config fields and their values.
    """

    name: str
    fields: dict[str, Any]

    def overrides(self) -> list[str]:
        return [f"--config.{name}={value}" for name, value in self.fields.items()]


def read_grid(path: str | os.PathLike[str]) -> list[Run]:
    """The runs of a grid file.

    The file is JSON: an object of config fields and lists of values, of which every combination is a run; or a list of
    such objects, one after the other, where fields change together: [{"stage.num_clusters": [256], "data_dir":
    ["$TOKENS/256"]}, …]. $NAME in a text stands for that environment variable.

    Raises:
      UserError: no such file, not such a grid, a variable that is not set, two runs of the same name.
    """
    try:
        grid = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise UserError(f"grid file cannot be read ({error.strerror})", path, "give a .json file") from error
    except ValueError as error:
        raise UserError(f"grid is not JSON ({error})", path, "mend it") from error
    parts = grid if isinstance(grid, list) else [grid]
    if not parts or not all(isinstance(part, dict) and part for part in parts):
        raise UserError("not a grid", path, 'write {"FIELD": [VALUE, …], …} or a list of such objects')
    for name, values in ((name, values) for part in parts for name, values in part.items()):
        if not isinstance(values, list) or not values:
            raise UserError(f"values of {name} are not a list", path, f'write "{name}": [VALUE, …]')
    points = [
        dict(zip(part, (_expand(value, path) for value in values), strict=True))
        for part in parts
        for values in itertools.product(*part.values())
    ]
    runs: dict[str, Run] = {}
    for point in points:
        run = Run(_name(point), point)
        if run.name in runs:
            problem = f"two runs would share the folder {run.name}"
            raise UserError(problem, path, "leave one out, or give values whose last parts differ")
        runs[run.name] = run
    return list(runs.values())


def _expand(value: Any, path: str | os.PathLike[str]) -> Any:
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    expanded = os.path.expandvars(value)
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise UserError(f"environment variable not set: {missing.group(1)}", path, f"export {missing.group(1)}=…")
    return expanded


def _name(fields: dict[str, Any]) -> str:
    """FIELD=VALUE,… with the last parts of names and paths; only what every file system takes."""
    short = [f"{name.rpartition('.')[2]}={os.path.basename(str(value).rstrip('/'))}" for name, value in fields.items()]
    return re.sub(r"[^\w.=,+\-]", "_", ",".join(short))


def sweep(
    config_name: str,
    overrides: Sequence[str],
    grid: str,
    backend: str,
    workdir: str,
    dry_run: bool,
    launcher: list[str],
) -> int:
    """Trains every run of a grid, each in WORKDIR/NAME, and tabulates what there is so far.

    On this machine one run follows the other; what is finished is not started again, what was interrupted goes on. For
    the other back ends each run is handed to its script in `launch/` once; called again, the sweep hands over what is
    new and brings the table up to date. The results: WORKDIR/results.md, results.csv and results.png.

    Args:
      config_name: recipe file or name of a shipped one.
      overrides: `--config.FIELD=VALUE` for all runs.
      grid: see `read_grid`.
      backend: of `BACKENDS`.
      workdir: of the sweep.
      dry_run: only prints the commands.
      launcher: further arguments for the back end's script, such as a queue or a zone.

    Returns:
      exit status: 0; 1 where a run failed; 143 or 130 when SIGTERM or Ctrl-C stopped the sweep (that run is saved).
    """
    runs = read_grid(grid)
    for run in runs:
        configs.load_config(config_name, [*overrides, *run.overrides()])
    commands = {
        run.name: _command(config_name, [*overrides, *run.overrides()], workdir, run, backend, launcher) for run in runs
    }
    if dry_run:
        for command in commands.values():
            print(shlex.join(command))
        return 0
    folder = files.make_workdir(workdir)
    if not files.is_local(folder):
        return _start_all(runs, commands, folder, backend)
    with files.exclusive(pathlib.Path(workdir) / ".lock", "another sweep is running here", workdir):
        return _start_all(runs, commands, folder, backend)


def _command(config_name, overrides: list[str], workdir: str, run: Run, backend: str, launcher: list[str]) -> list[str]:
    train = ["train", f"--config={config_name}", f"--workdir={workdir.rstrip('/')}/{run.name}", *overrides]
    if backend == "local":
        return [sys.executable, "-m", "audiolm_jax", *train]
    script = {"slurm": "slurm.sh", "gke": "gke.sh", "tpu": "tpu_pod.sh"}[backend]
    path = pathlib.Path(__file__).resolve().parent.parent / "launch" / script
    if not path.exists():
        raise UserError("no launch scripts in this installation", path, "sweep from a clone of the repository")
    # A pod's script stays with its run until it ends; the others only hand it to a scheduler.
    detached = ["--detach"] if backend == "tpu" else []
    return ["bash", str(path), *detached, *launcher, "--", *train]


def _start_all(runs: list[Run], commands: dict[str, list[str]], folder: epath.Path, backend: str) -> int:
    statuses: dict[str, str] = {}
    bar = tqdm.tqdm(runs, desc="sweep", unit="run")
    for run in bar:
        bar.set_postfix_str(run.name)
        status = _train_here(commands[run.name]) if backend == "local" else _submit(commands[run.name], run, folder)
        statuses[run.name] = "" if status in (0, *STOPPED) else f"failed ({status})"
        write_results(runs, folder, statuses)
        if status in STOPPED:
            return status
    print(folder / "results.md")
    return 1 if any(statuses.values()) else 0


def _train_here(command: list[str]) -> int:
    """Runs one training to its end; a signal to the sweep reaches it, it saves, and the signal's status is returned."""
    stopped: list[int] = []
    process: subprocess.Popen | None = None

    def stop(*_):
        stopped.append(143)
        if process is not None:
            process.terminate()

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        process = subprocess.Popen(command)
        if stopped:
            process.terminate()
        status = process.wait()
    except KeyboardInterrupt:
        # Ctrl-C has reached the run as well.
        stopped.append(130)
        status = process.wait() if process is not None else 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return stopped[0] if stopped else status


def _submit(command: list[str], run: Run, folder: epath.Path) -> int:
    record = folder / SUBMITTED_FILE
    submitted = json.loads(record.read_text()) if record.exists() else {}
    if run.name in submitted:
        return 0
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        submitted[run.name] = done.stdout.strip()
        files.write_bytes(record, (json.dumps(submitted, indent=2) + "\n").encode())
    return done.returncode


def write_results(runs: list[Run], folder: epath.Path, statuses: dict[str, str]):
    """The table and the plot of what the runs have reached: results.md, results.csv, results.png."""
    metrics = {run.name: read_metrics(folder / run.name) for run in runs}
    fields = list(dict.fromkeys(name for run in runs for name in run.fields))
    rows = [
        [
            *(str(run.fields.get(name, "")) for name in fields),
            *_figures(metrics[run.name], folder / run.name, statuses.get(run.name)),
        ]
        for run in runs
    ]
    header = [*fields, *FIGURES]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    files.write_bytes(folder / "results.csv", table.getvalue().encode())
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *rows)]
    page = "# Results\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n\n![held-out loss by step](results.png)\n"
    files.write_bytes(folder / "results.md", page.encode())
    files.write_bytes(folder / "results.png", _plot(metrics))


def _figures(rows: list[dict[str, Any]], workdir: epath.Path, failure: str | None) -> list[str]:
    """What `FIGURES` names, as text."""
    if not rows:
        return [failure or "waiting", "0", "", "", "", ""]
    config = configs.from_json((workdir / "config.json").read_text())
    saved = find_checkpoint(workdir)
    finished = saved is not None and int(saved.name) >= config.num_train_steps
    evaluated = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    number = lambda values, choose: f"{choose(values):.4f}" if values else ""
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    last = lambda values: values[-1]
    return [
        failure or ("finished" if finished else "unfinished"),
        str(rows[-1]["step"]),
        number(evaluated, last),
        number(evaluated, min),
        number(losses, last),
        f"{rows[-1]['steps_per_second']:.2f}",
    ]


def _plot(metrics: dict[str, list[dict[str, Any]]]) -> bytes:
    """Held-out loss by step, a line a run (training loss where nothing was held out), as PNG."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in metrics.items():
        key = "eval_loss" if any("eval_loss" in row for row in rows) else "loss"
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="held-out loss")
    if axes.has_data():
        axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
