"""Packing: several short utterances in one row of a batch, by a plan made from the stored lengths.

The plan says once and for all which records share a row; epochs shuffle the rows, and each record's
crop is drawn anew. So a position in training is one number, as without packing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from audiolm_jax.data import transforms
from audiolm_jax.lm.stages import Stage

OPEN_ROWS = 256


def plan(lengths: np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Groups of records that fit into `capacity` together: first fit over a random order.

    Args:
      lengths: of each record, at most `capacity`.
      capacity: of a row.
      seed: of the order.

    Returns:
      indices of the records in each row; every record is in exactly one.
    """
    rows: list[list[int]] = []
    # Only the last OPEN_ROWS rows are tried: linear time for millions of records.
    free = np.zeros(0, np.int64)
    for index in np.random.default_rng(seed).permutation(len(lengths)):
        fits = np.flatnonzero(free >= lengths[index])
        if len(fits):
            row = len(rows) - len(free) + fits[0]
            rows[row].append(int(index))
            free[fits[0]] -= lengths[index]
        else:
            rows.append([int(index)])
            free = np.append(free, capacity - lengths[index])[-OPEN_ROWS:]
    return [np.array(row) for row in rows]


class PackedSource:
    """Rows of token records that fit together into one training sequence of a stage.

    Args:
      records: of a token dataset's split, by random access.
      num_frames: semantic frames of each record.
      stage: whose sequences.
      seed: of the plan.
    """

    def __init__(self, records: Sequence[dict[str, Any]], num_frames: np.ndarray, stage: Stage, seed: int):
        self._records, self._stage = records, stage
        longest = np.array([stage.max_positions(frames) for frames in range(stage.crop_frames + 1)])
        lengths = longest[np.minimum(num_frames, stage.crop_frames)]
        self._rows = plan(lengths, stage.sequence_length, seed)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._rows[index]

    def example(self, row: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The records of a row, each cropped, one behind the other; see `transforms.pack`."""
        return transforms.pack([transforms.crop(self._records[i], self._stage, rng) for i in row.tolist()], self._stage)
