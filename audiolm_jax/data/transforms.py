"""Crop → de-duplicate → flatten → offset → pad: the one implementation, in NumPy, of a training example.

Every front end (Grain, seqio) goes through here. De-duplication, flattening and offsets are the stage's (`lm.stages`);
here are the crop, packing and padding. An example is a function of the record, the seed and the epoch: neither of where
it stands in the stream, nor of what it is packed with. Shape suffixes: T frames, Q quantizer levels.
"""

import hashlib
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


def crop(record: Record, stage: Stage, seed: int, epoch: int) -> Record:
    """A random stretch of at most `stage.crop_seconds`, cut on the semantic frames' grid.

    Args:
      record: a token record (`data.token_dataset`); its `id` decides, with the next two, where the stretch starts.
      stage: whose crop.
      seed: of the run.
      epoch: how often the record was seen before.

    Returns:
      the record with `semantic`, `acoustic` cut and `is_end` true only where the crop reaches a true end.
    """
    # 64 random bits: a hash costs a tenth of a generator, and is the same in every version of NumPy.
    text = f"{seed}/{epoch}/".encode() + record["id"]
    bits = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    starts = 1 + max(0, len(record["semantic"]) - stage.crop_frames)
    return _cut(record, stage, bits * starts >> 64)


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
