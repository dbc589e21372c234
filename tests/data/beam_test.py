"""Tokenizing in several processes: hosts, and the workers of Apache Beam, killed and started again."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from audiolm_jax.data import tokenize
from audiolm_jax.errors import UserError
from tests import tiny
from tests.data import fakes
from tests.data.tokenize_test import contents, ignore, recordings, request, whole  # noqa: F401

SECONDS = (1.1, 0.9, 1.4, 0.8, 1.2, 1.0, 1.3, 0.7, 1.5, 0.6)
pytestmark = pytest.mark.slow


def import_beam():
    pytest.importorskip("apache_beam", reason="needs Apache Beam: pip install -e '.[beam]'")
    from audiolm_jax.data import beam

    return beam


def test_two_workers_make_what_one_process_makes(recordings, whole, tmp_path):  # noqa: F811
    beam = import_beam()
    write = beam.write_shards(fakes.load, ignore, "direct", 2, [])
    tokenize.tokenize(request(recordings, tmp_path / "tokens"), fakes.load(), ignore, write_shards=write)
    assert contents(tmp_path / "tokens") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_what_a_worker_leaves_out_is_reported(recordings, tmp_path):  # noqa: F811
    beam = import_beam()
    paths = [tmp_path / name for name in ("nan.wav", "good.wav")]
    for path, last in zip(paths, (np.nan, 0.5)):
        soundfile.write(path, np.array([0.1] * 9999 + [last]), 16000, subtype="FLOAT")
    lines: list[str] = []
    write = beam.write_shards(fakes.load, lines.append, "direct", 1, [])
    listed = [tokenize.manifest.Recording(path.stem, path) for path in paths]
    tokenize.tokenize(request(listed, tmp_path / "tokens"), fakes.load(), lines.append, write_shards=write)
    (entry,) = map(json.loads, (tmp_path / "tokens" / "left_out.jsonl").read_text().splitlines())
    assert entry["id"] == "nan" and "not finite" in entry["reason"]
    assert lines[0] == f"left out: {entry['reason']}" and lines[-1].startswith("tokenized 1 recordings")


def test_a_failure_in_a_worker_is_one_line(recordings, tmp_path):  # noqa: F811
    beam = import_beam()
    write = beam.write_shards(broken, ignore, "direct", 1, [])
    with pytest.raises(RuntimeError, match=r"OSError: .*No space left on device.* \(a worker; its log may be .*\)$"):
        tokenize.tokenize(request(recordings, tmp_path / "tokens"), fakes.load(), ignore, write_shards=write)
    assert not (tmp_path / "tokens").exists()
    with pytest.raises(UserError, match="unknown runner .*: --runner=steam"):
        beam.write_shards(fakes.load, ignore, "steam", 1, [])


def broken():
    raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiniest parts, recordings and the dataset that one undisturbed process makes of them."""
    folder = tmp_path_factory.mktemp("world")
    tiny.write_parts(folder / "parts")
    tiny.write_recordings(folder / "recordings", SECONDS)
    assert start(folder, "alone").wait() == 0
    return folder


def start(folder, output, *options, **popen):
    """`audiolm tokenize` of one shard a recording, in a process group of its own."""
    arguments = [f"--codec={folder}/parts/codec", f"--semantic_tokenizer={folder}/parts/semantic_tokenizer"]
    arguments += [f"--input={folder}/recordings", f"--output={folder / output}", "--shard_seconds=0.5", *options]
    command = [sys.executable, "-m", "audiolm_jax", "tokenize", *arguments]
    return subprocess.Popen(command, start_new_session=True, **popen)


def whole_shards(folder, output) -> int:
    return len(list((folder / f"{output}.incomplete").glob("folder_tokens-*.json")))


def kill_in_the_midst(folder, output, *options, driver_alone=False):
    """Starts a run, and kills it as soon as it has made a shard."""
    before = whole_shards(folder, output)
    process = start(folder, output, *options)
    while whole_shards(folder, output) == before and process.poll() is None:
        time.sleep(0.005)
    (os.kill if driver_alone else os.killpg)(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / output).exists()
    return process


@pytest.mark.parametrize("num_workers", [1, 2])
def test_beam_killed_twice_makes_the_same_dataset(world, num_workers):
    import_beam()
    output, options = f"beam{num_workers}", ("--runner=direct", f"--num_workers={num_workers}")
    for _ in range(2):
        kill_in_the_midst(world, output, *options)
        assert 0 < whole_shards(world, output) < len(SECONDS)
    assert start(world, output, *options).wait() == 0
    assert contents(world / output) == contents(world / "alone")
    assert not (world / f"{output}.incomplete").exists()


def test_workers_that_outlive_their_driver_do_no_harm(world):
    import_beam()
    options = ("--runner=direct", "--num_workers=2")
    orphaned = kill_in_the_midst(world, "orphans", *options, driver_alone=True)
    assert start(world, "orphans").wait() == 0
    with contextlib.suppress(ProcessLookupError):  # They may have noticed, and gone.
        os.killpg(orphaned.pid, signal.SIGKILL)
    assert contents(world / "orphans") == contents(world / "alone")
    assert not (world / "orphans.incomplete").exists()


def test_two_hosts_at_once_make_the_same_dataset(world):
    kill_in_the_midst(world, "hosts", "--num_hosts=2", "--host=1")
    hosts = [start(world, "hosts", "--num_hosts=2", f"--host={host}") for host in (0, 1)]
    assert [process.wait() for process in hosts] == [0, 0]
    assert contents(world / "hosts") == contents(world / "alone")
    assert not (world / "hosts.incomplete").exists()


def test_full_disk(world):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    process = start(world, "full", preexec_fn=limit, env=environment, stderr=subprocess.PIPE, text=True)
    _, error = process.communicate()
    assert process.returncode == 2 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: File too large: ")
    assert not (world / "full").exists()
    left = [path for path in (world / "full.incomplete").rglob("*") if path.is_file() and path.suffix != ".json"]
    assert all(path.name.startswith(".lock") for path in left)
