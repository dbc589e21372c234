"""Several layers of an encoder and several numbers of clusters, in one pass over the recordings.

The encoder's pass is the dear one: its hidden states go to disk once (`frame_cache`), and k-means reads them from there
(`semantic.kmeans`). Both go on where a killed run stopped, to the same bits.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import tqdm

from audiolm_jax import files, frame_cache
from audiolm_jax.data.manifest import Recording
from audiolm_jax.errors import UserError
from audiolm_jax.progress import seconds_bar
from audiolm_jax.semantic import kmeans
from audiolm_jax.training.sharding import make_mesh

BATCH_SECONDS = 60.0  # Of audio that is encoded at once, padding included.
SHARD_SECONDS = 600.0  # Of audio a shard of the cache: 120 MB of float32 a layer at 50 frames a second, width 1024.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to fit.

    Attributes:
      layers, num_clusters: every pair of the two.
      seed: of k-means; the frames that are kept do not hang on it.
      max_frames: at most so many frames of each layer, drawn evenly from all recordings; 0: all.
      cache_dtype: one of `frame_cache.DTYPES`.
      settings: of k-means.
    """

    layers: tuple[int, ...]
    num_clusters: tuple[int, ...]
    seed: int
    max_frames: int
    cache_dtype: str
    settings: kmeans.Settings

    def check(self, num_layers: int):
        """Raises a UserError for what no encoder, or not one of so many layers, can do."""
        for layer in self.layers:
            if not 0 <= layer <= num_layers:
                raise UserError("no such layer", f"layer {layer}", f"choose 0 to {num_layers}")
        least = {"num_iterations": 1, "tolerance": 0, "mini_batch": 0}
        given = {name: (getattr(self.settings, name), at_least) for name, at_least in least.items()}
        given |= {"max_frames": (self.max_frames, 0), "seed": (self.seed, 0)}
        for name, (value, at_least) in {"num_clusters": (min(self.num_clusters), 1), **given}.items():
            if not at_least <= value < math.inf:
                raise UserError(f"{name} must be {at_least} or more", value, "change it")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """One pair.

    Attributes:
      layer: hidden state.
      clusters: {"mean", "std", "centroids"}, float32 NumPy arrays.
      figures: a row of the table.
    """

    layer: int
    clusters: dict[str, np.ndarray]
    figures: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its folder, where there are several."""
        return f"layer_{self.layer}_clusters_{len(self.clusters['centroids'])}"


@contextlib.contextmanager
def cache_folder(output: str, cache: str | None) -> Iterator[tuple[pathlib.Path, bool]]:
    """The folder of the hidden states, locked, and whether it is for this output alone: then it goes in the end."""
    output_path = pathlib.Path(os.path.abspath(output))
    folder = files.make_folder(cache or output_path.parent / f"{output_path.name}.incomplete")
    with files.exclusive(folder / ".lock", "another run is using this cache", folder):
        yield folder, cache is None
    if cache is None:
        shutil.rmtree(folder)


def fit(
    job: Job,
    tokenizer,
    fingerprint: str,
    recordings: Sequence[Recording],
    seconds: Sequence[float],
    folder: pathlib.Path,
    replace: bool,
    report: Callable[[str], None],
) -> list[Fitted]:
    """Computes hidden states, then clusters them on all devices of this process.

    Args:
      job: what to fit.
      tokenizer: the encoder: `features_of_layers`, `num_frames` and `sample_rate`, as a `SemanticTokenizer` has them.
      fingerprint: of the encoder.
      recordings, seconds: what to read, and how long each is.
      folder: `cache_folder`.
      replace: clear away what a run with other options left there.
      report: called with one line for each recording that is left out, and each fit.

    Returns:
      the layers in order, and of each the numbers of clusters in order.

    Raises:
      UserError: fewer frames than clusters, or as `frame_cache.fill` and `features_of_layers`.
    """
    cache = _filled(job, tokenizer, fingerprint, recordings, seconds, folder, replace, report)
    mesh = make_mesh({"data": len(jax.local_devices()), "fsdp": 1, "tensor": 1}, jax.local_devices())
    fits = []
    for layer in job.layers:
        frames, of_all = cache.frames(layer), cache.moments(layer)
        for size in job.num_clusters:
            kmeans.check_enough(len(frames), size)
        mean_D, std_D = kmeans.normalisation(of_all)
        clusterer = kmeans.Clustering(frames, mean_D, std_D, job.settings, job.seed, mesh)
        state = State(folder / f"layer_{layer}" / f"fit_{_digest(job, clusterer.num_lanes)}.npz")
        for fit in _with_progress(clusterer, job, state, layer):
            clusters = {"mean": mean_D, "std": std_D, "centroids": np.asarray(fit.centroids_KD)}
            fits.append(Fitted(layer, clusters, _figures(layer, fit, std_D, job.settings)))
            report(", ".join(f"{name} {value}" for name, value in fits[-1].figures.items()))
    return fits


def write_results(folder: pathlib.Path, fits: Sequence[Fitted], seed: int, fingerprint: str):
    """The table of all fits, results.json, and a plot, results.png."""
    table = {"encoder": fingerprint, "seed": seed, "fits": [fit.figures for fit in fits]}
    files.write_bytes(folder / "results.json", (json.dumps(table, indent=2) + "\n").encode())
    files.write_bytes(folder / "results.png", _plot([fit.figures for fit in fits]))


def _filled(job, tokenizer, fingerprint, recordings, seconds, folder, replace, report) -> frame_cache.FrameCache:
    rate = tokenizer.sample_rate

    def compute(batch: Sequence[int]) -> list[np.ndarray]:
        waves = []
        for index in batch:
            try:
                wave_W = recordings[index].read(rate)
            except UserError as error:
                report(f"left out: {error}")
                continue
            if tokenizer.num_frames(len(wave_W)):
                waves.append(wave_W)
            else:
                report(f"left out: too short for a frame: {recordings[index].path}")
        if not waves:
            return []
        lengths_B = np.array([len(wave_W) for wave_W in waves])
        wave_BW = np.stack([np.pad(wave_W, (0, lengths_B.max() - len(wave_W))) for wave_W in waves])
        return kmeans.hidden_states(tokenizer, wave_BW, lengths_B, job.layers)

    num_samples = [round(length * rate) for length in seconds]
    expected = sum(int(tokenizer.num_frames(size)) for size in num_samples)
    shards = plan(seconds)
    with seconds_bar("hidden states", sum(num_samples), rate) as bar:
        return frame_cache.fill(
            folder,
            shards,
            job.layers,
            compute,
            identity=[fingerprint, [[r.id, str(r.path), r.stretches()] for r in recordings], shards],
            keep=min(1.0, job.max_frames / max(1, expected)) if job.max_frames else 1.0,
            most=job.max_frames or None,
            dtype=job.cache_dtype,
            replace=replace,
            progress=lambda batch: bar.update(sum(num_samples[index] for index in batch)),
        )


def plan(seconds: Sequence[float]) -> list[list[list[int]]]:
    """Recordings by number in batches, and batches in shards; the shortest first, so that little is padding."""
    shards: list[list[list[int]]] = [[[]]]
    in_shard = 0.0
    for index in np.argsort(seconds, kind="stable").tolist():
        if shards[-1][-1] and in_shard + seconds[index] > SHARD_SECONDS:
            shards.append([[]])
            in_shard = 0.0
        elif (len(shards[-1][-1]) + 1) * seconds[index] > BATCH_SECONDS and shards[-1][-1]:
            shards[-1].append([])
        shards[-1][-1].append(index)
        in_shard += seconds[index]
    return shards


def _digest(job: Job, num_lanes: int) -> str:
    """Of all that a fit hangs on besides its frames; how often it is saved does not count."""
    settings = dataclasses.replace(job.settings, save_seconds=0.0)
    deciding = [job.num_clusters, job.seed, num_lanes, dataclasses.asdict(settings)]
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class State:
    """Where the fits of a layer stand, in a file that is whole or not there."""

    path: pathlib.Path

    def load(self) -> dict[str, Any] | None:
        """None where there is none.

        Raises:
          UserError: a damaged file.
        """
        if not self.path.is_file():
            return None
        try:
            with np.load(self.path) as archive:
                return dict(archive)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"saved progress is damaged ({error})", self.path, "remove the file") from error

    def save(self, arrays: dict[str, Any]):
        with files.new_file(self.path) as scratch, open(scratch, "wb") as file:
            np.savez(file, **arrays)
            files.flush_to_disk(file)


def _with_progress(clusterer: kmeans.Clustering, job: Job, state: State, layer: int) -> list[kmeans.Fit]:
    """Fits, with a bar that counts frames of all passes there may be."""
    saved = state.load()
    size = len(clusterer.frames)
    done = 0 if saved is None else int(saved["passes"]) * size + int(saved["blocks"]) * clusterer.block_frames
    quiet = 0.5 if sys.stderr.isatty() else 10.0
    total = (job.settings.num_iterations + 1) * size
    with tqdm.tqdm(
        total=total, initial=done, desc=f"k-means, layer {layer}", unit="frame", unit_scale=True, mininterval=quiet
    ) as bar:

        def progress(num_frames: int, fits: list[kmeans.Fit]):
            bar.update(num_frames)
            latest = {f"K={len(fit.centroids_KD)}": fit.inertias[-1] / size for fit in fits if fit.inertias}
            bar.set_postfix(latest, refresh=False)

        fits = clusterer.fit(job.num_clusters, saved, state.save, progress)
        bar.total = bar.n
    return fits


def _figures(layer: int, fit: kmeans.Fit, std_D: np.ndarray, settings: kmeans.Settings) -> dict[str, Any]:
    """A row of the table.

    `unexplained` is the share of the normalised frames' variance that the centroids leave, which can be compared across
    layers and widths; `perplexity` is the number of clusters that, all equally frequent, would be as hard to guess.
    """
    num_frames = int(fit.counts_K.sum())
    share_K = fit.counts_K[fit.counts_K > 0] / num_frames
    num_varying = max(1, int(np.sum(std_D > kmeans.DEVIATION_FLOOR)))
    return {
        "layer": layer,
        "num_clusters": len(fit.counts_K),
        "num_frames": num_frames,
        "inertia": fit.inertias[-1],
        "unexplained": fit.inertias[-1] / (num_frames * num_varying),
        "perplexity": float(np.exp(-np.sum(share_K * np.log(share_K)))),
        "empty_clusters": int(np.sum(fit.counts_K == 0)),
        "passes": len(fit.inertias),
        "settled": len(fit.inertias) <= settings.num_iterations,
    }


def _plot(rows: Sequence[dict[str, Any]]) -> bytes:
    """Unexplained variance by number of clusters, a line a layer, as PNG."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for layer in dict.fromkeys(row["layer"] for row in rows):
        points = sorted((row["num_clusters"], row["unexplained"]) for row in rows if row["layer"] == layer)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"layer {layer}")
    axes.set(xlabel="clusters", ylabel="variance that is left", xscale="log")
    axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
