"""Which recordings there are: from a folder, one file, or a `.jsonl` manifest."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np

from audiolm_jax import audio
from audiolm_jax.errors import UserError

VALIDATION_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Recording:
    """One stretch of one audio file.

    Attributes:
      id: unique within the manifest.
      path: the audio file.
      speaker: who speaks; "" where nothing tells.
      start, end: seconds within the file; None is the end of the file.
      split: "train", "validation", or any other name that a manifest gives.
      text: transcript, "" where there is none.
    """

    id: str
    path: pathlib.Path
    speaker: str = ""
    start: float = 0.0
    end: float | None = None
    split: str = "train"
    text: str = ""

    @property
    def is_end(self) -> bool:
        """Whether the stretch ends where the file does: a true end."""
        return self.end is None

    def seconds(self) -> float:
        """Length, read from the file's header. Raises UserError for a bad file."""
        whole = audio.duration(self.path)
        length = (whole if self.end is None else min(self.end, whole)) - self.start
        if length <= 0:
            raise UserError("stretch outside of the recording", f"{self.path} ({self.start} s …)", "mend the manifest")
        return length

    def read(self, sample_rate: int) -> np.ndarray:
        """The samples; see `audio.read`."""
        return audio.read(self.path, sample_rate, self.start, self.end)


def read_manifest(path: str | pathlib.Path) -> list[Recording]:
    """Lists the recordings of a folder (searched recursively), one file or a `.jsonl` manifest, sorted by id.

    In a folder the speaker is the first sub-folder and the id is the relative path without its
    extension. A manifest's relative paths start at its own folder; `split` is optional there.

    Raises:
      UserError: nothing there, a malformed line, or an id that comes twice.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        recordings = _read_folder(path)
    elif not path.is_file():
        raise UserError("input not found", path, "give a folder, a recording or a .jsonl manifest")
    elif path.suffix == ".jsonl":
        recordings = _read_jsonl(path)
    else:
        recordings = [Recording(id=path.stem, path=path)]
    recordings.sort(key=lambda recording: recording.id)
    for first, second in zip(recordings, recordings[1:], strict=False):
        if first.id == second.id:
            raise UserError("id comes twice", f"{first.id} ({first.path}, {second.path})", "make ids unique")
    if not recordings:
        raise UserError("no recordings", path, f"expected files ending in {', '.join(audio.EXTENSIONS)}")
    return recordings


def _read_folder(folder: pathlib.Path) -> list[Recording]:
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in audio.EXTENSIONS and not path.is_dir()]
    relative = {path: path.relative_to(folder) for path in paths}
    stems = [str(name.with_suffix("")) for name in relative.values()]
    twice = {stem for stem in stems if stems.count(stem) > 1} if len(set(stems)) < len(stems) else set()
    recordings = []
    for path, name in relative.items():
        stem = name.with_suffix("").as_posix()
        identifier = name.as_posix() if stem in twice else stem
        speaker = name.parts[0] if len(name.parts) > 1 else ""
        recordings.append(Recording(identifier, path, speaker, split=_split_of(identifier)))
    if len(recordings) > 1 and len({recording.split for recording in recordings}) == 1:
        # Too few for the hash to have hit both: hold out the last in hash order.
        last = max(recordings, key=lambda recording: _hash(recording.id))
        splits = ["validation" if recording is last else "train" for recording in recordings]
        recordings = [dataclasses.replace(r, split=split) for r, split in zip(recordings, splits, strict=True)]
    return recordings


def _hash(identifier: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8]) / 2**64


def _split_of(identifier: str) -> str:
    return "validation" if _hash(identifier) < VALIDATION_SHARE else "train"


def _read_jsonl(path: pathlib.Path) -> list[Recording]:
    text, number = (str,), (int, float)
    kinds = {"path": text, "id": text, "speaker": text, "split": text, "text": text, "start": number, "end": number}
    recordings = []
    for row_number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {row_number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"not JSON ({error})", where, "write one object a line") from error
        if not isinstance(row, dict) or "path" not in row:
            raise UserError("no `path`", where, 'write {"path": …} with optional id, speaker, start, end, split, text')
        fields = {name: value for name, value in row.items() if name in kinds and value is not None}
        for name, value in fields.items():
            if not isinstance(value, kinds[name]):
                raise UserError(f"`{name}` of the wrong type", where, "see the README on manifests")
        audio_path = path.parent / fields.pop("path")
        default_id = f"{row['path']}@{fields['start']}" if "start" in fields else row["path"]
        identifier = fields.pop("id", default_id)
        fields.setdefault("split", _split_of(identifier))
        recordings.append(Recording(identifier, audio_path, **fields))
    return recordings


def usable(recordings: list[Recording], report: Callable[[str], None]) -> tuple[list[Recording], list[float]]:
    """The recordings whose headers can be read, and their seconds.

    Args:
      recordings: what to look at.
      report: called with one line for each recording that is left out, saying why.

    Raises:
      UserError: none is usable; where there was one alone, its own error.
    """
    kept: list[Recording] = []
    seconds: list[float] = []
    refused: list[UserError] = []
    for recording in recordings:
        try:
            seconds.append(recording.seconds())
            kept.append(recording)
        except UserError as error:
            refused.append(error)
    if recordings and not kept:
        raise refused[0]
    for reason in refused:
        report(f"left out: {reason}")
    return kept, seconds
