"""Runs of several processes, and runs that move to other devices: the same figures as one process alone."""

import itertools
import json
import random
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from audiolm_jax.data.token_dataset import TokenDataset
from audiolm_jax.parts import read_part
from audiolm_jax.training.checkpoint import FOLDER, find_checkpoint
from audiolm_jax.training.metrics import read_metrics
from tests.data.pipeline_test import METADATA
from tests.training import tokens
from tests.training.devices import environment
from tests.training.loop_test import command, losses, run

pytestmark = pytest.mark.slow
FIELDS = {"batch_size": 4, "num_train_steps": 12, "model.num_heads": 4, "packing": True, "model.dropout_rate": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return {"tokens": str(tokens.write(tmp_path_factory.mktemp("data") / "tokens", METADATA))}


def start_two(arguments):
    """The two processes of one run, two devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {"AUDIOLM_COORDINATOR": address, "AUDIOLM_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(
            [*arguments, "--distributed"],
            env=environment(2, **settings, AUDIOLM_PROCESS_ID=str(index)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def finish(processes, expected_status=0):
    for process in processes:
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == expected_status, errors[-3000:]


def wait_for_step(processes, workdir, step):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        rows = read_metrics(workdir)
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} not reached: {[process.poll() for process in processes]}")


def saved_step(workdir):
    checkpoint = find_checkpoint(workdir)
    return int(checkpoint.name) if checkpoint else 0


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Workdirs of whole runs of two processes x two devices, by mesh."""
    workdirs = {}
    for name, mesh in (("data", {}), ("mixed", {"mesh.fsdp": 2, "mesh.tensor": 2}), ("tensor", {"mesh.tensor": 4})):
        workdirs[name] = tmp_path_factory.mktemp(name) / "w"
        finish(start_two(command("coarse", data, workdirs[name], **FIELDS, **mesh)))
    return workdirs


def test_two_processes_equal_one(data, uninterrupted, tmp_path):
    for name, mesh in (("data", {}), ("mixed", {"mesh.fsdp": 2, "mesh.tensor": 2}), ("tensor", {"mesh.tensor": 4})):
        alone = run(command("coarse", data, tmp_path / name, **FIELDS, **mesh), env=environment(4))
        assert alone.returncode == 0, alone.stderr[-3000:]
        ours, theirs = losses(uninterrupted[name]), losses(tmp_path / name)
        assert [row["step"] for row in ours] == list(range(1, 13))
        for row, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(row["loss"], other["loss"], rtol=1e-5)
            assert ("eval_loss" in row) == ("eval_loss" in other)
            np.testing.assert_allclose(row.get("eval_loss", 0), other.get("eval_loss", 0), rtol=1e-5)
        pair = (jax.tree.leaves(read_part(w).weights) for w in (uninterrupted[name], tmp_path / name))
        for leaf, other in zip(*pair, strict=True):
            assert np.linalg.norm(leaf - other) <= 1e-4 * np.linalg.norm(other)


def test_one_of_two_killed_and_both_restarted_continues_bit_for_bit(data, uninterrupted, tmp_path):
    arguments = command("coarse", data, tmp_path / "w", **FIELDS, **{"mesh.fsdp": 2, "mesh.tensor": 2})
    processes = start_two(arguments)
    wait_for_step(processes, tmp_path / "w", 6)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].communicate()
    # The other one waits for its peer, or has noticed; what restarts a job ends it.
    processes[0].kill()
    processes[0].communicate()
    finish(start_two(arguments))
    assert losses(tmp_path / "w") == losses(uninterrupted["mixed"])


def test_sigterm_to_one_of_two_saves_and_exits_143_in_both(data, tmp_path):
    arguments = command("coarse", data, tmp_path / "w", **{**FIELDS, "num_train_steps": 100000})
    processes = start_two(arguments)
    wait_for_step(processes, tmp_path / "w", 3)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, 143)
    saved = int(find_checkpoint(tmp_path / "w").name)
    assert read_metrics(tmp_path / "w")[-1]["step"] == saved


def test_two_processes_and_then_one_train_on_every_record_of_an_epoch_once(data, tmp_path):
    source = TokenDataset(data["tokens"]).source("train")
    # Crops longer than any record: what is trained on tells the record.
    record_of = {tuple(3 + source[index]["semantic"]): index for index in range(len(source))}
    fields = {**FIELDS, "stage.crop_seconds": 7.0, "stage.deduplicate": False}

    def recorded(folder, steps):
        (tmp_path / folder).mkdir()
        arguments = command("semantic", data, tmp_path / "w", **{**fields, "num_train_steps": steps})
        return [*arguments[:2], "tests.training.recorded_run", str(tmp_path / folder), *arguments[3:]]

    finish(start_two(recorded("two", 2)))
    alone = run(recorded("one", 9))
    assert alone.returncode == 0, alone.stderr[-3000:]
    batches = []
    for folder, count in (("two", 2), ("one", 1)):
        files = [path.read_text().splitlines() for path in (tmp_path / folder).iterdir()]
        assert len(files) == count
        for lines in zip(*files, strict=True):
            shares = [dict(zip(*json.loads(line).values(), strict=True)) for line in lines]
            # No row of a batch is in two processes.
            assert sorted(row for share in shares for row in share) == [0, 1, 2, 3]
            batches += [sequences for _, sequences in sorted(pair for share in shares for pair in share.items())]
    seen = [[record_of[tuple(tokens[:-1])] for tokens in row] for row in batches]
    flat = list(itertools.chain(*seen))
    assert max(map(len, seen)) > 1 and len(flat) > 2 * 20
    for epoch in range(len(flat) // 20):
        assert sorted(flat[20 * epoch : 20 * (epoch + 1)]) == list(range(20))


def test_checkpoint_of_eight_devices_continues_on_one_and_on_four(data, tmp_path):
    fields = {**FIELDS, "batch_size": 8, "num_train_steps": 6}
    shard = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    assert run(command("coarse", data, tmp_path / "eight", **fields, **shard), env=environment(8)).returncode == 0
    next_losses = []
    for devices, mesh in ((8, shard), (1, {}), (4, {"mesh.fsdp": 4})):
        workdir = shutil.copytree(tmp_path / "eight", tmp_path / str(devices))
        arguments = command("coarse", data, workdir, **{**fields, "num_train_steps": 7}, **mesh)
        done = run(arguments, env=environment(devices))
        assert done.returncode == 0, done.stderr[-3000:]
        next_losses.append(losses(workdir)[-1])
    for row in next_losses:
        assert row["step"] == 7
        np.testing.assert_allclose(row["loss"], next_losses[0]["loss"], rtol=1e-5)


def test_sigkill_during_a_save_leaves_the_checkpoint_before_it(data, tmp_path):
    fields = {"num_train_steps": 100000, "checkpoint_every_steps": 1, "model.embed_dim": 512, "model.mlp_dim": 2048}
    for attempt in itertools.count():
        assert attempt < 10, "never caught in the middle of a save"
        workdir = tmp_path / str(attempt)
        arguments = command("semantic", data, workdir, **fields)
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not (find_checkpoint(workdir) and list((workdir / FOLDER).glob("*tmp*"))):
            assert time.monotonic() < deadline and process.poll() is None
        process.kill()
        process.wait()
        if list((workdir / FOLDER).glob("*tmp*")):
            break
    whole = int(find_checkpoint(workdir).name)
    read_part(workdir)
    last = whole + 2
    resumed = run(command("semantic", data, workdir, **{**fields, "num_train_steps": last}))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert [row["step"] for row in losses(workdir)] == list(range(1, last + 1))
    assert not list((workdir / FOLDER).glob("*tmp*"))


def test_twenty_random_kills_lose_no_saved_step(data, tmp_path):
    fields = {"checkpoint_every_steps": 2, "num_train_steps": 100000, "optimizer.schedule": "constant"}
    arguments, generator = command("semantic", data, tmp_path / "w", **fields), random.Random(0)
    saved = 0
    for trial in range(20):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Every fourth kill comes anywhere between the start and the first steps, the others among saves.
        time.sleep(generator.uniform(0.0, 8.0) if trial % 4 == 3 else 0.0)
        while trial % 4 != 3 and not saved_step(tmp_path / "w") > saved:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.3))
        process.kill()
        process.wait()
        assert saved_step(tmp_path / "w") >= saved
        saved = saved_step(tmp_path / "w")
        steps = [row["step"] for row in read_metrics(tmp_path / "w")]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= saved
    assert saved >= 20
    last = saved + 2
    for workdir in ("w", "whole"):
        done = run(command("semantic", data, tmp_path / workdir, **{**fields, "num_train_steps": last}))
        assert done.returncode == 0, done.stderr[-3000:]
    whole = {row["step"]: row["loss"] for row in losses(tmp_path / "whole")}
    assert {row["step"]: row["loss"] for row in losses(tmp_path / "w")} == whole and list(whole)[-1] == last
