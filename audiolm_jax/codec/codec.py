"""A trained codec: waveforms to codes and back."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax.codec import architecture
from audiolm_jax.codec.architecture import Architecture, Weights, build_architecture
from audiolm_jax.codec.soundstream import STREAM
from audiolm_jax.errors import UserError
from audiolm_jax.waves import checked_lengths, checked_waveform


@dataclasses.dataclass(frozen=True)
class Codec:
    """Encoder, quantizer and decoder with their weights."""

    config: Architecture
    weights: Weights

    @classmethod
    def from_weights(cls, config: Mapping[str, Any], weights: Any) -> "Codec":
        """The codec of a training config (its `model` fields count), with its weights put on the device."""
        return cls(build_architecture(config["model"]), jax.device_put(weights))

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return self.config.hop_length

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.config.sample_rate / self.config.hop_length

    @property
    def num_quantizers(self) -> int:
        """Levels, Q."""
        return self.config.num_quantizers

    @property
    def codebook_size(self) -> int:
        """Codes per level, N."""
        return self.config.codebook_size

    def num_frames(self, num_samples: int) -> int:
        """Frames of a recording of so many samples."""
        return self.config.num_frames(num_samples)

    def features(self, wave_BW, lengths_B=None) -> jax.Array:
        """Frame vectors float32 [B, T, D] as they are before they are quantized; otherwise as `encode`."""
        padded_BW, lengths_B, num_frames = self._framed(wave_BW, lengths_B)
        return _features(self.config, self.weights, padded_BW, lengths_B)[:, :num_frames]

    def encode(self, wave_BW, lengths_B=None, num_quantizers: int | None = None) -> jax.Array:
        """Codes of a batch of recordings.

        Args:
          wave_BW: float waveforms at `sample_rate`, NumPy or JAX.
          lengths_B: samples of each row; what lies beyond them does not matter. The whole row by default.
          num_quantizers: levels wanted, from the coarsest; all by default.

        Returns:
          int32 [B, T, Q], T being ceil(W / hop) (of a converted codec: as many as the original gives). The frames of
          a row's own length are those of that recording alone; what those after them hold does not matter.

        Raises:
          UserError: not a finite float [B, W], or no such number of levels or lengths.
        """
        num_levels = self.checked_levels(num_quantizers)
        padded_BW, lengths_B, num_frames = self._framed(wave_BW, lengths_B)
        return _encode(self.config, self.weights, padded_BW, lengths_B, num_levels)[:, :num_frames]

    def checked_levels(self, num_quantizers: int | None) -> int:
        """That number of levels, all for None; raises a UserError where there are not so many."""
        num_levels = self.num_quantizers if num_quantizers is None else num_quantizers
        if not 1 <= num_levels <= self.num_quantizers:
            raise UserError(
                "no such number of quantizer levels",
                f"num_quantizers={num_quantizers}",
                f"choose 1 … {self.num_quantizers}",
            )
        return num_levels

    def _framed(self, wave_BW, lengths_B) -> tuple[np.ndarray, np.ndarray, int]:
        """Waveforms padded to one of few lengths, the rows' own, and the frames of the longest that there can be."""
        wave_BW = checked_waveform(wave_BW)
        batch, size = wave_BW.shape
        if lengths_B is None:
            lengths_B = np.full(batch, size, np.int32)
        else:
            lengths_B = checked_lengths(lengths_B, batch, size)
            wave_BW = np.where(np.arange(size) < lengths_B[:, None], wave_BW, np.float32(0))
        padded_BW = _pad_axis(wave_BW, _bucket(-(-size // self.hop_length)) * self.hop_length)
        return padded_BW, lengths_B, self.config.num_frames(size)

    def decode(self, codes_BTQ, lengths_B=None) -> jax.Array:
        """Waveforms float32 [B, T · hop] of codes [B, T, Q]; fewer levels than the codec's give a coarser sound.

        A converted codec gives as many samples as the original.

        Args:
          codes_BTQ: what `encode` returns.
          lengths_B: frames of each row; what lies beyond them, in codes and waveform, does not matter. All by default.

        Raises:
          UserError: not integers [B, T, Q], too many levels, a code out of range, or no such lengths.
        """
        codes_BTQ = self._checked_codes(codes_BTQ)
        batch, num_frames, _ = codes_BTQ.shape
        lengths_B = checked_lengths(np.full(batch, num_frames) if lengths_B is None else lengths_B, batch, num_frames)
        x_BTD = _vectors(self.config, self.weights, _pad_axis(codes_BTQ, _bucket(num_frames)))
        return _synthesize(self.config, self.weights, x_BTD, lengths_B)[:, : self.config.num_samples(num_frames)]

    def decode_chunk(self, codes_BTQ, state: Any = None) -> tuple[jax.Array, Any]:
        """The waveform of the next frames of a stream: chunk by chunk what `decode` makes of all of them.

        Every number of frames is a program of its own: take chunks of one size.

        Args:
          codes_BTQ: the next frames.
          state: as the call before returned it; None begins a stream.

        Returns:
          float32 [B, T · hop], and the state for the next call.

        Raises:
          UserError: as `decode`, or a codec that does not stream.
        """
        codes_BTQ = self._checked_codes(codes_BTQ)
        return self._step(_decode_chunk, codes_BTQ, state)

    def encode_chunk(self, wave_BW, state: Any = None) -> tuple[jax.Array, Any]:
        """Codes of the next samples of a stream: chunk by chunk what `encode` makes of all of them.

        Args:
          wave_BW: the next samples, a multiple of the hop; the stream ends with a chunk of another length.
          state: as the call before returned it; None begins a stream.

        Returns:
          int32 [B, T, Q] of all levels, and the state for the next call.

        Raises:
          UserError: not a finite float [B, W], or a codec that does not stream.
        """
        return self._step(_encode_chunk, checked_waveform(wave_BW), state)

    def _step(self, step: Callable, chunk: np.ndarray, state: Any) -> tuple[jax.Array, Any]:
        """One chunk of a stream; where it begins, the state is all zeros."""
        if not self.config.streams:
            raise UserError("this codec does not take chunks", type(self.config).__name__, "give whole recordings")
        if state is None:
            shapes = jax.eval_shape(functools.partial(step, self.config), self.weights, chunk, {})[1]
            state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return step(self.config, self.weights, chunk, state)

    def _checked_codes(self, codes_BTQ) -> np.ndarray:
        codes_BTQ = np.asarray(codes_BTQ)
        if codes_BTQ.ndim != 3 or not np.issubdtype(codes_BTQ.dtype, np.integer):
            found = f"{codes_BTQ.dtype}{list(codes_BTQ.shape)}"
            raise UserError("codes are not integers [batch, frames, levels]", found, "give what encode returns")
        num_levels = codes_BTQ.shape[2]
        if not 1 <= num_levels <= self.num_quantizers:
            raise UserError(
                f"codes of {num_levels} levels", "codes", f"this codec decodes 1 … {self.num_quantizers} levels"
            )
        if codes_BTQ.size and not 0 <= codes_BTQ.min() <= codes_BTQ.max() < self.codebook_size:
            raise UserError(
                f"codes from {codes_BTQ.min()} to {codes_BTQ.max()}",
                "codes",
                f"this codec's are 0 … {self.codebook_size - 1}: decode with the codec that encoded",
            )
        return codes_BTQ.astype(np.int32)


_features = jax.jit(architecture.features, static_argnums=0)
_encode = jax.jit(architecture.encode, static_argnums=(0, 4))
# Two programs, so that another number of levels compiles no decoder.
_vectors = jax.jit(architecture.vectors, static_argnums=0)
_synthesize = jax.jit(architecture.synthesize, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _decode_chunk(config: Architecture, weights: Weights, codes_BTQ: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    x_BTD = architecture.vectors(config, weights, codes_BTQ)
    variables = {"params": weights["generator"]["decoder"], STREAM: state}
    wave_BW, variables = config.decoder.apply(variables, x_BTD, mutable=[STREAM])
    return wave_BW, variables[STREAM]


@functools.partial(jax.jit, static_argnums=0)
def _encode_chunk(config: Architecture, weights: Weights, wave_BW: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    variables = {"params": weights["generator"]["encoder"], STREAM: state}
    x_BTD, variables = config.encoder.apply(variables, wave_BW, mutable=[STREAM])
    parameters = weights["generator"].get("quantizer", {})
    return config.quantizer.encode(parameters, weights["codebooks"], x_BTD), variables[STREAM]


def _bucket(num_frames: int) -> int:
    """The next of eight lengths an octave (from 32 frames on), so that few lengths are compiled and little is padding.

    The padding changes nothing that is kept: frames do not depend on what follows them, or know where a row ends.
    """
    step = max(4, 2 ** (max(num_frames - 1, 1).bit_length() - 4))
    return max(1, -(-num_frames // step)) * step


def _pad_axis(x: np.ndarray, size: int) -> np.ndarray:
    """`x` with zeros appended on axis 1 up to `size`."""
    return np.pad(x, [(0, 0), (0, size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
