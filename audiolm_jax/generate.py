"""Prompt → semantic → coarse → fine → waveform: AudioLM's generation (arXiv 2209.03143 §3.4).

Rows are processed together and may differ in length; each draws from its own key, made of the seed,
its prompt's samples and its number, so a row does not depend on its company.

Shape suffixes: B rows (prompt-major), W samples, T frames, Q quantizer levels.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence

import jax
import numpy as np

from audiolm_jax.codec.codec import Codec
from audiolm_jax.data import transforms
from audiolm_jax.errors import UserError
from audiolm_jax.lm.decode import LanguageModel
from audiolm_jax.lm.sampling import Sampling
from audiolm_jax.lm.scoring import next_token_losses
from audiolm_jax.semantic.tokenizer import SemanticTokenizer
from audiolm_jax.windows import Clock, Row, Windows

MODES = ("continuation", "acoustic", "unconditional")
DEFAULT_SECONDS = 10.0


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
class Generation:
    """What was generated; rows are prompt-major: row = prompt · num_samples + sample.

    Attributes:
      wave_BW: float32, zeros beyond each row's length.
      lengths_B: samples of each row.
      sample_rate: Hz.
      semantic_BT: frame-level semantic tokens, −1 beyond the end. Where the semantic stage works on
        de-duplicated tokens, a sampled token stands for the training set's mean run length.
        [B, 0] without a semantic stage.
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


@dataclasses.dataclass(frozen=True)
class AudioLM:
    """The whole model: a bundle, loaded (`audiolm_jax.load_bundle`).

    Attributes:
      codec, tokenizer: the tokenizers; no semantic one without a semantic stage.
      stages: language models by stage name; no "fine" where the coarse stage predicts every level, no "semantic" where
        it needs no semantic tokens.
      mean_run_length: semantic frames per de-duplicated token in the training data.
      fingerprints: of each part.
    """

    codec: Codec
    tokenizer: SemanticTokenizer | None
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
          UserError: arguments that contradict each other or the bundle, or a prompt that is too short.
        """
        windows = self.stream(prompt_BW, mode, seconds, num_samples, seed, lengths_B, sampling, ignore_end)
        wave_BW = np.concatenate([block.wave_BW for block in windows], axis=1)
        return Generation(
            wave_BW=wave_BW,
            lengths_B=windows.lengths_B,
            sample_rate=self.codec.sample_rate,
            semantic_BT=_stack([row.semantic for row in windows.rows]),
            acoustic_BTQ=_stack([row.acoustic for row in windows.rows]),
            ended_B=windows.ended_B,
            tokens_per_second=windows.clock.rates(),
        )

    def stream(
        self,
        prompt_BW: np.ndarray | None = None,
        mode: str = "continuation",
        seconds: float | None = None,
        num_samples: int = 1,
        seed: int = 0,
        lengths_B: np.ndarray | None = None,
        sampling: dict[str, Sampling] | None = None,
        ignore_end: bool = False,
    ) -> Windows:
        """The waveforms of `generate` with the same arguments, in blocks of a second as they get ready.

        The prompt, where the mode keeps it, comes at once; then each coarse window as soon as its fine levels are
        sampled, while the rest of the audio does not exist yet.

        Returns:
          an iterator of `Block`s, whose rows tell how far it is.

        Raises:
          UserError: as `generate`, and before the first block.
        """
        check_request(mode, prompt_BW is not None, seconds, num_samples)
        if mode == "acoustic":
            self.semantic_stage("mode acoustic")
        seconds = DEFAULT_SECONDS if seconds is None else seconds
        deduplicates = "semantic" in self.stages and self.stages["semantic"].stage.target.deduplicate
        return Windows(
            codec=self.codec,
            stages=self.stages,
            frames_per_token=self._frames_per_token,
            mean_run_length=self.mean_run_length if deduplicates else 1.0,
            rows=self._start(prompt_BW, lengths_B, mode, seconds, num_samples, seed, not ignore_end),
            sampling={name: Sampling(lm.stage.temperature) for name, lm in self.stages.items()} | (sampling or {}),
            samples_semantic="semantic" in self.stages and mode != "acoustic",
            clock=Clock(),
        )

    @property
    def _frames_per_token(self) -> int:
        """Acoustic frames in the time of one semantic frame."""
        stage = self.stages["coarse"].stage
        return stage.acoustic_rate // stage.semantic_rate

    def semantic_stage(self, where: str) -> LanguageModel:
        """The semantic stage, or a UserError where there is none, in whatever `where` says."""
        if "semantic" not in self.stages:
            raise UserError("the bundle has no semantic stage", where, "choose a bundle with one")
        return self.stages["semantic"]

    def _start(self, prompt_BW, lengths_B, mode, seconds, num_samples, seed, may_end) -> list[Row]:
        rate, hop, levels = self.codec.sample_rate, self.codec.hop_length, self.codec.num_quantizers
        base = jax.random.key(seed)
        if mode == "unconditional":
            total = round(seconds * rate)
            empty = np.zeros(0, np.int32), np.zeros((0, levels), np.int32)
            keys = [jax.random.fold_in(base, k) for k in range(num_samples)]
            return [Row(key, *empty, 0, math.ceil(total / hop), total, may_end) for key in keys]
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
        acoustic_BTQ = np.asarray(self.codec.encode(wave_BW, lengths_B))
        semantic = self._encode_semantic(wave_BW, lengths_B)
        rows = []
        for wave_W, length, semantic_T, acoustic_TQ in zip(wave_BW, lengths_B, semantic, acoustic_BTQ, strict=True):
            prompt_key = jax.random.fold_in(base, np.uint32(zlib.crc32(np.float32(wave_W[:length]).tobytes())))
            if mode == "acoustic":
                # An encoder without padding has no frame for the last samples: they sound as what is before them.
                missing = math.ceil(length / token_samples) - len(semantic_T)
                semantic_T = np.pad(semantic_T, (0, max(0, missing)), mode="edge")
                frames, total, ends = 0, int(length), False
            else:
                # Whole semantic frames; what the prompt has beyond them is generated with the rest.
                tokens = int(length) // token_samples
                semantic_T = semantic_T[:tokens]
                frames = (tokens if self.tokenizer is None else len(semantic_T)) * self._frames_per_token
                total, ends = int(length) + round(seconds * rate), may_end
            for k in range(num_samples):
                key = jax.random.fold_in(prompt_key, k)
                row = Row(key, semantic_T, acoustic_TQ[:frames], frames, math.ceil(total / hop), total, ends)
                rows.append(row)
        return rows

    def _encode_semantic(self, wave_BW: np.ndarray, lengths_B: np.ndarray) -> list[np.ndarray]:
        """The semantic tokens [T] of each recording; none of them without a semantic tokenizer."""
        if self.tokenizer is None:
            return [np.zeros(0, np.int32)] * len(wave_BW)
        semantic_BT = np.asarray(self.tokenizer.encode(wave_BW, lengths_B))
        counts = [self.tokenizer.num_frames(int(length)) for length in lengths_B]
        return [semantic_T[:count] for semantic_T, count in zip(semantic_BT, counts, strict=True)]

    def log_likelihood(
        self, wave_BW: np.ndarray, lengths_B: np.ndarray | None = None, normalize: bool = True
    ) -> np.ndarray:
        """Stage 1's log-likelihood of each recording's semantic tokens, in nats: sWUGGY's and sBLIMP's score.

        Args:
          wave_BW: recordings at `codec.sample_rate`. Longer ones than the stage's training crop are scored in
            consecutive stretches of that length, as `token_log_likelihoods` says.
          lengths_B: samples of each.
          normalize: divide by the number of tokens (the paper does; §4.4).

        Returns:
          float64 [B].

        Raises:
          UserError: the bundle has no semantic stage, or a recording is too short for a token.
        """
        likelihoods_B, counts_B = self.semantic_log_likelihoods(wave_BW, lengths_B)
        return likelihoods_B / counts_B if normalize else likelihoods_B

    def semantic_log_likelihoods(
        self, wave_BW: np.ndarray, lengths_B: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `log_likelihood` gives without the division, float64 [B], and the numbers of tokens, [B]."""
        self.semantic_stage("log_likelihood")
        wave_BW = np.asarray(wave_BW)
        lengths_B = np.full(len(wave_BW), wave_BW.shape[1]) if lengths_B is None else np.asarray(lengths_B)
        semantic = self._encode_semantic(wave_BW, lengths_B)
        for row, semantic_T in enumerate(semantic):
            if not len(semantic_T):
                raise UserError("a recording too short for a semantic token", f"row {row}", "leave it out")
        nothing = np.zeros((0, self.codec.num_quantizers), np.int32)
        records = [{"semantic": semantic_T, "acoustic": nothing, "is_end": False} for semantic_T in semantic]
        return self.token_log_likelihoods("semantic", records)

    def token_log_likelihoods(self, stage: str, records: Sequence[transforms.Record]) -> tuple[np.ndarray, np.ndarray]:
        """How likely a stage finds its target tokens of each record, given its condition there.

        Records longer than the stage's training crop are cut into consecutive stretches of that length, whose
        log-likelihoods add up; each begins as if nothing came before it. Held-out losses in training are taken so, too.

        Args:
          stage: its name.
          records: with `semantic`, `acoustic` and `is_end` (a true end has an end token where the stage predicts one).

        Returns:
          log-likelihoods in nats, float64 [R], and numbers of tokens, [R].
        """
        lm = self.stages[stage]
        examples, owners = [], []
        for owner, record in enumerate(records):
            for window in transforms.windows(record, lm.stage):
                examples.append(lm.stage.sequence(window["semantic"], window["acoustic"], window["is_end"]))
                owners.append(owner)
        likelihoods_R, counts_R = np.zeros(len(records)), np.zeros(len(records), np.int64)
        losses = next_token_losses(lm, [tokens for tokens, _ in examples])
        for owner, (_, loss_start), losses_T in zip(owners, examples, losses, strict=True):
            counted_T = losses_T[loss_start - 1 :].astype(np.float64)
            likelihoods_R[owner] -= counted_T.sum()
            counts_R[owner] += len(counted_T)
        return likelihoods_R, counts_R


def _stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different length -> one array, −1 where a row has ended."""
    longest = max(map(len, rows))
    widths = [((0, longest - len(row)), *[(0, 0)] * (row.ndim - 1)) for row in rows]
    return np.stack([np.pad(row, width, constant_values=-1) for row, width in zip(rows, widths, strict=True)])
