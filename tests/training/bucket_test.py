"""A workdir in a bucket: gs:// spoken to a server of its protocol on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.data.pipeline_test import METADATA
from tests.training import tokens
from tests.training.loop_test import command, losses, run

pytestmark = pytest.mark.slow
FIELDS = {"num_train_steps": 12, "checkpoint_every_steps": 4}


@pytest.fixture(scope="module")
def bucket():
    """gs:// path of an empty bucket; the environment of this process and its children points to the server."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = [sys.executable, "-m", "tests.training.bucket_server", str(port)]
    server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield "gs://audiolm"
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return {"tokens": str(tokens.write(tmp_path_factory.mktemp("data") / "tokens", METADATA))}


def test_killed_and_resumed_in_a_bucket_equals_a_folder_s_run(bucket, data, tmp_path):
    from etils import epath

    from audiolm_jax.parts import read_part
    from audiolm_jax.training.checkpoint import find_checkpoint

    local = run(command("semantic", data, tmp_path / "w", **FIELDS))
    assert local.returncode == 0, local.stderr[-3000:]
    workdir = epath.Path(f"{bucket}/runs/a")
    arguments = command("semantic", data, os.fspath(workdir), **FIELDS)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while find_checkpoint(workdir) is None:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # A save that was cut off lies under its final name here, without the mark of a whole one.
    (workdir / "checkpoints" / "99" / "state").mkdir(parents=True)
    (workdir / "checkpoints" / "99" / "state" / "half").write_text("x")
    assert find_checkpoint(workdir).name != "99"
    resumed = run(arguments)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses(os.fspath(workdir)) == losses(tmp_path / "w")
    assert not (workdir / "metrics.jsonl").exists() and (workdir / "config.json").exists()
    assert read_part(os.fspath(workdir)).fingerprint() == read_part(tmp_path / "w").fingerprint()


def test_bucket_that_is_not_there_is_one_line(bucket, data):
    failed = run(command("semantic", data, "gs://no-such-bucket/w", **FIELDS))
    assert failed.returncode == 2
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error: workdir not writable") and "gs://no-such-bucket/w; check the bucket" in last
