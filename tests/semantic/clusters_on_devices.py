"""Run in a process of its own: k-means of the same frames on as many devices as there are, going on where it stopped.

    python -m tests.semantic.clusters_on_devices FRAMES.npy FOLDER MINI_BATCH [SAVES]

Writes FOLDER/centroids.npz and FOLDER/inertias.json and prints how many devices shared the lanes; with SAVES it kills
itself right after it has saved its progress so many times.
"""

import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np

from audiolm_jax.clustering import State
from audiolm_jax.semantic.kmeans import Clustering, FramesInMemory, Settings
from audiolm_jax.training.sharding import make_mesh

SIZES = (7, 3)


def main(frames: str, folder: str, mini_batch: str, saves: str = ""):
    x_MD = np.load(frames)
    settings = Settings(num_iterations=5, tolerance=0.0, mini_batch=int(mini_batch), block_frames=96, save_seconds=0.0)
    num_dims = x_MD.shape[1]
    mesh = make_mesh({"data": -1, "fsdp": 2 if len(jax.devices()) > 1 else 1, "tensor": 1})
    clustering = Clustering(FramesInMemory(x_MD), np.zeros(num_dims), np.ones(num_dims), settings, 0, mesh)
    state, count = State(pathlib.Path(folder) / "state.npz"), 0

    def save(arrays):
        nonlocal count
        state.save(arrays)
        count += 1
        if saves and count == int(saves):
            os.kill(os.getpid(), signal.SIGKILL)

    fits = clustering.fit(SIZES, state.load(), save)
    centroids = {str(size): np.asarray(fit.centroids_KD) for size, fit in zip(SIZES, fits, strict=True)}
    np.savez(pathlib.Path(folder) / "centroids.npz", **centroids)
    (pathlib.Path(folder) / "inertias.json").write_text(json.dumps([fit.inertias for fit in fits]))
    print(json.dumps(len(jax.devices())))


if __name__ == "__main__":
    main(*sys.argv[1:])
