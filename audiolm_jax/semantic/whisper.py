"""The encoder of Whisper (arXiv 2212.04356 §2.2): log-mel features, two convolutions, a pre-norm Transformer.

It was trained to transcribe, so its tokens know what transcripts taught it: a supervised encoder. It always sees
`num_positions` frames (30 s); what a clip lacks of them is silence, which is attended to as in training.

Shape suffixes: B batch, W waveform samples, T frames, M mel bands, N heads, H head width, D model, F feed-forward.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from audiolm_jax import spectral
from audiolm_jax.activations import activation_of
from audiolm_jax.semantic import blocks
from audiolm_jax.semantic.features import length_mask

FFT_LENGTH, MEL_HOP = 400, 160
ENERGY_FLOOR = 1e-10
RANGE_DECADES = 8.0  # Below a clip's loudest energy everything is alike.
ROWS = 4  # Rows that are run at once: each is 30 s, however short its clip.

layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """Architecture: the fields of a config's `model`.

    Attributes:
      num_mels: M.
      num_positions: frames that are seen at once, 50 a second.
      embed_dim, num_layers, num_heads, mlp_dim: D, number of blocks, N and F.
      activation: of feed-forward units, a name in `activations.ACTIVATIONS`.
      default_layer: hidden state that semantic tokens are taken from unless told otherwise.
    """

    num_mels: int
    num_positions: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    activation: str
    default_layer: int

    def __post_init__(self):
        activation_of(self.activation)
        blocks.check_heads(self.embed_dim, self.num_heads)

    @property
    def sample_rate(self) -> int:
        return 16_000

    @property
    def hop_length(self) -> int:
        return 2 * MEL_HOP

    @property
    def window_seconds(self) -> float:
        return self.num_positions * self.hop_length / self.sample_rate

    def num_frames(self, num_samples: Any) -> Any:
        """ceil(W / 320) (an integer or an array of them): frames that begin within the clip."""
        return -(-num_samples // self.hop_length)

    def hidden_states(
        self, weights: Mapping[str, Any], wave_BW: jax.Array, lengths_B: jax.Array, layers: tuple[int, ...]
    ) -> tuple[jax.Array, ...]:
        """Hidden states of waveforms no longer than the window; see `semantic.encoder.Encoder`.

        The last layer's are normalised, as the decoder takes them (and Hugging Face gives them).
        """
        size, params = self.num_frames(wave_BW.shape[1]), weights["params"]
        missing = self.num_positions * self.hop_length - wave_BW.shape[1]
        wave_BW = jnp.where(length_mask(lengths_B, wave_BW.shape[1]), wave_BW, 0.0)

        def one(wave_W: jax.Array) -> tuple[jax.Array, ...]:
            mel_BTM = log_mel(jnp.pad(wave_W, (0, missing))[None], self.num_mels)
            x_BTD = Front(self).apply({"params": params["front"]}, mel_BTM)
            states = blocks.hidden_states(Block(self), params["layers"], x_BTD, (), layers)
            normed = (
                layer_norm().apply({"params": params["norm"]}, x_BTD) if layer == self.num_layers else x_BTD
                for layer, x_BTD in zip(layers, states, strict=True)
            )
            return tuple(x_BTD[0, :size] for x_BTD in normed)

        return jax.lax.map(one, wave_BW, batch_size=ROWS)


def log_mel(wave_BW: jax.Array, num_mels: int) -> jax.Array:
    """Log energies of mel bands around every 160th sample, of which 80 dB below the row's loudest are told apart.

    Args:
      wave_BW: 16 kHz waveforms of whole hops, mirrored at their ends.
      num_mels: M.

    Returns:
      [B, W / 160, M], around 0; 4 are 40 dB.
    """
    padded_BW = jnp.pad(wave_BW, ((0, 0), (FFT_LENGTH // 2, FFT_LENGTH // 2)), mode="reflect")
    energy_BTM = spectral.mel_spectrogram(
        padded_BW, 16_000, FFT_LENGTH, MEL_HOP, num_mels, high_hz=8000.0, power=2.0, style="slaney"
    )[:, : wave_BW.shape[1] // MEL_HOP]
    log_BTM = jnp.log10(jnp.maximum(energy_BTM, ENERGY_FLOOR))
    loudest_B11 = jnp.max(log_BTM, axis=(1, 2), keepdims=True)
    return (jnp.maximum(log_BTM, loudest_B11 - RANGE_DECADES) + 4.0) / 4.0


class Front(nn.Module):
    """Two convolutions, the second of which halves the rate, and the positions."""

    config: WhisperConfig

    @nn.compact
    def __call__(self, mel_BTM: jax.Array) -> jax.Array:
        """Log-mels [B, 2T, M] -> [B, T, D]."""
        config = self.config
        for name, stride in (("wide", 1), ("strided", 2)):
            # Centred whatever the stride: "SAME" would begin a frame later where it is 2.
            convolution = nn.Conv(config.embed_dim, (3,), strides=(stride,), padding=[(1, 1)], name=name)
            mel_BTM = nn.gelu(convolution(mel_BTM), approximate=False)
        shape = (config.num_positions, config.embed_dim)
        return mel_BTM + self.param("positions", nn.initializers.zeros, shape)


class Block(nn.Module):
    """Self-attention and feed-forward units, each on normalised inputs."""

    config: WhisperConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        heads = (*x_BTD.shape[:2], config.num_heads, -1)
        dense = functools.partial(nn.Dense, config.embed_dim)
        normed_BTD = layer_norm(name="attention_norm")(x_BTD)
        q_BTNH = dense(name="query")(normed_BTD).reshape(heads)
        k_BTNH = dense(name="key", use_bias=False)(normed_BTD).reshape(heads)
        v_BTNH = dense(name="value")(normed_BTD).reshape(heads)
        mixed_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH)
        x_BTD += dense(name="out")(mixed_BTNH.reshape(x_BTD.shape))
        hidden_BTF = nn.Dense(config.mlp_dim, name="wide")(layer_norm(name="mlp_norm")(x_BTD))
        return x_BTD + dense(name="narrow")(activation_of(config.activation)(hidden_BTF))
