"""Crop → de-duplicate → flatten → offset → pad: the one implementation, in NumPy, of a training example.

Every front end (Grain, seqio) calls `example`. De-duplication, flattening and offsets are the
stage's (`lm.stages`); here are the crop, packing and padding. Shape suffixes: T frames, Q quantizer levels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from audiolm_jax.lm.stages import BOS, Stage

Record = dict[str, Any]


def _cut(record: Record, stage: Stage, start: int) -> Record:
    """At most one crop's semantic frames from `start` on, and the acoustic frames of the same stretch of time."""
    stop, ratio = start + stage.crop_frames, stage.acoustic_rate // stage.semantic_rate
    at_end = stop >= len(record["semantic"])
    return {
        **record,
        "semantic": record["semantic"][start:stop],
        "acoustic": record["acoustic"][start * ratio : None if at_end else stop * ratio],
        "is_end": bool(record["is_end"]) and at_end,
    }


def crop(record: Record, stage: Stage, rng: np.random.Generator) -> Record:
    """A random stretch of at most `stage.crop_seconds`, cut on the semantic frames' grid.

    Args:
      record: a token record (`data.token_dataset`).
      stage: whose crop.
      rng: draws the start.

    Returns:
      the record with `semantic`, `acoustic` cut and `is_end` true only where the crop reaches a true end.
    """
    return _cut(record, stage, int(rng.integers(0, max(0, len(record["semantic"]) - stage.crop_frames) + 1)))


def windows(record: Record, stage: Stage) -> Iterator[Record]:
    """The whole record as consecutive stretches of at most `stage.crop_seconds`, for evaluation."""
    for start in range(0, len(record["semantic"]), stage.crop_frames):
        yield _cut(record, stage, start)


def pack(records: Sequence[Record], stage: Stage) -> dict[str, np.ndarray]:
    """Cropped records, one behind the other -> one training example of `stage.sequence_length` positions.

    Returns:
      seqio's decoder fields, padded on the right; `decoder_segment_ids` number the records from 1 and are 0 on padding.
    """
    length = stage.sequence_length
    inputs, targets = np.full(length, BOS, np.int32), np.full(length, BOS, np.int32)
    weights, segments = np.zeros(length, np.float32), np.zeros(length, np.int32)
    start = 0
    for segment, record in enumerate(records, 1):
        tokens, loss_start = stage.sequence(record["semantic"], record["acoustic"], record["is_end"])
        count = min(len(tokens) - 1, length - start)
        stop = start + count
        inputs[start:stop], targets[start:stop] = tokens[:count], tokens[1 : count + 1]
        weights[start + loss_start - 1 : stop] = 1.0
        segments[start:stop] = segment
        start = stop
    return {
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": weights,
        "decoder_segment_ids": segments,
    }


def encode(record: Record, stage: Stage) -> dict[str, np.ndarray]:
    """A cropped record -> training example of `stage.sequence_length` positions, alone in its row."""
    example = pack([record], stage)
    del example["decoder_segment_ids"]
    return example


def example(record: Record, stage: Stage, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Token record -> training example: a random crop, encoded."""
    return encode(crop(record, stage, rng), stage)
