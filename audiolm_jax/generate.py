"""Prompt → semantic → coarse → fine → waveform: AudioLM's generation (arXiv 2209.03143 §3.4).

Rows are processed together and may differ in length; each draws from its own key, made of the seed,
its prompt's samples and its number, so a row does not depend on its company. What is longer than a
stage's training crop is generated in windows that carry the end of the one before.

Shape suffixes: B rows (prompt-major), W samples, T frames, Q quantizer levels.
"""

import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax.codec.codec import Codec
from audiolm_jax.errors import UserError
from audiolm_jax.lm.decode import bucket, decode_stage
from audiolm_jax.lm.objective import next_token_losses
from audiolm_jax.lm.sampling import Sampling
from audiolm_jax.lm.stages import Stage
from audiolm_jax.lm.transformer import TransformerConfig
from audiolm_jax.semantic.tokenizer import SemanticTokenizer

MODES = ("continuation", "acoustic", "unconditional")
# Of a window's crop, how much is the end of the window before (SPEC: coarse 3 of 10 s, semantic 15 of 30 s).
CARRIED = {"semantic": 0.5, "coarse": 0.3}
DEFAULT_SECONDS = 10.0
# An ended utterance may sound this much longer than its semantic tokens last on average.
END_SLACK = 1.25


def check_request(mode: str, has_prompt: bool, seconds: float | None, num_samples: int):
    """Raises a UserError where the arguments of `AudioLM.generate` contradict each other."""
    if mode not in MODES:
        raise UserError("unknown mode", mode, f"use one of {', '.join(MODES)}")
    if mode == "unconditional" and has_prompt:
        raise UserError("a prompt is refused", f"mode {mode}", "leave it out or choose another mode")
    if mode != "unconditional" and not has_prompt:
        raise UserError("no prompt", f"mode {mode}", "give a recording to start from")
    if mode == "acoustic" and seconds is not None:
        raise UserError("seconds are refused", f"mode {mode}", "leave them out: the recording sets the length")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UserError("seconds out of range", seconds, "give more than 0")
    if num_samples < 1:
        raise UserError("num_samples must be 1 or more", num_samples, "change it")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """One stage: its task, architecture and parameters."""

    stage: Stage
    config: TransformerConfig
    params: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated; rows are prompt-major: row = prompt · num_samples + sample.

    Attributes:
      wave_BW: float32, zeros beyond each row's length.
      lengths_B: samples of each row.
      sample_rate: Hz.
      semantic_BT: frame-level semantic tokens, −1 beyond the end. Where the semantic stage works on
        de-duplicated tokens, a sampled token stands for the training set's mean run length.
      acoustic_BTQ: acoustic tokens, −1 beyond the end.
      ended_B: whether a sampled end token shortened the row.
      tokens_per_second: sampling speed of each stage that ran, compilation included.
    """

    wave_BW: np.ndarray
    lengths_B: np.ndarray
    sample_rate: int
    semantic_BT: np.ndarray
    acoustic_BTQ: np.ndarray
    ended_B: np.ndarray
    tokens_per_second: dict[str, float]


@dataclasses.dataclass
class _Row:
    """One waveform in the making.

    Attributes:
      key: the row's own PRNG key.
      semantic: frame-level semantic tokens so far.
      acoustic: codes so far [T, Q]; the coarse stage fills in the first levels, the fine stage the rest.
      prompt_frames: acoustic frames that come from the prompt.
      total_frames: acoustic frames wanted.
      total_samples: samples wanted; the last frame may be cut.
      may_end: whether an end token may be sampled.
      ended: whether the semantic stage sampled one: only then may the coarse stage.
    """

    key: jax.Array
    semantic: np.ndarray
    acoustic: np.ndarray
    prompt_frames: int
    total_frames: int
    total_samples: int
    may_end: bool
    ended: bool = False

    def samples(self, hop_length: int) -> int:
        return min(self.total_samples, len(self.acoustic) * hop_length)


class _Clock:
    """Tokens a second of each stage."""

    def __init__(self):
        self._spent: dict[str, list[float]] = {}

    def measure(self, name: str, function: Callable[[], Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
        start = time.monotonic()
        rows = function()
        spent = self._spent.setdefault(name, [0.0, 0.0])
        spent[0] += sum(row.size for row in rows)
        spent[1] += time.monotonic() - start
        return rows

    def rates(self) -> dict[str, float]:
        return {name: tokens / max(seconds, 1e-9) for name, (tokens, seconds) in self._spent.items()}


@dataclasses.dataclass(frozen=True)
class AudioLM:
    """The whole model: a bundle, loaded (`audiolm_jax.load_bundle`).

    Attributes:
      codec, tokenizer: the tokenizers.
      stages: language models by stage name; no "fine" where the coarse stage predicts every level.
      mean_run_length: semantic frames per de-duplicated token in the training data.
      fingerprints: of each part.
    """

    codec: Codec
    tokenizer: SemanticTokenizer
    stages: dict[str, LanguageModel]
    mean_run_length: float
    fingerprints: dict[str, str]

    def generate(
        self,
        prompt_BW: np.ndarray | None = None,
        mode: str = "continuation",
        seconds: float | None = None,
        num_samples: int = 1,
        seed: int = 0,
        lengths_B: np.ndarray | None = None,
        sampling: dict[str, Sampling] | None = None,
        ignore_end: bool = False,
    ) -> Generation:
        """Generates audio.

        Args:
          prompt_BW: prompts at `codec.sample_rate`, float [B, W]; None for the unconditional mode.
          mode: "continuation" (prompt, then `seconds` of new audio), "acoustic" (the whole prompt again
            from its semantic tokens) or "unconditional" (`seconds` from nothing).
          seconds: of new audio, 10 by default; not for the acoustic mode.
          num_samples: rows for each prompt.
          seed: of all sampling.
          lengths_B: samples of each prompt; all of them by default.
          sampling: settings of each stage by name; the paper's temperatures where none are given.
          ignore_end: never sample an end token.

        Raises:
          UserError: arguments that contradict each other or a prompt that is too short.
        """
        check_request(mode, prompt_BW is not None, seconds, num_samples)
        seconds = DEFAULT_SECONDS if seconds is None else seconds
        clock = _Clock()
        rows = self._start(prompt_BW, lengths_B, mode, seconds, num_samples, seed, not ignore_end)
        settings = {name: Sampling(lm.stage.temperature) for name, lm in self.stages.items()} | (sampling or {})
        if mode != "acoustic":
            self._continue_semantic(rows, settings["semantic"], clock)
        self._continue_coarse(rows, settings["coarse"], clock)
        if "fine" in self.stages:
            self._fill_fine(rows, settings["fine"], clock)
        return self._finish(rows, clock)

    @property
    def _frames_per_token(self) -> int:
        """Acoustic frames in the time of one semantic frame."""
        return round(self.codec.frame_rate / self.tokenizer.frame_rate)

    def _start(self, prompt_BW, lengths_B, mode, seconds, num_samples, seed, may_end) -> list[_Row]:
        rate, hop, levels = self.codec.sample_rate, self.codec.hop_length, self.codec.num_quantizers
        base = jax.random.key(seed)
        if mode == "unconditional":
            total = round(seconds * rate)
            empty = np.zeros(0, np.int32), np.zeros((0, levels), np.int32)
            keys = [jax.random.fold_in(base, k) for k in range(num_samples)]
            return [_Row(key, *empty, 0, math.ceil(total / hop), total, may_end) for key in keys]
        wave_BW = np.asarray(prompt_BW)
        if wave_BW.ndim != 2:
            raise UserError("prompt must be [B, W]", f"shape {wave_BW.shape}", "add a batch axis")
        lengths_B = np.full(len(wave_BW), wave_BW.shape[1]) if lengths_B is None else np.asarray(lengths_B)
        token_samples = hop * self._frames_per_token
        if lengths_B.min() < token_samples:
            raise UserError(
                "prompt is shorter than one semantic token",
                f"prompt {int(lengths_B.argmin())} with {lengths_B.min()} samples",
                f"give at least {token_samples} samples",
            )
        semantic_BT = np.asarray(self.tokenizer.encode(wave_BW, lengths_B))
        acoustic_BTQ = np.asarray(self.codec.encode(wave_BW, lengths_B))
        rows = []
        for wave_W, length, semantic_T, acoustic_TQ in zip(wave_BW, lengths_B, semantic_BT, acoustic_BTQ, strict=True):
            prompt_key = jax.random.fold_in(base, np.uint32(zlib.crc32(np.float32(wave_W[:length]).tobytes())))
            if mode == "acoustic":
                tokens, frames, total, ends = math.ceil(length / token_samples), 0, int(length), False
            else:
                # Whole semantic frames; what the prompt has beyond them is generated with the rest.
                tokens = int(length) // token_samples
                frames = tokens * self._frames_per_token
                total, ends = int(length) + round(seconds * rate), may_end
            for k in range(num_samples):
                key = jax.random.fold_in(prompt_key, k)
                row = _Row(key, semantic_T[:tokens], acoustic_TQ[:frames], frames, math.ceil(total / hop), total, ends)
                rows.append(row)
        return rows

    def _continue_semantic(self, rows: list[_Row], sampling: Sampling, clock: _Clock):
        """Stage 1: continues each row's semantic tokens until they last as long as the row."""
        lm = self.stages["semantic"]
        segment = lm.stage.target
        run_length = self.mean_run_length if segment.deduplicate else 1.0
        limit = segment.max_tokens(lm.stage.crop_seconds)
        carried = int(limit * CARRIED["semantic"])
        missing = [math.ceil(row.total_frames / self._frames_per_token) - len(row.semantic) for row in rows]
        wanted = [math.ceil(frames / run_length) for frames in missing]
        sampled: list[np.ndarray] = [np.zeros(0, np.int32) for _ in rows]
        before = [segment.flatten(row.semantic) for row in rows]
        window = 0
        while any(count > 0 for count in wanted):
            prefixes, counts = [], []
            for context, new, count in zip(before, sampled, wanted, strict=True):
                tokens = np.concatenate([context, new])
                if len(tokens) + count > limit:
                    tokens = tokens[-carried:]
                prefixes.append(lm.stage.prefix(None, tokens))
                counts.append(max(0, min(count, limit - len(tokens))))
            codes, ended = self._decode(lm, rows, prefixes, counts, [r.may_end for r in rows], window, sampling, clock)
            for i, row in enumerate(rows):
                sampled[i] = np.concatenate([sampled[i], codes[i][:, 0]])
                row.ended |= ended[i]
                wanted[i] = 0 if row.ended else wanted[i] - counts[i]
            window += 1
        for row, tokens in zip(rows, sampled, strict=True):
            edges = np.round(np.arange(len(tokens) + 1) * run_length).astype(int)
            row.semantic = np.concatenate([row.semantic, np.repeat(tokens, np.diff(edges))])
            if row.ended:
                slack = END_SLACK if segment.deduplicate else 1.0
                longest = math.ceil(len(row.semantic) * self._frames_per_token * slack)
                row.total_frames = min(row.total_frames, max(longest, row.prompt_frames))

    def _continue_coarse(self, rows: list[_Row], sampling: Sampling, clock: _Clock):
        """Stage 2: continues each row's coarse acoustic tokens, given its semantic tokens."""
        lm = self.stages["coarse"]
        condition, target, ratio = lm.stage.condition, lm.stage.target, self._frames_per_token
        limit = round(lm.stage.crop_seconds * self.codec.frame_rate)
        carried = int(limit * CARRIED["coarse"]) // ratio * ratio
        window = 0
        while any(len(row.acoustic) < row.total_frames for row in rows):
            prefixes, counts, ends = [], [], []
            for row in rows:
                done = len(row.acoustic)
                fits = row.total_frames <= limit or done < limit - carried
                start = 0 if fits else done - carried
                stop = min(row.total_frames, start + limit)
                last = stop == row.total_frames
                semantic_T = row.semantic[start // ratio : None if last else math.ceil(stop / ratio)]
                given = condition.flatten(semantic_T) if condition else None
                prefixes.append(lm.stage.prefix(given, target.flatten(row.acoustic[start:])))
                counts.append(max(0, stop - done))
                ends.append(row.ended and last)
            codes, ended = self._decode(lm, rows, prefixes, counts, ends, window, sampling, clock)
            for row, codes_TQ, has_ended in zip(rows, codes, ended, strict=True):
                unfilled = np.zeros((len(codes_TQ), self.codec.num_quantizers - target.num_levels), np.int32)
                row.acoustic = np.concatenate([row.acoustic, np.concatenate([codes_TQ, unfilled], axis=1)])
                if has_ended:
                    row.total_frames = len(row.acoustic)
            window += 1

    def _fill_fine(self, rows: list[_Row], sampling: Sampling, clock: _Clock):
        """Stage 3: the fine levels of everything new, in non-overlapping chunks of one crop, as one batch."""
        lm = self.stages["fine"]
        coarse, fine = lm.stage.condition, lm.stage.target
        assert coarse is not None
        size = round(lm.stage.crop_seconds * self.codec.frame_rate)
        chunks = [
            (row, number, slice(start, min(start + size, len(row.acoustic))))
            for row in rows
            for number, start in enumerate(range(row.prompt_frames, len(row.acoustic), size))
        ]
        if not chunks:
            return
        none = np.zeros(0, np.int32)
        prefixes = [lm.stage.prefix(coarse.flatten(row.acoustic[span]), none) for row, _, span in chunks]
        keys_B = jnp.stack([_stage_key(row.key, lm.stage, number) for row, number, _ in chunks])
        counts = [span.stop - span.start for _, _, span in chunks]

        def decode():
            return decode_stage(
                lm.config, lm.stage, lm.params, prefixes, counts, [False] * len(chunks), keys_B, sampling
            )[0]

        codes = clock.measure(lm.stage.name, decode)
        for (row, _, span), codes_TQ in zip(chunks, codes, strict=True):
            row.acoustic[span, fine.first_level : fine.first_level + fine.num_levels] = codes_TQ

    def _decode(self, lm, rows, prefixes, counts, may_end, window, sampling, clock):
        keys_B = jnp.stack([_stage_key(row.key, lm.stage, window) for row in rows])
        ended: list[bool] = []

        def decode():
            codes, ends = decode_stage(lm.config, lm.stage, lm.params, prefixes, counts, may_end, keys_B, sampling)
            ended.extend(ends)
            return codes

        return clock.measure(lm.stage.name, decode), ended

    def _finish(self, rows: list[_Row], clock: _Clock) -> Generation:
        lengths_B = np.array([row.samples(self.codec.hop_length) for row in rows])
        acoustic_BTQ = _stack([row.acoustic for row in rows])
        wave_BW = np.array(self.codec.decode(np.maximum(acoustic_BTQ, 0)))[:, : lengths_B.max()]
        for wave_W, length in zip(wave_BW, lengths_B, strict=True):
            wave_W[length:] = 0.0
        return Generation(
            wave_BW=wave_BW,
            lengths_B=lengths_B,
            sample_rate=self.codec.sample_rate,
            semantic_BT=_stack([row.semantic for row in rows]),
            acoustic_BTQ=acoustic_BTQ,
            ended_B=lengths_B < np.array([row.total_samples for row in rows]),
            tokens_per_second=clock.rates(),
        )

    def log_likelihood(
        self, wave_BW: np.ndarray, lengths_B: np.ndarray | None = None, normalize: bool = True
    ) -> np.ndarray:
        """Stage 1's log-likelihood of each recording's semantic tokens, in nats: sWUGGY's and sBLIMP's score.

        Args:
          wave_BW: recordings at `codec.sample_rate`.
          lengths_B: samples of each.
          normalize: divide by the number of tokens (the paper does; §4.4).

        Returns:
          float [B].
        """
        lm = self.stages["semantic"]
        wave_BW = np.asarray(wave_BW)
        lengths_B = np.full(len(wave_BW), wave_BW.shape[1]) if lengths_B is None else np.asarray(lengths_B)
        token_samples = self.codec.hop_length * self._frames_per_token
        rows = []
        for semantic_T, length in zip(np.asarray(self.tokenizer.encode(wave_BW, lengths_B)), lengths_B, strict=True):
            tokens = lm.stage.target.flatten(semantic_T[: math.ceil(length / token_samples)])
            rows.append(lm.stage.prefix(None, tokens))
        length = bucket(max(map(len, rows)) - 1, 64)
        inputs_BT, targets_BT = np.zeros((2, len(rows), length), np.int32)
        weights_BT = np.zeros((len(rows), length), np.float32)
        for row, tokens in enumerate(rows):
            count = len(tokens) - 1
            inputs_BT[row, :count], targets_BT[row, :count], weights_BT[row, :count] = tokens[:-1], tokens[1:], 1.0
        losses_BT = np.asarray(next_token_losses(lm.config, lm.params, inputs_BT, targets_BT))
        scores_B = -np.sum(losses_BT * weights_BT, axis=1)
        return scores_B / weights_BT.sum(axis=1) if normalize else scores_B


def _stage_key(key: jax.Array, stage: Stage, number: int) -> jax.Array:
    """The key of a row's window or chunk in one stage."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(stage.name.encode())), number)


def _stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different length -> one array, −1 where a row has ended."""
    longest = max(map(len, rows))
    widths = [((0, longest - len(row)), *[(0, 0)] * (row.ndim - 1)) for row in rows]
    return np.stack([np.pad(row, width, constant_values=-1) for row, width in zip(rows, widths, strict=True)])
