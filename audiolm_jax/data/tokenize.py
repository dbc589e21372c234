"""Recordings → token dataset: shard by shard, by one process or many, so that a killed run goes on where it stopped.

OUTPUT.incomplete/plan.json     what is asked for, and how long each recording is: all shards follow from it
OUTPUT.incomplete/SHARD.json    what a whole shard holds
OUTPUT.incomplete/dataset/      the whole shards; with TFDS's metadata it becomes OUTPUT

A shard's tokens depend on the shard alone, so whoever makes it, and however often, the dataset is the same, byte for
byte. Whichever process finds all shards whole finishes the dataset.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from audiolm_jax import files
from audiolm_jax.data import manifest, token_dataset
from audiolm_jax.errors import UserError
from audiolm_jax.lm.stages import run_starts
from audiolm_jax.progress import seconds_bar

SHARD_SECONDS, BATCH_SECONDS = 1800.0, 60.0
READERS = 4  # Threads that decode and resample while a batch is encoded.


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
class Tokenizers:
    """The two that make the tokens, of one sample rate.

    Attributes:
      codec, semantic: the models.
      fingerprints: of "codec" and "semantic_tokenizer".
    """

    codec: AcousticTokenizer
    semantic: SemanticTokenizer
    fingerprints: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for, the tokenizers aside.

    Attributes:
      recordings: from `manifest.read_manifest`; their splits become the dataset's.
      output: folder of the dataset; must not hold anything else.
      shard_seconds: audio a shard.
      batch_seconds: audio that is encoded at once, padding included.
    """

    recordings: Sequence[manifest.Recording]
    output: str | os.PathLike[str]
    shard_seconds: float = SHARD_SECONDS
    batch_seconds: float = BATCH_SECONDS

    def digest(self, fingerprints: Mapping[str, str]) -> str:
        """Hash of everything that decides what the dataset holds."""
        names = [field.name for field in dataclasses.fields(manifest.Recording)]
        members = [[getattr(recording, name) for name in names] for recording in self.recordings]
        asked = [members, dict(fingerprints), self.shard_seconds, self.batch_seconds]
        text = json.dumps(asked, sort_keys=True, default=os.path.abspath)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Shard:
    """One output file and the recordings that go into it."""

    name: str
    split: str
    recordings: tuple[manifest.Recording, ...]
    seconds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Workshop:
    """The folder where a dataset grows."""

    folder: pathlib.Path

    @property
    def dataset(self) -> pathlib.Path:
        """Holds whole shards only."""
        return self.folder / "dataset"

    @property
    def plan(self) -> pathlib.Path:
        return self.folder / "plan.json"

    def summary(self, shard: Shard) -> pathlib.Path:
        """Written once the shard is whole."""
        return self.folder / f"{shard.name}.json"

    def pending(self, shards: Iterable[Shard]) -> list[Shard]:
        """Those that are not whole yet."""
        return [shard for shard in shards if not self.summary(shard).is_file()]

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Waits until no other process plans or finishes, and keeps others from it."""
        return files.exclusive(self.folder / ".lock", "another run is writing this dataset", self.folder, wait=True)


# Makes shards whole: (workshop, shards, batch_seconds, advance by so many seconds).
WriteShards = Callable[[Workshop, Sequence[Shard], float, Callable[[float], None]], None]


def tokenize(
    request: Request,
    tokenizers: Tokenizers,
    report: Callable[[str], None],
    host: int = 0,
    num_hosts: int = 1,
    write_shards: WriteShards | None = None,
):
    """Writes the token dataset that is asked for, or this host's share of it.

    Run again after a crash, it keeps the shards that are whole; run again once the dataset is there, it does nothing.
    Recordings that cannot be read are left out, reported, and listed in the dataset's `left_out.jsonl`.

    Args:
      request: what is asked for.
      tokenizers: what makes the tokens.
      report: called with one line for each recording that is left out, and with the outcome.
      host, num_hosts: this process makes every `num_hosts`-th shard, from `host` on. All see the same folders; the
        last one to be ready finishes the dataset.
      write_shards: makes the shards; by default this process does, one after the other.

    Raises:
      UserError: the output holds something else, another run does the same, a share that cannot be, or no recording
        can be used.
    """
    if not 0 <= host < num_hosts:
        raise UserError("no such share", f"--host={host} --num_hosts={num_hosts}", "number the hosts 0 … num_hosts - 1")
    for split in sorted({recording.split for recording in request.recordings}):
        token_dataset.check_split(split)
    output = pathlib.Path(os.path.abspath(request.output))
    workshop = Workshop(output.parent / f"{output.name}.incomplete")
    digest = request.digest(tokenizers.fingerprints)
    if token_dataset.made_for(output) == digest:
        report(f"nothing to do: {output} is whole")
        shutil.rmtree(workshop.folder, ignore_errors=True)
        return
    files.refuse_existing(output)
    files.make_folder(workshop.folder)
    share = workshop.folder / f".lock-{host}-of-{num_hosts}"
    with files.exclusive(share, "another run is writing this dataset", output):
        shards, left_out = _begin(workshop, request, digest, report, may_clear=num_hosts == 1)
        mine = shards[host::num_hosts]
        pending = workshop.pending(mine)
        total, left = (sum(sum(shard.seconds) for shard in some) for some in (mine, pending))
        write_shards = write_shards or _one_by_one(tokenizers, report)
        with seconds_bar("tokenize", total, 1, initial=total - left) as bar:
            if pending:
                write_shards(workshop, pending, request.batch_seconds, bar.update)
        _finish(workshop, output, digest, shards, left_out, tokenizers, report)


def _begin(
    workshop: Workshop, request: Request, digest: str, report: Callable[[str], None], may_clear: bool
) -> tuple[list[Shard], list[dict[str, str]]]:
    """All shards, and the recordings whose headers rule them out; the first process to come reads the headers."""
    with workshop.alone():
        plan = json.loads(workshop.plan.read_text()) if workshop.plan.is_file() else None
        if plan is not None and plan["request"] != digest:
            if not may_clear:
                what = "shards of other recordings, tokenizers or options are here"
                raise UserError(what, workshop.folder, "start all hosts alike, or remove the folder")
            _clear(workshop)
            plan = None
        if plan is None:
            plan = {"request": digest, **_measure(workshop, request, report)}
            workshop.dataset.mkdir(exist_ok=True)
            files.write_bytes(workshop.plan, json.dumps(plan).encode())
    usable = [(r, s) for r, s in zip(request.recordings, plan["seconds"], strict=True) if s is not None]
    shards = plan_shards([r for r, _ in usable], [s for _, s in usable], request.shard_seconds)
    return shards, plan["left_out"]


def _clear(workshop: Workshop):
    for path in workshop.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith(".lock"):
            path.unlink()


def _measure(workshop: Workshop, request: Request, report: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of each recording, None for one whose header rules it out, and the reasons."""
    reasons: list[str] = []
    try:
        usable, lengths = manifest.usable(list(request.recordings), reasons.append)
    except UserError:
        shutil.rmtree(workshop.folder)
        raise
    kept, remaining = set(map(id, usable)), iter(lengths)
    seconds = [next(remaining) if id(recording) in kept else None for recording in request.recordings]
    refused = [recording for recording, length in zip(request.recordings, seconds, strict=True) if length is None]
    for reason in reasons:
        report(reason)
    left_out = [
        _left_out(recording, reason.removeprefix("left out: "))
        for recording, reason in zip(refused, reasons, strict=True)
    ]
    return {"seconds": seconds, "left_out": left_out}


def plan_shards(
    recordings: Sequence[manifest.Recording], seconds: Sequence[float], shard_seconds: float
) -> list[Shard]:
    """Which recordings go into which shard: in order, by split, about `shard_seconds` each."""
    by_split = collections.defaultdict(list)
    for recording, length in zip(recordings, seconds, strict=True):
        by_split[recording.split].append((recording, length))
    shards = []
    for split, members in sorted(by_split.items()):
        ends = np.cumsum([length for _, length in members])
        count = max(1, min(len(members), round(float(ends[-1]) / shard_seconds)))
        indices = np.minimum((ends - ends[-1] / count / 2) // (ends[-1] / count), count - 1).clip(0).astype(int)
        firsts = np.searchsorted(indices, np.arange(count + 1))
        for i, (first, last) in enumerate(zip(firsts, firsts[1:], strict=False)):
            name = token_dataset.shard_name(split, i, count)
            group = members[first:last]
            shards.append(Shard(name, split, tuple(r for r, _ in group), tuple(s for _, s in group)))
    return shards


def _one_by_one(tokenizers: Tokenizers, report: Callable[[str], None]) -> WriteShards:
    def write(workshop, shards, batch_seconds, advance):
        for shard in shards:
            write_shard(workshop, shard, tokenizers, batch_seconds, report, advance)

    return write


def write_shard(
    workshop: Workshop,
    shard: Shard,
    tokenizers: Tokenizers,
    batch_seconds: float,
    report: Callable[[str], None],
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """Makes one shard whole; writes down and returns what it holds.

    Args:
      workshop, shard, tokenizers: where, what, and with what.
      batch_seconds: audio that is encoded at once.
      report: called with one line for each recording that is left out.
      advance: called with the seconds of each recording that is done.
    """
    records, left_out = encode_shard(shard, tokenizers, batch_seconds, report, advance)
    # Outside of `dataset`, which holds whole shards only; of this process, as another may be making the same shard.
    scratch = workshop.folder / f"{shard.name}.{uuid.uuid4().hex}"
    try:
        token_dataset.write_shard(scratch, records, tokenizers.codec.num_quantizers)
        with open(scratch, "rb+") as file:
            files.flush_to_disk(file)
        summary = {
            "frames": [len(record["semantic"]) for record in records],
            "runs": sum(int(run_starts(record["semantic"]).sum()) for record in records),
            "samples": sum(record["num_samples"] for record in records),
            "acoustic_tokens": sum(record["acoustic"].size for record in records),
            "left_out": left_out,
            "sha256": files.sha256(scratch),
        }
        os.replace(scratch, workshop.dataset / shard.name)
    finally:
        scratch.unlink(missing_ok=True)
    files.write_bytes(workshop.summary(shard), json.dumps(summary).encode())
    return summary


@dataclasses.dataclass(frozen=True)
class Clip:
    """A recording that was read."""

    recording: manifest.Recording
    wave_W: np.ndarray


def encode_shard(
    shard: Shard,
    tokenizers: Tokenizers,
    batch_seconds: float,
    report: Callable[[str], None],
    advance: Callable[[float], None],
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The shard's records in the recordings' order, and the recordings that were left out; see `write_shard`."""
    left_out: dict[str, dict[str, str]] = {}

    def refuse(recording: manifest.Recording, error: UserError):
        left_out[recording.id] = _left_out(recording, str(error))
        report(f"left out: {error}")

    records: dict[str, dict[str, Any]] = {}
    clips = _clips(shard, tokenizers, refuse, advance)
    for batch in _batches(clips, batch_seconds * tokenizers.codec.sample_rate):
        records.update(_encode(batch, tokenizers))
    ordered = [recording.id for recording in shard.recordings]
    return [records[i] for i in ordered if i in records], [left_out[i] for i in ordered if i in left_out]


def _left_out(recording: manifest.Recording, reason: str) -> dict[str, str]:
    entry = {"id": recording.id, "path": str(recording.path), "reason": reason}
    return {name: files.printable(text) for name, text in entry.items()}


def _clips(
    shard: Shard,
    tokenizers: Tokenizers,
    refuse: Callable[[manifest.Recording, UserError], None],
    advance: Callable[[float], None],
) -> Iterator[Clip]:
    """Reads the recordings, the shortest first, ahead of what is encoded: at most a shard's audio is in memory."""
    order = [int(index) for index in np.argsort(shard.seconds, kind="stable")]
    rate = tokenizers.codec.sample_rate
    pool = concurrent.futures.ThreadPoolExecutor(READERS)
    try:
        waves = collections.deque(pool.submit(shard.recordings[index].read, rate) for index in order)
        for index in order:
            advance(shard.seconds[index])
            recording = shard.recordings[index]
            try:
                wave_W = waves.popleft().result()
                _check_length(recording, len(wave_W), tokenizers)
            except UserError as error:
                refuse(recording, error)
            else:
                yield Clip(recording, wave_W)
    finally:
        pool.shutdown(cancel_futures=True)


def _check_length(recording: manifest.Recording, num_samples: int, tokenizers: Tokenizers):
    if min(tokenizers.codec.num_frames(num_samples), tokenizers.semantic.num_frames(num_samples)) < 1:
        raise UserError(f"too short for a token ({num_samples} samples)", recording.path, "leave it out")


def _batches(clips: Iterable[Clip], max_samples: float) -> Iterator[list[Clip]]:
    """Clips that come by length, in batches of 1, 2, 4 … that fit: little is padded, and few shapes are compiled."""
    waiting: list[Clip] = []
    largest_fit = lambda: 2 ** (len(waiting).bit_length() - 1)
    for clip in clips:
        while waiting and (len(waiting) + 1) * len(clip.wave_W) > max_samples:
            size = largest_fit()
            yield waiting[:size]
            waiting = waiting[size:]
        waiting.append(clip)
    while waiting:
        size = largest_fit()
        yield waiting[:size]
        waiting = waiting[size:]


def _encode(clips: Sequence[Clip], tokenizers: Tokenizers) -> dict[str, dict[str, Any]]:
    codec, semantic_tokenizer = tokenizers.codec, tokenizers.semantic
    lengths_B = np.array([len(clip.wave_W) for clip in clips])
    wave_BW = np.zeros((len(clips), lengths_B.max()), np.float32)
    for row, clip in enumerate(clips):
        wave_BW[row, : len(clip.wave_W)] = clip.wave_W
    acoustic_BTQ = np.asarray(codec.encode(wave_BW, lengths_B), np.int32)
    semantic_BT = np.asarray(semantic_tokenizer.encode(wave_BW, lengths_B), np.int32)
    return {
        clip.recording.id: {
            "id": clip.recording.id,
            "semantic": semantic_BT[row, : semantic_tokenizer.num_frames(length)],
            "acoustic": acoustic_BTQ[row, : codec.num_frames(length)],
            "num_samples": int(length),
            "speaker": clip.recording.speaker,
            "is_end": clip.recording.is_end,
        }
        for row, (clip, length) in enumerate(zip(clips, lengths_B.tolist(), strict=True))
    }


def _finish(
    workshop: Workshop,
    output: pathlib.Path,
    digest: str,
    shards: Sequence[Shard],
    left_out: Sequence[dict[str, str]],
    tokenizers: Tokenizers,
    report: Callable[[str], None],
):
    """Once all shards are whole, makes a dataset of them and gives it its final name."""
    with workshop.alone():
        if token_dataset.made_for(output) != digest:
            if missing := len(workshop.pending(shards)):
                report(f"this share is done; {missing} of {len(shards)} shards are left to other hosts")
                return
            summaries = [json.loads(workshop.summary(shard).read_text()) for shard in shards]
            left_out = [*left_out, *(entry for summary in summaries for entry in summary["left_out"])]
            counters = _count(summaries, left_out, tokenizers.codec.sample_rate)
            report(_describe(counters))
            if not counters["recordings"]:
                shutil.rmtree(workshop.folder)
                raise UserError("no recording could be read", output, "see the lines above")
            _describe_dataset(workshop.dataset, digest, shards, summaries, left_out, counters, tokenizers)
            if output.is_dir():
                output.rmdir()
            os.replace(workshop.dataset, output)
    shutil.rmtree(workshop.folder, ignore_errors=True)


def _count(summaries: Sequence[Mapping[str, Any]], left_out: Sequence[Mapping[str, str]], rate: int) -> dict[str, Any]:
    return {
        "recordings": sum(len(summary["frames"]) for summary in summaries),
        "seconds": sum(summary["samples"] for summary in summaries) / rate,
        "semantic_tokens": sum(sum(summary["frames"]) for summary in summaries),
        "acoustic_tokens": sum(summary["acoustic_tokens"] for summary in summaries),
        "left_out": dict(sorted(collections.Counter(_kind(entry["reason"]) for entry in left_out).items())),
    }


def _kind(reason: str) -> str:
    """WHAT of "WHAT (details): WHERE; WHAT TO DO"."""
    return reason.partition(": ")[0].partition(" (")[0]


def _describe(counters: Mapping[str, Any]) -> str:
    tokens = f"{counters['semantic_tokens']} semantic and {counters['acoustic_tokens']} acoustic tokens"
    reasons = ", ".join(f"{count} x {kind}" for kind, count in counters["left_out"].items())
    out = f"; left out (left_out.jsonl): {reasons}" if reasons else ""
    return f"tokenized {counters['recordings']} recordings, {counters['seconds'] / 3600:.2f} hours: {tokens}{out}"


def _describe_dataset(
    folder: pathlib.Path,
    digest: str,
    shards: Sequence[Shard],
    summaries: Sequence[Mapping[str, Any]],
    left_out: Sequence[Mapping[str, str]],
    counters: Mapping[str, Any],
    tokenizers: Tokenizers,
):
    """Writes all files of the dataset that are not shards, and removes the shards of splits without a record."""
    sizes: dict[str, int] = collections.defaultdict(int)
    for shard, summary in zip(shards, summaries, strict=True):
        sizes[shard.split] += len(summary["frames"])
    # TFDS opens none such.
    for shard in (shard for shard in shards if not sizes[shard.split]):
        (folder / shard.name).unlink(missing_ok=True)
    made = [(shard, summary) for shard, summary in zip(shards, summaries, strict=True) if sizes[shard.split]]
    lengths: dict[str, list[int]] = collections.defaultdict(list)
    frames: dict[str, list[int]] = collections.defaultdict(list)
    runs: dict[str, int] = collections.defaultdict(int)
    for shard, summary in made:
        lengths[shard.split].append(len(summary["frames"]))
        frames[shard.split] += summary["frames"]
        runs[shard.split] += summary["runs"]
    metadata = describe_tokens(tokenizers, frames, runs)
    token_dataset.write_info(folder, lengths, frames, metadata)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in left_out)
    files.write_bytes(folder / token_dataset.LEFT_OUT_FILE, lines.encode())
    origin = {"request": digest, "counters": counters}
    files.write_bytes(folder / token_dataset.ORIGIN_FILE, (json.dumps(origin, indent=2) + "\n").encode())
    known = {shard.name: summary["sha256"] for shard, summary in made}
    token_dataset.write_checksums(folder, known)


def describe_tokens(
    tokenizers: Tokenizers, num_frames: Mapping[str, Sequence[int]], num_runs: Mapping[str, int]
) -> token_dataset.TokenMetadata:
    """A dataset's metadata.

    Args:
      tokenizers: what made it.
      num_frames: semantic frames of each record, by split.
      num_runs: by split, what de-duplication leaves of all of them.
    """
    splits = ["train"] if "train" in num_frames else list(num_frames)
    frames, runs = sum(sum(num_frames[split]) for split in splits), sum(num_runs[split] for split in splits)
    codec, semantic_tokenizer = tokenizers.codec, tokenizers.semantic
    return token_dataset.TokenMetadata(
        codec=tokenizers.fingerprints["codec"],
        semantic_tokenizer=tokenizers.fingerprints["semantic_tokenizer"],
        num_clusters=semantic_tokenizer.vocab_size,
        codebook_size=codec.codebook_size,
        num_quantizers=codec.num_quantizers,
        semantic_rate=int(semantic_tokenizer.frame_rate),
        acoustic_rate=int(codec.frame_rate),
        sample_rate=codec.sample_rate,
        mean_run_length=frames / max(1, runs),
    )
