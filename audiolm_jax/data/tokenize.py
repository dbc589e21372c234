"""Recordings → token dataset: shard by shard, so that a killed run goes on where it stopped.

The shards grow in `OUTPUT.incomplete` beside the final folder, each under a scratch name until it is
whole; once all are there, the TFDS metadata is added and the folder takes its final name.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tqdm

from audiolm_jax import files
from audiolm_jax.data import manifest, token_dataset
from audiolm_jax.errors import UserError
from audiolm_jax.lm.stages import run_starts


class Tokenizer(Protocol):
    """What tokenizing needs of a codec or a semantic tokenizer."""

    @property
    def sample_rate(self) -> int: ...

    @property
    def frame_rate(self) -> float: ...

    def num_frames(self, num_samples: int) -> int: ...

    def encode(self, wave_BW: np.ndarray, lengths_B: np.ndarray | None = None) -> Any: ...


class AcousticTokenizer(Tokenizer, Protocol):
    """A codec."""

    @property
    def codebook_size(self) -> int: ...

    @property
    def num_quantizers(self) -> int: ...


class SemanticTokenizer(Tokenizer, Protocol):
    """A semantic tokenizer."""

    @property
    def vocab_size(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Shard:
    """One output file and the recordings that go into it."""

    name: str
    split: str
    recordings: tuple[manifest.Recording, ...]
    seconds: tuple[float, ...]


def tokenize(
    recordings: Sequence[manifest.Recording],
    codec: AcousticTokenizer,
    semantic_tokenizer: SemanticTokenizer,
    fingerprints: dict[str, str],
    output: str | os.PathLike[str],
    report: Callable[[str], None],
    shard_seconds: float = 1800.0,
    batch_seconds: float = 60.0,
):
    """Writes the token dataset of `recordings` into the new folder `output`.

    Run again after a crash, it keeps the shards that are whole. A recording that cannot be read is
    left out and reported.

    Args:
      recordings: from `manifest.read_manifest`; their splits become the dataset's.
      codec, semantic_tokenizer: what makes the tokens.
      fingerprints: of the two, by role.
      output: folder; must not hold anything yet.
      report: called with one line for each recording that is left out.
      shard_seconds: audio a shard.
      batch_seconds: audio that is encoded at once, padding included.

    Raises:
      UserError: the output exists, or no recording can be used.
    """
    output = pathlib.Path(os.path.abspath(output))
    files.refuse_existing(output)
    usable, seconds = manifest.usable(list(recordings), report)
    shards = plan(usable, seconds, shard_seconds)
    folder = files.make_folder(output.parent / f"{output.name}.incomplete")
    with files.exclusive(folder / ".lock", "another run is writing this dataset", output):
        _begin(folder, shards, fingerprints)
        statistics = []
        with _progress(seconds) as bar:
            for shard in shards:
                path = folder / shard.name
                summary = folder / f"{shard.name}.json"
                if not summary.is_file():
                    records = _encode_shard(shard, codec, semantic_tokenizer, batch_seconds, report)
                    with files.new_file(path) as scratch:
                        token_dataset.write_shard(scratch, records, codec.num_quantizers)
                    files.write_bytes(summary, json.dumps(_summarize(records)).encode())
                statistics.append({"split": shard.split, **json.loads(summary.read_text())})
                bar.update(round(sum(shard.seconds)))
        _finish(folder, output, statistics, codec, semantic_tokenizer, fingerprints)


def plan(recordings: Sequence[manifest.Recording], seconds: Sequence[float], shard_seconds: float) -> list[Shard]:
    """Which recordings go into which shard: in order, by split, about `shard_seconds` each."""
    by_split = collections.defaultdict(list)
    for recording, length in zip(recordings, seconds, strict=True):
        by_split[recording.split].append((recording, length))
    shards = []
    for split, members in sorted(by_split.items()):
        ends = np.cumsum([length for _, length in members])
        count = max(1, min(len(members), round(float(ends[-1]) / shard_seconds)))
        indices = np.minimum((ends - ends[-1] / count / 2) // (ends[-1] / count), count - 1).clip(0).astype(int)
        groups = [[m for m, index in zip(members, indices, strict=True) if index == i] for i in range(count)]
        for i, group in enumerate(groups):
            name = token_dataset.shard_name(split, i, count)
            shards.append(Shard(name, split, tuple(r for r, _ in group), tuple(s for _, s in group)))
    return shards


def _begin(folder: pathlib.Path, shards: list[Shard], fingerprints: dict[str, str]):
    """Notes what is being made; what another plan left in the folder is cleared away."""
    members = [[shard.name, [[r.id, str(r.path), r.stretches()] for r in shard.recordings]] for shard in shards]
    digest = hashlib.sha256(json.dumps([members, fingerprints], sort_keys=True).encode()).hexdigest()
    note = folder / "plan.json"
    if not note.is_file() or json.loads(note.read_text()) != digest:
        for path in folder.iterdir():
            if path.name != ".lock":
                path.unlink()
        files.write_bytes(note, json.dumps(digest).encode())


def _progress(seconds: Sequence[float]) -> tqdm.tqdm:
    quiet = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm.tqdm(total=round(sum(seconds)), desc="tokenize", unit="s", mininterval=quiet)


def _encode_shard(shard, codec, semantic_tokenizer, batch_seconds, report) -> list[dict[str, Any]]:
    """The shard's records in the recordings' order; batches are of similar length, to pad little."""
    records: dict[str, dict[str, Any]] = {}
    batch: list[tuple[manifest.Recording, np.ndarray]] = []

    def encode_batch():
        if batch:
            records.update(_encode(batch, codec, semantic_tokenizer))
            batch.clear()

    for index in np.argsort(shard.seconds, kind="stable"):
        recording = shard.recordings[index]
        try:
            wave_W = recording.read(codec.sample_rate)
        except UserError as error:
            report(f"left out: {error}")
            continue
        if min(tokenizer.num_frames(len(wave_W)) for tokenizer in (codec, semantic_tokenizer)) < 1:
            report(f"left out: {recording.id}: {len(wave_W)} samples are too few for a token")
            continue
        if (len(batch) + 1) * len(wave_W) > batch_seconds * codec.sample_rate:
            encode_batch()
        batch.append((recording, wave_W))
    encode_batch()
    return [records[recording.id] for recording in shard.recordings if recording.id in records]


def _encode(batch, codec, semantic_tokenizer) -> dict[str, dict[str, Any]]:
    lengths_B = np.array([len(wave_W) for _, wave_W in batch])
    wave_BW = np.zeros((len(batch), lengths_B.max()), np.float32)
    for row, (_, wave_W) in enumerate(batch):
        wave_BW[row, : len(wave_W)] = wave_W
    acoustic_BTQ = np.asarray(codec.encode(wave_BW, lengths_B), np.int32)
    semantic_BT = np.asarray(semantic_tokenizer.encode(wave_BW, lengths_B), np.int32)
    return {
        recording.id: {
            "id": recording.id,
            "semantic": semantic_BT[row, : semantic_tokenizer.num_frames(length)],
            "acoustic": acoustic_BTQ[row, : codec.num_frames(length)],
            "num_samples": int(length),
            "speaker": recording.speaker,
            "is_end": recording.is_end,
        }
        for row, ((recording, _), length) in enumerate(zip(batch, lengths_B.tolist(), strict=True))
    }


def _summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Semantic frames of each record, and all tokens that de-duplication keeps."""
    runs = sum(int(run_starts(record["semantic"]).sum()) for record in records)
    return {"frames": [len(record["semantic"]) for record in records], "runs": runs}


def _finish(folder, output, statistics, codec, semantic_tokenizer, fingerprints):
    lengths: dict[str, list[int]] = collections.defaultdict(list)
    frames: dict[str, list[int]] = collections.defaultdict(list)
    for shard in statistics:
        lengths[shard["split"]].append(len(shard["frames"]))
        frames[shard["split"]] += shard["frames"]
    if not any(map(sum, lengths.values())):
        raise UserError("no recording could be read", output, "see the lines above")
    counted = [shard for shard in statistics if shard["split"] == "train"] or statistics
    metadata = token_dataset.TokenMetadata(
        codec=fingerprints["codec"],
        semantic_tokenizer=fingerprints["semantic_tokenizer"],
        num_clusters=semantic_tokenizer.vocab_size,
        codebook_size=codec.codebook_size,
        num_quantizers=codec.num_quantizers,
        semantic_rate=int(semantic_tokenizer.frame_rate),
        acoustic_rate=int(codec.frame_rate),
        sample_rate=codec.sample_rate,
        mean_run_length=sum(sum(s["frames"]) for s in counted) / max(1, sum(s["runs"] for s in counted)),
    )
    token_dataset.write_info(folder, lengths, frames, metadata)
    for name in ["plan.json", *(f"{path.name}" for path in folder.glob("*.array_record-*.json"))]:
        (folder / name).unlink()
    if output.is_dir():
        output.rmdir()
    (folder / ".lock").unlink()
    os.replace(folder, output)
