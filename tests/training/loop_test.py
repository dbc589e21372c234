"""The loop with real processes: killed, terminated, resumed, refused."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from audiolm_jax.errors import UserError
from audiolm_jax.training.checkpoint import find_checkpoint
from audiolm_jax.training.loop import check_resumable, train
from audiolm_jax.training.metrics import is_timing, read_metrics
from tests import tiny
from tests.data.pipeline_test import METADATA
from tests.training import tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        "recordings": str(tiny.write_recordings(folder / "recordings", (0.4, 0.9, 1.2, 0.5, 1.1, 0.45, 1.4, 0.8))),
        "tokens": str(tokens.write(folder / "tokens", METADATA)),
    }


def command(objective, data, workdir, **fields):
    config = {"classifier": "speaker_classifier_tiny"}.get(objective, f"{objective}_tiny")
    kind = "tokens" if objective in tiny.STAGES else "recordings"
    settings = {
        "data_dir": data[kind], "num_train_steps": 12, "log_every_steps": 1, "eval_every_steps": 6,
        "checkpoint_every_steps": 4, **fields,
    }  # fmt: skip
    return [
        sys.executable, "-m", "audiolm_jax", "train", f"--config={config}", f"--workdir={workdir}",
        *tiny.flags_of(objective), *(f"--config.{name}={value}" for name, value in settings.items()),
    ]  # fmt: skip


def run(arguments, **options):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600, **options)


def start_and_wait_for_step(arguments, workdir, step):
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        rows = read_metrics(workdir)
        if rows and rows[-1]["step"] >= step:
            return process
        time.sleep(0.01)
    raise AssertionError(f"step {step} not reached: {process.communicate()[1].decode()[-2000:]}")


# What a codec's state can hold, codes that die, and the watch's averages; batches of two shapes.
MORE = {
    "soundstream": {
        "loss.balancer": True, "ema_decay": 0.9, "quantizer.dead_code_share": 0.5,
        "discriminator.multi_stft_windows": (64,),
    },
    "w2v_bert": {"bucket_seconds": (0.5,)},
}  # fmt: skip


def final_state(workdir):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return jax.tree.map(np.asarray, checkpointer.restore(find_checkpoint(workdir) / "state"))


def losses(workdir):
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in read_metrics(workdir)]


# A semantic run on every commit; the others, whose compilation takes longer, in the slow step.
@pytest.mark.parametrize(
    "objective", ["semantic", *(pytest.param(o, marks=pytest.mark.slow) for o in tiny.OVERRIDES if o != "semantic")]
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(objective, data, tmp_path):
    steps = 40
    fields = {"num_train_steps": steps, **MORE.get(objective, {})}
    whole = run(command(objective, data, tmp_path / "whole", **fields))
    assert whole.returncode == 0, whole.stderr[-2000:]
    arguments = command(objective, data, tmp_path / "killed", **fields)
    process = start_and_wait_for_step(arguments, tmp_path / "killed", 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = run(arguments)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    expected = losses(tmp_path / "whole")
    assert [row["step"] for row in expected] == list(range(1, steps + 1))
    assert losses(tmp_path / "killed") == expected
    state = final_state(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path / "killed"), state)
    if objective == "soundstream":
        assert {"generator_opt", "discriminator_opt", "balancer", "codebooks", "ema"} <= set(state)
        replaced = [row["dead_codes_0"] + row["dead_codes_1"] + row["dead_codes_2"] for row in expected]
        assert sum(replaced[:20]) and sum(replaced[20:]) and expected[-1]["share_adversarial"] > 0


def test_sigterm_saves_and_exits_143(data, tmp_path):
    process = start_and_wait_for_step(
        command("semantic", data, tmp_path / "w", num_train_steps=100000), tmp_path / "w", 3
    )
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    saved = int(find_checkpoint(tmp_path / "w").name)
    row = read_metrics(tmp_path / "w")[-1]
    # There is no time to evaluate after a notice.
    assert row["step"] == saved and "eval_loss" not in row
    resumed = run(command("semantic", data, tmp_path / "w", num_train_steps=saved + 2))
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert [row["step"] for row in losses(tmp_path / "w")] == list(range(1, saved + 3))


def test_ctrl_c_saves_and_exits_130(data, tmp_path):
    process = start_and_wait_for_step(
        command("semantic", data, tmp_path / "w", num_train_steps=100000), tmp_path / "w", 3
    )
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130 and find_checkpoint(tmp_path / "w") is not None


def test_two_runs_in_one_workdir_and_another_config(data, tmp_path):
    process = start_and_wait_for_step(
        command("semantic", data, tmp_path / "w", num_train_steps=100000), tmp_path / "w", 5
    )
    second = run(command("semantic", data, tmp_path / "w"))
    assert second.returncode == 2
    assert second.stderr.strip().splitlines()[-1].startswith("error: another run is training here: ")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    other = run(command("semantic", data, tmp_path / "w", **{"model.mlp_dim": 24}))
    assert other.returncode == 2
    last = other.stderr.strip().splitlines()[-1]
    assert last.startswith("error: checkpoint of another config: config.model.mlp_dim was 16, now 24: ")
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize("field", ["input.num_threads", "input.prefetch_batches", "batch_size", "eval_every_steps"])
def test_numbers_that_cannot_be_are_refused_by_name(data, tmp_path, field):
    config = tiny.config_of("soundstream", data_dir=data["recordings"])
    config.update_from_flattened_dict({field: -1})
    with pytest.raises(UserError, match=f"config.{field}=-1"):
        train(config, str(tmp_path / "w"))


def test_finished_run_writes_what_the_contract_names(data, tmp_path):
    done = run(command("semantic", data, tmp_path / "w"))
    assert done.returncode == 0, done.stderr[-2000:]
    names = {path.name.split(".")[0] for path in (tmp_path / "w").iterdir()}
    assert {"config", "metrics", "checkpoints", "events"} <= names
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    assert config["num_train_steps"] == 12 and config["model"]["mlp_dim"] == 16
    assert sorted(os.listdir(tmp_path / "w" / "checkpoints")) == ["12", "4", "8"]
    evaluated = [row for row in losses(tmp_path / "w") if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [6, 12]
    assert "train semantic" in done.stderr and done.stdout == ""
    again = run(command("semantic", data, tmp_path / "w"))
    assert again.returncode == 0 and "already at step 12" in again.stderr


def test_a_field_that_an_earlier_version_did_not_know_stops_no_run_while_it_is_off():
    before = {"config": {"seed": 0, "model": {"embed_dim": 16}}, "tokens": None}
    off = {"config": {"seed": 0, "model": {"embed_dim": 16, "prefix_attention": False}}, "tokens": None}
    check_resumable(before, off, "runs/x")
    on = {"config": {"seed": 0, "model": {"embed_dim": 16, "prefix_attention": True}}, "tokens": None}
    with pytest.raises(UserError, match="prefix_attention was None, now True"):
        check_resumable(before, on, "runs/x")


def test_members_of_a_mixture_may_move_between_runs_but_their_rates_stay():
    paths = {"data_dirs": ["a", "b"], "rates": [3, 1]}
    before = {"config": {"mixture": paths}, "tokens": None}
    check_resumable(before, {"config": {"mixture": {**paths, "data_dirs": ["c", "d"]}}, "tokens": None}, "runs/x")
    with pytest.raises(UserError, match=r"config.mixture.rates was \(3, 1\), now \(1, 1\)"):
        check_resumable(before, {"config": {"mixture": {**paths, "rates": [1, 1]}}, "tokens": None}, "runs/x")
