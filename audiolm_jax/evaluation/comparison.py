"""`audiolm compare`: what several runs of `audiolm generate` made of the same prompts, side by side to be heard."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from audiolm_jax import audio, files
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation.report import Clip, Group, Table, render

Entry = dict[str, Any]


def compare(runs: Sequence[str], output: str):
    """Writes `report.html` about folders of `audiolm generate` into the new folder `output`.

    With every prompt goes the recording that it was cut from, as far as the longest of its continuations.

    Raises:
      UserError: a folder without generated audio, an output that exists.
    """
    files.refuse_existing(output)
    entries = [entry for run in dict.fromkeys(runs) for entry in _read(pathlib.Path(run))]
    prompts = dict.fromkeys(entry["prompt"] for entry in entries)
    page = render(
        "Generated audio, side by side",
        f"{len(set(runs))} runs, {len(prompts)} prompts, {len(entries)} files.",
        [_table(entries)],
        [],
        [_group(prompt, [entry for entry in entries if entry["prompt"] == prompt]) for prompt in prompts],
    )
    with files.new_folder(output) as scratch:
        (scratch / "report.html").write_text(page)
    print(f"report: {output}/report.html")


def _read(run: pathlib.Path) -> list[Entry]:
    """What `generation.json` says of each file, with its samples, `wave_W`."""
    try:
        entries = json.loads((run / "generation.json").read_text())
        rates = [entry["sample_rate"] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("no generated audio", run, "give folders that `audiolm generate` wrote") from error
    return [
        {**entry, "path": str(run / entry["path"]), "wave_W": audio.read(run / entry["path"], rate)}
        for entry, rate in zip(entries, rates, strict=True)
    ]


def _group(prompt: str | None, entries: Sequence[Entry]) -> Group:
    clips = [
        Clip(entry["path"], entry["wave_W"], entry["sample_rate"], entry["prompt_seconds"] or None) for entry in entries
    ]
    if prompt is None:
        return Group("Unconditional", "", clips)
    rate, seconds = entries[0]["sample_rate"], max(entry["seconds"] for entry in entries)
    return Group(prompt, "", [Clip("The recording", audio.read(prompt, rate, end=seconds), rate), *clips])


def _table(entries: Sequence[Entry]) -> Table:
    rows = []
    for entry in entries:
        new_W = entry["wave_W"][round(entry["prompt_seconds"] * entry["sample_rate"]) :]
        level = math.sqrt(float(np.mean(np.square(new_W)))) if len(new_W) else 0.0
        ended = "yes" if entry["ended"] else "no"
        decibels = f"{20 * math.log10(max(level, 1e-9)):.1f} dB"
        rows.append([entry["path"], entry["mode"], f"{entry['seconds']:.2f}", ended, decibels])
    return Table("Generated", ["file", "mode", "seconds", "ended", "level of the new audio"], rows)
