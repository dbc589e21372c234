"""Tokenizers that need no network: what they make of a waveform can be checked by hand."""

import functools
from collections.abc import Sequence

import numpy as np

from audiolm_jax.data import tokenize

RATE, CODES, CLUSTERS, LEVELS = 16000, 50, 7, 2


def acoustic(wave_W: np.ndarray) -> np.ndarray:
    """[T, LEVELS]: the largest samples of 20 ms, in 50ths, and the number of samples above 0, modulo 50."""
    frames = [wave_W[i : i + 320] for i in range(0, len(wave_W), 320)]
    return np.array([[int(abs(frame).max() * 49), int((frame > 0).sum() % CODES)] for frame in frames], np.int32)


def semantic(wave_W: np.ndarray) -> np.ndarray:
    """[T]: sign changes in 40 ms, modulo 7."""
    frames = [wave_W[i : i + 640] for i in range(0, len(wave_W), 640)]
    return np.array([int((frame[1:] * frame[:-1] < 0).sum() % CLUSTERS) for frame in frames], np.int32)


class Fake:
    """Either tokenizer.

    Attributes:
      shapes: of the batches seen, [B, W].
    """

    sample_rate, codebook_size, num_quantizers, vocab_size = RATE, CODES, LEVELS, CLUSTERS

    def __init__(self, hop: int, tokens):
        self.hop, self.tokens, self.frame_rate = hop, tokens, RATE / hop
        self.shapes: list[tuple[int, int]] = []

    def num_frames(self, num_samples: int) -> int:
        # A codec that gives nothing for what it cannot fill, as some converted ones.
        return 0 if num_samples < 100 else -(-num_samples // self.hop)

    def encode(self, wave_BW, lengths_B) -> np.ndarray:
        self.shapes.append(wave_BW.shape)
        rows: Sequence[np.ndarray] = [self.tokens(row[:length]) for row, length in zip(wave_BW, lengths_B)]
        longest = max(map(len, rows))
        # Junk past the end of a row.
        return np.stack(
            [np.pad(row, [(0, longest - len(row))] + [(0, 0)] * (row.ndim - 1), constant_values=3) for row in rows]
        )


def load(codec: str = "c", semantic_tokenizer: str = "s") -> tokenize.Tokenizers:
    fingerprints = {"codec": codec * 8, "semantic_tokenizer": semantic_tokenizer * 8}
    return tokenize.Tokenizers(Fake(320, acoustic), Fake(640, semantic), fingerprints)


load_others = functools.partial(load, "d", "t")
