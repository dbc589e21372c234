"""What an ABX test compares: phones in context, as Libri-Light's item files list them (arXiv 1912.07875 §4).

Shape suffix I: items.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from audiolm_jax.errors import UserError

HEADER = "#file onset offset #phone prev-phone next-phone speaker"


@dataclasses.dataclass(frozen=True)
class Item:
    """One token of a phone with its neighbours.

    Attributes:
      file: stem of the recording.
      onset, offset: seconds; of the whole triphone, neighbours included, where the test is on triphones.
      phone: in the middle.
      previous, following: its neighbours, the context.
      speaker: who speaks.
    """

    file: str
    onset: float
    offset: float
    phone: str
    previous: str
    following: str
    speaker: str


@dataclasses.dataclass(frozen=True)
class Items:
    """Items as columns of numbers, in the order given.

    Attributes:
      files, phones, contexts, speakers: names; the columns hold indices into them.
      file_I, phone_I, context_I, speaker_I: int.
      onset_I, offset_I: seconds.
    """

    files: Sequence[str]
    phones: Sequence[str]
    contexts: Sequence[tuple[str, str]]
    speakers: Sequence[str]
    file_I: np.ndarray
    phone_I: np.ndarray
    context_I: np.ndarray
    speaker_I: np.ndarray
    onset_I: np.ndarray
    offset_I: np.ndarray

    def __len__(self) -> int:
        return len(self.file_I)

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Items":
        """Numbers the names in the order of their first occurrence."""
        items = list(items)
        files, file_I = _numbered([item.file for item in items])
        phones, phone_I = _numbered([item.phone for item in items])
        contexts, context_I = _numbered([(item.previous, item.following) for item in items])
        speakers, speaker_I = _numbered([item.speaker for item in items])
        onset_I, offset_I = (np.array([getattr(item, name) for item in items], float) for name in ("onset", "offset"))
        return cls(
            files, phones, contexts, speakers, file_I, phone_I, context_I, speaker_I, onset_I=onset_I, offset_I=offset_I
        )

    def frames(self, frame_rate: float, num_frames_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First frame of each item, and the one past its last, as Libri-Light's `eval_ABX.py` counts.

        Frame t stands for the time (t + 1/2) / frame_rate. An item's frames are those from its onset on whose
        successor is not past its offset: a frame fewer than lie within. Where none is left, first = last.

        Args:
          frame_rate: frames a second, the inverse of `feature_size`.
          num_frames_I: frames of the recording that each item is in.
        """
        first_I = np.maximum(0, np.ceil(self.onset_I * frame_rate - 0.5)).astype(np.int64)
        last_I = np.minimum(num_frames_I, np.floor(self.offset_I * frame_rate - 0.5)).astype(np.int64)
        return first_I, np.maximum(first_I, last_I)


def _numbered(values: Sequence) -> tuple[list, np.ndarray]:
    """The different values, and the index of each."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return list(numbers), np.array([numbers[value] for value in values], np.int64)


def read_items(path: str | pathlib.Path) -> Items:
    """Reads an item file: a header, or none, then `file onset offset phone previous following speaker` a line.

    Raises:
      UserError: a line that is not of that form, or no items.
    """
    path = pathlib.Path(path)
    items = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError("item file not in UTF-8", path, "write it in UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            file, onset, offset, phone, previous, following, speaker = line.split()
            items.append(Item(file, float(onset), float(offset), phone, previous, following, speaker))
        except ValueError as error:
            if number == 1:  # The header.
                continue
            raise UserError("not an item", f"{path} line {number}", f"write {HEADER}") from error
        if not 0 <= items[-1].onset <= items[-1].offset < math.inf:
            raise UserError("onset and offset are not a stretch of time", f"{path} line {number}", "mend the times")
    if not items:
        raise UserError("no items", path, f"write a header, {HEADER}, and an item a line")
    return Items.of(items)


def write_items(path: str | pathlib.Path, items: Iterable[Item]):
    """Writes an item file."""
    lines = [HEADER]
    for item in items:
        times = f"{item.onset:.4f} {item.offset:.4f}"
        lines.append(f"{item.file} {times} {item.phone} {item.previous} {item.following} {item.speaker}")
    pathlib.Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
