"""Opus as the yardstick: recordings through Debian's `opus-tools` and back.

Suffix W: samples.
"""

import pathlib
import shutil
import subprocess
import tempfile

import numpy as np
import scipy.signal

from audiolm_jax import audio

KILOBITS = (6, 12, 24)
# Opus decodes to this rate, whatever went in.
SAMPLE_RATE = 48_000
MAX_SHIFT_SECONDS = 0.02


def missing() -> str | None:
    """Why there is no Opus here; None where there is."""
    if shutil.which("opusenc") and shutil.which("opusdec"):
        return None
    return "no opusenc and opusdec; apt-get install opus-tools brings them"


def code(wave_W: np.ndarray, sample_rate: int, kilobits: int) -> tuple[np.ndarray, float]:
    """A recording as Opus gives it back.

    Args:
      wave_W: the recording.
      sample_rate: Hz.
      kilobits: a second that the encoder is asked for; the rest of its settings are its own.

    Returns:
      float32 [W], aligned with the recording, and the kilobits a second of the packets, Ogg's pages aside.
    """
    with tempfile.TemporaryDirectory() as folder:
        original, coded, decoded = (str(pathlib.Path(folder) / name) for name in ("in.wav", "x.opus", "out.wav"))
        audio.write(original, wave_W, sample_rate)
        _run("opusenc", "--quiet", "--bitrate", str(kilobits), original, coded)
        _run("opusdec", "--quiet", "--float", "--rate", str(SAMPLE_RATE), coded, decoded)
        bits = 8 * audio_bytes(pathlib.Path(coded).read_bytes())
        back_W = audio.read(decoded, SAMPLE_RATE)
    back_W = align(audio.resample(wave_W, sample_rate, SAMPLE_RATE), back_W, round(MAX_SHIFT_SECONDS * SAMPLE_RATE))
    back_W = fit_length(audio.resample(back_W, SAMPLE_RATE, sample_rate), len(wave_W))
    return back_W, bits / 1000 / (len(wave_W) / sample_rate)


def _run(*command: str):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}: {done.stderr.strip()[-500:]}")


def align(reference_W: np.ndarray, other_W: np.ndarray, max_shift: int) -> np.ndarray:
    """`other_W`, moved by at most `max_shift` samples to where it correlates most, at the reference's length."""
    other_W = fit_length(other_W, len(reference_W))
    padded_W = np.pad(reference_W, max_shift)
    # At index max_shift the two lie as they are; at a smaller one `other_W` comes too late.
    correlation = scipy.signal.correlate(padded_W, other_W, mode="valid", method="fft")
    shift = int(np.argmax(correlation)) - max_shift if correlation.any() else 0
    return fit_length(np.pad(other_W, (max(shift, 0), 0))[max(-shift, 0) :], len(reference_W))


def fit_length(wave_W: np.ndarray, size: int) -> np.ndarray:
    """`wave_W` cut to `size` samples, or filled up with zeros."""
    return np.pad(wave_W[:size], (0, max(0, size - len(wave_W))))


def audio_bytes(ogg: bytes) -> int:
    """Bytes of the audio packets in an Ogg Opus file (RFC 3533 §6, RFC 7845 §3): all but the two headers."""
    position, packets, total = 0, 0, 0
    while position < len(ogg):
        num_segments = ogg[position + 26]
        segments = ogg[position + 27 : position + 27 + num_segments]
        for size in segments:
            total += size if packets >= 2 else 0
            # A segment that is not full ends its packet.
            packets += size < 255
        position += 27 + num_segments + sum(segments)
    return total
