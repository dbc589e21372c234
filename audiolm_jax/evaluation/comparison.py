"""`audiolm compare`: runs side by side, generated audio to be heard, measured figures to be read."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from audiolm_jax import audio, files
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation.report import GENERATED, ORIGINAL, Clip, Group, Table, render, with_details
from audiolm_jax.evaluation.statistics import Estimate, shown
from audiolm_jax.progress import report

Entry = dict[str, Any]
QUICKSTART_AUDIO = ("continuations", "acoustic", "unconditional")
# What `generation.json` says of a file, as far as it is needed here.
FIELDS: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "mode": (str,),
    "prompt": (str, type(None)),
    "prompt_seconds": (int, float),
    "seconds": (int, float),
    "ended": (bool,),
    "sample_rate": (int,),
}
RUNS = "folders that `audiolm generate`, `audiolm evaluate` or `audiolm quickstart` wrote"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What was continued: a recording, or stretches of it joined."""

    path: str
    stretches: tuple[audio.Stretch, ...]

    def title(self) -> str:
        """The path, and from where to where in seconds unless it is the whole."""
        if self.stretches == (audio.WHOLE,):
            return self.path
        spans = (f"{start:g}–{'' if end is None else f'{end:g}'}" for start, end in self.stretches)
        return f"{self.path}, {', '.join(spans)} s"


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder to compare.

    Attributes:
      path: as it was given.
      entries: what was generated, each with its samples, `wave_W`; None of an evaluation.
      results: its results.json: of an evaluation, or of a quickstart, which has `entries` too.
    """

    path: str
    entries: Sequence[Entry] | None
    results: Mapping[str, Any] | None


def compare(runs: Sequence[str], output: str):
    """Writes `report.html` about runs into the new folder `output`.

    Of generated audio, each prompt goes with the recording that it was cut from, as far as the longest of its
    continuations. Of evaluations, each metric is shown with its intervals.

    Raises:
      UserError: a folder that is no run or lacks what it lists, evaluations and generated audio together, evaluations
        without a metric in common, an output that exists.
    """
    files.refuse_existing(output)
    found = [_read(run) for run in dict.fromkeys(runs)]
    for run in found:
        if run.entries is not None and not run.entries:
            raise UserError("no generated audio", run.path, f"give {RUNS}")
    evaluations = [run for run in found if run.entries is None]
    if evaluations and len(evaluations) < len(found):
        what = f"an evaluation ({evaluations[0].path}) cannot be compared with generated audio"
        audible = next(run.path for run in found if run.entries is not None)
        raise UserError(what, audible, "give folders of one kind")
    page = _page_of_figures(evaluations) if evaluations else _page_of_audio(found)
    with files.new_folder(output) as scratch:
        files.write_text(scratch / "report.html", page)
    print(f"report: {output}/report.html")


def _read(path: str) -> Run:
    folder = pathlib.Path(path)
    if (folder / "generation.json").is_file():
        return Run(path, _generated(folder), None)
    try:
        results = json.loads((folder / "results.json").read_text())
        if "suite" in results:
            _estimates(results)
            return Run(path, None, results)
        if "generation" in results:
            entries = [entry for name in QUICKSTART_AUDIO for entry in _generated(folder / name)]
            return Run(path, entries, results)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("nothing to compare", path, f"give {RUNS}") from error
    raise UserError("nothing to compare", path, f"give {RUNS}")


# --- generated audio


def _generated(folder: pathlib.Path) -> list[Entry]:
    """What `generation.json` says of each file, with its samples, `wave_W`."""
    try:
        entries = [_checked(entry) for entry in json.loads((folder / "generation.json").read_text())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("no generated audio", folder, f"give {RUNS}") from error
    return [
        {**entry, "path": str(path), "wave_W": audio.read(path, entry["sample_rate"])}
        for entry in entries
        for path in [folder / entry["path"]]
    ]


def _checked(entry: Any) -> Entry:
    """It, where all that is needed is there and of the right type; another exception than UserError otherwise."""
    given = entry.get("prompt_stretches", [audio.WHOLE])
    stretches = [(float(start), None if end is None else float(end)) for start, end in given]
    if not all(isinstance(entry[name], kinds) for name, kinds in FIELDS.items()) or entry["sample_rate"] < 1:
        raise ValueError
    return {**entry, "prompt_stretches": stretches}


def _page_of_audio(runs: Sequence[Run]) -> str:
    entries = [entry for run in runs for entry in run.entries or ()]
    prompts = _by_recording(entries)
    tables = [_audio_table(entries)]
    if measured := {run.path: _flat(run.results) for run in runs if run.results is not None}:
        tables.insert(0, _quickstart_table(measured))
    page = render(
        "Generated audio, side by side",
        f"{len(runs)} runs, {len(prompts)} prompts, {len(entries)} files.",
        tables,
        [],
        [_group(prompt, found) for prompt, found in prompts.items()],
    )
    settings = {entry["path"]: {name: entry.get(name) for name in ("seed", "settings")} for entry in entries}
    return with_details(page, {"Seeds and settings": settings})


def _by_recording(entries: Sequence[Entry]) -> dict[Prompt | None, list[Entry]]:
    """Entries by their prompt; a recording that lies in two places is one prompt, named as it was first."""
    names: dict[str, str] = {}
    found: dict[Prompt | None, list[Entry]] = {}
    for entry in entries:
        path, prompt = entry["prompt"], None
        if path is not None:
            if pathlib.Path(path).is_file():
                path = names.setdefault(files.sha256(path), path)
            prompt = Prompt(path, tuple(entry["prompt_stretches"]))
        found.setdefault(prompt, []).append(entry)
    return found


def _group(prompt: Prompt | None, entries: Sequence[Entry]) -> Group:
    clips = [
        Clip(entry["path"], entry["wave_W"], entry["sample_rate"], entry["prompt_seconds"] or None, GENERATED)
        for entry in entries
    ]
    if prompt is None:
        return Group("Unconditional", "", clips)
    rate, seconds = entries[0]["sample_rate"], max(entry["seconds"] for entry in entries)
    heard_W = audio.read_joined(prompt.path, rate, prompt.stretches)[: round(seconds * rate)]
    return Group(prompt.title(), "", [Clip("The recording", heard_W, rate, kind=ORIGINAL), *clips])


def _audio_table(entries: Sequence[Entry]) -> Table:
    rows = []
    for entry in entries:
        new_W = entry["wave_W"][round(entry["prompt_seconds"] * entry["sample_rate"]) :]
        level = math.sqrt(float(np.mean(np.square(new_W)))) if len(new_W) else 0.0
        ended = "yes" if entry["ended"] else "no"
        decibels = f"{20 * math.log10(max(level, 1e-9)):.1f} dB"
        rows.append([entry["path"], entry["mode"], f"{entry['seconds']:.2f}", ended, decibels])
    return Table("Generated", ["file", "mode", "seconds", "ended", "level of the new audio"], rows)


def _quickstart_table(measured: Mapping[str, Mapping[str, float]]) -> Table:
    names = dict.fromkeys(name for figures in measured.values() for name in figures)
    rows = [[name, *(_digits(figures.get(name)) for figures in measured.values())] for name in names]
    return Table("Measured by quickstart on held-out lines", ["figure", *measured], rows, "Without intervals.")


def _flat(results: Any, prefix: str = "") -> dict[str, float]:
    """The figures of a quickstart by their names, joined by dots; those of single files are left out."""
    found: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, dict) and name != "generation":
            found.update(_flat(value, f"{prefix}{name}."))
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = value
    return found


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


# --- evaluations


def _estimates(results: Mapping[str, Any]) -> dict[str, Estimate]:
    """Those of a results.json, or another exception than UserError where it is damaged."""
    if not all(isinstance(value, int | float) for found in results["metrics"].values() for value in found.values()):
        raise ValueError
    return {name: Estimate(**found) for name, found in results["metrics"].items()}


def _page_of_figures(runs: Sequence[Run]) -> str:
    results = {run.path: run.results or {} for run in runs}
    metrics = {path: _estimates(found) for path, found in results.items()}
    if not set.intersection(*(set(found) for found in metrics.values())):
        suites = ", ".join(dict.fromkeys(str(found["suite"]) for found in results.values()))
        what = f"no metric in common (suites: {suites})"
        raise UserError(what, runs[-1].path, "compare runs of one suite")
    warnings = _differences(results)
    for warning in warnings:
        report(f"warning: {warning}")
    notes = [f"{path}: {note}" for path, found in results.items() for note in found.get("notes") or ()]
    page = render(
        "Evaluations, side by side",
        f"{len(runs)} runs.",
        [_figures_table(metrics)],
        [],
        [],
        notes=[*(f"Warning: {warning}" for warning in warnings), *notes],
    )
    details = {path: {name: found[name] for name in found if name != "metrics"} for path, found in results.items()}
    return with_details(page, details)


def _differences(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What of the runs should be alike, for their metrics to be compared, and is not."""
    warnings = []
    for field, title in (("suite", "suites"), ("seed", "seeds"), ("data_fingerprint", "data")):
        values = {path: str(found.get(field)) for path, found in results.items()}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{value} in {path}" for path, value in values.items())
            warnings.append(f"the {title} differ: {told}")
    return warnings


def _figures_table(metrics: Mapping[str, Mapping[str, Estimate]]) -> Table:
    names = dict.fromkeys(name for found in metrics.values() for name in found)
    first, *others = metrics.values()
    rows = [
        [name, shown(first.get(name), 4), *(_beside(first.get(name), other.get(name)) for other in others)]
        for name in names
    ]
    note = (
        "Values with their 95 % intervals. Higher and lower, ▲ and ▼: the interval does not meet the first run's, so "
        "the two differ. Where intervals meet, as they may where two runs differ after all, nothing is said."
    )
    return Table("Metrics", ["metric", *metrics], rows, note)


def _beside(first: Estimate | None, other: Estimate | None) -> str:
    """A figure, and which way it differs from the first run's."""
    text = shown(other, 4)
    if first is None or other is None or (first.low <= other.high and other.low <= first.high):
        return text
    return f"{text} ▲ higher" if other.value > first.value else f"{text} ▼ lower"
