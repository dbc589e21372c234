"""The sets of paired recordings as they are published: ZeroSpeech 2021 (sWUGGY, sBLIMP), Spoken StoryCloze, SALMon.

docs/evaluation.md describes the folders.
"""

import collections
import csv
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from audiolm_jax import audio
from audiolm_jax.data.manifest import Recording
from audiolm_jax.errors import UserError

IN_VOCABULARY = "in_vocabulary"
DEFAULT_SPLIT = "dev"


@dataclasses.dataclass(frozen=True)
class Trial:
    """Two recordings, of which a good model finds the first the likelier.

    Attributes:
      pair: trials of one pair differ in the voice alone, and count as one.
      subsets: names of the parts of the set that the pair belongs to.
      right, wrong: the recordings; a recording's id is its name in the files of scores.
    """

    pair: str
    subsets: tuple[str, ...]
    right: Recording
    wrong: Recording


def read_swuggy(data: str, split: str | None) -> list[Trial]:
    """sWUGGY: a word and a non-word, in the same voice; in the vocabulary is a word that occurs in LibriSpeech.

    Args:
      data: folder of the data set, or of its part `lexical`, or of a split.
      split: "dev" by default, or "test".

    Raises:
      UserError: no gold.csv, one that is damaged, a recording that is missing, a pair that is not one.
    """

    def describe(row: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
        return row["id"], (IN_VOCABULARY,) if float(row["frequency"] or 0) > 0 else ()

    return _read_gold(_gold(data, "lexical", split), ("id", "voice", "frequency"), describe)


def read_sblimp(data: str, split: str | None) -> list[Trial]:
    """sBLIMP: a sentence and its ungrammatical neighbour, in the same voice; a subset for each type of error.

    As `read_swuggy`, in the part `syntactic`.
    """

    def describe(row: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
        return f"{row['type']}/{row['subtype']}/{row['id']}", (row["type"],)

    return _read_gold(_gold(data, "syntactic", split), ("id", "voice", "type", "subtype"), describe)


def _gold(data: str, part: str, split: str | None) -> pathlib.Path:
    """The gold.csv of a split."""
    folder, split = pathlib.Path(data), split or DEFAULT_SPLIT
    for place in (folder, folder / split, folder / part / split):
        if (place / "gold.csv").is_file():
            return place / "gold.csv"
    wanted = f"give the ZeroSpeech 2021 data set, with {part}/{split}/gold.csv and the recordings beside it"
    raise UserError("no gold.csv", data, wanted)


def _read_gold(
    gold: pathlib.Path, columns: Sequence[str], describe: Callable[[Mapping[str, str]], tuple[str, tuple[str, ...]]]
) -> list[Trial]:
    """The trials of a gold.csv: in each voice of a pair one recording that is correct and one that is not.

    Args:
      gold: with the columns `filename` and `correct`, and those that follow.
      columns: that must be there, too.
      describe: the pair and its subsets, by the correct recording's row; of the other row only the pair counts.
    """
    there = {path.stem: path for path in sorted(gold.parent.iterdir()) if _is_recording(path)}
    members: dict[tuple[str, str], tuple[list[Recording], list[Recording]]] = {}
    subsets: dict[str, tuple[str, ...]] = {}
    seen = set()
    for number, row in enumerate(_rows(gold, ("filename", "correct", *columns)), 2):
        where = f"{gold} line {number}"
        name = row["filename"].removesuffix(".wav")
        try:
            pair, own_subsets = describe(row)
        except ValueError as error:
            raise UserError(f"gold.csv is damaged ({error})", where, "fetch it anew") from error
        if row["correct"] not in ("0", "1"):
            raise UserError(f"gold.csv is damaged (correct is {row['correct']!r}, not 0 or 1)", where, "fetch it anew")
        if name in seen:
            raise UserError(f"gold.csv is damaged ({name} comes twice)", where, "fetch it anew")
        if name not in there:
            raise UserError("recording is missing", gold.parent / f"{name}.wav", "fetch the data set anew")
        seen.add(name)
        both = members.setdefault((pair, row["voice"]), ([], []))
        both[row["correct"] == "0"].append(Recording(name, there[name]))
        if row["correct"] == "1":
            subsets[pair] = own_subsets
    return _trials(
        (pair, f"{gold} ({pair}, voice {voice})", subsets.get(pair, ()), right, wrong)
        for (pair, voice), (right, wrong) in members.items()
    )


def _rows(gold: pathlib.Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table with a header, each with all of these columns."""
    try:
        # Whoever opened it in a spreadsheet may have given it a byte order mark.
        with open(gold, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header, rows = reader.fieldnames or (), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"gold.csv is damaged ({error})", gold, "fetch it anew") from error
    if lacking := [name for name in columns if name not in header]:
        what_to_do = "give the folder of this suite's own part, with a gold.csv of columns with commas between them"
        raise UserError(f"gold.csv lacks the column {lacking[0]}", gold, what_to_do)
    for number, row in enumerate(rows, 2):
        if any(row[name] is None for name in columns):
            raise UserError("gold.csv is damaged (a row is cut off)", f"{gold} line {number}", "fetch it anew")
    if not rows:
        raise UserError("no pairs", gold, "fetch it anew")
    return rows


def read_storycloze(data: str, split: str | None) -> list[Trial]:
    """Spoken StoryCloze (sStoryCloze and tStoryCloze): a story with its own ending and with another.

    Args:
      data: folder of NAME_correct.wav and NAME_incorrect.wav, or of such folders, which are then subsets.
      split: refused.

    Raises:
      UserError: no pairs, or a recording without its partner.
    """
    _refuse_split(split)
    members: dict[tuple[str, str], tuple[list[Recording], list[Recording]]] = {}
    for path, subset, name in _recordings(data):
        if match := re.fullmatch(r"(.*)_(correct|incorrect)", name):
            both = members.setdefault((subset, match[1]), ([], []))
            both[match[2] == "incorrect"].append(Recording(name, path))
    if not members:
        raise UserError("no pairs", data, "give a folder of NAME_correct.wav and NAME_incorrect.wav")
    return _trials(
        (pair, f"{pathlib.Path(data, pair)}_*.wav", (subset,) if subset else (), right, wrong)
        for (subset, pair), (right, wrong) in members.items()
    )


def read_salmon(data: str, split: str | None) -> list[Trial]:
    """SALMon: a recording, and one whose sound (speaker, background, room, feeling) changes or does not fit.

    Args:
      data: folder of the task's folders, or of one task: of each pair two recordings, sample_NUMBER_0.wav, the right
        one, and another that sorts behind it.
      split: refused.

    Raises:
      UserError: no pairs, or not two recordings of a number.
    """
    _refuse_split(split)
    members: dict[tuple[str, int], list[Recording]] = collections.defaultdict(list)
    for path, subset, name in _recordings(data):
        if match := re.fullmatch(r"sample_(\d+)(_.*)?", path.stem):
            members[subset or pathlib.Path(data).resolve().name, int(match[1])].append(Recording(name, path))
    if not members:
        raise UserError("no pairs", data, "give SALMon's folder: a folder a task, of sample_NUMBER_0.wav and _1.wav")
    return _trials(
        (f"{task}/{number}", f"{recordings[0].path.parent} (sample_{number})", (task,), recordings[:1], recordings[1:])
        for (task, number), recordings in sorted(members.items())
    )


def _refuse_split(split: str | None):
    if split is not None:
        raise UserError("this set has no splits", f"--split={split}", "leave it out")


def _is_recording(path: pathlib.Path) -> bool:
    """By its suffix: the sets come as WAV, and somebody may have made FLAC of them."""
    return path.suffix.lower() in audio.EXTENSIONS


def _recordings(data: str) -> list[tuple[pathlib.Path, str, str]]:
    """All recordings below a folder, by name: path, folder within it ("" for its own), and name without extension."""
    folder = pathlib.Path(data)
    if not folder.is_dir():
        raise UserError("no such folder", data, "give the folder of the data set")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if _is_recording(path))
    subset = lambda name: "" if name.parent == pathlib.Path() else name.parent.as_posix()
    return [(folder / name, subset(name), name.with_suffix("").as_posix()) for name in names]


def _trials(
    members: Iterable[tuple[str, str, tuple[str, ...], Sequence[Recording], Sequence[Recording]]],
) -> list[Trial]:
    """Of (pair, where it stands, its subsets, right recordings, wrong recordings): one each, or a UserError."""
    trials = []
    for pair, where, subsets, right, wrong in members:
        if len(right) != 1 or len(wrong) != 1:
            what = f"a pair needs a right and a wrong recording, here are {len(right)} and {len(wrong)}"
            raise UserError(what, where, "fetch the data set anew")
        trials.append(Trial(pair, subsets, right[0], wrong[0]))
    return trials
