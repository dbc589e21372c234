"""The networks that a codec can be made of, and what all of them do.

Shape suffixes: B batch, W waveform samples, T frames, D embedding, Q levels.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax

from audiolm_jax.codec.dac import DacConfig
from audiolm_jax.codec.encodec import EncodecConfig
from audiolm_jax.codec.mimi import MimiConfig
from audiolm_jax.codec.soundstream import SoundStreamConfig
from audiolm_jax.config import build_kind

# {"generator": {"encoder", "decoder" and perhaps "quantizer"}, "codebooks"}, as the objective's `weights` gives them.
Weights = Mapping[str, Any]


class Architecture(Protocol):
    """What a codec's networks have in common: a frozen dataclass of the fields of a config's `model`.

    Attributes:
      sample_rate: Hz.
      hop_length: samples per frame.
      embed_dim: D, the width of the frame vectors that are quantized.
      num_quantizers: Q, levels.
      codebook_size: N, codes per level.
      encoder: module, (wave_BW, lengths_B) -> x_BTD. A row's first frames are those of its first `length` samples
        alone; without lengths every row is as long as the array.
      decoder: module, (x_BTD, lengths_B) -> wave_BW, lengths being frames; rows as in the encoder.
      quantizer: see `ResidualQuantizer`.
      streams: whether both take a recording chunk by chunk, keeping what they need in the collection `STREAM`.
      reach: where they do not, how many frames on either side of its own a decoded sample depends on; None: on all.
    """

    @property
    def sample_rate(self) -> int: ...
    @property
    def hop_length(self) -> int: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def num_quantizers(self) -> int: ...
    @property
    def codebook_size(self) -> int: ...
    @property
    def encoder(self) -> nn.Module: ...
    @property
    def decoder(self) -> nn.Module: ...
    @property
    def quantizer(self) -> Any: ...
    @property
    def streams(self) -> bool: ...
    @property
    def reach(self) -> int | None: ...

    def num_frames(self, num_samples: Any) -> Any:
        """Frames of so many samples (an integer or an array of them)."""

    def num_samples(self, num_frames: Any) -> Any:
        """Samples that so many frames are decoded to."""


ARCHITECTURES: Mapping[str, Callable[..., Architecture]] = {
    "soundstream": SoundStreamConfig,
    "dac": DacConfig,
    "encodec": EncodecConfig,
    "mimi": MimiConfig,
}


def build_architecture(model: Mapping[str, Any]) -> Architecture:
    """The networks that a config's `model` describes: of the kind `architecture`, by default SoundStream.

    Raises:
      UserError: an unknown architecture or unknown fields.
    """
    return build_kind(ARCHITECTURES, model, default="soundstream")


def features(architecture: Architecture, weights: Weights, wave_BW: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Frame vectors before they are quantized: [B, T, D]."""
    return architecture.encoder.apply({"params": weights["generator"]["encoder"]}, wave_BW, lengths_B)


def encode(
    architecture: Architecture,
    weights: Weights,
    wave_BW: jax.Array,
    lengths_B: jax.Array,
    num_quantizers: int | None = None,
) -> jax.Array:
    """Codes int32 [B, T, Q] of the first `num_quantizers` levels, all by default."""
    x_BTD = features(architecture, weights, wave_BW, lengths_B)
    parameters = weights["generator"].get("quantizer", {})
    return architecture.quantizer.encode(parameters, weights["codebooks"], x_BTD, num_quantizers)


def vectors(architecture: Architecture, weights: Weights, codes_BTQ: jax.Array) -> jax.Array:
    """Frame vectors [B, T, D] of codes, of as many levels as they have."""
    parameters = weights["generator"].get("quantizer", {})
    return architecture.quantizer.decode(parameters, weights["codebooks"], codes_BTQ)


def synthesize(architecture: Architecture, weights: Weights, x_BTD: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Waveforms [B, W] of frame vectors, of which each row has so many."""
    return architecture.decoder.apply({"params": weights["generator"]["decoder"]}, x_BTD, lengths_B)


def decode(architecture: Architecture, weights: Weights, codes_BTQ: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Waveforms [B, W] of codes, of which each row has so many frames."""
    return synthesize(architecture, weights, vectors(architecture, weights, codes_BTQ), lengths_B)
