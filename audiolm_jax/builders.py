"""The token datasets as TFDS builders, for pipelines that ask TFDS for data by name:

    import audiolm_jax.builders  # registers them
    parts = {"recordings": "manifest.jsonl", "codec": "runs/codec", "semantic_tokenizer": "runs/semantic_tokenizer"}
    tfds.data_source("folder_tokens", data_dir="runs/tfds", builder_kwargs=parts)
    tfds.load("folder_tokens", data_dir="runs/tfds", builder_kwargs={**parts, "file_format": "tfrecord"})

Records, their order and the metadata are those of `audiolm tokenize`; how they are spread over files is TFDS's choice.
ArrayRecord, the default, is what `data_dir` of a training takes; TFDS makes tf.data of TFRecord only. What takes more
than one process is for `audiolm tokenize`, whose datasets `tfds.builder_from_directory` opens.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from audiolm_jax import commands
from audiolm_jax.data import manifest, token_dataset, tokenize
from audiolm_jax.errors import UserError
from audiolm_jax.lm.stages import run_starts
from audiolm_jax.progress import report


class _Tokens(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Tokens of recordings.

    Args:
      recordings: folder, recording or .jsonl manifest.
      codec, semantic_tokenizer: folders of the parts.
      **kwargs: TFDS's own.

    Raises:
      UserError: as `audiolm tokenize`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        recordings: str = "",
        codec: str = "",
        semantic_tokenizer: str = "",
        file_format: str = "array_record",
        **kwargs,
    ):
        self._recordings = recordings
        # What is prepared already is read without them.
        self._tokenizers = commands.load_tokenizers(codec, semantic_tokenizer) if recordings else None
        self._num_frames: dict[str, list[int]] = {}
        self._num_runs: dict[str, int] = {}
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        if self._tokenizers is None:
            return tfds.core.DatasetInfo(builder=self)
        metadata = tokenize.describe_tokens(self._tokenizers, self._num_frames, self._num_runs)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=token_dataset.features(metadata.num_quantizers),
            metadata=tfds.core.MetadataDict(dataclasses.asdict(metadata)),
            disable_shuffling=True,
        )

    def _given_tokenizers(self) -> tokenize.Tokenizers:
        if self._tokenizers is None:
            advice = "give recordings, codec and semantic_tokenizer in builder_kwargs"
            raise UserError("nothing to make tokens of", self.name, advice)
        return self._tokenizers

    def _split_generators(self, dl_manager):
        tokenizers = self._given_tokenizers()
        usable, seconds = manifest.usable(manifest.read_manifest(self._recordings), report)
        shards = tokenize.plan_shards(usable, seconds, tokenize.SHARD_SECONDS)
        by_split = {shard.split: [other for other in shards if other.split == shard.split] for shard in shards}
        return {split: self._generate_examples(members, tokenizers) for split, members in by_split.items()}

    def _generate_examples(
        self, shards: Sequence[tokenize.Shard], tokenizers: tokenize.Tokenizers
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for shard in shards:
            frames = self._num_frames.setdefault(shard.split, [])
            records, _ = tokenize.encode_shard(shard, tokenizers, tokenize.BATCH_SECONDS, report, lambda _: None)
            for record in records:
                frames.append(len(record["semantic"]))
                runs = int(run_starts(record["semantic"]).sum())
                self._num_runs[shard.split] = self._num_runs.get(shard.split, 0) + runs
                yield record["id"], record

    def _download_and_prepare(self, dl_manager, download_config):
        super()._download_and_prepare(dl_manager, download_config)
        token_dataset.write_num_frames(pathlib.Path(self.data_dir), self._num_frames)
        metadata = tokenize.describe_tokens(self._given_tokenizers(), self._num_frames, self._num_runs)
        self.info.metadata.update(dataclasses.asdict(metadata))

    def _post_download_and_prepare_hook(self):
        token_dataset.write_checksums(pathlib.Path(self.data_dir), {})


class LibrilightTokens(_Tokens):
    """Semantic and acoustic tokens of Libri-Light (arXiv 1912.07875), or of a part of it."""


class PianoTokens(_Tokens):
    """Semantic and acoustic tokens of piano performances, such as MAESTRO's (arXiv 1810.12247)."""


class FolderTokens(_Tokens):
    """Semantic and acoustic tokens of recordings."""
