"""Judges that say what can be worked out by hand, in the place of packages."""

import hashlib

import numpy as np

from audiolm_jax.evaluation import quality, recognizers, speakers, transcribers
from audiolm_jax.evaluation.adapters import Adapter

WORDS = ("one", "two", "three", "four", "five", "six", "seven")


def words(wave_W):
    """A transcript that depends on the samples."""
    digest = hashlib.sha256(np.asarray(wave_W, np.float32).tobytes()).digest()
    return " ".join(WORDS[byte % len(WORDS)] for byte in digest[:5])


def voice(wave_W):
    """Energy in eight bands."""
    return np.array([np.sum(np.square(band)) for band in np.array_split(np.abs(np.fft.rfft(wave_W)), 8)])


def level(wave_W):
    return float(np.sqrt(np.mean(np.square(wave_W))))


def notes(wave_W):
    """A note every tenth of a second, its pitch told by the loudest frequency there."""
    pieces = np.array_split(wave_W, max(1, len(wave_W) // 1600))
    pitches = [40 + int(np.argmax(np.abs(np.fft.rfft(piece)))) % 36 for piece in pieces]
    return np.array([[0.1 * index, 0.1 * index + 0.08, pitch] for index, pitch in enumerate(pitches)])


def install(monkeypatch):
    """Makes them the only judges."""
    for module, name, title, function in (
        (recognizers, "RECOGNIZERS", "ear", words),
        (speakers, "EMBEDDERS", "bands", voice),
        (quality, "QUALITY", "level", level),
        (transcribers, "TRANSCRIBERS", "grid", notes),
    ):
        nothing = {"ear": "", "grid": transcribers.NO_NOTES}.get(title)
        adapter = Adapter(title, 16_000, lambda function=function: function, (), nothing=nothing)
        registry = getattr(module, name)
        for other in list(registry):
            monkeypatch.delitem(registry, other)
        monkeypatch.setitem(registry, title, adapter)
