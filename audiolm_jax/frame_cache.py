"""Hidden states of many recordings on disk: computed once, then read by k-means as often as it likes.

A folder of shards, each of some recordings:

    plan.json             a digest of everything that decides what the shards hold
    layer_L/00012.npy     [M, D] frames of the shard that are kept
    00012.npz             moments of all its frames, by layer; written last: with it the shard is whole

float32 by default: what the encoder gave, so that the clusters are those of frames in memory. float16 takes half the
room and is refused where a layer needs more than its range (65 504) or its eleven bits; bfloat16's eight would blur
every dimension whose mean is a few deviations from zero, and most encoders have some.

Shape suffixes: M frames, D model.
"""

import dataclasses
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from audiolm_jax import files
from audiolm_jax.errors import UserError
from audiolm_jax.semantic import moments

DTYPES = ("float32", "float16")
# Of a dimension's deviation: half of float16's spacing at its mean must stay below.
FINEST = 0.05


@dataclasses.dataclass(frozen=True)
class FrameCache:
    """A cache that is complete.

    Attributes:
      folder: where it is.
      num_shards: how many there are.
    """

    folder: pathlib.Path
    num_shards: int

    def frames(self, layer: int) -> "StoredFrames":
        """The frames of a layer.

        Raises:
          UserError: a shard is missing or damaged.
        """
        paths = [_frames_path(self.folder, layer, shard) for shard in range(self.num_shards)]
        lengths = [len(_mapped(path)) for path in paths]
        filled = [(path, length) for path, length in zip(paths, lengths, strict=True) if length]
        return StoredFrames(tuple(path for path, _ in filled), tuple(length for _, length in filled))

    def moments(self, layer: int) -> moments.Moments:
        """Of all frames that were seen, kept or not, in float64."""
        total = moments.nothing()
        for shard in range(self.num_shards):
            with _summary(self.folder, shard) as summary:
                total = moments.merge(total, {name: summary[f"layer_{layer}/{name}"] for name in total})
        return total


@dataclasses.dataclass(frozen=True)
class StoredFrames:
    """Frames of one layer, on disk: `semantic.kmeans.Frames`.

    Attributes:
      paths: of the shards that have any.
      lengths: frames in each.
    """

    paths: tuple[pathlib.Path, ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.lengths)

    def take(self, rows_M: np.ndarray) -> np.ndarray:
        """The frames [M, D] of those numbers; of the files only what they need is read."""
        ends = np.cumsum(self.lengths)
        shards_M = np.searchsorted(ends, rows_M, side="right")
        first = _mapped(self.paths[0])
        x_MD = np.empty((len(rows_M), first.shape[1]), first.dtype)
        for shard in np.unique(shards_M):
            here_M = shards_M == shard
            x_MD[here_M] = _mapped(self.paths[shard])[rows_M[here_M] - (ends[shard] - self.lengths[shard])]
        return x_MD


def fill(
    folder: pathlib.Path,
    shards: Sequence[Sequence[Any]],
    layers: Sequence[int],
    compute: Callable[[Any], list[np.ndarray]],
    identity: Any,
    keep: float = 1.0,
    most: int | None = None,
    dtype: str = "float32",
    replace: bool = False,
    progress: Callable[[Any], None] = lambda batch: None,
) -> FrameCache:
    """Computes the shards that a folder lacks; a run that was cut short goes on behind its last whole shard.

    Args:
      folder: for this cache alone, which `files.exclusive` must hold.
      shards: batches of each.
      layers: hidden states to keep.
      compute: frames [M, D] of each layer, of a batch; a batch that gives [] is left out.
      identity: JSON of what `compute` and the batches hang on.
      keep: share of the frames to keep, drawn evenly from every batch, the same ones of all layers.
      most: frames to keep at most.
      dtype: to keep them in.
      replace: clear away what the folder holds of something else.
      progress: called with each batch that is done.

    Raises:
      UserError: the folder holds frames of something else, frames that `dtype` cannot hold, or what `compute` raises.
    """
    plan = json.dumps([identity, list(layers), dtype, keep, most], sort_keys=True)
    _claim(folder, hashlib.sha256(plan.encode()).hexdigest(), replace)
    chosen_before = lambda count: int(count * keep) if most is None else min(int(count * keep), most)
    num_seen = 0
    for shard, batches in enumerate(shards):
        if not _summary_path(folder, shard).is_file():
            _write_shard(folder, shard, batches, layers, compute, num_seen, chosen_before, dtype)
        with _summary(folder, shard) as summary:
            num_seen += int(summary["num_frames"])
        for batch in batches:
            progress(batch)
    return FrameCache(folder, len(shards))


def _claim(folder: pathlib.Path, digest: str, replace: bool):
    """Notes what a folder is to hold."""
    note = folder / "plan.json"
    if note.is_file() and note.read_text() != json.dumps(digest):
        if not replace:
            what_to_do = "choose another folder, or remove this one"
            raise UserError("cache holds frames of another encoder, layers, recordings or options", folder, what_to_do)
        note.unlink()
        for path in [*folder.glob("*.npz"), *folder.glob("layer_*/*")]:
            path.unlink()
    for left_behind in folder.rglob(".*.incomplete-*"):
        left_behind.unlink()
    files.write_bytes(note, json.dumps(digest).encode())


def _write_shard(folder, shard, batches, layers, compute, num_seen, chosen_before, dtype):
    """Computes a shard, `num_seen` frames being in those before it."""
    kept: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    totals = {layer: moments.nothing() for layer in layers}
    num_frames = 0
    for index, batch in enumerate(batches):
        by_layer = compute(batch)
        if not by_layer:
            continue
        before, size = num_seen + num_frames, len(by_layer[0])
        count = chosen_before(before + size) - chosen_before(before)
        rows = np.sort(np.random.default_rng([shard, index]).choice(size, count, replace=False))
        for layer, x_MD in zip(layers, by_layer, strict=True):
            totals[layer] = moments.merge(totals[layer], moments.of(x_MD.astype(np.float64), np.ones(size)))
            kept[layer].append(x_MD[rows] if count < size else x_MD)
        num_frames += size
    for layer in layers:
        x_MD = np.concatenate(kept[layer] or [np.zeros((0, 0), np.float32)])
        path = _frames_path(folder, layer, shard)
        with files.new_file(path) as scratch, open(scratch, "wb") as file:
            np.save(file, _as(x_MD, dtype, totals[layer], layer))
    arrays = {f"layer_{layer}/{name}": totals[layer][name] for layer in layers for name in totals[layer]}
    with files.new_file(_summary_path(folder, shard)) as scratch, open(scratch, "wb") as file:
        np.savez(file, num_frames=num_frames, **arrays)


def _as(x_MD: np.ndarray, dtype: str, of_all: moments.Moments, layer: int) -> np.ndarray:
    """The frames in that type; what float16 would spoil is refused."""
    if dtype == "float16" and len(x_MD):
        spacing_D = np.spacing(np.abs(of_all["mean"]).clip(max=65_000.0).astype(np.float16)).astype(np.float64)
        deviation_D = moments.deviation(of_all)
        is_coarse = np.any((spacing_D / 2 > FINEST * deviation_D) & (deviation_D > 0))
        if is_coarse or np.abs(x_MD).max() > np.finfo(np.float16).max:
            raise UserError("float16 is too coarse or too small for these frames", f"layer {layer}", "use float32")
    return x_MD.astype(dtype)


def _frames_path(folder: pathlib.Path, layer: int, shard: int) -> pathlib.Path:
    return folder / f"layer_{layer}" / f"{shard:05}.npy"


def _summary_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
    return folder / f"{shard:05}.npz"


def _summary(folder: pathlib.Path, shard: int):
    try:
        return np.load(_summary_path(folder, shard))
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise _damaged(_summary_path(folder, shard), error) from error


def _mapped(path: pathlib.Path) -> np.ndarray:
    """A shard's frames, not yet read."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
    return UserError(f"cache is damaged ({error})", path, "remove the cache's folder and start again")
