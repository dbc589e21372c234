"""k-means: ours beside scikit-learn's, and a run over more frames than memory should hold.

    python benchmarks/kmeans.py                              # both, the same frames, one core
    python benchmarks/kmeans.py --frames=10000000 --num_iterations=1 --large [--folder=DIR]

Frames are generated: a mixture, each frame one of 2048 centres plus one of 65 536 vectors of noise. The table compares
time and inertia from k-means++ seeds to the end; the floor is the product of all frames with all centroids alone, the
inertia that of the final centroids over all frames. `--large` runs ours alone, over frames that are made as they are
read, or with `--folder` written there first as `fit-kmeans` keeps them (float16: 2 GB a million frames of width 1024),
and says how much memory it took at most. Nothing else should use the core meanwhile.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import resource
import time

import numpy as np

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
COLUMNS = ("k-means", "frames", "width", "K", "seconds", "passes", "seconds a pass", "x floor", "inertia", "x best")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Frames made as they are read: `audiolm_jax.semantic.kmeans.Frames`."""

    num_frames: int
    centers_KD: np.ndarray
    noise_ND: np.ndarray

    def __len__(self) -> int:
        return self.num_frames

    def take(self, rows_M: np.ndarray) -> np.ndarray:
        """Which centre and which noise follow from the number of the frame."""
        mixed_M = rows_M.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        centers_M = (mixed_M >> np.uint64(40)) % np.uint64(len(self.centers_KD))
        noise_M = (mixed_M >> np.uint64(16)) % np.uint64(len(self.noise_ND))
        return self.centers_KD[centers_M] + self.noise_ND[noise_M]


def mixture(num_frames: int, num_dims: int) -> Mixture:
    """Heaps that overlap, as those of speech do."""
    generator = np.random.default_rng(0)
    centers_KD = generator.standard_normal((2048, num_dims), np.float32)
    return Mixture(num_frames, 0.7 * centers_KD, 0.7 * generator.standard_normal((65_536, num_dims), np.float32))


def clustering(frames, num_dims: int, **settings):
    from audiolm_jax.semantic.kmeans import Clustering, Settings

    return Clustering(frames, np.zeros(num_dims), np.ones(num_dims), Settings(**settings), seed=0)


def floor(x_MD: np.ndarray, num_clusters: int) -> float:
    """Seconds that the product of the frames with so many centroids takes, in the blocks and lanes of ours."""
    import jax

    from audiolm_jax.semantic.kmeans import LANES, Settings

    block_MD = x_MD[: Settings().block_frames // LANES]
    product = jax.jit(lambda x_MD, centroids_KD: x_MD @ centroids_KD.T)
    arguments = jax.device_put((block_MD, x_MD[:num_clusters]))
    jax.block_until_ready(product(*arguments))
    return (
        min(timed(lambda: jax.block_until_ready(product(*arguments)))[0] for _ in range(5)) / len(block_MD) * len(x_MD)
    )


def timed(function) -> tuple:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def fits(x_MD: np.ndarray, num_clusters: int, num_iterations: int, mini_batch: int) -> dict[str, tuple]:
    """Of each k-means: seconds, passes over the frames (the one for the inertia included), and centroids."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    from audiolm_jax.semantic.kmeans import FramesInMemory

    results = {}
    frames, num_dims = FramesInMemory(x_MD), x_MD.shape[1]
    for name, settings in {"ours, Lloyd": {}, "ours, mini-batch": {"mini_batch": mini_batch}}.items():
        clustering(frames, num_dims, num_iterations=1, **settings).fit([num_clusters])  # Compiles.
        job = clustering(frames, num_dims, num_iterations=num_iterations, **settings)
        seconds, (fit,) = timed(lambda job=job: job.fit([num_clusters]))
        results[name] = seconds, len(fit.inertias), np.asarray(fit.centroids_KD)
    given = {"n_clusters": num_clusters, "n_init": 1, "max_iter": num_iterations, "random_state": 0}
    seconds, theirs = timed(lambda: KMeans(**given, algorithm="lloyd").fit(x_MD))
    results["scikit-learn, KMeans"] = seconds, theirs.n_iter_ + 1, theirs.cluster_centers_
    seconds, theirs = timed(lambda: MiniBatchKMeans(**given, batch_size=mini_batch).fit(x_MD))
    passes = theirs.n_steps_ * min(mini_batch, len(x_MD)) / len(x_MD) + 1
    results["scikit-learn, MiniBatchKMeans"] = seconds, passes, theirs.cluster_centers_
    return results


def inertia(x_MD: np.ndarray, centroids_KD: np.ndarray) -> float:
    """Sum of squared distances to the nearest centroid, block by block."""
    total, norms_K = 0.0, np.sum(np.square(centroids_KD, dtype=np.float64), axis=1)
    for start in range(0, len(x_MD), 4096):
        block_MD = x_MD[start : start + 4096].astype(np.float64)
        least_M = np.min(norms_K - 2 * block_MD @ centroids_KD.T, axis=1)
        total += float(np.sum(least_M + np.sum(np.square(block_MD), axis=1)))
    return total


def compare(num_frames: int, num_dims: int, num_clusters: int, num_iterations: int, mini_batch: int) -> list[dict]:
    """A row for each k-means."""
    x_MD = mixture(num_frames, num_dims).take(np.arange(num_frames))
    least = floor(x_MD, num_clusters)
    results = fits(x_MD, num_clusters, num_iterations, mini_batch)
    inertias = {name: inertia(x_MD, centroids_KD) for name, (_, _, centroids_KD) in results.items()}
    rows = []
    for name, (seconds, passes, _) in results.items():
        cells = [name, num_frames, num_dims, num_clusters, seconds, passes, seconds / passes]
        cells += [seconds / passes / least, inertias[name], inertias[name] / min(inertias.values())]
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def large(num_frames: int, num_dims: int, num_clusters: int, num_iterations: int, mini_batch: int, folder) -> dict:
    """Ours over all the frames: seconds, inertia of each pass, and the most memory that the process took, in GiB."""
    from audiolm_jax import frame_cache

    frames = mixture(num_frames, num_dims)
    if folder is not None:
        path, size = pathlib.Path(folder), 32_768
        path.mkdir(parents=True, exist_ok=True)
        shards = [[(start, min(start + size, num_frames))] for start in range(0, num_frames, size)]
        compute = lambda batch: [frames.take(np.arange(*batch))]
        identity = ["mixture", num_frames, num_dims]
        frames = frame_cache.fill(path, shards, [0], compute, identity, dtype="float16").frames(0)
    job = clustering(frames, num_dims, num_iterations=num_iterations, mini_batch=mini_batch)
    read = 0

    def progress(count, fits):
        nonlocal read
        read += count
        print(f"\r{read / num_frames:.2f} passes, {peak_gibibytes():.2f} GiB", end="", flush=True)

    seconds, (fit,) = timed(lambda: job.fit([num_clusters], progress=progress))
    print()
    return {
        "frames": num_frames, "width": num_dims, "K": num_clusters, "mini_batch": mini_batch, "on disk": bool(folder),
        "seconds": seconds, "passes": len(fit.inertias), "inertias": fit.inertias, "peak GiB": peak_gibibytes(),
    }  # fmt: skip


def peak_gibibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000, help="how many (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="of a frame (default: %(default)s)")
    parser.add_argument("--num_clusters", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--num_iterations", type=int, default=10, help="passes at most (default: %(default)s)")
    parser.add_argument("--mini_batch", type=int, help="frames (default: 16 384; with --large whole passes)")
    parser.add_argument("--large", action="store_true", help="ours alone, and its memory")
    parser.add_argument("--folder", help="with --large: write the frames to disk first, and read them from there")
    parser.add_argument("--core", type=int, default=0, help="the one to run on; -1: all (default: %(default)s)")
    parser.add_argument("--output", default=RESULTS / "kmeans.json", help="JSON file (default: %(default)s)")
    options = parser.parse_args()
    if options.core >= 0:
        # Before JAX or BLAS ask how many cores there are.
        os.sched_setaffinity(0, {options.core})
    sizes = (options.frames, options.width, options.num_clusters, options.num_iterations)
    if options.large:
        rows = [large(*sizes, options.mini_batch or 0, options.folder)]
        print(json.dumps(rows[0], indent=2))
    else:
        rows = compare(*sizes, options.mini_batch or 16_384)
        print(f"| {' | '.join(COLUMNS)} |\n| --- " + "| ---: " * (len(COLUMNS) - 1) + "|")
        for row in rows:
            print(f"| {' | '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in row.values())} |")
    machine = {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    pathlib.Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(options.output).write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
