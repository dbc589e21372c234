"""A codec at work on files of any length: recordings to codes and back.

Where the codec streams, a long file goes through it block by block, in memory that does not grow with its length.

Suffixes: B batch (of one), W waveform samples, T frames, Q levels.
"""

import pathlib
import time
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from audiolm_jax import audio, bundle, files
from audiolm_jax.codec.codec import Codec
from audiolm_jax.codec.streaming import ChunkDecoder
from audiolm_jax.errors import UserError
from audiolm_jax.parts import read_part
from audiolm_jax.progress import report, seconds_bar

BLOCK_SECONDS = 10.0
EXPECTED = "give an NPZ written by `audiolm encode`"


class _Stopwatch:
    """Reports how fast a file went through a codec, and how long its first block took."""

    def __init__(self):
        self._start = time.perf_counter()
        self._first: float | None = None

    def block(self):
        """To be called when a block is ready."""
        if self._first is None:
            self._first = time.perf_counter() - self._start

    def report(self, name: str, num_samples: int, sample_rate: int):
        """One line on standard error."""
        self.block()
        heard, seconds = num_samples / sample_rate, time.perf_counter() - self._start
        speed = f"{heard:.2f} s of audio in {seconds:.2f} s, {heard / seconds:.2f} times real time"
        report(f"{name}: {speed}; first block after {self._first:.2f} s, compiling included")


def encode(codec: str, input_path: str, output: str, num_quantizers: int | None = None):
    """One recording → NPZ with `codes` [T, Q], `sample_rate`, `num_samples` and the codec's `fingerprint`.

    Args:
      codec: folder of the codec.
      input_path: recording, at any rate, with any number of channels.
      output: file to write.
      num_quantizers: levels to keep, all by default.

    Raises:
      UserError: a codec or a recording that cannot be read, or no such number of levels.
    """
    model = bundle.load_codec(codec)
    expected_samples = round(audio.duration(input_path) * model.sample_rate)
    blocks, num_samples, stopwatch = [], 0, _Stopwatch()
    with files.new_file(output) as scratch:
        with seconds_bar("encode", expected_samples, model.sample_rate) as progress:
            for codes_TQ, size in _encoded_blocks(model, input_path, expected_samples, num_quantizers):
                stopwatch.block()
                blocks.append(codes_TQ)
                num_samples += size
                progress.update(size)
        with open(scratch, "wb") as file:
            np.savez_compressed(
                file,
                codes=np.concatenate(blocks),
                sample_rate=model.sample_rate,
                num_samples=num_samples,
                fingerprint=read_part(codec).fingerprint(),
            )
    stopwatch.report("encode", num_samples, model.sample_rate)


def _encoded_blocks(
    model: Codec, path: str, expected_samples: int, num_quantizers: int | None
) -> Iterator[tuple[np.ndarray, int]]:
    """Codes [T, Q] of the recording, block by block, and the number of samples that each stands for."""
    block = _block_frames(model) * model.hop_length
    if not model.config.streams or expected_samples <= block:
        wave_W = audio.read(path, model.sample_rate)
        yield np.asarray(model.encode(wave_W[None], num_quantizers=num_quantizers))[0], len(wave_W)
        return
    num_levels, state = model.checked_levels(num_quantizers), None
    for wave_W in audio.blocks(path, model.sample_rate, block):
        codes_BTQ, state = model.encode_chunk(wave_W[None], state)
        yield np.asarray(codes_BTQ)[0, :, :num_levels], len(wave_W)


def decode(codec: str, input_path: str, output: str):
    """NPZ of `encode` → 16-bit WAV of `num_samples` samples, the last of them zeros where the codec gives fewer.

    Raises:
      UserError: a codec that cannot be read, or a file that does not hold codes of this codec.
    """
    codes_TQ, num_samples, fingerprint = _read_codes(input_path)
    if read_part(codec).fingerprint() != fingerprint:
        raise UserError("codes were made by another codec", input_path, "decode with the codec that encoded")
    model, stopwatch, remaining = bundle.load_codec(codec), _Stopwatch(), num_samples
    if num_samples <= 0 or model.config.num_frames(num_samples) > len(codes_TQ):
        raise UserError(f"{len(codes_TQ)} frames do not make {num_samples} samples", input_path, EXPECTED)
    with (
        seconds_bar("decode", num_samples, model.sample_rate) as progress,
        audio.writer(output, model.sample_rate) as write,
    ):
        for wave_W in _decoded_blocks(model, codes_TQ):
            stopwatch.block()
            write(wave_W[:remaining])
            progress.update(min(len(wave_W), remaining))
            remaining -= min(len(wave_W), remaining)
        write(np.zeros(remaining, np.float32))
    stopwatch.report("decode", num_samples, model.sample_rate)


def _read_codes(path: str) -> tuple[np.ndarray, int, str]:
    """Codes [T, Q], `num_samples` and `fingerprint` of an NPZ."""
    if not pathlib.Path(path).is_file():
        raise UserError("codes not found", path, EXPECTED)
    try:
        with np.load(path, allow_pickle=False) as archive:
            codes_TQ, num_samples, fingerprint = archive["codes"], archive["num_samples"], archive["fingerprint"]
            if codes_TQ.ndim != 2:
                raise ValueError(f"codes {list(codes_TQ.shape)} are not [frames, levels]")
            return codes_TQ, int(num_samples), str(fingerprint)
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"not codes of ours ({error})", path, EXPECTED) from error


def _decoded_blocks(model: Codec, codes_TQ: np.ndarray) -> Iterator[np.ndarray]:
    """The waveform [W] of the codes, block by block."""
    block = _block_frames(model)
    if model.config.streams and len(codes_TQ) <= block:
        yield np.asarray(model.decode(codes_TQ[None]))[0]
        return
    decoder = ChunkDecoder(model)
    for start in range(0, len(codes_TQ), block):
        yield decoder.decode(codes_TQ[None, start : start + block])[0]
    if len(codes_TQ):
        yield decoder.finish()[0]


def _block_frames(model: Codec) -> int:
    return round(BLOCK_SECONDS * model.frame_rate)
