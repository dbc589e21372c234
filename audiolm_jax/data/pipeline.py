"""From recordings or a token dataset to batches of NumPy arrays, by Grain.

Training batches are an endless, shuffled, deterministic stream whose position is part of every
checkpoint; evaluation batches are the held-out split once, in order, nothing left out.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import ml_collections
import numpy as np

from audiolm_jax.data import manifest, transforms
from audiolm_jax.data.token_dataset import TokenDataset
from audiolm_jax.errors import UserError
from audiolm_jax.lm.stages import Stage

Example = dict[str, np.ndarray]


class AudioCrops:
    """Fixed-length crops of the recordings of one split, each second of audio equally likely.

    The recordings are cut into stretches of one crop each; element i of the source is stretch i, and a
    training crop starts at random around it. Shorter recordings are padded with zeros.
    """

    def __init__(
        self, recordings: list[manifest.Recording], seconds: list[float], sample_rate: int, crop_seconds: float
    ):
        self.sample_rate, self.crop_seconds = sample_rate, crop_seconds
        self._recordings, self._seconds = recordings, seconds
        counts = [max(1, math.ceil(length / crop_seconds)) for length in seconds]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> int:
        return index

    def random_crop(self, index: int, rng: np.random.Generator) -> Example:
        """A crop whose start is uniform within one crop length around stretch `index`."""
        return self._read(index, float(rng.uniform(-0.5, 0.5)))

    def fixed_crop(self, index: int) -> Example:
        """Exactly stretch `index`."""
        return self._read(index, 0.0)

    def _read(self, index: int, shift: float) -> Example:
        which = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[which - 1]) if which else 0
        recording, seconds = self._recordings[which], self._seconds[which]
        start = (index - first + shift) * self.crop_seconds
        if shift:
            start = min(max(0.0, start), max(0.0, seconds - self.crop_seconds))
        stop = min(start + self.crop_seconds, seconds)
        stretch = manifest.Recording(
            recording.id, recording.path, start=recording.start + start, end=recording.start + stop
        )
        size = round(self.crop_seconds * self.sample_rate)
        wave_W = stretch.read(self.sample_rate)[:size]
        return {
            "wave_BW": np.pad(wave_W, (0, size - len(wave_W))).astype(np.float32),
            "lengths_B": np.array(len(wave_W), np.int32),
        }


class AudioInput:
    """Batches {"wave_BW": float32, "lengths_B": int32} for the tokenizers' objectives.

    Attributes:
      tokens: None; these inputs are recordings.
    """

    tokens = None

    def __init__(self, config: ml_collections.ConfigDict, report):
        recordings = manifest.read_manifest(_data_dir(config))
        train = [recording for recording in recordings if recording.split == "train"]
        held_out = [recording for recording in recordings if recording.split == "validation"]
        if not train:
            raise UserError("no recording in the training split", config.data_dir, "add recordings")
        rate, crop = config.model.sample_rate, config.crop_seconds
        self._config = config
        self._train = AudioCrops(*manifest.usable(train, report), rate, crop)
        self._held_out = AudioCrops(*manifest.usable(held_out, report), rate, crop)

    def training(self, process_index: int, process_count: int) -> grain.DatasetIterator:
        dataset = grain.MapDataset.source(self._train).seed(self._config.seed).shuffle().repeat()
        dataset = dataset.random_map(self._train.random_crop)
        return _batches(dataset, self._config, process_index, process_count)

    def evaluation(self, process_index: int, process_count: int) -> Iterator[Example]:
        examples = map(self._held_out.fixed_crop, range(process_index, len(self._held_out), process_count))
        return _evaluation_batches(examples, self._config.batch_size // process_count)


class TokenInput:
    """Batches of `data.transforms` examples for the language models.

    Attributes:
      tokens: the token dataset's metadata (`data.token_dataset.TokenMetadata`) as a dictionary.
    """

    def __init__(self, config: ml_collections.ConfigDict, stage: Stage):
        dataset = TokenDataset(_data_dir(config))
        dataset.metadata.check_stage(config.stage, config.data_dir)
        self.tokens = dataclasses.asdict(dataset.metadata)
        self._config, self._stage = config, stage
        if "train" not in dataset.splits:
            raise UserError("no training split", config.data_dir, "tokenize recordings whose split is train")
        self._train = dataset.source("train")
        self._held_out = dataset.source("validation") if "validation" in dataset.splits else []

    def _example(self, record: dict[str, Any], rng: np.random.Generator) -> Example:
        stage = self._config.stage
        return transforms.example(record, self._stage, stage.semantic_rate, stage.acoustic_rate, rng)

    def training(self, process_index: int, process_count: int) -> grain.DatasetIterator:
        dataset = grain.MapDataset.source(self._train).seed(self._config.seed).shuffle().repeat()
        return _batches(dataset.random_map(self._example), self._config, process_index, process_count)

    def evaluation(self, process_index: int, process_count: int) -> Iterator[Example]:
        rates = self._config.stage.semantic_rate, self._config.stage.acoustic_rate
        examples = (
            transforms.encode(window, self._stage)
            for index in range(process_index, len(self._held_out), process_count)
            for window in transforms.windows(self._held_out[index], self._stage, *rates)
        )
        return _evaluation_batches(examples, self._config.batch_size // process_count)


def _data_dir(config: ml_collections.ConfigDict) -> str:
    if not config.data_dir:
        raise UserError("no training data", "config.data_dir", "give --config.data_dir=PATH")
    return config.data_dir


def _batches(dataset: grain.MapDataset, config, process_index: int, process_count: int) -> grain.DatasetIterator:
    dataset = dataset.slice(slice(process_index, None, process_count))
    dataset = dataset.batch(config.batch_size // process_count, drop_remainder=True)
    options = grain.ReadOptions(
        num_threads=config.input.num_threads, prefetch_buffer_size=config.input.prefetch_batches
    )
    return iter(dataset.to_iter_dataset(options))


def _evaluation_batches(examples: Iterator[Example], batch_size: int) -> Iterator[Example]:
    """Batches with `valid_B` (1 or 0): the last one is filled up with examples that do not count."""
    rows: list[Example] = []
    for example in examples:
        rows.append(example)
        if len(rows) == batch_size:
            yield _stack(rows, batch_size)
            rows = []
    if rows:
        yield _stack(rows, batch_size)


def _stack(rows: Sequence[Example], batch_size: int) -> Example:
    filled = [*rows, *[rows[0]] * (batch_size - len(rows))]
    batch = {name: np.stack([row[name] for row in filled]) for name in rows[0]}
    return {**batch, "valid_B": (np.arange(batch_size) < len(rows)).astype(np.float32)}
