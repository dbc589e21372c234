"""Reading and writing recordings: the only place that touches audio files.

libsndfile (by `soundfile`) decodes WAV, FLAC, MP3, Ogg and more; `soxr` resamples. Waves are float32
in [−1, 1], mono. Suffix W: samples.
"""

import contextlib
import io
import os
import pathlib
import re
import wave
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import soundfile
import soxr

from audiolm_jax import files
from audiolm_jax.errors import UserError

EXTENSIONS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff")
READABLE = "give a WAV, FLAC, MP3 or Ogg recording"
# Seconds from a start to an end, None being the end of the file.
Stretch = tuple[float, float | None]
WHOLE: Stretch = (0.0, None)
DECODED_FRAMES = 1 << 20
LONGEST_FRAMES = 1 << 60
# What writes a WAV into a pipe leaves a length of this or more in its header.
PIPED_BYTES = 0x7FFF0000
MP3_TOLERANCE = 0.05


def duration(path: str | pathlib.Path) -> float:
    """Seconds of a recording, from its header alone.

    Raises:
      UserError: missing, not permitted, empty, not audio, zero length, cut off as far as the header tells, or without
        a length in the header.
    """
    with _opened(pathlib.Path(path)) as sound:
        return sound.frames / sound.samplerate


def read(path: str | pathlib.Path, sample_rate: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
    """Reads (a stretch of) a recording as mono at `sample_rate`.

    Channels, however many, are averaged, and rates, however high, resampled. A stretch is decoded alone, so a crop of
    an hour costs no more than a crop of a minute where the format can seek.

    Args:
      path: the recording.
      sample_rate: Hz wanted.
      start, end: the stretch in seconds; the end of the file by default.

    Returns:
      float32 [W].

    Raises:
      UserError: as `duration`; damaged, cut off, or with samples that are not finite.
    """
    return read_joined(path, sample_rate, [(start, end)])


def read_joined(path: str | pathlib.Path, sample_rate: int, stretches: Sequence[Stretch]) -> np.ndarray:
    """Reads several stretches of a recording, one behind the other without a gap, as `read` does one.

    They are joined at the file's own rate, then resampled as one.
    """
    return np.concatenate(list(_pieces(pathlib.Path(path), sample_rate, DECODED_FRAMES, stretches)))


def check(path: str | pathlib.Path):
    """Decodes a recording to its end. Raises UserError, as `read`, for what its header does not show."""
    path = pathlib.Path(path)
    with _opened(path) as sound:
        for wave_WC in _decoded(sound, path, (WHOLE,), DECODED_FRAMES):
            _mixed(wave_WC, path)


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
    for piece_W in _pieces(pathlib.Path(path), sample_rate, size, (WHOLE,)):
        rest_W = np.concatenate([rest_W, piece_W])
        while len(rest_W) > size:
            yield rest_W[:size]
            rest_W = rest_W[size:]
    if len(rest_W):
        yield rest_W


def _pieces(path: pathlib.Path, sample_rate: int, size: int, stretches: Sequence[Stretch]) -> Iterator[np.ndarray]:
    """Stretches at `sample_rate`, in pieces of whatever length blocks of `size` samples of the file come to."""
    with _opened(path) as sound:
        resampler = soxr.ResampleStream(sound.samplerate, sample_rate, num_channels=1)
        count = 0
        for wave_WC in _decoded(sound, path, stretches, size):
            count += len(wave_WC)
            wave_W = _mixed(wave_WC, path)
            yield wave_W if sound.samplerate == sample_rate else resampler.resample_chunk(wave_W)
        if count == 0:
            raise UserError("audio of zero length", path, "give a recording with samples in it")
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _decoded(
    sound: soundfile.SoundFile, path: pathlib.Path, stretches: Sequence[Stretch], size: int
) -> Iterator[np.ndarray]:
    """The samples [W, C] of the stretches, at most `size` at a time."""
    for start, end in stretches:
        position = min(round(start * sound.samplerate), sound.frames)
        stop = sound.frames if end is None else min(round(end * sound.samplerate), sound.frames)
        if position != sound.tell():
            sound.seek(position)
        while position < stop and len(wave_WC := sound.read(min(size, stop - position), "float32", always_2d=True)):
            position += len(wave_WC)
            yield wave_WC
        # Without a table of its frames an MP3 has an estimated length.
        if stop - position > (MP3_TOLERANCE * sound.frames if sound.format == "MP3" else 0):
            raise _cut_off(path, position, sound.frames)


def _mixed(wave_WC: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """The mean of the channels, which must be finite."""
    wave_W = wave_WC.mean(axis=1)
    if not np.isfinite(wave_W).all():
        what = "audio has samples that are not finite (NaN or infinity)"
        raise UserError(what, path, "repair or leave out the file")
    return wave_W


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[soundfile.SoundFile]:
    """An audio file with a good header; says in one line why it, or what is done with it, fails."""
    try:
        if not path.is_file():
            broken = path.is_symlink() and not path.exists()
            raise UserError("link to nothing" if broken else "recording not found", path, "check the path")
        if path.stat().st_size == 0:
            raise UserError("empty file", path, READABLE)
        open(path, "rb").close()
        sound = soundfile.SoundFile(os.fsencode(path))
    except OSError as error:
        raise UserError(f"recording cannot be read ({error.strerror})", path, "check its permissions") from error
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: samples without a header, named .raw.
        why = getattr(error, "error_string", error)
        raise UserError(f"not audio that can be read ({why})", path, READABLE) from error
    with sound:
        _check_header(sound, path)
        try:
            yield sound
        except soundfile.SoundFileError as error:
            raise UserError(f"damaged or cut-off audio ({error})", path, "repair or leave out the file") from error


def _check_header(sound: soundfile.SoundFile, path: pathlib.Path):
    if sound.frames > LONGEST_FRAMES:
        raise UserError("audio whose header has no length", path, "write it again, to a file and not to a pipe")
    if sound.frames <= 0:
        raise UserError("audio of zero length", path, "give a recording with samples in it")
    # libsndfile takes what is left of a WAV or AIFF for all of it, and notes what the header says.
    noted = re.search(r"^ *(?:data|SSND) : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    if noted and int(noted[2]) < int(noted[1]) < PIPED_BYTES:
        raise _cut_off(path, int(noted[2]), int(noted[1]))


def _cut_off(path: pathlib.Path, there: int, expected: int) -> UserError:
    return UserError(f"cut-off audio ({there / expected:.1%} of it is there)", path, "repair or leave out the file")


def encode_wav(wave_W: np.ndarray, sample_rate: int, file_format: str = "WAV") -> bytes:
    """A 16-bit mono file ("WAV" or "FLAC") as bytes; samples outside of [−1, 1] are clipped."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wave_W, -1.0, 1.0), sample_rate, format=file_format, subtype="PCM_16")
    return buffer.getvalue()


def write(path: str | pathlib.Path, wave_W: np.ndarray, sample_rate: int):
    """Writes a 16-bit mono WAV; the whole file or nothing."""
    files.write_bytes(path, encode_wav(wave_W, sample_rate))


def write_lossless(stem: pathlib.Path, wave: np.ndarray, sample_rate: int) -> pathlib.Path:
    """Writes samples [W] or [W, C] as they are: 16-bit integers as STEM.flac, floats as STEM.wav of floats.

    Returns:
      the path of the file.

    Raises:
      UserError: no samples, or integers of more than 16 bits.
    """
    if not len(wave):
        raise UserError("audio of zero length", stem, "give a recording with samples in it")
    buffer = io.BytesIO()
    if np.issubdtype(wave.dtype, np.floating):
        path = stem.with_name(f"{stem.name}.wav")
        soundfile.write(buffer, wave.astype(np.float32), sample_rate, format="WAV", subtype="FLOAT")
    else:
        if wave.min() < -(2**15) or wave.max() >= 2**15:
            raise UserError("samples of more than 16 bits", stem, "scale them to 16 bits or to floats")
        path = stem.with_name(f"{stem.name}.flac")
        soundfile.write(buffer, wave.astype(np.int16), sample_rate, format="FLAC", subtype="PCM_16")
    files.write_bytes(path, buffer.getvalue())
    return path


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
