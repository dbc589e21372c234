"""Fits the clusters of a semantic tokenizer: hidden states, their normalisation, k-means (arXiv 2209.03143 §3.2).

The frames may be more than memory holds: they are read block by block, once a pass, for several numbers of clusters at
a time. A block is cut into lanes, at least `LANES`, which the devices of a mesh share out and which are added up in a
fixed order at the end of a pass, so that one device and several find the same centroids.

Shape suffixes: B batch, W waveform samples, M frames, S frames of a sample, D model, K clusters, L lanes.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audiolm_jax import kmeans
from audiolm_jax.errors import UserError
from audiolm_jax.semantic import moments

DEVIATION_FLOOR = 1e-5  # A dimension that never changes is not blown up.
LANES = 8
LANE_AXES = ("data", "fsdp")
MOST_RESTARTS = 64  # Clusters that can restart after one pass.
# A sample of so many frames a cluster gives the seeds and, by iterations of its own, a start near the end.
SAMPLE_FRAMES_PER_CLUSTER, SAMPLE_FRAMES, SAMPLE_ITERATIONS = 32, 16_384, 20
RUN_FRAMES = 64  # Consecutive frames that a mini-batch reads in one go.


class Frames(Protocol):
    """Frames of one layer, wherever they are."""

    def __len__(self) -> int: ...

    def take(self, rows_M: np.ndarray) -> np.ndarray:
        """The frames [M, D] of those numbers, float32 or float16."""
        ...


@dataclasses.dataclass(frozen=True)
class FramesInMemory:
    """An array [M, D] as `Frames`."""

    x_MD: np.ndarray

    def __len__(self) -> int:
        return len(self.x_MD)

    def take(self, rows_M: np.ndarray) -> np.ndarray:
        return self.x_MD[rows_M]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to fit.

    Attributes:
      num_iterations: passes over all frames that move the centroids, at most; one more measures the inertia.
      tolerance: stop where a pass lessens the inertia by less than this part of it.
      mini_batch: frames after which the centroids move; 0: after all of them (Lloyd's iterations).
      block_frames: frames of a block without mini-batches; memory and speed hang on it, the result only by rounding.
      save_seconds: how often progress is saved within a pass.
    """

    num_iterations: int = 50
    tolerance: float = 1e-4
    mini_batch: int = 0
    block_frames: int = 16_384
    save_seconds: float = 60.0


@dataclasses.dataclass
class Fit:
    """One number of clusters on its way.

    Attributes:
      centroids_KD: of normalised frames.
      weights_K: frames that each centroid is the mean of, with mini-batches.
      totals_L: of the pass in progress, a share a lane.
      inertias: of each pass that is done: of the centroids at its beginning, with mini-batches of those on the way.
      phase: what a pass does: "lloyd", "mini_batch", after which "measure", and "finished".
      counts_K: frames of each cluster in the last pass.
    """

    centroids_KD: jax.Array
    weights_K: jax.Array
    totals_L: kmeans.Totals
    phase: str
    inertias: list[float] = dataclasses.field(default_factory=list)
    counts_K: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


def fit_clusters(
    tokenizer,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    num_clusters: int,
    seed: int,
    layer: int,
    settings: Settings = Settings(),  # noqa: B008  It is frozen.
) -> dict[str, Any]:
    """Normalises every dimension over the recordings and clusters the frames, all of them in memory.

    Args:
      tokenizer: anything with `features_of_layers(wave_BW, lengths_B, layers)` and `num_frames(lengths_B)`.
      batches: pairs of wave_BW and lengths_B, read once.
      num_clusters: K.
      seed: of k-means's seeds.
      layer: hidden state to cluster.
      settings: of the fit.

    Returns:
      {"layer": int, "mean": [D], "std": [D], "centroids": [K, D] of normalised frames}, float32 NumPy arrays.

    Raises:
      UserError: fewer frames than clusters, or as `hidden_states`.
    """
    parts = [hidden_states(tokenizer, wave_BW, lengths_B, [layer])[0] for wave_BW, lengths_B in batches]
    x_MD = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    check_enough(len(x_MD), num_clusters)
    mean_D, std_D = normalisation(moments.of(x_MD.astype(np.float64), np.ones(len(x_MD))))
    (fit,) = Clustering(FramesInMemory(x_MD), mean_D, std_D, settings, seed).fit([num_clusters])
    return {"layer": layer, "mean": mean_D, "std": std_D, "centroids": np.asarray(fit.centroids_KD)}


def hidden_states(tokenizer, wave_BW: np.ndarray, lengths_B: np.ndarray, layers: Sequence[int]) -> list[np.ndarray]:
    """Hidden states [M, D] of each layer, without the frames that are padding.

    Raises:
      UserError: what `features_of_layers` raises, or hidden states that are not finite.
    """
    frames_B = np.asarray(tokenizer.num_frames(np.asarray(lengths_B)))
    by_layer = tokenizer.features_of_layers(wave_BW, lengths_B, layers)
    kept = [x_BTD[np.arange(x_BTD.shape[1]) < frames_B[:, None]] for x_BTD in by_layer]
    for layer, x_MD in zip(layers, kept, strict=True):
        if not np.isfinite(x_MD).all():
            raise UserError("hidden states that are not finite", f"layer {layer}", "look at the encoder's weights")
    return kept


def normalisation(of_all: moments.Moments) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float32 [D], that normalise frames of these moments."""
    deviation_D = np.maximum(moments.deviation(of_all), DEVIATION_FLOOR)
    return np.asarray(of_all["mean"], np.float32), np.asarray(deviation_D, np.float32)


def check_width(clusters: Mapping[str, Any], num_dims: int):
    """Raises a UserError where clusters are not of hidden states that are `num_dims` wide."""
    shapes = {name: np.shape(clusters[name]) for name in ("mean", "std", "centroids")}
    if any(shape[-1:] != (num_dims,) for shape in shapes.values()):
        sizes = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        problem = f"clusters do not fit an encoder of width {num_dims}"
        raise UserError(problem, sizes, "fit k-means on this encoder")


def check_enough(num_frames: int, num_clusters: int):
    """Raises a UserError where there are fewer frames than clusters."""
    if num_frames < num_clusters:
        problem = f"num_clusters={num_clusters}, {num_frames} frames"
        raise UserError("more clusters than frames", problem, "add audio or ask for fewer")


def _ignore(*_):
    pass


class Clustering:
    """k-means of one layer's frames."""

    def __init__(
        self,
        frames: Frames,
        mean_D: np.ndarray,
        std_D: np.ndarray,
        settings: Settings,
        seed: int,
        mesh: Mesh | None = None,
    ):
        """Prepares; `fit` does the work.

        Args:
          frames: what to cluster, each dimension of which is normalised first by
          mean_D, std_D: `normalisation`.
          settings: how.
          seed: of the sample, the seeds and the order of mini-batches.
          mesh: over whose axes data and fsdp the lanes are shared out; one device by default.
        """
        self.frames, self.settings, self.seed = frames, settings, seed
        self.mesh = mesh or Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1), LANE_AXES)
        self.programs = _programs(self.mesh)
        self.num_lanes = math.lcm(LANES, math.prod(self.mesh.shape[axis] for axis in LANE_AXES))
        wanted = min(settings.mini_batch or settings.block_frames, len(frames))
        self.block_frames = -(-wanted // self.num_lanes) * self.num_lanes
        self.mean_D, self.std_D = self.programs.replicate((jnp.asarray(mean_D), jnp.asarray(std_D)))

    def fit(
        self,
        num_clusters: Sequence[int],
        saved: Mapping[str, np.ndarray] | None = None,
        save: Callable[[dict[str, np.ndarray]], None] = _ignore,
        progress: Callable[[int, list[Fit]], None] = _ignore,
    ) -> list[Fit]:
        """Fits every number of clusters, all of them in the same passes over the frames.

        Args:
          num_clusters: Ks.
          saved: what `save` was last called with by a run that was cut short: the result is the same, to the last bit.
          save: called after each pass, and every `save_seconds` within one.
          progress: called with the number of frames of each block that is read and the fits as they are.

        Returns:
          finished fits; their last inertia is that of their centroids.

        Raises:
          UserError: fewer frames than clusters.
        """
        for size in num_clusters:
            check_enough(len(self.frames), size)
        if saved is None:
            fits = [self._begin(size) for size in num_clusters]
            return self._run(fits, 0, 0, save, progress)
        return self._run(*self._restored(saved, num_clusters), save, progress)

    def _run(self, fits: list[Fit], done: int, start: int, save: Callable, progress: Callable) -> list[Fit]:
        """Finishes fits of which so many passes, and blocks of the next one, are done."""
        saved_at = time.monotonic()
        while active := [fit for fit in fits if fit.phase != "finished"]:
            for block, rows_M in self._blocks(done, start):
                x_LMD, exists_LM = self._read(rows_M)
                # One block computes while the next is read; a third would only take memory.
                jax.block_until_ready([fit.totals_L for fit in active])
                for fit in active:
                    self._add(fit, x_LMD, exists_LM)
                progress(len(rows_M), fits)
                if time.monotonic() - saved_at >= self.settings.save_seconds:
                    save(_state(fits, done, block + 1))
                    saved_at = time.monotonic()
            for fit in active:
                self._conclude(fit)
            done, start, saved_at = done + 1, 0, time.monotonic()
            save(_state(fits, done, start))
        return fits

    def _begin(self, size: int) -> Fit:
        """Seeds by k-means++ on a uniform sample, and Lloyd's iterations on the sample from there.

        k-means|| would need passes over all frames for its seeds. A sample of many frames a cluster misses only
        clusters that are rarer than any that is worth a token, and its own iterations save passes over all frames.
        """
        phase = "mini_batch" if self.settings.mini_batch else "lloyd"
        sample_size = max(SAMPLE_FRAMES, SAMPLE_FRAMES_PER_CLUSTER * size)
        if sample_size >= len(self.frames):
            return self._fit_from(self._seeds(self.frames, size), phase)
        generator = np.random.default_rng([self.seed, size])
        rows_S = np.sort(generator.choice(len(self.frames), sample_size, replace=False))
        sample = FramesInMemory(self.frames.take(rows_S))
        settings = dataclasses.replace(
            self.settings, mini_batch=0, num_iterations=SAMPLE_ITERATIONS, save_seconds=math.inf
        )
        of_sample = Clustering(sample, self.mean_D, self.std_D, settings, self.seed, self.mesh)
        start = of_sample._fit_from(self._seeds(sample, size), "lloyd")
        of_sample._run([start], 0, 0, _ignore, _ignore)
        return self._fit_from(start.centroids_KD, phase)

    def _seeds(self, frames: Frames, size: int) -> jax.Array:
        x_MD = frames.take(np.arange(len(frames))).astype(np.float32)
        normed_MD = (x_MD - np.asarray(self.mean_D)) / np.asarray(self.std_D)
        return _plus_plus_seeds(jax.random.key(self.seed), normed_MD, size)

    def _fit_from(self, centroids_KD: jax.Array, phase: str) -> Fit:
        weights_K = jnp.zeros(len(centroids_KD), jnp.int32)
        centroids_KD, weights_K = self.programs.replicate((centroids_KD, weights_K))
        return Fit(centroids_KD, weights_K, self._no_totals(centroids_KD), phase)

    def _no_totals(self, centroids_KD: jax.Array) -> kmeans.Totals:
        return self.programs.no_totals(centroids_KD, self.num_lanes)

    def _blocks(self, done: int, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """Numbers of the blocks of the next pass from `start` on, and of the frames in each."""
        size = self.block_frames
        run = math.gcd(RUN_FRAMES, size) if self.settings.mini_batch else size
        runs = np.arange(-(-len(self.frames) // run))
        if self.settings.mini_batch:
            # Neighbours are alike: every mini-batch is of runs of frames from all over.
            runs = np.random.default_rng([self.seed, done]).permutation(runs)
        for block in range(start, -(-len(runs) * run // size)):
            starts = runs[block * size // run : (block + 1) * size // run] * run
            rows_M = (starts[:, None] + np.arange(run)).reshape(-1)
            yield block, rows_M[rows_M < len(self.frames)]

    def _read(self, rows_M: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Frames of a block, cut into lanes, and which of its rows are any."""
        x_MD = self.frames.take(rows_M)
        missing = self.block_frames - len(x_MD)
        x_MD = np.pad(x_MD, ((0, missing), (0, 0))) if missing else x_MD
        exists_M = np.arange(self.block_frames) < len(rows_M)
        lanes = (x_MD.reshape(self.num_lanes, -1, x_MD.shape[-1]), exists_M.reshape(self.num_lanes, -1))
        return jax.device_put(lanes, self.programs.by_lane)

    def _add(self, fit: Fit, x_LMD: jax.Array, exists_LM: jax.Array):
        """Takes a block into the totals; a mini-batch moves the centroids."""
        block = (x_LMD, exists_LM, self.mean_D, self.std_D)
        if fit.phase == "mini_batch":
            fit.totals_L, fit.centroids_KD, fit.weights_K = self.programs.add_and_nudge(
                fit.totals_L, self._no_totals(fit.centroids_KD), *block, fit.centroids_KD, fit.weights_K
            )
        else:
            fit.totals_L = self.programs.add(fit.totals_L, *block, fit.centroids_KD)

    def _conclude(self, fit: Fit):
        """Ends a pass: moves the centroids, or finishes."""
        totals = self.programs.merge(fit.totals_L)
        fit.inertias.append(float(totals["inertia"]))
        fit.counts_K = np.asarray(totals["counts_K"])
        last, *before = fit.inertias[:-3:-1]
        settled = bool(before) and before[0] - last <= self.settings.tolerance * before[0]
        if fit.phase == "measure":
            fit.phase = "finished"
        elif fit.phase == "mini_batch":
            fit.centroids_KD = self.programs.restart(totals, fit.centroids_KD)
            fit.weights_K = jnp.where(totals["counts_K"] > 0, fit.weights_K, 0)
            if settled or len(fit.inertias) == self.settings.num_iterations:
                fit.phase = "measure"
        elif settled or len(fit.inertias) > self.settings.num_iterations:
            fit.phase = "finished"
        else:
            fit.centroids_KD = self.programs.update(totals, fit.centroids_KD)
        fit.totals_L = {} if fit.phase == "finished" else self._no_totals(fit.centroids_KD)

    def _restored(self, saved: Mapping[str, np.ndarray], num_clusters: Sequence[int]) -> tuple[list[Fit], int, int]:
        """Fits, passes that are done and blocks of the next one that are done, from `_state`."""
        fits = []
        for size in num_clusters:
            of_fit = {name.split("/", 1)[1]: saved[name] for name in saved if name.startswith(f"{size}/")}
            totals_L = {name.split("/")[1]: of_fit[name] for name in of_fit if name.startswith("totals/")}
            centroids_KD, weights_K = self.programs.replicate((of_fit["centroids"], of_fit["weights"]))
            totals_L = jax.device_put(totals_L, self.programs.by_lane)
            inertias, phase = of_fit["inertias"].tolist(), str(of_fit["phase"])
            fits.append(Fit(centroids_KD, weights_K, totals_L, phase, inertias, of_fit["counts"]))
        return fits, int(saved["passes"]), int(saved["blocks"])


def _state(fits: Sequence[Fit], passes: int, blocks: int) -> dict[str, np.ndarray]:
    """All there is to go on from."""
    state: dict[str, Any] = {"passes": passes, "blocks": blocks}
    for fit in fits:
        arrays = {"centroids": fit.centroids_KD, "weights": fit.weights_K, "counts": fit.counts_K}
        arrays |= {"inertias": fit.inertias, "phase": fit.phase}
        arrays |= {f"totals/{name}": array for name, array in fit.totals_L.items()}
        state |= {f"{len(fit.centroids_KD)}/{name}": array for name, array in arrays.items()}
    return {name: np.asarray(array) for name, array in state.items()}


_plus_plus_seeds = jax.jit(kmeans.plus_plus_seeds, static_argnames="num_clusters")


@dataclasses.dataclass(frozen=True)
class _Programs:
    """What runs on a mesh: see `_programs`."""

    by_lane: NamedSharding
    replicate: Callable
    no_totals: Callable
    add: Callable
    add_and_nudge: Callable
    merge: Callable
    update: Callable
    restart: Callable


@functools.cache
def _programs(mesh: Mesh) -> _Programs:
    """Compiles for a mesh: every device takes its lanes one after the other, in the same shapes on any mesh."""
    lanes, whole = PartitionSpec(LANE_AXES), PartitionSpec()
    by_lane, replicated = NamedSharding(mesh, lanes), NamedSharding(mesh, whole)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(lanes, lanes, lanes, whole, whole, whole), out_specs=lanes, check_vma=False
    )
    def add(totals_L, x_LMD, exists_LM, mean_D, std_D, centroids_KD):
        def lane(arguments):
            totals, x_MD, exists_M = arguments
            return kmeans.add(totals, (x_MD.astype(jnp.float32) - mean_D) / std_D, exists_M, centroids_KD)

        return jax.lax.map(lane, (totals_L, x_LMD, exists_LM))

    def merge(totals_L):
        # Gathered first, so that the order in which lanes are added does not hang on the devices.
        return kmeans.merge(jax.lax.with_sharding_constraint(totals_L, replicated))

    def add_and_nudge(totals_L, empty_L, x_LMD, exists_LM, mean_D, std_D, centroids_KD, weights_K):
        block_L = add(empty_L, x_LMD, exists_LM, mean_D, std_D, centroids_KD)
        pairs_L = jax.tree.map(lambda *pair: jnp.stack(pair, axis=1), totals_L, block_L)
        return jax.vmap(kmeans.merge)(pairs_L), *kmeans.nudge(merge(block_L), centroids_KD, weights_K)

    def no_totals(centroids_KD, num_lanes):
        empty = kmeans.empty_totals(centroids_KD, min(MOST_RESTARTS, centroids_KD.shape[0]))
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_lanes, *leaf.shape)), empty)

    return _Programs(
        by_lane=by_lane,
        replicate=functools.partial(jax.device_put, device=replicated),
        no_totals=jax.jit(no_totals, static_argnames="num_lanes", out_shardings=by_lane),
        add=jax.jit(add, donate_argnums=0),
        add_and_nudge=jax.jit(add_and_nudge, donate_argnums=0, out_shardings=(by_lane, replicated, replicated)),
        merge=jax.jit(merge, out_shardings=replicated),
        update=jax.jit(kmeans.update, out_shardings=replicated),
        restart=jax.jit(kmeans.restart, out_shardings=replicated),
    )
