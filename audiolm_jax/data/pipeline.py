"""From recordings or a token dataset to batches of NumPy arrays, by Grain.

Training batches are an endless, shuffled, deterministic stream whose position is part of every
checkpoint; evaluation batches are the held-out split once, in order, nothing left out. Where a run
has several processes, each asks for its rows of every global batch: what a batch holds does not
depend on how many processes there are.
"""

import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import ml_collections
import numpy as np

from audiolm_jax import files
from audiolm_jax.data import manifest, packing, transforms
from audiolm_jax.data.token_dataset import TokenDataset
from audiolm_jax.errors import UserError
from audiolm_jax.lm.stages import Stage

Example = dict[str, np.ndarray]


class AudioCrops:
    """Fixed-length crops of the recordings of one split, each second of audio equally likely.

    The recordings are cut into stretches of one crop each; element i of the source is stretch i, and a
    training crop starts at random around it. Shorter recordings are padded with zeros. With labels to choose from,
    a crop has the index of its recording's.

    Args:
      recordings: those whose headers can be read.
      seconds: how long each is.
      sample_rate: Hz.
      crop_seconds: how long a crop is.
      report: called with a line, once, for each recording that turns out not to be readable.
      labels: of a classifier.
    """

    def __init__(
        self,
        recordings: list[manifest.Recording],
        seconds: list[float],
        sample_rate: int,
        crop_seconds: float,
        report: Callable[[str], None],
        labels: Sequence[str] = (),
    ):
        self.sample_rate, self.crop_seconds = sample_rate, crop_seconds
        self._recordings, self._seconds = recordings, seconds
        self._indices = {label: index for index, label in enumerate(labels)}
        self._report, self._reported, self._lock = report, set[str](), threading.Lock()
        counts = np.array([max(1, math.ceil(length / crop_seconds)) for length in seconds])
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> int:
        return index

    def random_crop(self, index: int, rng: np.random.Generator) -> Example:
        """A crop whose start is uniform within one crop length around stretch `index`.

        Where that cannot be read, around the beginning of the next recording that can be.

        Raises:
          UserError: no recording can be read.
        """
        shift, which = float(rng.uniform(-0.5, 0.5)), self._recording(index)
        for place in (index, *np.roll(self._starts, -which - 1)):
            try:
                return self._read(int(place), shift)
            except UserError as error:
                self._leave_out(int(place), error)
        raise UserError("no recording can be read", self._recordings[which].path, "see the lines above")

    def fixed_crop(self, index: int) -> Example:
        """Exactly stretch `index`; where that cannot be read, silence with `valid_B` 0 instead of 1."""
        try:
            return {**self._read(index, 0.0), "valid_B": np.ones((), np.float32)}
        except UserError as error:
            self._leave_out(index, error)
        silence_W = np.zeros(self._size, np.float32)
        return {**self._example(index, silence_W), "valid_B": np.zeros((), np.float32)}

    @property
    def _size(self) -> int:
        return round(self.crop_seconds * self.sample_rate)

    def _recording(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _leave_out(self, index: int, error: UserError):
        recording = self._recordings[self._recording(index)]
        with self._lock:
            if recording.id not in self._reported:
                self._reported.add(recording.id)
                self._report(f"left out: {error}")

    def _read(self, index: int, shift: float) -> Example:
        which = self._recording(index)
        recording, seconds = self._recordings[which], self._seconds[which]
        start = float(index - self._starts[which] + shift) * self.crop_seconds
        if shift:
            start = min(max(0.0, start), max(0.0, seconds - self.crop_seconds))
        stop = min(start + self.crop_seconds, seconds)
        wave_W = recording.crop(start, stop).read(self.sample_rate)[: self._size]
        return self._example(index, wave_W)

    def _example(self, index: int, wave_W: np.ndarray) -> Example:
        """The samples of stretch `index`, padded, and what it is labelled."""
        example = {
            "wave_BW": np.pad(wave_W, (0, self._size - len(wave_W))).astype(np.float32),
            "lengths_B": np.array(len(wave_W), np.int32),
        }
        if self._indices:
            label = self._recordings[self._recording(index)].class_label
            example["labels_B"] = np.array(self._indices[label], np.int32)
        return example


def read_recordings(config: ml_collections.ConfigDict) -> list[manifest.Recording]:
    """Those of `config.data_dir`, split as they say, by default by speaker; or as `config.split_by` wants it.

    Raises:
      UserError: no data, or an unknown way to split them.
    """
    path = _data_dir(config)
    match config.get("split_by", "speaker"):
        case "speaker":
            return manifest.read_manifest(path)
        case "recording":
            return manifest.split_by_recording(manifest.read_manifest(path), config.validation_share)
        case other:
            raise UserError("unknown way to split", f"config.split_by={other}", "use speaker or recording")


class AudioInput:
    """Batches {"wave_BW": float32, "lengths_B": int32} of recordings; for a classifier with "labels_B", int32.

    With `config.bucket_seconds` recordings of like lengths come together, in fewer or more rows, so that no batch holds
    more than `batch_size * crop_seconds` and little of it is padding. Buckets take turns in fixed proportion.

    Attributes:
      tokens: None; these inputs are recordings.
    """

    tokens = None

    def __init__(self, config: ml_collections.ConfigDict, report):
        recordings = read_recordings(config)
        if labels := config.model.get("labels", ()):
            recordings = _labelled(recordings, labels, report)
        train = [recording for recording in recordings if recording.split == "train"]
        held_out = [recording for recording in recordings if recording.split == "validation"]
        if not train:
            raise UserError("no recording in the training split", config.data_dir, "add recordings")
        self._config = config
        self._train = _buckets(manifest.usable(train, report), config, report)
        self._held_out = _buckets(manifest.usable(held_out, report), config, report)

    def training(self, rows: np.ndarray) -> grain.DatasetIterator:
        buckets, weights = [], []
        for number, (crops, factor) in enumerate(self._train):
            dataset = grain.MapDataset.source(crops).seed(self._config.seed + number).shuffle().repeat()
            buckets.append(_batches(dataset.random_map(crops.random_crop), self._config.batch_size, rows, factor))
            weights.append(len(crops) / factor)
        return _iterate(grain.MapDataset.mix(buckets, weights), self._config)

    def evaluation(self, rows: np.ndarray) -> Iterator[Example]:
        for crops, factor in self._held_out:
            yield from _evaluation_batches(
                range(len(crops)), crops.fixed_crop, self._config.batch_size * factor, _scaled(rows, factor)
            )


def _labelled(recordings: list[manifest.Recording], labels: Sequence[str], report) -> list[manifest.Recording]:
    """The recordings that have one of the labels; reports how many of another there are."""
    kept = [recording for recording in recordings if recording.class_label in labels]
    others = {recording.class_label for recording in recordings} - set(labels)
    if others:
        named = ", ".join(sorted(label or "none" for label in others)[:5])
        report(f"left out: {len(recordings) - len(kept)} recordings of {len(others)} other labels, such as {named}")
    return kept


def _buckets(
    usable: tuple[list[manifest.Recording], list[float]],
    config: ml_collections.ConfigDict,
    report: Callable[[str], None],
) -> list[tuple[AudioCrops, int]]:
    """Crops of the recordings by length, none empty, and how many times `config.batch_size` rows a batch of each has.

    A recording goes into the shortest bucket that holds it whole, or into the longest, which is cut into crops.
    """
    crop, labels = config.crop_seconds, config.model.get("labels", ())
    sizes = sorted({*config.get("bucket_seconds", ()), crop})
    if sizes[0] <= 0 or sizes[-1] > crop:
        where = f"config.bucket_seconds={config.bucket_seconds}"
        raise UserError("buckets must be longer than 0 and no longer than a crop", where, f"crops last {crop} s")
    members: dict[float, tuple[list[manifest.Recording], list[float]]] = {size: ([], []) for size in sizes}
    for recording, seconds in zip(*usable, strict=True):
        recordings, lengths = members[next((size for size in sizes if seconds <= size), crop)]
        recordings.append(recording)
        lengths.append(seconds)
    return [
        (AudioCrops(recordings, lengths, config.model.sample_rate, size, report, labels), int(crop // size))
        for size, (recordings, lengths) in members.items()
        if recordings
    ]


class TokenExamples:
    """The training examples of one token dataset: element `index` in epoch `epoch`, whoever asks and in whatever order.

    An element is a record, or with packing a row of them (`data.packing`).
    """

    def __init__(self, dataset: TokenDataset, stage: Stage, seed: int, packed: bool):
        self._records, self._stage, self._seed = dataset.source("train"), stage, seed
        self._rows = packing.Rows(dataset.num_frames("train"), stage, seed) if packed else None

    def __len__(self) -> int:
        return len(self._records if self._rows is None else self._rows)

    def example(self, index: int, epoch: int) -> Example:
        if self._rows is None:
            return transforms.encode(self._crop(index, epoch), self._stage)
        return transforms.pack([self._crop(record, epoch) for record in self._rows[index]], self._stage)

    def _crop(self, record: int, epoch: int) -> transforms.Record:
        return transforms.crop(self._records[record], self._stage, self._seed, epoch)


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One token dataset of a training mixture.

    Attributes:
      dataset: it, opened.
      rate: its share among the training examples, relative to the other members'.
      training: its examples.
      held_out: its validation records, none where it has no such split.
    """

    dataset: TokenDataset
    rate: float
    training: TokenExamples
    held_out: Sequence[transforms.Record]


def open_members(config: ml_collections.ConfigDict, stage: Stage) -> list[Member]:
    """The token datasets that a language model's config names.

    Raises:
      UserError: one that is missing, does not fit the stage, or was made by other tokenizers than the first.
    """
    members: list[Member] = []
    for data_dir, rate in _data_dirs(config):
        dataset = TokenDataset(data_dir)
        dataset.metadata.check_stage(config.stage, data_dir)
        for name in ("codec", "semantic_tokenizer"):
            if members and getattr(dataset.metadata, name) != getattr(members[0].dataset.metadata, name):
                advice = "tokenize all members of a mixture with the same parts"
                raise UserError(f"tokens of another {name} than the mixture's first member", data_dir, advice)
        if "train" not in dataset.splits:
            raise UserError("no training split", data_dir, "tokenize recordings whose split is train")
        training = TokenExamples(dataset, stage, config.seed, config.packing)
        held_out = dataset.source("validation") if "validation" in dataset.splits else []
        members.append(Member(dataset, rate, training, held_out))
    return members


class TokenInput:
    """Batches of `data.transforms` examples for the language models, from one token dataset or a mixture of several.

    Members take turns in fixed proportion; each is shuffled anew every epoch of its own.

    Attributes:
      tokens: the token dataset's metadata (`data.token_dataset.TokenMetadata`) as a dictionary.
    """

    def __init__(self, config: ml_collections.ConfigDict, stage: Stage):
        self._config, self._stage = config, stage
        self._members = open_members(config, stage)
        metadata = [member.dataset.metadata for member in self._members]
        rates = np.array([member.rate for member in self._members])
        # Tokens that de-duplication keeps, of as many frames as the rates say.
        kept = rates @ [1 / each.mean_run_length for each in metadata]
        mixed = dataclasses.replace(metadata[0], mean_run_length=float(rates.sum() / kept))
        self.tokens = dataclasses.asdict(mixed)

    def training(self, rows: np.ndarray) -> grain.DatasetIterator:
        streams = [
            _epochs(member.training).seed(self._config.seed + number).shuffle().repeat()
            for number, member in enumerate(self._members)
        ]
        mixed = grain.MapDataset.mix(streams, [member.rate for member in self._members])
        return _iterate(_batches(mixed, self._config.batch_size, rows), self._config)

    def evaluation(self, rows: np.ndarray) -> Iterator[Example]:
        windows = (
            window
            for member in self._members
            for index in range(len(member.held_out))
            for window in transforms.windows(member.held_out[index], self._stage)
        )
        encode = functools.partial(transforms.encode, stage=self._stage)
        return _evaluation_batches(windows, encode, self._config.batch_size, rows)


def _epochs(examples: TokenExamples) -> grain.MapDataset:
    """Epoch behind epoch, in order: position p is element p mod n of epoch p // n."""
    size = len(examples)
    elements = grain.MapDataset.range(size)
    return elements.map_with_index(lambda position, index: examples.example(index, position // size))


def _data_dirs(config: ml_collections.ConfigDict) -> list[tuple[str, float]]:
    """A language model's token datasets and their rates."""
    data_dirs, rates = (config.mixture.data_dirs, config.mixture.rates) if "mixture" in config else ((), ())
    if not data_dirs and not rates:
        return [(_data_dir(config), 1.0)]
    if config.data_dir:
        raise UserError("both a dataset and a mixture", f"config.data_dir={config.data_dir}", "give one of them")
    if len(rates) != len(data_dirs) or not all(isinstance(rate, int | float) and 0 < rate < math.inf for rate in rates):
        where = f"config.mixture.rates={rates}"
        raise UserError("not a rate above 0 for each member", where, f"give {len(data_dirs)} numbers")
    if not all(isinstance(path, str) and path for path in data_dirs):
        where = f"config.mixture.data_dirs={data_dirs}"
        raise UserError("not a folder for each member", where, "give paths of token datasets")
    return [(_local(path, "config.mixture.data_dirs"), rate) for path, rate in zip(data_dirs, rates, strict=True)]


def _data_dir(config: ml_collections.ConfigDict) -> str:
    if not config.data_dir:
        raise UserError("no training data", "config.data_dir", "give --config.data_dir=PATH")
    return _local(config.data_dir, "config.data_dir")


def _local(data_dir: str, field: str) -> str:
    if not files.is_local(data_dir):
        # ArrayRecord's reader and libsndfile open files only.
        advice = "mount the bucket with gcsfuse (launch/tpu_pod.sh and gke.sh do: --bucket) and give that path"
        raise UserError("training data must lie in a file system", f"{field}={data_dir}", advice)
    return data_dir


class _Rows(grain.MapDataset):
    """Of each `batch_size` consecutive elements, those at `rows`."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + int(self._rows[row])]


def _scaled(rows: np.ndarray, factor: int) -> np.ndarray:
    """A process's rows of a global batch of `factor` times as many, cut between the processes in the same places."""
    return (rows[:, None] * factor + np.arange(factor)).reshape(-1)


def _batches(dataset: grain.MapDataset, batch_size: int, rows: np.ndarray, factor: int = 1) -> grain.MapDataset:
    """These rows of global batches of `factor * batch_size`."""
    rows = _scaled(rows, factor)
    return _Rows(dataset, batch_size * factor, rows).batch(len(rows), drop_remainder=True)


def _iterate(batches: grain.MapDataset, config: ml_collections.ConfigDict) -> grain.DatasetIterator:
    options = grain.ReadOptions(
        num_threads=config.input.num_threads, prefetch_buffer_size=config.input.prefetch_batches
    )
    return iter(batches.to_iter_dataset(options))


def _evaluation_batches(
    elements: Iterable[Any], encode: Callable[[Any], Example], batch_size: int, rows: np.ndarray
) -> Iterator[Example]:
    """These rows of each global batch, with `valid_B`: 0 for those that do not count.

    Such only fill up the last one, or are examples whose own `valid_B` is 0.

    Only what this process feeds is encoded, but every process makes the same number of batches.
    """
    iterator = iter(elements)
    while batch := list(itertools.islice(iterator, batch_size)):
        examples = [encode(batch[row if row < len(batch) else 0]) for row in rows]
        stacked = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        yield {**stacked, "valid_B": (rows < len(batch)) * stacked.get("valid_B", np.ones(len(rows), np.float32))}
