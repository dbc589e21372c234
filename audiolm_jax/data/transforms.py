"""Crop → de-duplicate → flatten → offset → pad: the one implementation, in NumPy, of a training example.

Every front end (Grain, seqio) calls `example`. De-duplication, flattening and offsets are the
stage's (`lm.stages`); here are the crop and the padding. Shape suffixes: T frames, Q quantizer levels.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from audiolm_jax.lm.stages import BOS, Stage

Record = dict[str, Any]


def _cut(record: Record, start: int, stop: int, semantic_rate: int, acoustic_rate: int) -> Record:
    """Semantic frames start … stop − 1 and the acoustic frames of the same stretch of time."""
    ratio, total = acoustic_rate // semantic_rate, len(record["semantic"])
    at_end = stop >= total
    return {
        **record,
        "semantic": record["semantic"][start:stop],
        "acoustic": record["acoustic"][start * ratio : None if at_end else stop * ratio],
        "is_end": bool(record["is_end"]) and at_end,
    }


def crop(record: Record, stage: Stage, semantic_rate: int, acoustic_rate: int, rng: np.random.Generator) -> Record:
    """A random stretch of at most `stage.crop_seconds`, cut on the semantic frames' grid.

    Args:
      record: a token record (`data.token_dataset`).
      stage: whose crop.
      semantic_rate, acoustic_rate: frames a second; the latter a multiple of the former.
      rng: draws the start.

    Returns:
      the record with `semantic`, `acoustic` cut and `is_end` true only where the crop reaches a true end.
    """
    length = max(1, round(stage.crop_seconds * semantic_rate))
    start = int(rng.integers(0, max(0, len(record["semantic"]) - length) + 1))
    return _cut(record, start, start + length, semantic_rate, acoustic_rate)


def windows(record: Record, stage: Stage, semantic_rate: int, acoustic_rate: int) -> Iterator[Record]:
    """The whole record as consecutive stretches of at most `stage.crop_seconds`, for evaluation."""
    length = max(1, round(stage.crop_seconds * semantic_rate))
    for start in range(0, len(record["semantic"]), length):
        yield _cut(record, start, start + length, semantic_rate, acoustic_rate)


def pad(tokens: np.ndarray, loss_start: int, length: int) -> dict[str, np.ndarray]:
    """A sequence -> seqio's decoder fields, padded on the right to `length` (cut where it is longer)."""
    inputs, targets = np.full(length, BOS, np.int32), np.full(length, BOS, np.int32)
    weights = np.zeros(length, np.float32)
    count = min(len(tokens) - 1, length)
    inputs[:count], targets[:count] = tokens[:count], tokens[1 : count + 1]
    weights[loss_start - 1 : count] = 1.0
    return {"decoder_input_tokens": inputs, "decoder_target_tokens": targets, "decoder_loss_weights": weights}


def encode(record: Record, stage: Stage) -> dict[str, np.ndarray]:
    """A cropped record -> training example of `stage.sequence_length` positions."""
    tokens, loss_start = stage.sequence(record["semantic"], record["acoustic"], record["is_end"])
    return pad(tokens, loss_start, stage.sequence_length)


def example(
    record: Record, stage: Stage, semantic_rate: int, acoustic_rate: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Token record -> training example: a random crop, encoded."""
    return encode(crop(record, stage, semantic_rate, acoustic_rate, rng), stage)
