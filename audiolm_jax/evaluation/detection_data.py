"""`audiolm detection-data`: what a detector of generated speech learns from and is judged by (arXiv 2209.03143 §4).

Against recordings as they are the task is trivial: it is enough to hear the codec. So generated speech stands beside
real speech that went through the same codec, of the same recording, from the end of the prompt on and as long:

OUTPUT/MODE/generated/RUN/NAME.wav   what `audiolm generate` made, without the prompt
OUTPUT/MODE/real/RUN/NAME.wav        the recording there, encoded and decoded
OUTPUT/MODE/original/RUN/NAME.wav    the recording there as it is, of held-out speakers: the control, split "control"
OUTPUT/manifest.jsonl                all of them, with speaker, split and label

Suffix W: waveform samples.
"""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from audiolm_jax import audio, bundle, files
from audiolm_jax.data import manifest
from audiolm_jax.data.manifest import Recording
from audiolm_jax.errors import UserError
from audiolm_jax.progress import report, seconds_bar

MANIFEST = "manifest.jsonl"
REAL, GENERATED, ORIGINAL = "real", "generated", "original"
CONTROL_SPLIT = "control"
MODES = ("acoustic", "continuation")
MIN_SECONDS = 1.0

Stretches = tuple[audio.Stretch, ...]


@dataclasses.dataclass(frozen=True)
class _Generated:
    """One WAV of a run of `audiolm generate`.

    Attributes:
      name: RUN/NAME.
      mode: "acoustic" or "continuation".
      path: of the WAV.
      prompt: the recording that it was prompted with, or made of.
      prompt_seconds: how long it repeats it.
      seconds: its length.
    """

    name: str
    mode: str
    path: pathlib.Path
    prompt: Recording
    prompt_seconds: float
    seconds: float


def write(runs: Sequence[str], codec: str, input_path: str, output: str):
    """Writes the new folder `output`, as balanced as can be: a pair for each generated WAV of a second or more.

    Args:
      runs: folders that `audiolm generate` wrote, of the modes acoustic and continuation.
      codec: folder of the codec that they were generated with.
      input_path: the recordings that were their prompts, with speakers; their splits become the pairs'.
      output: new folder.

    Raises:
      UserError: no runs, prompts that are not among the recordings, another sample rate, or no pair long enough.
    """
    files.refuse_existing(output)
    recordings = {_place(r.path, r.stretches()): r for r in manifest.read_manifest(input_path)}
    model = bundle.load_codec(codec)
    names = [pathlib.Path(run).resolve().name for run in runs]
    if twice := [run for run, name in zip(runs, names) if names.count(name) > 1]:
        raise UserError("two runs of one name", twice[-1], "rename one's folder")
    found = [each for run in runs for each in _read(pathlib.Path(run), recordings, model.sample_rate)]
    rows: list[Recording] = []
    with files.new_folder(output) as scratch:
        with seconds_bar("detection-data", sum(each.seconds for each in found), 1) as progress:
            for prompt, group in itertools.groupby(found, key=lambda each: each.prompt):
                original_W = prompt.read(model.sample_rate)
                real_W = np.asarray(model.decode(model.encode(original_W[None])))[0]
                for each in group:
                    rows += _write_pair(scratch, each, original_W, real_W, model.sample_rate)
                    progress.update(each.seconds)
        if not rows:
            raise UserError(f"no pair of {MIN_SECONDS:g} s or more", output, "generate from longer recordings")
        manifest.write_manifest(scratch / MANIFEST, rows, {})
    report(f"{output}: {_summary(rows)}")


def _place(path: str | os.PathLike[str], stretches: Sequence[Sequence[float | None]]) -> tuple[str, Stretches]:
    """What makes a recording the same as a prompt."""
    return os.path.realpath(path), tuple((start or 0.0, end) for start, end in stretches)


def _read(run: pathlib.Path, recordings: Mapping[tuple[str, Stretches], Recording], rate: int) -> Iterator[_Generated]:
    try:
        entries: list[dict[str, Any]] = json.loads((run / "generation.json").read_text())
        for entry in entries:
            if entry["mode"] not in MODES:
                hint = f"give runs of the modes {' and '.join(MODES)}"
                raise UserError(f"generated audio of mode {entry['mode']}", run, hint)
            if entry["sample_rate"] != rate:
                rates = f"{entry['sample_rate']} Hz, the codec's {rate} Hz"
                raise UserError(f"generated audio of another sample rate: {rates}", run, "give its own codec")
            prompt = recordings.get(_place(entry["prompt"], entry.get("prompt_stretches", [audio.WHOLE])))
            if prompt is None:
                raise UserError(f"prompt is not among the recordings: {entry['prompt']}", run, "give them as --input")
            name = f"{run.resolve().name}/{pathlib.Path(entry['path']).stem}"
            path = run / entry["path"]
            lengths = float(entry["prompt_seconds"]), float(entry["seconds"])
            yield _Generated(name, entry["mode"], path, prompt, *lengths)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("no generated audio", run, "give folders that `audiolm generate` wrote") from error


def _write_pair(
    folder: pathlib.Path, each: _Generated, original_W: np.ndarray, real_W: np.ndarray, rate: int
) -> list[Recording]:
    """Writes generated, real and, of held-out speakers, original audio of one length; nothing where that is short."""
    generated_W = audio.read(each.path, rate)
    start = round(each.prompt_seconds * rate)
    stop = min(len(original_W), len(real_W), len(generated_W))
    seconds, prompt = (stop - start) / rate, each.prompt
    if seconds < MIN_SECONDS:
        report(f"left out: {each.path}, {max(0.0, seconds):.2f} s beside its recording")
        return []
    kinds = [(GENERATED, GENERATED, prompt.split, generated_W), (REAL, REAL, prompt.split, real_W)]
    if prompt.split == "validation":
        kinds.append((ORIGINAL, REAL, CONTROL_SPLIT, original_W))
    rows = []
    for kind, label, split, wave_W in kinds:
        name = f"{each.mode}/{kind}/{each.name}"
        path = folder / f"{name}.wav"
        audio.write(path, wave_W[start:stop], rate)
        row = Recording(name, path, speaker=prompt.speaker, split=split, label=label, known_seconds=seconds)
        rows.append(row)
    return rows


def _summary(rows: Sequence[Recording]) -> str:
    generated = [row for row in rows if row.label == GENERATED]
    counts = collections.Counter(row.split for row in generated)
    seconds = sum(row.seconds() for row in generated)
    splits = ", ".join(f"{count} {split}" for split, count in sorted(counts.items()))
    return f"{len(generated)} pairs ({splits}), {seconds / 60:.1f} minutes of each"
