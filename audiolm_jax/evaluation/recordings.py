"""The recordings that a suite measures, and the batches in which a model continues them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from audiolm_jax.data import manifest
from audiolm_jax.data.manifest import Recording
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation.journal import Journal
from audiolm_jax.generate import AudioLM
from audiolm_jax.progress import items_bar, report

# Waveforms that are generated at once.
BATCH_ROWS = 16


def of_length(
    data: str, split: str | None, shortest: float, longest: float = math.inf
) -> tuple[list[Recording], list[str]]:
    """The recordings that can be read and last from `shortest` to `longest` seconds, and notes on the others.

    Raises:
      UserError: there are none.
    """
    chosen = manifest.of_split(manifest.read_manifest(data), split)
    usable, seconds = manifest.usable(chosen, report)
    kept = [one for one, length in zip(usable, seconds, strict=True) if shortest <= length <= longest]
    if not kept:
        lengths = f"they last {min(seconds):.2f} to {max(seconds):.2f} s"
        wanted = f"none lasts {shortest:g} to {longest:g} s" if longest < math.inf else f"none lasts {shortest:g} s"
        raise UserError(f"no recording fits: {wanted}", f"{data} ({lengths})", "see --min_seconds and --max_seconds")
    notes = []
    if unread := len(chosen) - len(usable):
        notes.append(f"{unread} of {len(chosen)} recordings could not be read and were left out")
    if unfit := len(usable) - len(kept):
        limits = f"{shortest:g} s" + (f" or longer than {longest:g} s" if longest < math.inf else "")
        notes.append(f"{unfit} of {len(chosen)} recordings are shorter than {limits} and were left out")
    return kept, notes


def check_prompt(model: AudioLM, prompt_seconds: float, seconds: float):
    """Raises a UserError where a prompt cannot be continued by so many seconds.

    It is shorter than a token, or leaves no room in a stage's training crop, or nothing is to follow.
    """
    if not 0 < seconds < math.inf:
        raise UserError("no length of new audio", f"--seconds={seconds:g}", "give more than 0")
    where = f"--prompt_seconds={prompt_seconds:g}"
    shortest = 1 / model.stages["coarse"].stage.semantic_rate
    if not shortest <= prompt_seconds < math.inf:
        raise UserError("prompt shorter than a token", where, f"give at least {shortest:g}")
    for name in ("semantic", "coarse"):
        if name in model.stages and prompt_seconds >= (window := model.stages[name].stage.crop_seconds):
            what = f"prompt longer than the model's window: the {name} stage sees {window:g} s"
            raise UserError(what, where, f"give less than {window:g}")


def measure_in_batches(
    journal: Journal,
    key: str,
    found: Sequence[Recording],
    sample_rate: int,
    num_samples: int,
    measure: Callable[[Sequence[Recording], Sequence[np.ndarray]], Sequence[Any]],
) -> dict[str, Any]:
    """What `measure` says of each recording that can be read, by its id; once a batch.

    Args:
      journal: keeps what was measured.
      key: what is measured, one of a kind in the suite.
      found: recordings.
      sample_rate: Hz at which they are read.
      num_samples: waveforms that are generated for each.
      measure: (recordings, their waveforms) -> what the journal can keep of each.

    Raises:
      UserError: no recording can be read.
    """
    size = max(1, BATCH_ROWS // num_samples)
    measured: dict[str, Any] = {}
    with items_bar(key, len(found)) as progress:
        for first in range(0, len(found), size):
            batch = found[first : first + size]
            run = functools.partial(_measure_batch, batch, sample_rate, measure)
            kept, errors = journal.once(f"{key} {first} {size}", run)
            for error in errors:
                report(f"left out: {error}")
            measured |= kept
            progress.update(len(batch))
    if not measured:
        raise UserError("no recording could be read", key, "see the lines above")
    return measured


def _measure_batch(batch: Sequence[Recording], sample_rate: int, measure) -> list[Any]:
    """What was measured, by id, and what is wrong with those that cannot be read."""
    read = list(zip(batch, manifest.in_threads(lambda one: one.read(sample_rate), batch), strict=True))
    errors = [str(wave) for _, wave in read if isinstance(wave, UserError)]
    readable = [(one, wave) for one, wave in read if not isinstance(wave, UserError)]
    if not readable:
        return [{}, errors]
    kept, waves = zip(*readable, strict=True)
    return [{one.id: what for one, what in zip(kept, measure(kept, waves), strict=True)}, errors]


def stacked(waves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Waveforms of several lengths as [B, W], zeros behind the shorter ones, and their lengths."""
    lengths_B = np.array([len(wave_W) for wave_W in waves])
    return np.stack([np.pad(wave_W, (0, lengths_B.max() - len(wave_W))) for wave_W in waves]), lengths_B


def read_or_none(recording: Recording, sample_rate: int) -> np.ndarray | None:
    """One that serves as another's floor; None where it cannot be read: that is reported where its own turn comes."""
    try:
        return recording.read(sample_rate)
    except UserError:
        return None
