"""Reading and writing recordings: the only place that touches audio files.

libsndfile (by `soundfile`) decodes WAV, FLAC, MP3, Ogg and more; `soxr` resamples. Waves are float32
in [−1, 1], mono. Suffix W: samples.
"""

import contextlib
import io
import pathlib
import wave
from collections.abc import Callable, Iterator

import numpy as np
import soundfile
import soxr

from audiolm_jax import files
from audiolm_jax.errors import UserError

EXTENSIONS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff")
READABLE = "give a WAV, FLAC, MP3 or Ogg recording"


def duration(path: str | pathlib.Path) -> float:
    """Seconds of a recording, from its header alone.

    Raises:
      UserError: missing, empty, unreadable or without samples.
    """
    info = _open(pathlib.Path(path), soundfile.info)
    if info.frames <= 0:
        raise UserError("audio of zero length", path, "give a recording with samples in it")
    return info.frames / info.samplerate


def read(path: str | pathlib.Path, sample_rate: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
    """Reads (a stretch of) a recording as mono at `sample_rate`.

    Channels are averaged. A stretch is decoded alone, so a crop of an hour costs no more than a crop
    of a minute where the format can seek.

    Args:
      path: the recording.
      sample_rate: Hz wanted.
      start, end: the stretch in seconds; the end of the file by default.

    Returns:
      float32 [W].

    Raises:
      UserError: missing, empty, not audio, zero length, or with samples that are not finite.
    """
    path = pathlib.Path(path)
    wave_WC, rate = _open(path, lambda file: _read_stretch(file, start, end))
    if len(wave_WC) == 0:
        raise UserError("audio of zero length", path, "give a recording with samples in it")
    wave_W = wave_WC.mean(axis=1)
    if not np.isfinite(wave_W).all():
        raise UserError("audio has samples that are not finite (NaN or infinity)", path, "repair or leave out the file")
    return wave_W if rate == sample_rate else soxr.resample(wave_W, rate, sample_rate)


def _read_stretch(path: str, start: float, end: float | None) -> tuple[np.ndarray, int]:
    with soundfile.SoundFile(path) as sound:
        rate = sound.samplerate
        first = min(round(start * rate), sound.frames)
        if first:
            sound.seek(first)
        frames = -1 if end is None else max(0, round(end * rate) - first)
        return sound.read(frames, dtype="float32", always_2d=True), rate


def _open(path: pathlib.Path, function):
    if not path.is_file():
        raise UserError("recording not found", path, "check the path")
    if path.stat().st_size == 0:
        raise UserError("empty file", path, READABLE)
    try:
        with open(path, "rb"):
            return function(str(path))
    except OSError as error:
        raise UserError(f"recording cannot be read ({error.strerror})", path, "check its permissions") from error
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise UserError(
            f"not audio that can be read ({error})".replace(str(path), path.name), path, READABLE
        ) from error


def encode_wav(wave_W: np.ndarray, sample_rate: int, file_format: str = "WAV") -> bytes:
    """A 16-bit mono file ("WAV" or "FLAC") as bytes; samples outside of [−1, 1] are clipped."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wave_W, -1.0, 1.0), sample_rate, format=file_format, subtype="PCM_16")
    return buffer.getvalue()


def write(path: str | pathlib.Path, wave_W: np.ndarray, sample_rate: int):
    """Writes a 16-bit mono WAV; the whole file or nothing."""
    files.write_bytes(path, encode_wav(wave_W, sample_rate))


@contextlib.contextmanager
def writer(path: str | pathlib.Path, sample_rate: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends samples to what `write` would make of all of them, in little memory."""
    # Not libsndfile: through it a full disk has no name.
    with files.new_file(path) as scratch, open(scratch, "wb") as file, wave.open(file, "wb") as sound:
        sound.setparams((1, 2, sample_rate, 0, "NONE", ""))
        yield lambda wave_W: sound.writeframesraw(_pcm16(wave_W).tobytes())


def _pcm16(wave_W: np.ndarray) -> np.ndarray:
    """Samples as libsndfile makes them: the upper half of 32 bits, little-endian; outside of [−1, 1] clipped."""
    wide_W = np.clip(np.rint(wave_W.astype(np.float64) * 2**31), -(2**31), 2**31 - 1).astype(np.int32)
    return (wide_W >> 16).astype("<i2")
