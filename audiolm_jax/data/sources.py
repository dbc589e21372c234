"""Corpora as they come → a `.jsonl` manifest, by headers alone, and beside it what was left out and why.

Libri-Light, LibriSpeech, MAESTRO, anyone's folder, and datasets that TFDS has already prepared.
"""

import collections
import csv
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from audiolm_jax import audio, files
from audiolm_jax.data import manifest
from audiolm_jax.data.manifest import Recording
from audiolm_jax.errors import UserError

MAESTRO_COLUMNS = ("canonical_composer", "canonical_title", "split", "year", "midi_filename", "audio_filename")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What `audiolm manifest` was asked for.

    Attributes:
      source: one of `SOURCES`.
      input: where the corpus lies.
      output: the `.jsonl` file to write.
      target_seconds: of Libri-Light's joined segments.
      min_seconds: shortest piece of Libri-Light, no shorter than the longest training crop.
      validation_share: of the speakers, or recordings, where the corpus has no splits of its own.
      decode: read every sample, too.
    """

    source: str
    input: pathlib.Path
    output: pathlib.Path
    target_seconds: float
    min_seconds: float
    validation_share: float
    decode: bool


@dataclasses.dataclass(frozen=True)
class Entry:
    """A recording, and what else its line says."""

    recording: Recording
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


Outcome = list[Entry] | UserError
Found = tuple[int, Iterator[Outcome]]


def write(request: Request, report: Callable[[str], None]):
    """Writes the manifest of a corpus, and `OUTPUT_STEM.left_out.txt`, a line for each file that is not in it.

    Args:
      request: of what.
      report: called with what was kept, and for each reason how many were left out.

    Raises:
      UserError: nothing there, the output exists, or no recording can be used.
    """
    if request.output.suffix != ".jsonl":
        raise UserError("a manifest's name ends in .jsonl", request.output, "change --output")
    files.refuse_existing(request.output)
    if not request.input.exists():
        raise UserError("input not found", request.input, "check --input")
    if not 0 <= request.min_seconds <= request.target_seconds or not 0 <= request.validation_share < 1:
        where = f"{request.min_seconds}, {request.target_seconds}, {request.validation_share}"
        raise UserError("need 0 <= min_seconds <= target_seconds and 0 <= validation_share < 1", where, "change them")
    request = dataclasses.replace(request, input=pathlib.Path(os.path.abspath(request.input)))
    count, outcomes = SOURCES[request.source](request)
    kept: dict[str, Entry] = {}
    refused: list[UserError] = []
    quiet = 0.5 if sys.stderr.isatty() else 10.0
    for outcome in tqdm.tqdm(outcomes, desc="manifest", unit="file", total=count, mininterval=quiet):
        if isinstance(outcome, UserError):
            refused.append(outcome)
            continue
        for entry in outcome:
            if entry.recording.id in kept:
                refused.append(manifest.repeated(entry.recording, kept[entry.recording.id].recording))
            else:
                kept[entry.recording.id] = entry
    recordings = manifest.with_splits([entry.recording for entry in kept.values()], request.validation_share)
    for line in _summary(recordings, refused):
        report(line)
    if not recordings:
        first = f", the first because: {refused[0]}" if refused else ""
        raise UserError(f"no recording can be used ({len(refused)} left out{first})", request.input, "check --source")
    left_out = request.output.with_suffix(".left_out.txt")
    files.write_bytes(left_out, "".join(f"{reason}\n" for reason in refused).encode(errors="backslashreplace"))
    recordings.sort(key=lambda recording: recording.id)
    manifest.write_manifest(request.output, recordings, {name: entry.notes for name, entry in kept.items()})


def _summary(recordings: Sequence[Recording], refused: Sequence[UserError]) -> Iterator[str]:
    for split in sorted({recording.split for recording in recordings}):
        members = [recording for recording in recordings if recording.split == split]
        hours = sum(recording.seconds() for recording in members) / 3600
        speakers = len({recording.speaker for recording in members if recording.speaker})
        yield f"{split}: {len(members)} recordings, {hours:.2f} hours, {speakers} speakers"
    # What follows in brackets is of one file.
    reasons = collections.Counter(reason.what.split(" (")[0] for reason in refused)
    for reason, count in reasons.most_common():
        yield f"left out: {count} x {reason}"


def _each(function: Callable[[Any], list[Entry]], items: Sequence[Any], request: Request) -> Found:
    """How many items there are, and what the function makes of each, many at a time; perhaps with a look at samples."""

    def entries(item: Any) -> list[Entry]:
        found = function(item)
        if request.decode:
            audio.check(found[0].recording.path)
        return found

    return len(items), manifest.in_threads(entries, items)


def _whole(recording: Recording) -> list[Entry]:
    seconds = dataclasses.replace(recording, known_seconds=None).seconds()
    return [Entry(dataclasses.replace(recording, known_seconds=seconds))]


def _folder(request: Request) -> Found:
    """Whatever `manifest.read_manifest` reads."""
    return _each(_whole, manifest.list_recordings(request.input), request)


def _librilight(request: Request) -> Found:
    """Libri-Light (Kahn et al., 2020, arXiv 1912.07875): SPEAKER/BOOK/FILE.flac, and FILE.json with its speech."""
    stems = sorted({path.with_suffix("") for path in files.below(request.input) if path.suffix in (".flac", ".json")})
    return _each(functools.partial(_librilight_pieces, request=request), stems, request)


def _librilight_pieces(stem: pathlib.Path, request: Request) -> list[Entry]:
    about = stem.with_name(f"{stem.name}.json")
    try:
        meta = json.loads(about.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("no JSON beside the recording", about, "get it from Libri-Light's archive") from error
    except OSError as error:
        raise UserError(f"JSON cannot be read ({error.strerror})", about, "check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", about, "get it from Libri-Light's archive") from error
    segments = meta.get("voice_activity") if isinstance(meta, dict) else None
    if not manifest.are_segments(segments):
        raise UserError("no `voice_activity` in pairs of seconds", about, "get it from Libri-Light's archive")
    path = stem.with_name(f"{stem.name}.flac")
    length = audio.duration(path)
    if any(onset >= length for onset, _ in segments):
        raise UserError(f"voice activity beyond the end of the recording ({length:.2f} s)", path, "get it anew")
    pieces = join_segments(
        [(onset, min(offset, length)) for onset, offset in segments], request.target_seconds, request.min_seconds
    )
    if not pieces:
        least = f"shorter than --min_seconds ({request.min_seconds:g})"
        raise UserError(f"speech {least}", path, "lower --min_seconds, or do without it")
    name = stem.relative_to(request.input).as_posix()
    book = meta.get("book_meta")
    notes = {"book": book.get("id") if isinstance(book, dict) else None, "snr": meta.get("snr")}
    return [
        Entry(
            Recording(
                id=f"{name}_{index:04}",
                path=path,
                speaker=str(meta.get("speaker") or stem.parent.parent.name),
                split="",
                segments=tuple(piece),
                is_end=index == len(pieces) - 1,
                known_seconds=sum(offset - onset for onset, offset in piece),
            ),
            notes,
        )
        for index, piece in enumerate(pieces)
    ]


def join_segments(
    segments: Sequence[tuple[float, float]], target_seconds: float, min_seconds: float
) -> list[list[tuple[float, float]]]:
    """The segments of one file, in order, in pieces of about `target_seconds`.

    As Libri-Light's `cut_by_vad.py`: a piece is full where the next segment would take it beyond the target, and no
    segment is cut, however long. But no piece is shorter than `min_seconds`: it grows until it is as long, and what
    remains at the end of the file, if it is shorter, goes to the piece before.

    Returns:
      the pieces; none where all segments together are shorter than `min_seconds`.
    """
    pieces: list[list[tuple[float, float]]] = []
    seconds = 0.0
    for onset, offset in segments:
        if not pieces or (seconds + offset - onset > target_seconds and seconds >= min_seconds):
            pieces.append([])
            seconds = 0.0
        pieces[-1].append((onset, offset))
        seconds += offset - onset
    if seconds < min_seconds:
        rest = pieces.pop() if pieces else []
        if pieces:
            pieces[-1] += rest
    return pieces


def _librispeech(request: Request) -> Found:
    """LibriSpeech (Panayotov et al., 2015): SUBSET/SPEAKER/CHAPTER/ID.flac, and ID TEXT in lines of *.trans.txt.

    The subsets' names tell the splits. A subset alone will do for an input.
    """
    texts: dict[str, str] = {}
    paths = sorted(files.below(request.input))
    for path in (path for path in paths if path.name.endswith(".trans.txt")):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"transcripts cannot be read ({error})", path, "get them anew, or remove them") from error
        texts |= dict(line.split(maxsplit=1) for line in lines if " " in line.strip())
    paths = [path for path in paths if path.suffix == ".flac"]
    return _each(functools.partial(_librispeech_utterance, texts=texts), paths, request)


def _librispeech_utterance(path: pathlib.Path, texts: dict[str, str]) -> list[Entry]:
    subset, speaker = path.parents[2].name, path.parents[1].name
    split = _split_of(subset)
    if split is None:
        raise UserError(f"subset neither train, dev nor test ({subset})", path, "expected SUBSET/SPEAKER/CHAPTER/FILE")
    return _whole(Recording(path.stem, path, speaker, split=split, text=texts.get(path.stem, "")))


def _split_of(name: str) -> str | None:
    """What a corpus's own name of a split comes to, None for none of ours."""
    ours = {"train": "train", "dev": "validation", "valid": "validation", "test": "test"}
    return next((split for prefix, split in ours.items() if name.startswith(prefix)), None)


def _maestro(request: Request) -> Found:
    """MAESTRO (Hawthorne et al., 2019, arXiv 1810.12247), by its CSV, whose splits keep a composition on one side.

    Who plays is not told, so `speaker` is empty; the composer is in the notes, with title, year and MIDI file.
    """
    tables = [request.input] if request.input.is_file() else sorted(request.input.glob("maestro*.csv"))
    if len(tables) != 1:
        raise UserError(f"{len(tables)} files maestro*.csv", request.input, "give the CSV itself or its folder")
    try:
        with open(tables[0], newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            rows, columns = list(reader), reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"not a CSV file in UTF-8 ({error})", tables[0], "give MAESTRO's own CSV") from error
    if missing := set(MAESTRO_COLUMNS) - set(columns):
        raise UserError(f"no column {min(missing)}", tables[0], "give MAESTRO's own CSV")
    return _each(functools.partial(_maestro_performance, folder=tables[0].parent), rows, request)


def _maestro_performance(row: dict[str, str], folder: pathlib.Path) -> list[Entry]:
    path, name = folder / row["audio_filename"], pathlib.PurePath(row["audio_filename"])
    for column, value in (("split", row["split"]), ("audio_filename", name.name)):
        if not value:
            raise UserError(f"row without {column}", path, "give MAESTRO's own CSV")
    notes = {
        "composer": row["canonical_composer"],
        "title": row["canonical_title"],
        "year": row["year"],
        "midi": str(folder / row["midi_filename"]),
    }
    recording = Recording(name.with_suffix("").as_posix(), path, split=row["split"])
    return [Entry(entry.recording, notes) for entry in _whole(recording)]


def _tfds(request: Request) -> Found:
    """A dataset that TFDS has prepared, with an `audio` feature: its samples as files in OUTPUT_STEM.audio.

    Its splits stay; where none is for validation, those of `train` are told by the hash. TFDS needs TensorFlow for
    this feature.
    """
    if not (request.input / "dataset_info.json").is_file():
        raise UserError("no dataset of TFDS", request.input, "give the folder with dataset_info.json, of one version")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(request.input)
    except Exception as error:  # Whatever TFDS and its parsers of JSON raise.
        raise UserError(f"dataset's description is damaged ({error})", request.input, "prepare it anew") from error
    feature = dict(builder.info.features.items()).get("audio")
    if not isinstance(feature, tfds.features.Audio) or not feature.sample_rate:
        raise UserError("no `audio` feature with a sample rate", request.input, "give a dataset of recordings")
    folder = request.output.with_suffix(".audio")
    files.refuse_existing(folder)
    count = sum(split.num_examples for split in builder.info.splits.values())
    return count, _tfds_entries(builder, feature.sample_rate, folder)


def _tfds_entries(builder, sample_rate: int, folder: pathlib.Path) -> Iterator[Outcome]:
    has_validation = "validation" in map(_split_of, builder.info.splits)
    with files.new_folder(folder) as scratch:
        for name in builder.info.splits:
            split = _split_of(name) or name
            for index, example in enumerate(_tfds_examples(builder, name)):
                stem = f"{name}-{index:08}"
                try:
                    path = audio.write_lossless(scratch / stem, np.asarray(example["audio"]), sample_rate)
                    seconds = audio.duration(path)
                    audio.check(path)
                except UserError as error:
                    yield UserError(error.what, f"{builder.data_path} example {index} of {name}", error.what_to_do)
                    continue
                texts = {key: _tfds_text(builder.info.features[key], example[key]) for key in example if key != "audio"}
                recording = Recording(
                    id=texts.get("id", stem),
                    path=folder / path.name,
                    speaker=texts.get("speaker", texts.get("speaker_id", "")),
                    split="" if split == "train" and not has_validation else split,
                    text=texts.get("text", ""),
                    known_seconds=seconds,
                )
                yield [Entry(recording)]
    if not any(folder.iterdir()):
        folder.rmdir()


def _tfds_examples(builder, split: str) -> Iterable[dict[str, Any]]:
    import tensorflow_datasets as tfds

    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return builder.as_data_source(split=split)
    return tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))


def _tfds_text(feature, value: Any) -> str:
    """A feature's value in words; "" for anything but words and numbers."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value))
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return str(value) if np.ndim(value) == 0 else ""


SOURCES: dict[str, Callable[[Request], Found]] = {
    "librilight": _librilight,
    "librispeech": _librispeech,
    "maestro": _maestro,
    "folder": _folder,
    "tfds": _tfds,
}
