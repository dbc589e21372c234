"""k-means in processes of their own: on eight devices as on one, and killed and started again as never killed."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.semantic.clusters import blobs
from tests.training.devices import environment

MODULE = "tests.semantic.clusters_on_devices"


def run(num_devices, *arguments):
    command = [sys.executable, "-m", MODULE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment(num_devices))


def result(folder):
    with np.load(folder / "centroids.npz") as archive:
        return dict(archive), json.loads((folder / "inertias.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mini_batch", [0, 96])
def test_eight_devices_find_what_one_finds_and_a_killed_run_goes_on_to_the_same_bits(tmp_path, mini_batch):
    np.save(tmp_path / "frames.npy", blobs(600, 4, 9))
    folders = {name: tmp_path / name for name in ("one", "eight", "killed")}
    for name, folder in folders.items():
        folder.mkdir()
        num_devices = 8 if name == "eight" else 1
        arguments = (tmp_path / "frames.npy", folder, mini_batch)
        if name == "killed":
            assert run(1, *arguments, 10).returncode == -signal.SIGKILL
            assert [path.name for path in folder.iterdir()] == ["state.npz"]
        done = run(num_devices, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout.splitlines()[-1]) == num_devices
    (centroids, inertias), eight, killed = (result(folder) for folder in folders.values())
    for size, array in centroids.items():
        np.testing.assert_allclose(eight[0][size], array, atol=1e-4)
        np.testing.assert_array_equal(killed[0][size], array)
    np.testing.assert_allclose(np.concatenate(eight[1]), np.concatenate(inertias), rtol=1e-5)
    assert killed[1] == inertias
