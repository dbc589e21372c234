"""Which phone is said when: alignment tables, and the ABX items and frame labels that follow from them.

A table is a TSV file with a header: `path`, `onset`, `offset`, `phone` and optionally `speaker`. `path` is the
recording's, from the table's folder on; times are seconds; speakers are the first sub-folder where there is no column.

Shape suffix T: frames.
"""

import csv
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from audiolm_jax import audio
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation.items import Item, Items, read_items

TABLE = "alignment.tsv"
COLUMNS = ("path", "onset", "offset", "phone")
SILENCES = frozenset({"", "sil", "sp", "spn", "nsn", "+spn+", "+nsn+", "<sil>", "<eps>", "#"})
# Phones farther apart than this are not neighbours.
MAX_GAP_SECONDS = 0.005


@dataclasses.dataclass(frozen=True)
class Segment:
    """One phone in one recording: `file` is its path without extension, times are seconds."""

    file: str
    onset: float
    offset: float
    phone: str
    speaker: str

    @property
    def is_silence(self) -> bool:
        return self.phone.lower() in SILENCES


@dataclasses.dataclass(frozen=True)
class Material:
    """What the suite `abx` works on.

    Attributes:
      items: for ABX.
      segments: of each file, sorted by onset; none where there is no alignment.
      paths: of the recordings of items and segments.
    """

    items: Items
    segments: dict[str, list[Segment]]
    paths: dict[str, pathlib.Path]


def read_alignment(path: str | pathlib.Path) -> list[Segment]:
    """Reads an alignment table, sorted by file and onset.

    Raises:
      UserError: a missing column, a line that is not of that form, or no phones.
    """
    path = pathlib.Path(path)
    try:
        # Whoever wrote it with a spreadsheet may have given it a byte order mark.
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise UserError(f"no column {missing[0]}", path, f"begin with a header: {' '.join(COLUMNS)}, by tabs")
            segments = [_segment(row, f"{path} line {number}") for number, row in enumerate(rows, 2)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"alignment cannot be read ({error})", path, "write it in UTF-8, separated by tabs") from error
    if not segments:
        raise UserError("no phones", path, "write a phone a line")
    return sorted(segments, key=lambda segment: (segment.file, segment.onset))


def _segment(row: dict[str, str], where: str) -> Segment:
    try:
        onset, offset = float(row["onset"]), float(row["offset"])
        file = pathlib.PurePosixPath(row["path"])
        first_folder = file.parts[0] if len(file.parts) > 1 else file.stem
        speaker = row.get("speaker") or first_folder
        phone = row["phone"].strip()
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError("not a phone", where, f"give {', '.join(COLUMNS)}, separated by tabs") from error
    if not 0 <= onset <= offset < float("inf"):
        raise UserError("onset and offset are not a stretch of time", where, "mend the times")
    return Segment(file.with_suffix("").as_posix(), onset, offset, phone, speaker)


def triphones(segments: Sequence[Segment]) -> list[Item]:
    """An item for each phone between two others, none of them silence, from the first's onset to the last's offset.

    Args:
      segments: sorted by file and onset.
    """
    items = []
    for before, middle, after in zip(segments, segments[1:], segments[2:]):
        neighbours = all(
            left.file == right.file and abs(right.onset - left.offset) <= MAX_GAP_SECONDS
            for left, right in ((before, middle), (middle, after))
        )
        if neighbours and not (before.is_silence or middle.is_silence or after.is_silence):
            times, names = (before.onset, after.offset), (middle.phone, before.phone, after.phone)
            items.append(Item(middle.file, *times, *names, middle.speaker))
    return items


def frame_phones(segments: Sequence[Segment], frame_rate: float, num_frames: int) -> list[str | None]:
    """The phone at the middle of each frame of a recording, (t + 1/2) / frame_rate; None between phones."""
    onsets = np.array([segment.onset for segment in segments])
    times_T = (np.arange(num_frames) + 0.5) / frame_rate
    index_T = np.searchsorted(onsets, times_T, side="right") - 1
    return [
        segments[index].phone if index >= 0 and time < segments[index].offset else None
        for index, time in zip(index_T, times_T)
    ]


def read_material(data: str | pathlib.Path) -> Material:
    """Reads an item file, an alignment table, or a folder that holds one of each or either.

    An item file's names are stems of recordings anywhere in its folder. Without one, the table's triphones are items.

    Raises:
      UserError: nothing of the kind there, a malformed file, no items, or a recording that is missing or ambiguous.
    """
    data = pathlib.Path(data)
    table, item_file = _sources(data)
    segments = read_alignment(table) if table else []
    if item_file:
        items = read_items(item_file)
    else:
        items = Items.of(triphones(segments))
        if not len(items):
            raise UserError("no three phones follow each other", data, "give an alignment without gaps")
    by_file = {file: list(group) for file, group in itertools.groupby(segments, lambda segment: segment.file)}
    folder = data if data.is_dir() else data.parent
    by_path, by_stem = _recordings(folder)
    paths = {}
    for file in dict.fromkeys((*items.files, *by_file)):
        found = by_path.get(file) or by_stem.get(file, [])
        if len(found) != 1:
            what = "recording is not there" if not found else f"{len(found)} recordings of that name"
            raise UserError(what, f"{file} in {folder}", "put it below the item file or table, under a unique name")
        paths[file] = found[0]
    return Material(items, by_file, paths)


def _sources(data: pathlib.Path) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """The alignment table and the item file."""
    advice = f"give an .item file, an alignment .tsv, or a folder with one .item or {TABLE}"
    if data.is_file() and data.suffix == ".item":
        return None, data
    if data.is_file() and data.suffix == ".tsv":
        return data, None
    if not data.is_dir():
        raise UserError("no items", data, advice)
    item_files, table = sorted(data.glob("*.item")), data / TABLE
    if len(item_files) > 1 or not (item_files or table.is_file()):
        raise UserError(f"{len(item_files)} item files" if item_files else "no items", data, advice)
    return table if table.is_file() else None, item_files[0] if item_files else None


def _recordings(folder: pathlib.Path) -> tuple[dict[str, list[pathlib.Path]], dict[str, list[pathlib.Path]]]:
    """Recordings below a folder, by path without extension, and by stem."""
    by_path: dict[str, list[pathlib.Path]] = {}
    by_stem: dict[str, list[pathlib.Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in audio.EXTENSIONS:
            by_path.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
            by_stem.setdefault(path.stem, []).append(path)
    return by_path, by_stem
