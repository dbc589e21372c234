"""The three stages of AudioLM as data: vocabulary ranges, sequence layout, crop, loss span.

Every stage is one sequence

    [BOS] condition … [SEP] target … [EOS]        (no condition and no SEP in the semantic stage)

over one vocabulary: three special tokens, then a block of codes for each level of the condition and
of the target. The transformer does not know which stage it serves; piano's two-stage layout is
another value, not another code path. AudioLM (arXiv 2209.03143) §3.3 gives the layouts; BOS and SEP
are open in the paper.

Pure integer functions on NumPy arrays; T frames, Q quantizer levels.
"""

import dataclasses
import typing

import numpy as np

BOS = 0  # Begins every sequence; also pads inputs, where the loss weight is 0.
SEP = 1  # Between the condition and the target.
EOS = 2  # The true end of an utterance, never the end of a crop.
NUM_SPECIAL = 3

Source = typing.Literal["semantic", "acoustic"]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of tokens: some levels of one token stream, flattened row-major by frame.

    Attributes:
      source: which stream of a token record.
      first_level, num_levels: the quantizer levels taken ((0, 1) for semantic tokens).
      codebook_size: codes a level.
      frame_rate: frames a second, before de-duplication.
      deduplicate: whether consecutive repeats are removed (semantic tokens only).
    """

    source: Source
    first_level: int
    num_levels: int
    codebook_size: int
    frame_rate: int
    deduplicate: bool = False

    def flatten(self, codes_TQ: np.ndarray) -> np.ndarray:
        """Codes [T] or [T, all levels] -> this segment's flattened tokens, level offsets added (int32).

        Token i carries the offset (i mod num_levels) · codebook_size (AudioLM §3.3).
        """
        codes_TQ = np.asarray(codes_TQ, np.int32)
        codes_TQ = codes_TQ[:, None] if codes_TQ.ndim == 1 else codes_TQ
        codes_TQ = codes_TQ[:, self.first_level : self.first_level + self.num_levels]
        if self.deduplicate:
            codes_TQ = codes_TQ[run_starts(codes_TQ[:, 0])]
        return (codes_TQ + self.codebook_size * np.arange(self.num_levels, dtype=np.int32)).ravel()

    def unflatten(self, tokens: np.ndarray) -> np.ndarray:
        """Inverse of `flatten` without de-duplication: [T · num_levels] -> codes [T, num_levels]."""
        codes_TQ = np.asarray(tokens, np.int32).reshape(-1, self.num_levels)
        return codes_TQ - self.codebook_size * np.arange(self.num_levels, dtype=np.int32)

    @property
    def vocabulary(self) -> int:
        return self.num_levels * self.codebook_size

    def max_tokens(self, seconds: float) -> int:
        """Tokens in `seconds` of audio, at most (nothing repeats)."""
        return round(seconds * self.frame_rate) * self.num_levels


def run_starts(tokens_T: np.ndarray) -> np.ndarray:
    """Mask of the positions that differ from their predecessor: what de-duplication keeps."""
    tokens_T = np.asarray(tokens_T)
    return np.concatenate([np.ones(min(1, len(tokens_T)), bool), tokens_T[1:] != tokens_T[:-1]])


@dataclasses.dataclass(frozen=True)
class Stage:
    """One language model's task.

    Attributes:
      name: "semantic", "coarse" or "fine".
      condition: what the target is predicted from; None in the semantic stage, and in a coarse stage of
        acoustic tokens alone (the baseline of the paper's piano experiment).
      target: what is predicted and sampled; the loss covers it alone.
      semantic_rate, acoustic_rate: frames a second of a token record's streams; the latter a multiple of the former.
      crop_seconds: training crop.
      temperature: sampling temperature of the paper (§4.1).
      predicts_end: whether a true end is marked by EOS. The fine stage's length is its condition's.
    """

    name: str
    condition: Segment | None
    target: Segment
    semantic_rate: int
    acoustic_rate: int
    crop_seconds: float
    temperature: float
    predicts_end: bool

    @property
    def condition_offset(self) -> int:
        return NUM_SPECIAL

    @property
    def target_offset(self) -> int:
        return NUM_SPECIAL + (self.condition.vocabulary if self.condition else 0)

    @property
    def vocab_size(self) -> int:
        """Tokens of the stage, rounded up to a multiple of 128 so that the vocabulary shards and tiles."""
        return -(-(self.target_offset + self.target.vocabulary) // 128) * 128

    @property
    def sequence_length(self) -> int:
        """Positions of the longest training example: a whole crop."""
        return self.max_positions(self.crop_frames)

    @property
    def crop_frames(self) -> int:
        """Semantic frames of a crop."""
        return max(1, round(self.crop_seconds * self.semantic_rate))

    def max_positions(self, semantic_frames: int) -> int:
        """Positions of the training example of so many semantic frames, at most: with BOS (or EOS) and SEP."""
        seconds = semantic_frames / self.semantic_rate
        condition = self.condition.max_tokens(seconds) + 1 if self.condition else 0
        return 1 + condition + self.target.max_tokens(seconds)

    def level_start(self, level: int) -> int:
        """First token of a target level's block; its codes are the `codebook_size` tokens from there."""
        return self.target_offset + level * self.target.codebook_size

    def prefix(self, condition_tokens: np.ndarray | None, target_tokens: np.ndarray) -> np.ndarray:
        """What stands before the first sampled token: [BOS] condition [SEP] target-so-far, int32.

        Args:
          condition_tokens: the condition's flattened tokens (see `Segment.flatten`), None without one.
          target_tokens: the flattened target so far, a whole number of frames (possibly none).
        """
        parts = [np.array([BOS])]
        if self.condition:
            parts += [np.asarray(condition_tokens) + self.condition_offset, np.array([SEP])]
        parts.append(np.asarray(target_tokens) + self.target_offset)
        return np.concatenate(parts).astype(np.int32)

    def sequence(self, semantic_T: np.ndarray, acoustic_TQ: np.ndarray, at_end: bool) -> tuple[np.ndarray, int]:
        """The training sequence of one crop.

        Args:
          semantic_T, acoustic_TQ: the crop's raw tokens, covering the same stretch of time.
          at_end: whether the crop ends where the utterance truly ends.

        Returns:
          tokens (BOS first) and the position of the first one that the loss covers.
        """
        sources = {"semantic": semantic_T, "acoustic": acoustic_TQ}
        condition = self.condition.flatten(sources[self.condition.source]) if self.condition else None
        tokens = self.prefix(condition, self.target.flatten(sources[self.target.source]))
        loss_start = 1 if condition is None else 2 + len(condition)
        if at_end and self.predicts_end:
            tokens = np.append(tokens, np.int32(EOS))
        return tokens, loss_start


def make_stage(
    name: str,
    num_clusters: int,
    codebook_size: int,
    num_quantizers: int,
    num_coarse_quantizers: int,
    semantic_rate: int,
    acoustic_rate: int,
    crop_seconds: float,
    deduplicate: bool,
    semantic_condition: bool = True,
) -> Stage:
    """Builds a stage from the numbers of the tokenizers (a config's `stage` fields).

    Piano has num_coarse_quantizers = num_quantizers = 3: its coarse stage predicts every level and
    there is no fine stage.
    """
    semantic = Segment("semantic", 0, 1, num_clusters, semantic_rate, deduplicate)
    coarse = Segment("acoustic", 0, num_coarse_quantizers, codebook_size, acoustic_rate)
    fine = Segment(
        "acoustic", num_coarse_quantizers, num_quantizers - num_coarse_quantizers, codebook_size, acoustic_rate
    )
    timing = (semantic_rate, acoustic_rate, crop_seconds)
    match name:
        case "semantic":
            return Stage(name, None, semantic, *timing, temperature=0.6, predicts_end=True)
        case "coarse":
            condition = semantic if semantic_condition else None
            return Stage(name, condition, coarse, *timing, temperature=0.8, predicts_end=True)
        case "fine" if fine.num_levels > 0:
            return Stage(name, coarse, fine, *timing, temperature=0.6, predicts_end=False)
    raise ValueError(f"no stage {name!r} for {num_coarse_quantizers} coarse of {num_quantizers} levels")
