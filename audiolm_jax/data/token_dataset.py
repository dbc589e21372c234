"""The token dataset: a TFDS dataset in ArrayRecord files, read without TensorFlow.

A record holds `id`, `semantic` [T_S] (raw, not de-duplicated), `acoustic` [T_A, Q], `num_samples`,
`speaker` and `is_end` (does it end at a true end?). The metadata says which tokenizers made it.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from audiolm_jax.errors import UserError

NAME = "folder_tokens"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TokenMetadata:
    """What a token dataset's `metadata.json` says.

    Attributes:
      codec, semantic_tokenizer: fingerprints of the parts that made the tokens.
      num_clusters: K, semantic tokens.
      codebook_size, num_quantizers: N and Q of the acoustic tokens.
      semantic_rate, acoustic_rate: frames a second.
      sample_rate: Hz of the codec.
      mean_run_length: semantic frames per token that de-duplication keeps, over the training split.
      format_version: of this layout.
    """

    codec: str
    semantic_tokenizer: str
    num_clusters: int
    codebook_size: int
    num_quantizers: int
    semantic_rate: int
    acoustic_rate: int
    sample_rate: int
    mean_run_length: float
    format_version: int = FORMAT_VERSION

    def check_stage(self, stage: ml_collections.ConfigDict, data_dir: str):
        """Raises a UserError naming the first field of a config's `stage` that this dataset contradicts."""
        for name in ("num_clusters", "codebook_size", "num_quantizers", "semantic_rate", "acoustic_rate"):
            if stage[name] != getattr(self, name):
                raise UserError(
                    f"config.stage.{name}={stage[name]} but the tokens have {getattr(self, name)}",
                    data_dir,
                    f"set --config.stage.{name}={getattr(self, name)} or tokenize anew",
                )


@functools.cache
def features(num_quantizers: int):
    """TFDS features of a record."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "semantic": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "acoustic": tfds.features.Tensor(shape=(None, num_quantizers), dtype=np.int32),
            "num_samples": tfds.features.Scalar(np.int64),
            "speaker": tfds.features.Text(),
            "is_end": tfds.features.Scalar(np.bool_),
        }
    )


def shard_name(split: str, shard: int, num_shards: int) -> str:
    """File name of one shard, as TFDS names it."""
    return f"{NAME}-{split}.array_record-{shard:05d}-of-{num_shards:05d}"


def write_shard(path: pathlib.Path, records: Iterable[dict[str, Any]], num_quantizers: int):
    """Writes records into one ArrayRecord file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # Random access reads one record a group.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for record in records:
            writer.write(features(num_quantizers).serialize_example(record))
    finally:
        writer.close()


def write_info(
    folder: pathlib.Path,
    shard_lengths: dict[str, list[int]],
    num_frames: Mapping[str, Sequence[int]],
    metadata: TokenMetadata,
):
    """Writes what makes the shards a TFDS dataset, and `num_frames_SPLIT.npy` beside it.

    Args:
      folder: of the shards.
      shard_lengths: records of each shard, by split.
      num_frames: semantic frames of each record, by split.
      metadata: of the dataset.
    """
    import tensorflow_datasets as tfds

    for split, frames in num_frames.items():
        np.save(folder / f"num_frames_{split}.npy", np.asarray(frames, np.int32))
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=NAME, filetype_suffix="array_record")
    splits = []
    for split, lengths in shard_lengths.items():
        paths = [folder / shard_name(split, shard, len(lengths)) for shard in range(len(lengths))]
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=lengths,
                num_bytes=sum(path.stat().st_size for path in paths),
                filename_template=template.replace(split=split),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(metadata.num_quantizers),
        split_infos=splits,
        filename_template=template,
        version="1.0.0",
        check_data=False,
        description="Semantic and acoustic tokens of recordings, made by `audiolm tokenize`.",
        metadata=tfds.core.MetadataDict(dataclasses.asdict(metadata)),
    )


class TokenDataset:
    """An opened token dataset.

    Attributes:
      metadata: which tokenizers made it.
      splits: names of its splits.
    """

    def __init__(self, data_dir: str):
        import tensorflow_datasets as tfds

        if not (pathlib.Path(data_dir) / "dataset_info.json").is_file():
            raise UserError("no token dataset", data_dir or "config.data_dir", "make one with `audiolm tokenize`")
        self._data_dir = pathlib.Path(data_dir)
        self._builder = tfds.builder_from_directory(data_dir)
        try:
            self.metadata = TokenMetadata(**self._builder.info.metadata)
        except TypeError as error:
            raise UserError("not a token dataset of this version", data_dir, "tokenize anew") from error
        self.splits = tuple(self._builder.info.splits)

    def source(self, split: str) -> Sequence[dict[str, Any]]:
        """The records of a split, by random access."""
        return self._builder.as_data_source(split=split)

    def num_frames(self, split: str) -> np.ndarray:
        """Semantic frames of each record of a split, without reading the records."""
        return np.load(self._data_dir / f"num_frames_{split}.npy")
