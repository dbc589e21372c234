"""Grids, their runs on this machine, and the table they end with."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from audiolm_jax import cli, sweep
from audiolm_jax.config import load_config, shipped_folder
from audiolm_jax.errors import UserError
from audiolm_jax.training.metrics import read_metrics
from tests import tiny
from tests.data.pipeline_test import METADATA
from tests.training import tokens


def write_grid(folder, grid):
    path = folder / "grid.json"
    path.write_text(json.dumps(grid))
    return path


def test_every_combination_is_a_run(tmp_path):
    runs = sweep.read_grid(write_grid(tmp_path, {"model.num_layers": [1, 2], "optimizer.learning_rate": [0.1, 0.2]}))
    assert [run.fields for run in runs] == [
        {"model.num_layers": layers, "optimizer.learning_rate": rate} for layers in (1, 2) for rate in (0.1, 0.2)
    ]
    assert runs[1].name == "num_layers=1,learning_rate=0.2"


def test_fields_that_change_together_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENS", "gs://lab/tokens")
    runs = sweep.read_grid(shipped_folder("configs") / "sweeps" / "num_clusters.json")
    assert [run.fields["stage.num_clusters"] for run in runs] == [256, 512, 1024, 2048]
    assert runs[0].fields["data_dir"] == "gs://lab/tokens/clusters_256"
    assert runs[0].name == "num_clusters=256,data_dir=clusters_256"
    monkeypatch.delenv("TOKENS")
    with pytest.raises(UserError, match="environment variable not set: TOKENS"):
        sweep.read_grid(shipped_folder("configs") / "sweeps" / "num_clusters.json")


@pytest.mark.parametrize(
    "path", sorted((shipped_folder("configs") / "sweeps").glob("*.json")), ids=lambda path: path.stem
)
def test_shipped_grids_fit_the_paper_s_configs(path, monkeypatch):
    monkeypatch.setenv("TOKENS", "gs://lab/tokens")
    runs = sweep.read_grid(path)
    assert len({run.name for run in runs}) == len(runs) > 1
    for run in runs:
        config = load_config("coarse_librilight", run.overrides())
        for name, value in run.fields.items():
            assert (
                config.get_ref(name).get() == value if "." not in name else config.to_dict()["stage"][name[6:]] == value
            )


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "not a grid"),
        ("text", "not a grid"),
        ({"seed": 3}, "values of seed are not a list"),
        ({"seed": []}, "values of seed are not a list"),
        ([{"seed": [1]}, {"seed": [2, 1]}], "two runs would share the folder seed=1"),
        ({"data_dir": ["/a/tokens", "/b/tokens"]}, "two runs would share the folder data_dir=tokens"),
    ],
)
def test_bad_grids(tmp_path, grid, message):
    with pytest.raises(UserError, match=message):
        sweep.read_grid(write_grid(tmp_path, grid))
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            sweep.read_grid(path)
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        sweep.read_grid(tmp_path / "torn.json")


def arguments(backend, grid, workdir, data, **fields):
    settings = {
        "data_dir": data, "num_train_steps": 30, "log_every_steps": 5, "eval_every_steps": 10,
        "checkpoint_every_steps": 5, **fields,
    }  # fmt: skip
    return [
        "sweep", "--config=semantic_tiny", f"--grid={grid}", f"--backend={backend}", f"--workdir={workdir}",
        *tiny.flags_of("semantic"), *(f"--config.{name}={value}" for name, value in settings.items()),
    ]  # fmt: skip


def test_unknown_field_is_refused_before_anything_starts(tmp_path, capsys):
    grid = write_grid(tmp_path, {"seed": [1], "model.num_layer": [1]})
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments("local", grid, tmp_path / "w", "x"))
    assert stopped.value.code == 2
    assert "did you mean config.model.num_layers?" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(("backend", "script"), [("slurm", "slurm.sh"), ("gke", "gke.sh"), ("tpu", "tpu_pod.sh")])
def test_dry_run_prints_one_command_a_run(tmp_path, capsys, backend, script):
    grid = write_grid(tmp_path, {"seed": [1, 2]})
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments(backend, grid, "gs://b/w", "gs://b/t"), "--dry-run", "--launcher=--zone=z --spot"])
    assert not stopped.value.code
    first, second = capsys.readouterr().out.splitlines()
    assert f"launch/{script}" in first and " --zone=z --spot -- train --config=semantic_tiny " in first
    assert "--workdir=gs://b/w/seed=1 " in first and first.endswith("--config.seed=1")
    assert "--workdir=gs://b/w/seed=2 " in second


@pytest.mark.parametrize(("backend", "options"), [("slurm", "--partition='gpu"), ("local", "--partition=gpu")])
def test_bad_options_of_a_launcher(tmp_path, capsys, backend, options):
    grid = write_grid(tmp_path, {"seed": [1]})
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments(backend, grid, tmp_path / "w", "t"), f"--launcher={options}"])
    assert stopped.value.code == 2
    assert f"--launcher={options}" in capsys.readouterr().err


def test_a_signal_ends_a_run_that_does_not_listen_yet(tmp_path):
    training = f"import pathlib, time; pathlib.Path({str(tmp_path / 'started')!r}).touch(); time.sleep(100)"
    code = (
        f"import sys; from audiolm_jax import sweep; sys.exit(sweep._train_here([sys.executable, '-c', {training!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143


def test_each_run_is_submitted_once(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f"#!/usr/bin/env bash\ncat > /dev/null\necho x >> {tmp_path}/log\necho 4711\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("AUDIOLM_INSTALLED", "1")
    for seeds, submissions in (([1, 2], 2), ([1, 2], 2), ([1, 2, 3], 3)):
        with pytest.raises(SystemExit):
            cli.main(arguments("slurm", write_grid(tmp_path, {"seed": seeds}), tmp_path / "w", "t"))
        assert len((tmp_path / "log").read_text().splitlines()) == submissions
    assert json.loads((tmp_path / "w" / "submitted.json").read_text()) == {f"seed={seed}": "4711" for seed in (1, 2, 3)}
    rows = list(csv.DictReader((tmp_path / "w" / "results.csv").open()))
    assert [row["status"] for row in rows] == ["waiting"] * 3


@pytest.mark.slow
def test_four_runs_killed_and_restarted_end_with_one_table_and_one_plot(tmp_path):
    data = tokens.write(tmp_path / "tokens", METADATA)
    grid = write_grid(tmp_path, {"seed": [0, 1], "optimizer.learning_rate": [0.01, 0.001]})
    workdir = tmp_path / "w"
    command = [sys.executable, "-m", "audiolm_jax", *arguments("local", grid, workdir, data, num_train_steps=60)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    second = workdir / "seed=0,learning_rate=0.001"
    while not (rows := read_metrics(second)) or rows[-1]["step"] < 10:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "another sweep is running here" in refused.stderr
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = (workdir / "seed=0,learning_rate=0.01" / "metrics.jsonl").read_text()
    # Stopped once more, by a notice: the run in progress is saved.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    third = workdir / "seed=1,learning_rate=0.01"
    while not (rows := read_metrics(third)) or rows[-1]["step"] < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(workdir / "results.md") and "sweep" in done.stderr
    assert (workdir / "seed=0,learning_rate=0.01" / "metrics.jsonl").read_text() == first
    rows = list(csv.DictReader((workdir / "results.csv").open()))
    assert [(row["seed"], row["optimizer.learning_rate"]) for row in rows] == [
        ("0", "0.01"), ("0", "0.001"), ("1", "0.01"), ("1", "0.001")
    ]  # fmt: skip
    for row in rows:
        assert row["status"] == "finished" and row["step"] == "60"
        assert float(row["best_eval_loss"]) <= float(row["eval_loss"])
        # Every logged step stands there once; the step at which the notice came is one more.
        name = f"seed={row['seed']},learning_rate={row['optimizer.learning_rate']}"
        steps = [r["step"] for r in read_metrics(workdir / name)]
        assert steps == sorted(set(steps)) and set(steps) >= set(range(5, 61, 5)) and len(steps) <= 13
    assert (workdir / "results.md").read_text().count("| finished |") == 4
    assert (workdir / "results.png").read_bytes().startswith(b"\x89PNG")


def test_failed_run_does_not_stop_the_others(tmp_path, capfd):
    data = tokens.write(tmp_path / "tokens", METADATA)
    grid = write_grid(tmp_path, {"stage.num_clusters": [4, tiny.CLUSTERS]})
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments("local", grid, tmp_path / "w", data, num_train_steps=5))
    assert stopped.value.code == 1
    rows = list(csv.DictReader(pathlib.Path(tmp_path / "w" / "results.csv").open()))
    assert [row["status"] for row in rows] == ["failed (2)", "finished"]
    assert "error: " in capfd.readouterr().err
