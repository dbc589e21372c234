"""wav2vec 2.0 (arXiv 2006.11477), HuBERT (2106.07447) and WavLM (2110.13900), for ragged batches; inference only.

Strided convolutions over the waveform, a convolution that tells positions apart, and Transformer blocks. WavLM adds a
bias by relative position to its attention, which each block gates by what a frame holds.

Whatever looks sideways is masked: statistics over time, the convolution of positions, attention. Hidden states are
those of `transformers` 5: layer L of a network with `pre_norm` is the last block's output, before the LayerNorm that
follows it (which is not kept).

Shape suffixes: B batch, W waveform samples, T frames, S keys, N heads, H head width, D model, F feed-forward,
C channels, R buckets of distances.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax.activations import activation_of
from audiolm_jax.errors import UserError
from audiolm_jax.semantic import blocks
from audiolm_jax.semantic.features import length_mask

CONV_NORMS = ("group", "layer")
CONV_EPSILON = 1e-5  # Of the convolutions' norms, whatever `norm_epsilon` says.
WAVE_EPSILON = 1e-7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wav2Vec2Config:
    """Architecture: the fields of a config's `model`.

    Attributes:
      sample_rate: Hz.
      normalize_wave: whether each clip is brought to zero mean and unit variance.
      conv_channels, conv_kernels, conv_strides: of the convolutions over the waveform.
      conv_bias: whether they have biases.
      conv_norm: "group": each channel of the first one is normalised over the clip; "layer": each frame of every one.
      conv_activation: behind each of them and the convolution of positions, one of `activations.ACTIVATIONS`.
      projection_norm: whether there is a LayerNorm before their channels are projected to D.
      position_kernel, position_groups: frames that the convolution of positions covers, and its groups of channels.
      position_norm: whether every dimension is scaled and shifted before it (batch norm's running statistics).
      num_layers, num_heads, embed_dim, mlp_dim: of the blocks; N a divisor of D.
      activation: of the feed-forward, one of `activations.ACTIVATIONS`.
      pre_norm: a block's LayerNorms stand before attention and feed-forward, not behind the sums.
      norm_epsilon: added to variances.
      num_buckets, max_distance: R of the gated bias by relative position, and from where on all share the last of
        their direction; 0: no such bias.
      default_layer: hidden state that semantic tokens are taken from unless told otherwise.
      window_seconds: longest audio that is seen at once when it is tokenized.
    """

    sample_rate: int
    normalize_wave: bool
    conv_channels: tuple[int, ...]
    conv_kernels: tuple[int, ...]
    conv_strides: tuple[int, ...]
    conv_bias: bool
    conv_norm: str
    conv_activation: str
    projection_norm: bool
    position_kernel: int
    position_groups: int
    position_norm: bool
    num_layers: int
    num_heads: int
    embed_dim: int
    mlp_dim: int
    activation: str
    pre_norm: bool
    norm_epsilon: float
    num_buckets: int
    max_distance: int
    default_layer: int
    window_seconds: float = 30.0

    def __post_init__(self):
        if not len(self.conv_channels) == len(self.conv_kernels) == len(self.conv_strides) > 0:
            raise UserError("convolutions do not match", "conv_channels", "give each channels, a kernel and a stride")
        if self.conv_norm not in CONV_NORMS:
            raise UserError("unknown conv_norm", self.conv_norm, f"use one of {', '.join(CONV_NORMS)}")
        blocks.check_heads(self.embed_dim, self.num_heads)
        activation_of(self.conv_activation)
        activation_of(self.activation)

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.conv_strides)

    def num_frames(self, num_samples: Any) -> Any:
        """Frames of so many samples (an integer or an array of them), 0 of fewer than the convolutions cover."""
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            num_samples = convolved_length(num_samples, kernel, stride)
        return num_samples

    def hidden_states(
        self, weights: Mapping[str, Any], wave_BW: jax.Array, lengths_B: jax.Array, layers: tuple[int, ...]
    ) -> tuple[jax.Array, ...]:
        """Hidden states of waveforms; see `semantic.encoder.Encoder`. `weights` is {"params": …}.

        `params` holds those of `Front` as "front", of all `Block`s, stacked, as "blocks", and a bias's table
        "relative_positions" [R, N].
        """
        params = weights["params"]
        x_BTD, mask_BT = Front(self).apply({"params": params["front"]}, wave_BW, lengths_B)
        bias_NTS = None
        if self.num_buckets:
            bias_NTS = position_bias(params["relative_positions"], x_BTD.shape[1], self.max_distance)
        return blocks.hidden_states(Block(self), params["blocks"], x_BTD, (mask_BT, bias_NTS), layers)


def convolved_length(length: Any, kernel: int, stride: int) -> Any:
    """Outputs of an unpadded convolution over so many inputs (an integer or an array of them), never negative."""
    length = (length - kernel) // stride + 1
    return length * (length > 0)


def normalized(wave_BW: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Each row with zero mean and unit variance over its own samples, zeros behind them; silence stays silence."""
    mask_BW = length_mask(lengths_B, wave_BW.shape[1])
    normed_BW1 = standardized(wave_BW[..., None], mask_BW, WAVE_EPSILON)
    return jnp.where(mask_BW, normed_BW1[..., 0], 0.0)


def standardized(x_BTC: jax.Array, mask_BT: jax.Array, epsilon: float) -> jax.Array:
    """Each channel of each row less its mean over the frames that exist, over their deviation.

    Frames that do not exist hold numbers of no meaning.
    """
    exists_BT1 = mask_BT[..., None]
    count_B11 = jnp.maximum(jnp.sum(exists_BT1, axis=1, keepdims=True), 1)
    mean_over_time = lambda y_BTC: jnp.sum(y_BTC, axis=1, keepdims=True, where=exists_BT1) / count_B11
    centred_BTC = x_BTC - mean_over_time(x_BTC)
    return centred_BTC * jax.lax.rsqrt(mean_over_time(jnp.square(centred_BTC)) + epsilon)


def position_bias(table_RN: jax.Array, num_frames: int, max_distance: int) -> jax.Array:
    """Bias [N, T, S] by the distance key − query."""
    num_buckets = table_RN.shape[0]
    buckets = distance_buckets(np.arange(1 - num_frames, num_frames), num_buckets, max_distance)
    frame_T = jnp.arange(num_frames)
    index_TS = frame_T - frame_T[:, None] + num_frames - 1
    return table_RN.T[:, buckets][:, index_TS]


def distance_buckets(distances: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Buckets of the distances key − query: the lower half for keys up to the query, the upper one for later keys.

    Half of each half holds one distance a bucket, the rest grows logarithmically, and the last one holds all from
    `max_distance` on. In float32, as the original computes them.
    """
    half = num_buckets // 2
    num_exact = half // 2
    sizes = np.abs(distances)
    shares = np.log(np.maximum(sizes, num_exact).astype(np.float32) / np.float32(num_exact))
    shares = shares / np.float32(math.log(max_distance / num_exact)) * np.float32(half - num_exact)
    coarse = np.minimum((num_exact + shares).astype(np.int32), half - 1)
    return np.where(sizes < num_exact, sizes, coarse) + half * (distances > 0)


class Convolutions(nn.Module):
    """Waveforms to frames of channels."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, wave_BW: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """[B, W] -> [B, `num_frames(W)`, C]; samples behind a row's length must be zeros."""
        config = self.config
        x_BTC = wave_BW[..., None]
        for index, stride in enumerate(config.conv_strides):
            channels, kernel = config.conv_channels[index], config.conv_kernels[index]
            convolution = functools.partial(nn.Conv, padding="VALID", use_bias=config.conv_bias)
            x_BTC = convolution(channels, (kernel,), (stride,), name=f"conv_{index}")(x_BTC)
            if config.conv_norm == "layer":
                x_BTC = nn.LayerNorm(CONV_EPSILON, use_fast_variance=False, name=f"norm_{index}")(x_BTC)
            elif index == 0:
                mask_BT = length_mask(convolved_length(lengths_B, kernel, stride), x_BTC.shape[1])
                x_BTC = Affine(name="norm_0")(standardized(x_BTC, mask_BT, CONV_EPSILON))
            x_BTC = activation_of(config.conv_activation)(x_BTC)
        return x_BTC


class Affine(nn.Module):
    """A scale and a bias for every channel."""

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        scale_C = self.param("scale", nn.initializers.ones, x_BTC.shape[-1:])
        bias_C = self.param("bias", nn.initializers.zeros, x_BTC.shape[-1:])
        return x_BTC * scale_C + bias_C


class Front(nn.Module):
    """All that leads to the first block."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, wave_BW: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Input [B, T, D] of the first block, and the mask [B, T] of the frames that exist."""
        config = self.config
        if config.normalize_wave:
            wave_BW = normalized(wave_BW, lengths_B)
        else:
            wave_BW = jnp.where(length_mask(lengths_B, wave_BW.shape[1]), wave_BW, 0.0)
        x_BTC = Convolutions(config, name="convolutions")(wave_BW, lengths_B)
        if config.projection_norm:
            x_BTC = layer_norm(config, "projection_norm")(x_BTC)
        x_BTD = nn.Dense(config.embed_dim, name="projection")(x_BTC)
        mask_BT = length_mask(config.num_frames(lengths_B), x_BTD.shape[1])
        x_BTD = jnp.where(mask_BT[..., None], x_BTD, 0.0)
        context_BTD = x_BTD
        if config.position_norm:
            context_BTD = jnp.where(mask_BT[..., None], Affine(name="position_norm")(x_BTD), 0.0)
        positions = nn.Conv(
            config.embed_dim,
            (config.position_kernel,),
            padding=[(config.position_kernel // 2, (config.position_kernel - 1) // 2)],
            feature_group_count=config.position_groups,
            name="positions",
        )
        x_BTD += activation_of(config.conv_activation)(positions(context_BTD))
        return x_BTD if config.pre_norm else layer_norm(config, "input_norm")(x_BTD), mask_BT


def layer_norm(config: Wav2Vec2Config, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm over the last axis."""
    return nn.LayerNorm(config.norm_epsilon, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Multi-head self-attention, with WavLM's gated bias (2110.13900 §3.2) where there is one."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BS: jax.Array, bias_NTS: jax.Array | None) -> jax.Array:
        config = self.config
        heads_BTNH = (*x_BTD.shape[:2], config.num_heads, config.embed_dim // config.num_heads)
        project = lambda name: nn.Dense(config.embed_dim, name=name)(x_BTD).reshape(heads_BTNH)
        bias_BNTS = None
        if bias_NTS is not None:
            gates_BTN2 = nn.sigmoid(nn.Dense(2, name="gate")(x_BTD.reshape(heads_BTNH)))
            scale_N = self.param("gate_scale", nn.initializers.ones, (config.num_heads,))
            gate_BTN = gates_BTN2[..., 0] * (gates_BTN2[..., 1] * scale_N - 1.0) + 2.0
            bias_BNTS = jnp.swapaxes(gate_BTN, 1, 2)[..., None] * bias_NTS
        mixed_BTNH = jax.nn.dot_product_attention(
            project("query"), project("key"), project("value"), bias=bias_BNTS, mask=mask_BS[:, None, None, :]
        )
        return nn.Dense(config.embed_dim, name="out")(mixed_BTNH.reshape(x_BTD.shape))


class Block(nn.Module):
    """Attention and feed-forward."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array, bias_NTS: jax.Array | None) -> jax.Array:
        """Mixes frames: [B, T, D].

        Args:
          x_BTD: inputs.
          mask_BT: True where a frame exists; no query sees the others.
          bias_NTS: of attention, before it is gated.
        """
        config = self.config
        attention, attention_norm = Attention(config, name="attention"), layer_norm(config, "attention_norm")
        mlp_norm = layer_norm(config, "mlp_norm")

        def mlp(x_BTD: jax.Array) -> jax.Array:
            hidden_BTF = activation_of(config.activation)(nn.Dense(config.mlp_dim, name="wide")(x_BTD))
            return nn.Dense(config.embed_dim, name="narrow")(hidden_BTF)

        if config.pre_norm:
            x_BTD += attention(attention_norm(x_BTD), mask_BT, bias_NTS)
            x_BTD += mlp(mlp_norm(x_BTD))
        else:
            x_BTD = attention_norm(x_BTD + attention(x_BTD, mask_BT, bias_NTS))
            x_BTD = mlp_norm(x_BTD + mlp(x_BTD))
        return x_BTD
