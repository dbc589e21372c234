"""Which recordings there are: from a folder, one file, or a `.jsonl` manifest; and what is wrong with them."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import numpy as np

from audiolm_jax import audio, files
from audiolm_jax.errors import UserError

VALIDATION_SHARE = 0.05
HEADER_THREADS = 32
MAX_SECONDS = 1e9  # 30 years: more is no time within a recording.
# Of a manifest's row: the fields of a Recording, `seconds` being its `known_seconds`.
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("path", "id", "speaker", "split", "text", "label"), (str,)),
    **dict.fromkeys(("start", "end", "seconds"), (int, float)),
    "segments": (list,),
    "is_end": (bool,),
}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, slots=True)
class Recording:
    """One stretch of one audio file, or of some of its segments one behind the other.

    Attributes:
      id: unique within the manifest.
      path: the audio file.
      speaker: who speaks; "" where nothing tells.
      start, end: seconds within the file, or within the joined segments; None is the end.
      split: "train", "validation", or any other name that a manifest gives.
      text: transcript, "" where there is none.
      segments: seconds within the file, from and to, that are read without what lies between them; none: all of it.
      is_end: whether it ends where a speaker or piece does, at a true end; by default, whether `end` is None.
      known_seconds: its length, where a manifest says it: then no header is read for it.
      label: what a classifier is to hear, where that is not the speaker.
    """

    id: str
    path: pathlib.Path
    speaker: str = ""
    start: float = 0.0
    end: float | None = None
    split: str = "train"
    text: str = ""
    segments: tuple[tuple[float, float], ...] = ()
    is_end: bool | None = None
    known_seconds: float | None = None
    label: str = ""

    def __post_init__(self):
        if self.is_end is None:
            object.__setattr__(self, "is_end", self.end is None)
        # From a file's name, or JSON, what is no text may come, and could not be written.
        for name in ("id", "speaker", "split", "text", "label"):
            object.__setattr__(self, name, files.printable(getattr(self, name)))

    @property
    def class_label(self) -> str:
        """What a classifier is to hear: the label, by default the speaker; "" where nothing tells."""
        return self.label or self.speaker

    def stretches(self) -> list[audio.Stretch]:
        """What is read of the file: seconds from and to, in order."""
        if not self.segments:
            return [(self.start, self.end)]
        stop = math.inf if self.end is None else self.end
        stretches: list[audio.Stretch] = []
        position = 0.0
        for onset, offset in self.segments:
            first, last = max(self.start - position, 0.0), min(stop - position, offset - onset)
            if first < last:
                stretches.append((onset + first, onset + last))
            position += offset - onset
        return stretches

    def seconds(self) -> float:
        """Length, as the manifest says or else the file's header. Raises UserError for a bad file."""
        if self.known_seconds:
            return self.known_seconds
        whole = audio.duration(self.path)
        length = sum(max(0.0, (whole if end is None else min(end, whole)) - start) for start, end in self.stretches())
        if length <= 0:
            first = self.stretches()[0][0] if self.stretches() else self.start
            raise UserError("stretch outside of the recording", f"{self.path} ({first:g} s …)", "mend the manifest")
        return length

    def crop(self, start: float, stop: float) -> "Recording":
        """The stretch of it from `start` to `stop` seconds."""
        return dataclasses.replace(
            self, start=self.start + start, end=self.start + stop, is_end=False, known_seconds=stop - start
        )

    def read(self, sample_rate: int) -> np.ndarray:
        """The samples; see `audio.read_joined`."""
        return audio.read_joined(self.path, sample_rate, self.stretches())


def read_manifest(path: str | pathlib.Path) -> list[Recording]:
    """Lists the recordings of a folder (searched recursively), one file or a `.jsonl` manifest, sorted by id.

    In a folder the speaker is the first sub-folder and the id is the relative path without its extension. A manifest's
    relative paths start at its own folder; `split` is optional there. What has none gets one by `with_splits`.

    Raises:
      UserError: nothing there, or a malformed line.
    """
    return sorted(with_splits(list_recordings(pathlib.Path(path))), key=lambda recording: recording.id)


def list_recordings(path: pathlib.Path) -> list[Recording]:
    """As `read_manifest`, but in no order, and the split is "" where nothing tells it."""
    expected = f"expected files ending in {', '.join(audio.EXTENSIONS)}"
    if path.is_dir():
        recordings = _read_folder(path)
    elif not path.is_file():
        raise UserError("input not found", path, "give a folder, a recording or a .jsonl manifest")
    elif path.suffix == ".jsonl":
        recordings, expected = _read_jsonl(path), 'write {"path": …}, an object a line'
    else:
        recordings = [Recording(id=path.stem, path=path)]
    if not recordings:
        raise UserError("no recordings", path, expected)
    return recordings


def _read_folder(folder: pathlib.Path) -> list[Recording]:
    paths = [path for path in files.below(folder) if path.suffix.lower() in audio.EXTENSIONS]
    names = [path.relative_to(folder) for path in paths]
    count = collections.Counter(name.with_suffix("") for name in names)
    return [
        Recording(
            id=(name if count[name.with_suffix("")] > 1 else name.with_suffix("")).as_posix(),
            path=path,
            speaker=name.parts[0] if len(name.parts) > 1 else "",
            split="",
        )
        for path, name in zip(paths, names, strict=True)
    ]


def with_splits(recordings: Sequence[Recording], validation_share: float = VALIDATION_SHARE) -> list[Recording]:
    """The same recordings; those whose split is "" go to "validation" or "train" by a hash.

    Where there are several speakers, the hash is of the speaker, who is then in one split alone; a recording without
    a speaker, or where all have the same, goes by its id. So what a speaker or recording belongs to does not change
    when others come or go. Only where the hash would hold out none, it holds out the one that comes nearest; others
    that come nearer later take that place, and it goes to "train".
    """
    speakers = {recording.speaker for recording in recordings if recording.speaker}
    keys = [(recording.speaker if len(speakers) > 1 else "") or recording.id for recording in recordings]
    return _split_by_keys(recordings, keys, validation_share)


def split_by_recording(recordings: Sequence[Recording], validation_share: float) -> list[Recording]:
    """The same recordings, in "validation" or "train" by a hash of the id alone, whatever split they were in."""
    unsplit = [dataclasses.replace(recording, split="") for recording in recordings]
    return _split_by_keys(unsplit, [recording.id for recording in recordings], validation_share)


def _split_by_keys(recordings: Sequence[Recording], keys: Sequence[str], validation_share: float) -> list[Recording]:
    """The same recordings; those whose split is "" go where the hash of their keys says."""
    hashes = {key: _hash(key) for key, recording in zip(keys, recordings, strict=True) if not recording.split}
    held_out = {key for key, value in hashes.items() if value < validation_share}
    if not held_out and len(hashes) > 1 and all(recording.split != "validation" for recording in recordings):
        held_out = {min(hashes, key=hashes.__getitem__)}
    return [
        recording
        if recording.split
        else dataclasses.replace(recording, split="validation" if key in held_out else "train")
        for recording, key in zip(recordings, keys, strict=True)
    ]


def of_split(recordings: Sequence[Recording], split: str | None) -> list[Recording]:
    """Those of a split, all of them where none is named; raises a UserError where there are none."""
    chosen = [recording for recording in recordings if split in (None, recording.split)]
    if not chosen:
        splits = ", ".join(sorted({recording.split for recording in recordings}))
        raise UserError("no recordings of this split", f"--split={split}", f"use one of {splits}")
    return chosen


def _hash(identifier: str) -> float:
    """A number in [0, 1) that depends on the identifier alone."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8]) / 2**64


def _read_jsonl(path: pathlib.Path) -> list[Recording]:
    recordings = []
    paths: dict[str, pathlib.Path] = {}
    for row_number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path} line {row_number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON ({error})", where, "write one object a line") from error
        if not isinstance(row, dict) or row.get("path") is None:
            raise UserError("no `path`", where, 'write {"path": …} with optional id, speaker, start, end, split, text')
        fields = {name: value for name, value in row.items() if name in KINDS and value is not None}
        for name, value in fields.items():
            _check_field(name, value, where)
        name = fields.pop("path")
        fields.setdefault("id", f"{name}@{fields['start']}" if "start" in fields else name)
        fields.setdefault("split", "")
        fields["segments"] = tuple((onset, offset) for onset, offset in fields.get("segments", ()))
        fields["known_seconds"] = fields.pop("seconds", None)
        recordings.append(Recording(path=paths.setdefault(name, path.parent / name), **fields))
    return recordings


def _lines(path: pathlib.Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError("manifest not in UTF-8", path, "write it in UTF-8") from error


def _check_field(name: str, value: Any, where: str):
    kinds = KINDS[name]
    is_right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not is_right:
        raise UserError(f"`{name}` of the wrong type", where, "see the README on manifests")
    if float in kinds and not 0 <= value <= MAX_SECONDS:
        raise UserError(f"`{name}` must be 0 or more", where, "give seconds within a recording")
    if name == "segments" and not are_segments(value):
        raise UserError("`segments` must be pairs of seconds, from and to", where, "see the README on manifests")


def are_segments(value: Any) -> TypeGuard[list[list[float]]]:
    """Whether it is a list of [from, to] in seconds."""

    def is_segment(pair: Any) -> bool:
        match pair:
            case [int() | float() as onset, int() | float() as offset]:
                return 0 <= onset <= offset <= MAX_SECONDS
        return False

    return isinstance(value, list) and all(map(is_segment, value))


def write_manifest(path: pathlib.Path, recordings: Iterable[Recording], notes: Mapping[str, Mapping[str, Any]]):
    """Writes what `read_manifest` reads, the whole file or nothing.

    Args:
      path: the `.jsonl` file. Recordings below its folder move with it; of others the whole path is written.
      recordings: one a line.
      notes: further fields of a line, by the recording's id, for people and programs other than this one.
    """
    folder = pathlib.Path(os.path.abspath(path.parent))
    with files.new_file(path) as scratch, open(scratch, "w") as file:
        for recording in recordings:
            row = _row(recording, folder) | dict(notes.get(recording.id, {}))
            file.write(json.dumps(row) + "\n")


def _row(recording: Recording, folder: pathlib.Path) -> dict[str, Any]:
    path = pathlib.Path(os.path.abspath(recording.path))
    row: dict[str, Any] = {
        "path": str(path.relative_to(folder) if path.is_relative_to(folder) else path),
        "id": recording.id,
        "split": recording.split,
    }
    plain = Recording(recording.id, recording.path, end=recording.end)
    for name in ("speaker", "start", "segments", "is_end", "text", "label"):
        if getattr(recording, name) != getattr(plain, name):
            row[name] = getattr(recording, name)
    for name, value in (("end", recording.end), ("seconds", recording.known_seconds)):
        if value is not None:
            row[name] = value
    return row


def usable(recordings: list[Recording], report: Callable[[str], None]) -> tuple[list[Recording], list[float]]:
    """The recordings whose headers can be read, the first of each id, and their seconds.

    Args:
      recordings: what to look at.
      report: called with one line for each recording that is left out, saying why.

    Raises:
      UserError: none is usable; where there was one alone, its own error.
    """
    kept: dict[str, Recording] = {}
    seconds: list[float] = []
    refused: list[UserError] = []
    for recording, length in zip(recordings, in_threads(Recording.seconds, recordings), strict=True):
        if isinstance(length, UserError):
            refused.append(length)
        elif recording.id in kept:
            refused.append(repeated(recording, kept[recording.id]))
        else:
            kept[recording.id] = recording
            seconds.append(length)
    if recordings and not kept:
        raise refused[0]
    for reason in refused:
        report(f"left out: {reason}")
    return list(kept.values()), seconds


def repeated(recording: Recording, first: Recording) -> UserError:
    """What is wrong with a recording whose id another had before it."""
    return UserError("id comes twice", f"{recording.path} (id {recording.id}, as {first.path})", "make ids unique")


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result | UserError]:
    """`function` of each item, in order; where it raises a UserError, that error. For waiting, not for computing."""

    def outcome(item: Item) -> Result | UserError:
        try:
            return function(item)
        except UserError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(HEADER_THREADS) as pool:
        yield from pool.map(outcome, items)
