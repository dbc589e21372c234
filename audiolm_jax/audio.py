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
    path = pathlib.Path(path)
    with _reading(path):
        info = soundfile.info(str(path))
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
    with _reading(path):
        wave_WC, rate = _read_stretch(path, start, end)
    if len(wave_WC) == 0:
        raise UserError("audio of zero length", path, "give a recording with samples in it")
    return resample(_mixed(wave_WC, path), rate, sample_rate)


def resample(wave_W: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Samples at `rate` Hz as samples at `new_rate`; their number is in proportion, rounded."""
    return wave_W if rate == new_rate else soxr.resample(wave_W, rate, new_rate)


def blocks(path: str | pathlib.Path, sample_rate: int, size: int) -> Iterator[np.ndarray]:
    """What `read` gives of a whole recording, piece by piece, in memory that does not grow with its length.

    Args:
      path: the recording.
      sample_rate: Hz wanted.
      size: samples of a block.

    Yields:
      float32 [size]; the last block may be shorter.

    Raises:
      UserError: as `read`.
    """
    rest_W = np.zeros(0, np.float32)
    for piece_W in _pieces(pathlib.Path(path), sample_rate, size):
        rest_W = np.concatenate([rest_W, piece_W])
        while len(rest_W) > size:
            yield rest_W[:size]
            rest_W = rest_W[size:]
    if len(rest_W):
        yield rest_W


def _pieces(path: pathlib.Path, sample_rate: int, size: int) -> Iterator[np.ndarray]:
    """A recording at `sample_rate`, in pieces of whatever length its blocks of `size` samples come to."""
    with _reading(path), soundfile.SoundFile(str(path)) as sound:
        resampler = soxr.ResampleStream(sound.samplerate, sample_rate, num_channels=1)
        count = 0
        while len(wave_WC := sound.read(size, dtype="float32", always_2d=True)):
            count += len(wave_WC)
            wave_W = _mixed(wave_WC, path)
            yield wave_W if sound.samplerate == sample_rate else resampler.resample_chunk(wave_W)
        if count == 0:
            raise UserError("audio of zero length", path, "give a recording with samples in it")
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _mixed(wave_WC: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """The mean of the channels, which must be finite."""
    wave_W = wave_WC.mean(axis=1)
    if not np.isfinite(wave_W).all():
        raise UserError("audio has samples that are not finite (NaN or infinity)", path, "repair or leave out the file")
    return wave_W


def _read_stretch(path: pathlib.Path, start: float, end: float | None) -> tuple[np.ndarray, int]:
    with soundfile.SoundFile(str(path)) as sound:
        rate = sound.samplerate
        first = min(round(start * rate), sound.frames)
        if first:
            sound.seek(first)
        frames = -1 if end is None else max(0, round(end * rate) - first)
        return sound.read(frames, dtype="float32", always_2d=True), rate


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Says in one line why a recording cannot be read."""
    if not path.is_file():
        raise UserError("recording not found", path, "check the path")
    if path.stat().st_size == 0:
        raise UserError("empty file", path, READABLE)
    try:
        with open(path, "rb"):
            yield
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
