"""Packing: several short utterances in one row of a batch, by a plan made from the stored lengths.

The plan says once and for all which records share a row; epochs shuffle the rows, and each record's
crop is drawn anew. So a position in training is one number, as without packing.
"""

import numpy as np

from audiolm_jax.lm.stages import Stage

OPEN_ROWS = 256


class Rows:
    """Groups of records whose examples fit into one training sequence of a stage; every record is in exactly one.

    Args:
      num_frames: semantic frames of each record.
      stage: whose sequences.
      seed: of the order in which records look for a row.
    """

    def __init__(self, num_frames: np.ndarray, stage: Stage, seed: int):
        longest = np.array([stage.max_positions(frames) for frames in range(stage.crop_frames + 1)])
        row_of = plan(longest[np.minimum(num_frames, stage.crop_frames)], stage.sequence_length, seed)
        self._records = np.argsort(row_of, kind="stable")
        self._ends = np.cumsum(np.bincount(row_of))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> list[int]:
        """The records of a row."""
        return self._records[self._ends[row - 1] if row else 0 : self._ends[row]].tolist()


def plan(lengths: np.ndarray, capacity: int, seed: int) -> np.ndarray:
    """Puts records into rows, in a random order, each into an open row with room for it, else into a new one.

    Args:
      lengths: of each record, at most `capacity`.
      capacity: of a row.
      seed: of the order.

    Returns:
      the row of each record: 0, 1, … without gaps.
    """
    row_of = np.zeros(len(lengths), np.int64)
    # What has no room for even the shortest is alone.
    alone = lengths + lengths.min(initial=capacity) > capacity
    num_rows = np.count_nonzero(alone)
    row_of[alone] = np.arange(num_rows)
    # Only so many rows are open, and the fullest gives way to a new one: linear time for millions of records.
    room, open_rows = np.zeros(OPEN_ROWS, np.int64), np.zeros(OPEN_ROWS, np.int64)
    for index in np.random.default_rng(seed).permutation(np.flatnonzero(~alone)).tolist():
        length = lengths[index]
        place = (room >= length).argmax()
        if room[place] < length:
            place = room.argmin()
            room[place], open_rows[place] = capacity, num_rows
            num_rows += 1
        room[place] -= length
        row_of[index] = open_rows[place]
    return row_of
