"""The token dataset: a TFDS dataset in ArrayRecord files, read without TensorFlow.

A record holds `id`, `semantic` [T_S] (raw, not de-duplicated), `acoustic` [T_A, Q], `num_samples`,
`speaker` and `is_end` (does it end at a true end?). The metadata says which tokenizers made it.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from audiolm_jax import files
from audiolm_jax.data.records import parse_record
from audiolm_jax.errors import UserError

NAME = "folder_tokens"
FORMAT_VERSION = 1
RESTORE = "find what is damaged by `audiolm tokenize --verify`, and restore it from a copy"
ORIGIN_FILE, LEFT_OUT_FILE, CHECKSUMS_FILE = "tokenization.json", "left_out.jsonl", "SHA256SUMS"


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


def check_split(split: str):
    """Raises a UserError where TFDS could not name a split so."""
    if split == "all" or not re.fullmatch(r"\w[\w-]*", split):
        advice = "name it in letters, digits, - and _, as train, validation or test-clean"
        raise UserError("no name for a split of a dataset", f"split {split!r}", advice)


def shard_name(split: str, shard: int, num_shards: int) -> str:
    """File name of one shard, as TFDS names it."""
    return f"{NAME}-{split}.array_record-{shard:05d}-of-{num_shards:05d}"


def write_shard(path: pathlib.Path, records: Iterable[dict[str, Any]], num_quantizers: int):
    """Writes records into one ArrayRecord file: the same bytes for the same records."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    # Random access reads one record a group.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for record in records:
            # TFDS leaves the order of the fields to chance.
            example = tf_example_pb2.Example.FromString(features(num_quantizers).serialize_example(record))
            writer.write(example.SerializeToString(deterministic=True))
    finally:
        writer.close()


def write_num_frames(folder: pathlib.Path, num_frames: Mapping[str, Sequence[int]]):
    """Writes `num_frames_SPLIT.npy`: semantic frames of each record."""
    for split, frames in num_frames.items():
        np.save(folder / f"num_frames_{split}.npy", np.asarray(frames, np.int32))


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

    write_num_frames(folder, num_frames)
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


def made_for(data_dir: str | os.PathLike[str]) -> str | None:
    """Digest of the request that a folder's dataset answers; None where it is no dataset of `audiolm tokenize`."""
    try:
        return json.loads((pathlib.Path(data_dir) / ORIGIN_FILE).read_text())["request"]
    except (OSError, ValueError, KeyError):
        return None


def write_checksums(folder: pathlib.Path, known: Mapping[str, str]):
    """Writes SHA256SUMS, as `sha256sum --check` reads it, over all files of a dataset.

    Args:
      folder: of the dataset.
      known: checksums of files that need not be read again, by name.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS_FILE)
    lines = [f"{known.get(name) or files.sha256(folder / name)}  {name}\n" for name in names]
    files.write_bytes(folder / CHECKSUMS_FILE, "".join(lines).encode())


def verify(data_dir: str | os.PathLike[str], report: Callable[[str], None]) -> int:
    """Compares every file of a dataset with its checksum.

    Args:
      data_dir: the dataset.
      report: called with one line for each file that is missing or damaged.

    Returns:
      the number of files.

    Raises:
      UserError: no checksums, or files that are missing or damaged; the first is named.
    """
    folder = pathlib.Path(data_dir)
    if not (folder / CHECKSUMS_FILE).is_file():
        raise UserError("no checksums", folder / CHECKSUMS_FILE, "give a dataset that `audiolm tokenize` made")
    lines = (folder / CHECKSUMS_FILE).read_text(errors="replace").splitlines()
    entries = [(line[:64], line[66:]) for line in lines if re.fullmatch("[0-9a-f]{64}  .+", line)]
    if not entries or len(entries) < len(lines):
        raise UserError("checksums are damaged", folder / CHECKSUMS_FILE, "restore them from a copy, or tokenize anew")
    problems = []
    for checksum, name in entries:
        path = folder / name
        found = files.sha256(path) if path.is_file() else None
        if found != checksum:
            problem = "is missing" if found is None else f"is damaged (SHA-256 is {found}, was {checksum})"
            problems.append(f"{name} {problem}")
            report(problems[-1])
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}", folder, "restore from a copy, or remove the dataset and tokenize anew")
    return len(entries)


def _read_metadata(values: Mapping[str, Any] | None, data_dir: str) -> TokenMetadata:
    error = UserError("not a token dataset of this version", data_dir, "tokenize anew")
    try:
        metadata = TokenMetadata(**(values or {}))
    except TypeError as wrong_fields:
        raise error from wrong_fields
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(metadata)}
    kinds["mean_run_length"] = (int, float)
    is_right = all(isinstance(getattr(metadata, name), kind) for name, kind in kinds.items())
    if not is_right or metadata.format_version != FORMAT_VERSION:
        raise error
    return metadata


class _Records(Sequence[dict[str, Any]]):
    """The records of a split, from their bytes; an error in reading names the shard."""

    def __init__(
        self, source: Sequence[bytes], metadata: TokenMetadata, paths: Sequence[pathlib.Path], lengths: Sequence[int]
    ):
        self._source, self._metadata, self._paths = source, metadata, paths
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            data = self._source[index]
            # Of a file that was cut ArrayRecord reads what is gone as empty.
            if not data:
                raise self._damaged(index, "a record is lost")
            return self._checked(parse_record(data, self._metadata.num_quantizers), index)
        except UserError:
            raise
        except Exception as error:  # Whatever ArrayRecord and the parsing of a record raise.
            raise self._damaged(index, str(error)) from error

    def _checked(self, record: dict[str, Any], index: int) -> dict[str, Any]:
        """It; a token outside of its vocabulary would pass for one of another kind in a model's sequence."""
        for name, size in (("semantic", self._metadata.num_clusters), ("acoustic", self._metadata.codebook_size)):
            # Seen as unsigned, negative tokens are the largest.
            if record[name].size and (largest := record[name].view(np.uint32).max()) >= size:
                what = f"{name} token {largest.view(np.int32)} of {size} in record {record['id'].decode()!r}"
                raise UserError(what, self._path(index), RESTORE)
        return record

    def _path(self, index: int) -> pathlib.Path:
        return self._paths[int(np.searchsorted(self._ends, index, side="right"))]

    def _damaged(self, index: int, why: str) -> UserError:
        return UserError(
            f"shard is damaged ({why})", self._path(index), "find all such shards by `audiolm tokenize --verify`"
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
        try:
            self._builder = tfds.builder_from_directory(data_dir)
            metadata, splits = self._builder.info.metadata, self._builder.info.splits
        except Exception as error:  # Whatever TFDS and its parsers of JSON raise.
            raise UserError(f"dataset's description is damaged ({error})", data_dir, RESTORE) from error
        self.metadata = _read_metadata(metadata, data_dir)
        self.splits = tuple(name for name, split in splits.items() if split.num_examples)
        there = set(os.listdir(data_dir))
        for path in (path for split in self.splits for path in self._shards(split)):
            if path.name not in there:
                raise UserError("shard is missing", path, "restore it from a copy, or tokenize anew")

    def _shards(self, split: str) -> list[pathlib.Path]:
        return [self._data_dir / pathlib.Path(path).name for path in self._builder.info.splits[split].filepaths]

    def source(self, split: str) -> Sequence[dict[str, Any]]:
        """The records of a split, by random access. Reading raises a UserError that names a damaged shard."""
        import tensorflow_datasets as tfds

        source = self._builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        lengths = self._builder.info.splits[split].shard_lengths
        return _Records(source, self.metadata, self._shards(split), lengths)

    def num_frames(self, split: str) -> np.ndarray:
        """Semantic frames of each record of a split, without reading the records."""
        path, size = self._data_dir / f"num_frames_{split}.npy", self._builder.info.splits[split].num_examples
        try:
            num_frames = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"lengths cannot be read ({error})", path, RESTORE) from error
        if num_frames.shape != (size,):
            raise UserError(f"not the lengths of {size} records", path, RESTORE)
        return num_frames
