"""SEANet, the convolutions between waveform and frame vectors that EnCodec and Mimi share.

Tagliasacchi et al., "SEANet" (arXiv 2009.02095); Défossez et al., "High Fidelity Neural Audio Compression" (arXiv
2210.13438 §3.1); sizes and padding as in the public checkpoints. Every strided convolution rounds its input up to whole
strides, and a row of a ragged batch gets its padding where it ends, so that it comes out as that recording alone.

Shape suffixes: B batch, W waveform samples, T frames (of any rate), C channels, D embedding, k kernel taps, I and O
channels in and out, P padding.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from audiolm_jax.codec.convolution import elu, masked
from audiolm_jax.codec.soundstream import causal_conv_transpose, remember
from audiolm_jax.errors import UserError

PAD_MODES = ("constant", "replicate", "reflect")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeanetConfig:
    """Sizes of the convolutions, and of a codec made of them.

    Attributes:
      sample_rate: Hz.
      audio_channels: of the waveform.
      channels: C, the width at the waveform's rate; it doubles with each stride.
      strides: of the encoder's blocks, waveform first.
      embed_dim: D, the width of the frame vectors.
      num_quantizers: Q, levels.
      codebook_size: N, codes per level.
      kernel_size: of the encoder's and the decoder's first convolution.
      last_kernel_size: of their last ones.
      residual_kernel_size: of the dilated convolution in a residual unit.
      num_residual_layers: residual units of a block.
      dilation_growth: the units of a block are dilated by its powers 1, growth, growth^2 ...
      compress: a residual unit's inner width is C / compress.
      conv_shortcut: a residual unit adds a convolution of its input instead of the input itself.
      causal: padding comes before the first sample only (but for whole strides).
      pad_mode: what padding holds: one of `PAD_MODES`.
      trim_right_ratio: how much of what a causal transposed convolution gives in excess is cut from its end; the rest
        is cut from its beginning.
      num_lstm_layers: between the convolutions and the frame vectors, on both sides.
      group_norm: normalise each convolution's output over time and channels.
    """

    sample_rate: int
    audio_channels: int = 1
    channels: int
    strides: tuple[int, ...]
    embed_dim: int
    num_quantizers: int
    codebook_size: int
    kernel_size: int
    last_kernel_size: int
    residual_kernel_size: int
    num_residual_layers: int
    dilation_growth: int
    compress: int
    conv_shortcut: bool
    causal: bool
    pad_mode: str
    trim_right_ratio: float
    num_lstm_layers: int = 0
    group_norm: bool = False

    def __post_init__(self):
        if self.pad_mode not in PAD_MODES:
            where = f"config.model.pad_mode={self.pad_mode}"
            raise UserError("unknown padding", where, f"use one of {', '.join(PAD_MODES)}")

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.strides)

    def num_frames(self, num_samples):
        """Frames of so many samples (an integer or an array of them)."""
        return -(-num_samples // self.hop_length)

    def num_samples(self, num_frames):
        """Samples that so many frames are decoded to."""
        return num_frames * self.hop_length


def extended(
    x_BTC: jax.Array, lengths_B: jax.Array, left_BPC: jax.Array, right: int, stride: int, mode: str
) -> jax.Array:
    """Inputs of a convolution: each row with its padding on both sides.

    Args:
      x_BTC: inputs; those beyond a row's length do not matter.
      lengths_B: of the rows.
      left_BPC: what comes before them.
      right: inputs needed after a whole number of strides.
      stride: rows are filled up to a multiple of it.
      mode: what is filled in, one of `PAD_MODES`.

    Returns:
      [B, P + T', C], T' being T rounded up, plus `right`; what follows a row's padding is arbitrary.
    """
    size, left = x_BTC.shape[1], left_BPC.shape[1]
    if most := right + stride - 1:
        positions_BP = lengths_B[:, None] + jnp.arange(most)
        around_B = jnp.maximum(left, right + -lengths_B % stride)
        values_BPC = mirrored(x_BTC, lengths_B, positions_BP, around_B, mode)
        x_BTC = jnp.pad(x_BTC, ((0, 0), (0, most), (0, 0)))
        x_BTC = jax.vmap(lambda x_TC, values_PC, at: jax.lax.dynamic_update_slice(x_TC, values_PC, (at, 0 * at)))(
            x_BTC, values_BPC, lengths_B
        )
    return jnp.concatenate([left_BPC, x_BTC[:, : size + -size % stride + right]], axis=1)


def mirrored(
    x_BTC: jax.Array, lengths_B: jax.Array, positions_BP: jax.Array, around_B: jax.Array, mode: str
) -> jax.Array:
    """What padding holds at some positions outside of the rows: [B, P, C].

    Args:
      x_BTC, lengths_B: rows.
      positions_BP: negative, or from a row's length on.
      around_B: the longer of a row's paddings. A row that is too short to be reflected so far is thought of as
        followed by just as many zeros as that takes.
      mode: one of `PAD_MODES`.
    """
    lengths_B1 = lengths_B[:, None]
    match mode:
        case "replicate":
            sources_BP = jnp.clip(positions_BP, 0, lengths_B1 - 1)
        case "reflect":
            last_B1 = jnp.maximum(lengths_B - 1, around_B)[:, None]
            sources_BP = jnp.where(positions_BP > last_B1, 2 * last_B1 - positions_BP, jnp.abs(positions_BP))
        case _:
            return jnp.zeros((*positions_BP.shape, x_BTC.shape[-1]), x_BTC.dtype)
    found_BPC = jnp.take_along_axis(x_BTC, jnp.clip(sources_BP, 0, x_BTC.shape[1] - 1)[..., None], axis=1)
    return jnp.where((sources_BP < lengths_B1)[..., None], found_BPC, 0)


class Conv(nn.Module):
    """A convolution with its padding: [B, T, I] -> [B, ceil(T / stride), O]; a row's length becomes the same.

    Attributes:
      config: its causality, padding and normalisation count.
      features: O.
      kernel_size, stride, dilation: of the kernel.
      use_bias: add one.
      pad_mode: other than the config's.
    """

    config: SeanetConfig
    features: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    use_bias: bool = True
    pad_mode: str | None = None

    @nn.compact
    def __call__(self, x_BTC: jax.Array, lengths_B: jax.Array) -> jax.Array:
        kernel_kIO, bias_O = kernel_and_bias(self, (self.kernel_size, x_BTC.shape[-1], self.features), self.use_bias)
        mode = self.pad_mode or self.config.pad_mode
        total = (self.kernel_size - 1) * self.dilation + 1 - self.stride
        right = 0 if self.config.causal else total // 2
        left_BPC = self._before(x_BTC, lengths_B, total - right, right, mode)
        x_BTC, kernel_kIO, bias_O = nn.dtypes.promote_dtype(
            extended(x_BTC, lengths_B, left_BPC, right, self.stride, mode), kernel_kIO, bias_O
        )
        x_BTC = jax.lax.conv_general_dilated(
            x_BTC,
            kernel_kIO,
            window_strides=(self.stride,),
            padding="VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        x_BTC = x_BTC if bias_O is None else x_BTC + bias_O
        return GroupNorm(name="norm")(x_BTC, -(-lengths_B // self.stride)) if self.config.group_norm else x_BTC

    def _before(self, x_BTC: jax.Array, lengths_B: jax.Array, left: int, right: int, mode: str) -> jax.Array:
        """The `left` inputs before the first: of a stream those of the call before, otherwise padding."""
        positions_BP = jnp.broadcast_to(jnp.arange(-left, 0), (x_BTC.shape[0], left))
        around_B = jnp.maximum(left, right + -lengths_B % self.stride)
        padding_BPC = mirrored(x_BTC, lengths_B, positions_BP, around_B, mode)
        past_BPC = remember(self, x_BTC, left, first_BPC=padding_BPC)
        return padding_BPC if past_BPC is None else past_BPC


class ConvTranspose(nn.Module):
    """A transposed convolution, cut to whole strides: [B, T, I] -> [B, T · stride, O].

    Attributes:
      config: its causality, padding and normalisation count.
      features: O.
      stride: half the kernel's size.
      groups: of channels.
      use_bias: add one.
    """

    config: SeanetConfig
    features: int
    stride: int
    groups: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_BTC: jax.Array, lengths_B: jax.Array) -> jax.Array:
        config, frames = self.config, x_BTC.shape[1]
        shape = (2 * self.stride, x_BTC.shape[-1], self.features // self.groups)
        kernel_kIO, bias_O = kernel_and_bias(self, shape, self.use_bias)
        x_BTC, kernel_kIO, bias_O = nn.dtypes.promote_dtype(x_BTC, kernel_kIO, bias_O)
        right = math.ceil(self.stride * config.trim_right_ratio) if config.causal else self.stride // 2
        left = self.stride - right
        if left or config.group_norm:
            x_BTC = masked(x_BTC, lengths_B)
        past_B1C = remember(self, x_BTC, 1)
        if past_B1C is not None:
            x_BTC, left = jnp.concatenate([past_B1C, x_BTC], axis=1), left + self.stride
        # One frame of silence more, for what the last frame adds to the next block.
        ended_BTC = jnp.pad(x_BTC, ((0, 0), (0, 1), (0, 0)))
        y_BTC = causal_conv_transpose(ended_BTC, kernel_kIO, self.stride, groups=self.groups)
        y_BTC = y_BTC if bias_O is None else y_BTC + bias_O
        if config.group_norm:
            y_BTC = GroupNorm(name="norm")(y_BTC, (lengths_B + 1) * self.stride)
        return y_BTC[:, left : left + frames * self.stride]


def kernel_and_bias(module: nn.Module, shape: tuple[int, ...], use_bias: bool) -> tuple[jax.Array, jax.Array | None]:
    """A convolution's parameters `kernel`, of that shape, and `bias`."""
    normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    kernel_init = nn.with_logical_partitioning(normal, (None, "conv_in", "conv_out"))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
    kernel_kIO = module.param("kernel", kernel_init, shape, jnp.float32)
    # The features are the module's: a grouped kernel holds only a group's.
    return kernel_kIO, module.param("bias", bias_init, (module.features,), jnp.float32) if use_bias else None


class GroupNorm(nn.Module):
    """Normalises each row over its own frames and all channels, then scales and shifts each channel."""

    @nn.compact
    def __call__(self, x_BTC: jax.Array, lengths_B: jax.Array) -> jax.Array:
        channels = x_BTC.shape[-1]
        scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("conv_out",))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
        scale_C = self.param("scale", scale_init, (channels,), jnp.float32)
        bias_C = self.param("bias", bias_init, (channels,), jnp.float32)
        count_B11 = jnp.maximum(lengths_B, 1)[:, None, None] * channels
        mean_B11 = jnp.sum(masked(x_BTC, lengths_B), axis=(1, 2), keepdims=True) / count_B11
        deviation_BTC = masked(x_BTC - mean_B11, lengths_B)
        variance_B11 = jnp.sum(jnp.square(deviation_BTC), axis=(1, 2), keepdims=True) / count_B11
        return deviation_BTC * jax.lax.rsqrt(variance_B11 + 1e-5) * scale_C + bias_C


class Lstm(nn.Module):
    """x + LSTM(x), of as many layers: [B, T, C] -> [B, T, C]. Gates are input, forget, cell, output."""

    num_layers: int

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        y_BTC = x_BTC
        for layer in range(self.num_layers):
            y_BTC = LstmLayer(name=f"layer_{layer}")(y_BTC)
        return x_BTC + y_BTC


class LstmLayer(nn.Module):
    """One layer; its `kernel` is the recurrent one, `input` holds the other and both biases in one."""

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        batch, _, width = x_BTC.shape
        normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel_IO = self.param(
            "kernel", nn.with_logical_partitioning(normal, (None, "conv_out")), (width, 4 * width), jnp.float32
        )
        driven_BTO = nn.Dense(4 * width, name="input")(x_BTC)
        kernel_IO = kernel_IO.astype(driven_BTO.dtype)

        def step(state, driven_BO):
            hidden_BC, cell_BC = state
            enter, forget, new, leave = jnp.split(driven_BO + hidden_BC @ kernel_IO, 4, axis=-1)
            cell_BC = nn.sigmoid(forget) * cell_BC + nn.sigmoid(enter) * jnp.tanh(new)
            hidden_BC = nn.sigmoid(leave) * jnp.tanh(cell_BC)
            return (hidden_BC, cell_BC), hidden_BC

        zeros_BC = jnp.zeros((batch, width), driven_BTO.dtype)
        hidden_TBC = jax.lax.scan(step, (zeros_BC, zeros_BC), jnp.moveaxis(driven_BTO, 1, 0))[1]
        return jnp.moveaxis(hidden_TBC, 0, 1)


class ResidualUnit(nn.Module):
    """shortcut(x) + conv k1(ELU(dilated conv(ELU(x)))), at the width of x."""

    config: SeanetConfig
    dilation: int

    @nn.compact
    def __call__(self, x_BTC: jax.Array, lengths_B: jax.Array) -> jax.Array:
        config, width = self.config, x_BTC.shape[-1]
        dilated = Conv(
            config, width // config.compress, config.residual_kernel_size, dilation=self.dilation, name="dilated"
        )
        inner_BTC = dilated(elu(x_BTC), lengths_B)
        inner_BTC = Conv(config, width, 1, name="mix")(elu(inner_BTC), lengths_B)
        if config.conv_shortcut:
            x_BTC = Conv(config, width, 1, name="shortcut")(x_BTC, lengths_B)
        return x_BTC + inner_BTC


class Encoder(nn.Module):
    """Waveform [B, W], or [B, W, C] of several channels -> frame vectors [B, ceil(W / hop), D].

    `lengths_B` are samples of each row, all by default: see `architecture.Architecture`.
    """

    config: SeanetConfig

    @nn.compact
    def __call__(self, wave_BW: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
        config = self.config
        x_BTC = wave_BW[..., None] if wave_BW.ndim == 2 else wave_BW
        lengths_B = all_of(x_BTC) if lengths_B is None else lengths_B
        x_BTC = Conv(config, config.channels, config.kernel_size, name="first")(x_BTC, lengths_B)
        for block, stride in enumerate(config.strides):
            for unit in range(config.num_residual_layers):
                x_BTC = ResidualUnit(config, config.dilation_growth**unit, name=f"unit_{block}_{unit}")(
                    x_BTC, lengths_B
                )
            down = Conv(config, 2 * x_BTC.shape[-1], 2 * stride, stride, name=f"down_{block}")
            x_BTC = down(elu(x_BTC), lengths_B)
            lengths_B = -(-lengths_B // stride)
        if config.num_lstm_layers:
            x_BTC = Lstm(config.num_lstm_layers, name="lstm")(x_BTC)
        return Conv(config, config.embed_dim, config.last_kernel_size, name="last")(elu(x_BTC), lengths_B)


class Decoder(nn.Module):
    """Frame vectors [B, T, D] -> waveform [B, T · hop], or [B, T · hop, C] of several channels.

    `lengths_B` are frames of each row, all by default.
    """

    config: SeanetConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
        config = self.config
        lengths_B = all_of(x_BTD) if lengths_B is None else lengths_B
        widest = config.channels * 2 ** len(config.strides)
        x_BTC = Conv(config, widest, config.kernel_size, name="first")(x_BTD, lengths_B)
        if config.num_lstm_layers:
            x_BTC = Lstm(config.num_lstm_layers, name="lstm")(x_BTC)
        for block, stride in reversed(list(enumerate(config.strides))):
            up = ConvTranspose(config, x_BTC.shape[-1] // 2, stride, name=f"up_{block}")
            x_BTC = up(elu(x_BTC), lengths_B)
            lengths_B = lengths_B * stride
            for unit in range(config.num_residual_layers):
                x_BTC = ResidualUnit(config, config.dilation_growth**unit, name=f"unit_{block}_{unit}")(
                    x_BTC, lengths_B
                )
        wave_BWC = Conv(config, config.audio_channels, config.last_kernel_size, name="last")(elu(x_BTC), lengths_B)
        return wave_BWC[..., 0] if config.audio_channels == 1 else wave_BWC


def all_of(x_BTC: jax.Array) -> jax.Array:
    """The lengths of rows that are as long as the array."""
    return jnp.full(x_BTC.shape[0], x_BTC.shape[1], jnp.int32)
