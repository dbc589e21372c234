"""One generation in progress: three stages in windows, and the waveform as it gets ready.

What is longer than a stage's training crop is generated in windows that carry the end of the one before. Every stage
goes only as far as the next coarse window needs, so that finished audio leaves while the rest is still to come, and the
memory that all this takes does not depend on the length.

Shape suffixes: B rows (prompt-major), W samples, T frames, Q quantizer levels.
"""

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax.codec.codec import Codec
from audiolm_jax.codec.streaming import ChunkDecoder
from audiolm_jax.lm.decode import LanguageModel, decode_stage, size_class
from audiolm_jax.lm.sampling import Sampling
from audiolm_jax.lm.stages import Stage

# Of a window's crop, how much is the end of what came before, where not all of it fits: of the coarse and fine stages
# exactly, of the semantic stage at least (SPEC: coarse 3 of 10 s, semantic 15 of 30 s). The paper's fine chunks carry
# nothing: as benchmarks/length.py measures, the sound then changes more where one begins.
CARRIED = {"semantic": 0.5, "coarse": 0.3, "fine": 0.1}
# An ended utterance may sound this much longer than its semantic tokens last on average.
END_SLACK = 1.25
# Seconds of audio that leave at a time.
BLOCK_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Block:
    """The next stretch of all rows' audio.

    Attributes:
      wave_BW: float32, zeros beyond a row's end.
      lengths_B: how many of these samples belong to each row.
    """

    wave_BW: np.ndarray
    lengths_B: np.ndarray


@dataclasses.dataclass
class Row:
    """One waveform in the making.

    Attributes:
      key: the row's own PRNG key.
      semantic: frame-level semantic tokens so far.
      acoustic: codes so far [T, Q]; the coarse stage fills in the first levels, the fine stage the rest.
      prompt_frames: acoustic frames that come from the prompt.
      total_frames: acoustic frames wanted.
      total_samples: samples wanted; the last frame may be cut.
      may_end: whether an end token may be sampled.
      ended: whether the semantic stage, where there is one, sampled one: only then may the coarse stage.
      tokens: the semantic stage's own tokens (de-duplicated where it works on such), the prompt's included.
      sampled: how many of these were sampled.
      semantic_windows: how many windows of the semantic stage have been sampled.
      finished_frames: how many acoustic frames have all their levels.
    """

    key: jax.Array
    semantic: np.ndarray
    acoustic: np.ndarray
    prompt_frames: int
    total_frames: int
    total_samples: int
    may_end: bool
    ended: bool = False
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    sampled: int = 0
    semantic_windows: int = 0
    finished_frames: int = 0

    @property
    def complete(self) -> bool:
        return len(self.acoustic) >= self.total_frames

    def samples(self, hop_length: int) -> int:
        return min(self.total_samples, len(self.acoustic) * hop_length)


class Clock:
    """Tokens a second of each stage."""

    def __init__(self):
        self._spent: dict[str, list[float]] = {}

    def measure(self, name: str, function: Callable[[], tuple[list[np.ndarray], list[bool]]]):
        start = time.monotonic()
        rows, ended = function()
        spent = self._spent.setdefault(name, [0.0, 0.0])
        spent[0] += sum(row.size for row in rows)
        spent[1] += time.monotonic() - start
        return rows, ended

    def rates(self) -> dict[str, float]:
        return {name: tokens / max(seconds, 1e-9) for name, (tokens, seconds) in self._spent.items()}


@dataclasses.dataclass(frozen=True)
class Windows(Iterator[Block]):
    """Generation of some rows: everything from the first sample to the last, in blocks of `BLOCK_SECONDS`.

    The last block may be shorter, and so is the first of a codec that looks ahead.

    Attributes:
      codec: decodes what is finished.
      stages: language models by name; no "fine" where the coarse stage predicts every level, no "semantic" where it
        has no condition.
      frames_per_token: acoustic frames in the time of one semantic frame.
      mean_run_length: semantic frames for each of the semantic stage's tokens, on average; 1 without de-duplication.
      rows: changed as the generation goes on.
      sampling: settings of each stage.
      samples_semantic: whether semantic tokens are sampled; False where the rows have all of them or need none.
      clock: measures the stages.
    """

    codec: Codec
    stages: Mapping[str, LanguageModel]
    frames_per_token: int
    mean_run_length: float
    rows: Sequence[Row]
    sampling: Mapping[str, Sampling]
    samples_semantic: bool
    clock: Clock

    @property
    def lengths_B(self) -> np.ndarray:
        """Samples of each row so far."""
        return np.array([row.samples(self.codec.hop_length) for row in self.rows])

    @property
    def ended_B(self) -> np.ndarray:
        """Whether a sampled end token has shortened the row; once all blocks have come."""
        return self.lengths_B < np.array([row.total_samples for row in self.rows])

    def __next__(self) -> Block:
        return next(self._blocks)

    @functools.cached_property
    def _blocks(self) -> Iterator[Block]:
        return self._generate()

    def _generate(self) -> Iterator[Block]:
        decoder = _Decoder(self.codec, len(self.rows))
        for row in self.rows:
            row.finished_frames = row.prompt_frames
            if self.samples_semantic:
                row.tokens = self.stages["semantic"].stage.target.flatten(row.semantic)
        yield from decoder.blocks(self.rows)
        window = 0
        while not all(row.complete for row in self.rows):
            if self.samples_semantic:
                self._extend_semantic()
            self._extend_coarse(window)
            if "fine" in self.stages:
                self._fill_fine()
            else:
                for row in self.rows:
                    row.finished_frames = len(row.acoustic)
            yield from decoder.blocks(self.rows)
            window += 1

    @property
    def window_frames(self) -> tuple[int, int]:
        """Acoustic frames of a coarse window, and how many of these it carries: whole semantic frames."""
        semantic_frames = self.stages["coarse"].stage.crop_frames
        carried = int(semantic_frames * CARRIED["coarse"])
        return semantic_frames * self.frames_per_token, carried * self.frames_per_token

    @property
    def chunk_frames(self) -> tuple[int, int]:
        """Acoustic frames of a fine chunk, and how many of these it carries."""
        size = round(self.stages["fine"].stage.crop_seconds * self.codec.frame_rate)
        return size, int(size * CARRIED["fine"])

    def _coarse_span(self, row: Row) -> tuple[int, int]:
        """Frames start … stop of a row's next coarse window, what it carries over included."""
        limit, carried = self.window_frames
        done = len(row.acoustic)
        fits = row.total_frames <= limit or done < limit - carried
        start = 0 if fits else done - carried
        return start, min(row.total_frames, start + limit)

    def _extend_semantic(self):
        """Stage 1: continues each row's semantic tokens until they last to the end of its next coarse window."""
        lm = self.stages["semantic"]
        segment = lm.stage.target
        limit = segment.max_tokens(lm.stage.crop_seconds)
        carried = int(limit * CARRIED["semantic"])
        while True:
            prefixes, counts = [], []
            for row in self.rows:
                missing = self._missing_tokens(row)
                tokens = row.tokens[-max(carried, limit - missing) :]
                prefixes.append(lm.stage.prefix(None, tokens))
                counts.append(min(missing, limit - len(tokens)))
            if not any(counts):
                return
            numbers = [row.semantic_windows for row in self.rows]
            codes, ended = self._sample(lm, self.rows, numbers, prefixes, counts, [row.may_end for row in self.rows])
            for row, count, codes_TQ, has_ended in zip(self.rows, counts, codes, ended, strict=True):
                if count:
                    self._append_semantic(row, codes_TQ[:, 0], has_ended)

    def _missing_tokens(self, row: Row) -> int:
        if row.ended or row.complete:
            return 0
        missing = math.ceil(self._coarse_span(row)[1] / self.frames_per_token) - len(row.semantic)
        return max(0, math.ceil(missing / self.mean_run_length))

    def _append_semantic(self, row: Row, tokens: np.ndarray, ended: bool):
        edges = np.round((row.sampled + np.arange(len(tokens) + 1)) * self.mean_run_length).astype(int)
        row.semantic = np.concatenate([row.semantic, np.repeat(tokens, np.diff(edges))])
        row.tokens = np.concatenate([row.tokens, tokens])
        row.sampled += len(tokens)
        row.semantic_windows += 1
        row.ended = ended
        if ended:
            slack = END_SLACK if self.stages["semantic"].stage.target.deduplicate else 1.0
            longest = math.ceil(len(row.semantic) * self.frames_per_token * slack)
            row.total_frames = min(row.total_frames, max(longest, row.prompt_frames))

    def _extend_coarse(self, window: int):
        """Stage 2: one window of each row's coarse acoustic tokens, given its semantic tokens."""
        lm = self.stages["coarse"]
        condition, target = lm.stage.condition, lm.stage.target
        prefixes, counts, may_end = [], [], []
        for row in self.rows:
            start, stop = self._coarse_span(row)
            last = stop == row.total_frames
            until = None if last else math.ceil(stop / self.frames_per_token)
            given = condition.flatten(row.semantic[start // self.frames_per_token : until]) if condition else None
            prefixes.append(lm.stage.prefix(given, target.flatten(row.acoustic[start:])))
            counts.append(max(0, stop - len(row.acoustic)))
            may_end.append(row.ended and last if "semantic" in self.stages else row.may_end)
        codes, ended = self._sample(lm, self.rows, [window] * len(self.rows), prefixes, counts, may_end)
        for row, codes_TQ, has_ended in zip(self.rows, codes, ended, strict=True):
            unfilled = np.zeros((len(codes_TQ), self.codec.num_quantizers - target.num_levels), np.int32)
            row.acoustic = np.concatenate([row.acoustic, np.concatenate([codes_TQ, unfilled], axis=1)])
            if has_ended:
                row.total_frames = len(row.acoustic)

    def _fill_fine(self):
        """Stage 3: the fine levels of every new chunk, as one batch; a row's last may be shorter.

        The frames that a window's first chunk carries have their fine levels. The other chunks do not wait for the one
        before: what they carry they sample for themselves and drop.
        """
        lm = self.stages["fine"]
        coarse, fine = lm.stage.condition, lm.stage.target
        assert coarse is not None
        crop, carried = self.chunk_frames
        size = crop - carried
        chunks = [
            (row, slice(start, min(start + size, len(row.acoustic))))
            for row in self.rows
            for start in range(row.finished_frames, len(row.acoustic), size)
            if row.complete or start + size <= len(row.acoustic)
        ]
        if not chunks:
            return
        prefixes, counts = [], []
        for row, span in chunks:
            first = max(0, span.start - carried)
            given_TQ = row.acoustic[first : min(span.start, row.finished_frames)]
            condition = coarse.flatten(row.acoustic[first : span.stop])
            prefixes.append(lm.stage.prefix(condition, fine.flatten(given_TQ)))
            counts.append(span.stop - first - len(given_TQ))
        numbers = [(span.start - row.prompt_frames) // size for row, span in chunks]
        codes, _ = self._sample(lm, [row for row, _ in chunks], numbers, prefixes, counts, [False] * len(chunks))
        for (row, span), codes_TQ in zip(chunks, codes, strict=True):
            levels = slice(fine.first_level, fine.first_level + fine.num_levels)
            row.acoustic[span, levels] = codes_TQ[len(codes_TQ) - (span.stop - span.start) :]
            row.finished_frames = span.stop

    def _sample(self, lm: LanguageModel, rows, numbers, prefixes, counts, may_end):
        """`decode_stage` for windows or chunks of rows, each with the key of its row, stage and number."""
        keys_B = jnp.stack([_stage_key(row.key, lm.stage, number) for row, number in zip(rows, numbers, strict=True)])
        return self.clock.measure(
            lm.stage.name,
            lambda: decode_stage(lm, prefixes, counts, may_end, keys_B, self.sampling[lm.stage.name]),
        )


def _stage_key(key: jax.Array, stage: Stage, number: int) -> jax.Array:
    """The key of a row's window or chunk in one stage."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(stage.name.encode())), number)


class _Decoder:
    """Decodes the rows' finished frames in blocks, all rows in step."""

    def __init__(self, codec: Codec, num_rows: int):
        self._codec, self._batch = codec, size_class(num_rows)
        self._size = round(BLOCK_SECONDS * codec.frame_rate)
        self._decoder = ChunkDecoder(codec)
        # How many frames have gone into the decoder, and how many samples have come out.
        self._frame = self._sample = 0

    def blocks(self, rows: Sequence[Row]) -> Iterator[Block]:
        """What has become ready: whole blocks, and the rest once every row is complete."""
        growing = [row.finished_frames for row in rows if not row.complete]
        ready = min(growing) if growing else max(row.finished_frames for row in rows)
        while ready - self._frame >= self._size or (not growing and ready > self._frame):
            yield from self._heard(rows, self._decode(rows))
        if not growing:
            yield from self._heard(rows, self._decoder.finish())

    def _decode(self, rows: Sequence[Row]) -> np.ndarray:
        codes_BTQ = np.zeros((self._batch, self._size, self._codec.num_quantizers), np.int32)
        lengths_B = np.zeros(self._batch, np.int32)
        for index, row in enumerate(rows):
            frames = row.acoustic[self._frame : min(row.finished_frames, self._frame + self._size)]
            codes_BTQ[index, : len(frames)], lengths_B[index] = frames, len(frames)
        self._frame += self._size
        return self._decoder.decode(codes_BTQ, lengths_B)

    def _heard(self, rows: Sequence[Row], wave_BW: np.ndarray) -> Iterator[Block]:
        """The next samples as a block, where any row has some."""
        hop, size = self._codec.hop_length, wave_BW.shape[1]
        lengths_B = np.array([np.clip(row.samples(hop) - self._sample, 0, size) for row in rows])
        self._sample += size
        if num_samples := int(lengths_B.max()):
            heard_BW = np.arange(num_samples) < lengths_B[:, None]
            yield Block(np.where(heard_BW, wave_BW[: len(rows), :num_samples], np.float32(0)), lengths_B)
