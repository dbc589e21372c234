"""`python -m tests.training.recorded_run FOLDER train …`: `audiolm`, writing down what each process trains on.

FOLDER gets a file a process, a line a batch: the numbers of its rows in the global batch, and the targets of each
sequence in each row.
"""

import json
import pathlib
import sys

import jax

from audiolm_jax import cli
from audiolm_jax.data.pipeline import TokenInput


class _Recorded:
    def __init__(self, batches, rows, file):
        self._batches, self._rows, self._file = batches, rows.tolist(), file
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        batch = next(self._batches)
        targets, segments = batch["decoder_target_tokens"], batch.get("decoder_segment_ids")
        if segments is None:
            segments = (batch["decoder_loss_weights"] > 0).astype(int)
        sequences = [
            [ours[marks == number].tolist() for number in range(1, marks.max() + 1)]
            for ours, marks in zip(targets, segments, strict=True)
        ]
        self._file.write(json.dumps({"rows": self._rows, "sequences": sequences}) + "\n")
        self._file.flush()
        return batch


def main(folder, *arguments):
    training = TokenInput.training

    def recorded(self, rows):
        path = pathlib.Path(folder) / f"{jax.process_index()}.jsonl"
        return _Recorded(training(self, rows), rows, path.open("w"))

    TokenInput.training = recorded
    cli.main(arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
