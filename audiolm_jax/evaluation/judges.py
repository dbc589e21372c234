"""Judges of a reconstruction: each takes a recording and what became of it, and gives a score.

Two are ours; the others are packages of the extra `eval`, and whoever lacks one is told so.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence

import jax
import numpy as np

from audiolm_jax import audio
from audiolm_jax.codec import losses
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation.adapters import EXTRA, missing_modules


@dataclasses.dataclass(frozen=True)
class Judge:
    """A measure of how near a reconstruction is to its recording.

    Attributes:
      title: for people, with the unit.
      compare: (reference_W, other_W, sample_rate) -> score; None where the judge has nothing to go by (silence, too
        short a piece). Both have the same length.
      sample_rate: that `compare` wants; None takes any.
      package: Python module that it needs; None for ours.
    """

    title: str
    compare: Callable[[np.ndarray, np.ndarray, int], float | None]
    sample_rate: int | None = None
    package: str | None = None

    def missing(self) -> str | None:
        """Why it cannot judge here; None where it can."""
        return missing_modules([] if self.package is None else [self.package], EXTRA)

    def score(self, reference_W: np.ndarray, other_W: np.ndarray, sample_rate: int) -> float | None:
        """Compares at the judge's own rate; None where it has nothing to go by, digital silence on either side too."""
        if not (reference_W.any() and other_W.any()):
            return None
        rate = self.sample_rate or sample_rate
        reference_W, other_W = (audio.resample(wave_W, sample_rate, rate) for wave_W in (reference_W, other_W))
        return self.compare(reference_W, other_W, rate)


def si_sdr(reference_W: np.ndarray, other_W: np.ndarray, sample_rate: int) -> float:
    """Scale-invariant signal-to-distortion ratio in dB; see `losses.si_sdr`."""
    del sample_rate
    return float(_si_sdr(*_padded(reference_W, other_W))[0])


def log_mel_distance(reference_W: np.ndarray, other_W: np.ndarray, sample_rate: int) -> float:
    """Mean absolute difference of log-mel spectra in nepers; see `losses.log_mel_distance`."""
    distance_BT = _log_mel_distance(*_padded(reference_W, other_W), sample_rate)
    return float(np.mean(np.asarray(distance_BT)[0, : -(-len(reference_W) // (sample_rate // 100))]))


_si_sdr = jax.jit(losses.si_sdr)
_log_mel_distance = jax.jit(losses.log_mel_distance, static_argnums=2)


def _padded(*waves: np.ndarray) -> list[np.ndarray]:
    """float32 [1, W], with zeros up to a power of two: few lengths are compiled, and neither measure notices."""
    size = 2 ** math.ceil(math.log2(len(waves[0])))
    return [np.pad(wave_W, (0, size - len(wave_W)))[None].astype(np.float32) for wave_W in waves]


def _pesq(reference_W: np.ndarray, other_W: np.ndarray, sample_rate: int) -> float | None:
    import pesq

    try:
        return float(pesq.pesq(sample_rate, reference_W, other_W, "wb"))
    except (pesq.NoUtterancesError, pesq.BufferTooShortError):
        return None


def _stoi(reference_W: np.ndarray, other_W: np.ndarray, sample_rate: int) -> float | None:
    import pystoi

    with warnings.catch_warnings():
        # Where too little is left once silence is taken out it warns and returns 1e-5; of less than a frame it fails.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi.stoi(reference_W, other_W, sample_rate))
        except (RuntimeWarning, ValueError):
            return None


def _visqol(reference_W: np.ndarray, other_W: np.ndarray, sample_rate: int) -> float | None:
    waves = (wave_W.astype(np.float64) for wave_W in (reference_W, other_W))
    try:
        return float(_visqol_api().measure_from_arrays(*waves, sample_rate).moslqo)
    except (ValueError, IndexError):
        # Less than one of its patches, half a second.
        return None


@functools.cache
def _visqol_api():
    import visqol

    api = visqol.VisqolApi()
    # Not the lattice: it wants one more package, and published figures are mostly older than it.
    api.create(mode="speech", use_lattice_model=False)
    return api


JUDGES = {
    "si_sdr": Judge("SI-SDR, dB", si_sdr),
    "log_mel_distance": Judge("log-mel distance, nepers", log_mel_distance),
    "pesq": Judge("PESQ, wide band", _pesq, 16_000, "pesq"),
    "stoi": Judge("STOI", _stoi, None, "pystoi"),
    "visqol": Judge("ViSQOL, speech", _visqol, 16_000, "visqol"),
}


def choose(names: Sequence[str]) -> tuple[dict[str, Judge], list[str]]:
    """The judges of these names, or all that are there.

    Returns:
      judges by name, and a note for each that is missing.

    Raises:
      UserError: an unknown name, or one that was asked for and is missing.
    """
    notes = []
    for name in names:
        if name not in JUDGES:
            raise UserError("unknown judge", f"--judge={name}", f"use one of {', '.join(JUDGES)}")
        if missing := JUDGES[name].missing():
            what, _, advice = missing.partition("; ")
            raise UserError(what, f"--judge={name}", advice)
    chosen = {}
    for name in dict.fromkeys(names or JUDGES):
        if missing := JUDGES[name].missing():
            notes.append(f"{JUDGES[name].title}: not measured, {missing}")
        else:
            chosen[name] = JUDGES[name]
    return chosen, notes
