"""w2v-BERT 2.0 (arXiv 2312.05187 §3.1): Kaldi filterbanks, two stacked to a frame, and causally convolving Conformers.

Shape suffixes: B batch, W waveform samples, w samples of a window, T frames (of the model or of the filterbank), R
relative distances, P distances that have a code, M mel bands, N heads, H head width, D model, F feed-forward, K kernel.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax import spectral
from audiolm_jax.activations import activation_of
from audiolm_jax.errors import UserError
from audiolm_jax.rotary import rotate
from audiolm_jax.semantic import blocks
from audiolm_jax.semantic.conformer import attend, depthwise_convolution, sinusoids
from audiolm_jax.semantic.features import length_mask

POSITIONS = ("relative_key", "relative", "rotary", "none")
SAMPLE_RATE, MEL_WINDOW, MEL_HOP, FFT_LENGTH = 16_000, 400, 160, 512
PREEMPHASIS = 0.97
ENERGY_FLOOR = 2.0**-23
VARIANCE_EPSILON = 1e-7
STACKED = 2  # Filterbank frames to a frame of the model.
ATTENTION_PAIRS = 2**23  # Pairs of frames (a head) whose logits exist at a time.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wav2Vec2BertConfig:
    """Architecture: the fields of a config's `model`.

    Attributes:
      num_mels: M.
      embed_dim, num_layers, num_heads, mlp_dim: D, number of blocks, N and F.
      activation: of feed-forward units and convolutions, a name in `activations.ACTIVATIONS`.
      norm_epsilon: added to LayerNorm's variances.
      conv_kernel: frames that the depthwise convolution covers: the last of them is the frame itself.
      positions: "relative_key" (a learnt code a distance, arXiv 1803.02155), "relative" (sinusoids, 1901.02860),
        "rotary" (2104.09864) or "none".
      max_left, max_right: largest distances, before and after a frame, of which "relative_key" has a code.
      rotary_base: of "rotary".
      default_layer: hidden state that semantic tokens are taken from unless told otherwise.
      window_seconds: longest audio that is seen at once when it is tokenized.
    """

    num_mels: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    activation: str
    norm_epsilon: float
    conv_kernel: int
    positions: str
    max_left: int
    max_right: int
    rotary_base: float
    default_layer: int
    window_seconds: float = 30.0

    def __post_init__(self):
        activation_of(self.activation)
        blocks.check_heads(self.embed_dim, self.num_heads)
        if self.positions not in POSITIONS:
            where = f"config.model.positions={self.positions}"
            raise UserError("unknown kind of positions", where, f"use one of {', '.join(POSITIONS)}")

    @property
    def sample_rate(self) -> int:
        return SAMPLE_RATE

    @property
    def hop_length(self) -> int:
        return STACKED * MEL_HOP

    def num_frames(self, num_samples: Any) -> Any:
        """Whole pairs of filterbank frames, of 400 samples each 160, that fit into a clip: 0 below 560 samples.

        An integer or an array of them. The original stacks a single last frame with zeros and masks the pair.
        """
        frames = num_filterbank_frames(num_samples) // STACKED
        return frames * (frames > 0)

    def hidden_states(
        self, weights: Mapping[str, Any], wave_BW: jax.Array, lengths_B: jax.Array, layers: tuple[int, ...]
    ) -> tuple[jax.Array, ...]:
        """Hidden states of waveforms; see `semantic.encoder.Encoder`."""
        params = weights["params"]
        wave_BW = jnp.where(length_mask(lengths_B, wave_BW.shape[1]), wave_BW, 0.0)
        mel_BTM = filterbank(wave_BW, self.num_mels)
        mel_BTM = normalize(mel_BTM, length_mask(num_filterbank_frames(lengths_B), mel_BTM.shape[1]))
        size = mel_BTM.shape[1] // STACKED
        stacked_BTM = mel_BTM[:, : STACKED * size].reshape(len(mel_BTM), size, -1)
        x_BTD = Front(self).apply({"params": params["front"]}, stacked_BTM)
        mask_BT = length_mask(self.num_frames(lengths_B), size)
        return blocks.hidden_states(Block(self), params["layers"], x_BTD, (mask_BT,), layers)


def num_filterbank_frames(num_samples: Any) -> Any:
    """Windows that fit into so many samples; none or fewer into less than one."""
    return (num_samples - MEL_WINDOW) // MEL_HOP + 1


def filterbank(wave_BW: jax.Array, num_mels: int) -> jax.Array:
    """Kaldi's log mel filterbank: 25 ms windows every 10 ms, of 16-bit amplitudes.

    Args:
      wave_BW: 16 kHz waveforms in [-1, 1].
      num_mels: M.

    Returns:
      [B, ceil(W / 160), M]; windows that end past W are filled up with zeros.
    """
    frames_BTw = spectral.frame(wave_BW * 2.0**15, MEL_WINDOW, MEL_HOP)
    frames_BTw -= jnp.mean(frames_BTw, axis=-1, keepdims=True)
    # The sample before the first is taken to be like it.
    earlier_BTw = jnp.concatenate([frames_BTw[..., :1], frames_BTw[..., :-1]], axis=-1)
    povey_w = np.hanning(MEL_WINDOW) ** 0.85
    frames_BTw = (frames_BTw - PREEMPHASIS * earlier_BTw) * povey_w.astype(np.float32)
    spectrum_BTF = spectral.rfft(frames_BTw, FFT_LENGTH)
    energy_BTF = jnp.square(spectrum_BTF.real) + jnp.square(spectrum_BTF.imag)
    filters_FM = spectral.mel_filterbank(FFT_LENGTH // 2 + 1, num_mels, SAMPLE_RATE, low_hz=20.0, style="kaldi")
    return jnp.log(jnp.maximum(energy_BTF @ filters_FM, ENERGY_FLOOR))


def normalize(mel_BTM: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Zero mean and unit variance (of the sample: the divisor is one less) of each band over a row's frames.

    A band that never changes, as in silence, becomes zero, and so does a single frame.
    """
    mask_BT1 = mask_BT[..., None]
    count_B11 = jnp.sum(mask_BT1, axis=1, keepdims=True)
    # Measured from the first frame, what never changes is exactly zero, whatever the order of summation.
    mel_BTM -= mel_BTM[:, :1]
    mean_B1M = jnp.sum(mel_BTM, axis=1, keepdims=True, where=mask_BT1) / jnp.maximum(count_B11, 1)
    mel_BTM -= mean_B1M
    squares_B1M = jnp.sum(jnp.square(mel_BTM), axis=1, keepdims=True, where=mask_BT1)
    return mel_BTM / jnp.sqrt(squares_B1M / jnp.maximum(count_B11 - 1, 1) + VARIANCE_EPSILON)


def layer_norm(config: Wav2Vec2BertConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.norm_epsilon, use_fast_variance=False, name=name)


class Front(nn.Module):
    """Stacked filterbanks, normalised and projected."""

    config: Wav2Vec2BertConfig

    @nn.compact
    def __call__(self, stacked_BTM: jax.Array) -> jax.Array:
        normed_BTM = layer_norm(self.config, "norm")(stacked_BTM)
        return nn.Dense(self.config.embed_dim, name="projection")(normed_BTM)


class Attention(nn.Module):
    """Self-attention with any of `POSITIONS`."""

    config: Wav2Vec2BertConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Mixes frames; no query sees those outside the mask."""
        config = self.config
        num_frames, width = x_BTD.shape[1:]
        by_head = lambda x: x.reshape(*x.shape[:-1], config.num_heads, -1)
        project = lambda name, x: by_head(nn.Dense(width, name=name)(x))
        matched_BTD = x_BTD
        if config.positions == "rotary":
            turned_BTNH = rotate(by_head(x_BTD), jnp.arange(num_frames), config.rotary_base)
            matched_BTD = turned_BTNH.reshape(x_BTD.shape)
        arrays = (project("query", matched_BTD), project("key", matched_BTD), project("value", x_BTD), mask_BT)
        mix = self._mixer(num_frames)

        def one(row: tuple[jax.Array, ...]) -> jax.Array:
            return mix(*(array[None] for array in row))[0]

        mixed_BTNH = jax.lax.map(one, arrays, batch_size=max(1, ATTENTION_PAIRS // max(1, num_frames) ** 2))
        return nn.Dense(width, name="out")(mixed_BTNH.reshape(x_BTD.shape))

    def _mixer(self, num_frames: int):
        """What mixes values: (q_BTNH, k_BSNH, v_BSNH, mask_BS) -> [B, T, N, H]."""
        config, zeros = self.config, nn.initializers.zeros
        head_dim = config.embed_dim // config.num_heads
        if config.positions == "relative_key":
            codes_PH = self.param("distances", zeros, (config.max_left + 1 + config.max_right, head_dim))
            # Of query before key, as `attend` wants it.
            before_R = np.arange(num_frames - 1, -num_frames, -1)
            codes_R1H = codes_PH[np.clip(-before_R, -config.max_left, config.max_right) + config.max_left][:, None]
            codes_RNH = jnp.broadcast_to(codes_R1H, (len(before_R), config.num_heads, head_dim))
            return lambda q, k, v, mask_BS: attend(q, q, k, v, codes_RNH, mask_BS)
        if config.positions == "relative":
            sinusoids_RD = jnp.asarray(sinusoids(num_frames, config.embed_dim))
            codes_RD = nn.Dense(config.embed_dim, use_bias=False, name="position")(sinusoids_RD)
            codes_RNH = codes_RD.reshape(-1, config.num_heads, head_dim)
            content_NH, position_NH = (
                self.param(name, zeros, (config.num_heads, head_dim)) for name in ("content_bias", "position_bias")
            )
            return lambda q, k, v, mask_BS: attend(q + content_NH, q + position_NH, k, v, codes_RNH, mask_BS)
        return lambda q, k, v, mask_BS: jax.nn.dot_product_attention(q, k, v, mask=mask_BS[:, None, None])


class FeedForward(nn.Module):
    """Two linear layers."""

    config: Wav2Vec2BertConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = nn.Dense(self.config.mlp_dim, name="wide")(x_BTD)
        return nn.Dense(x_BTD.shape[-1], name="narrow")(activation_of(self.config.activation)(hidden_BTF))


class Convolution(nn.Module):
    """Gated pointwise, causal depthwise over time, LayerNorm, pointwise."""

    config: Wav2Vec2BertConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        dense = functools.partial(nn.Dense, config.embed_dim, use_bias=False)
        x_BTD = dense(name="value")(x_BTD) * nn.sigmoid(dense(name="gate")(x_BTD))
        kernel_KD = self.param("depthwise", nn.initializers.zeros, (config.conv_kernel, config.embed_dim))
        x_BTD = layer_norm(config, "norm")(depthwise_convolution(x_BTD, kernel_KD, causal=True))
        return dense(name="out")(activation_of(config.activation)(x_BTD))


class Block(nn.Module):
    """One Conformer block."""

    config: Wav2Vec2BertConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        config = self.config
        norm = functools.partial(layer_norm, config)
        x_BTD += 0.5 * FeedForward(config, name="first_mlp")(norm("first_mlp_norm")(x_BTD))
        x_BTD += Attention(config, name="attention")(norm("attention_norm")(x_BTD), mask_BT)
        x_BTD += Convolution(config, name="convolution")(norm("convolution_norm")(x_BTD))
        x_BTD += 0.5 * FeedForward(config, name="last_mlp")(norm("last_mlp_norm")(x_BTD))
        return norm("final_norm")(x_BTD)
