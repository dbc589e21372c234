"""DAC's encoder and decoder: SoundStream's, with snakes and with convolutions that look both ways.

Kumar et al., "High-Fidelity Audio Compression with Improved RVQGAN" (arXiv 2306.06546 §3). Every convolution is padded
with zeros on both sides, so a frame depends on samples around it and a sample on frames around its own: neither side
streams, but both reach only so far. Lengths are what these convolutions make of them: a recording gives about W / hop
frames, and an odd stride s of the decoder gives one sample fewer than s a frame, so that at strides 8, 5, 4, 2 T frames
make 320 T - 8 samples.

Rows of a ragged batch are cut to their length before every convolution that looks aside: each comes out as it does
alone.

Shape suffixes: B batch, W waveform samples, T frames (of any rate), C channels, D embedding, k kernel taps, I and O
channels in and out.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from audiolm_jax.codec.convolution import masked, parameters_of
from audiolm_jax.codec.factorised import FactorisedQuantizer
from audiolm_jax.codec.snake import Snake
from audiolm_jax.codec.soundstream import DILATIONS, causal_conv_transpose
from audiolm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DacConfig:
    """Architecture of the codec: the fields of a config's `model` whose `architecture` is "dac".

    Attributes:
      sample_rate: Hz.
      channels: the encoder's width at the waveform's rate; it doubles with each stride.
      strides: of the encoder's blocks, waveform first; their product is the hop.
      decoder_channels: the decoder's width at the frames' rate; it halves with each stride.
      decoder_strides: of the decoder's blocks, frames first; of the same product.
      embed_dim: D, the width of the frame vectors that are quantized.
      num_quantizers: Q, levels of the quantizer.
      codebook_size: N, codes per level.
      codebook_dim: width of a code.
    """

    sample_rate: int
    channels: int
    strides: tuple[int, ...]
    decoder_channels: int
    decoder_strides: tuple[int, ...]
    embed_dim: int
    num_quantizers: int
    codebook_size: int
    codebook_dim: int

    def __post_init__(self):
        if math.prod(self.decoder_strides) != self.hop_length:
            raise UserError(
                f"the decoder makes {math.prod(self.decoder_strides)} samples of a frame, not {self.hop_length}",
                f"config.model.decoder_strides={self.decoder_strides}",
                f"choose strides of the same product as config.model.strides={self.strides}",
            )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.strides)

    @property
    def encoder(self) -> "Encoder":
        """Waveforms to frame vectors."""
        return Encoder(self)

    @property
    def decoder(self) -> "Decoder":
        """Frame vectors to waveforms."""
        return Decoder(self)

    @property
    def quantizer(self) -> FactorisedQuantizer:
        """Frame vectors to codes and back."""
        return FactorisedQuantizer(self.num_quantizers, self.codebook_size, self.embed_dim, self.codebook_dim)

    @property
    def streams(self) -> bool:
        """Whether encoder and decoder take a recording chunk by chunk: what they look ahead at is not there yet."""
        return False

    @property
    def reach(self) -> int:
        """Frames on either side of a sample's own that it depends on.

        From the samples of frame 0 back to what they are made of, layer by layer.
        """
        first, last = -3, self.hop_length - 1 + 3
        for stride in reversed(self.decoder_strides):
            first, last = first - 3 * sum(DILATIONS), last + 3 * sum(DILATIONS)
            # Input t of a transposed convolution makes the outputs from t · stride - cut on, 2 · stride of them.
            first = -((2 * stride - 1 - _cut(stride) - first) // stride)
            last = (last + _cut(stride)) // stride
        return max(3 - first, 3 + last)

    def num_frames(self, num_samples):
        """Frames of so many samples (an integer or an array of them)."""
        for stride in self.strides:
            num_samples = _down_length(num_samples, stride)
        return num_samples

    def num_samples(self, num_frames):
        """Samples that so many frames are decoded to; none of no frames."""
        length = num_frames
        for stride in self.decoder_strides:
            length = _up_length(length, stride)
        return length * (num_frames > 0)


def _cut(stride: int) -> int:
    """Zeros on either side of a strided convolution, and what a transposed one leaves out there."""
    return -(-stride // 2)


def _down_length(length, stride: int):
    return (length + 2 * _cut(stride)) // stride - 1


def _up_length(length, stride: int):
    return (length + 1) * stride - 2 * _cut(stride)


def _conv(x_BTC: jax.Array, kernel_kIO: jax.Array, padding: int, stride: int = 1, dilation: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_BTC,
        kernel_kIO,
        window_strides=(stride,),
        padding=[(padding, padding)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )


class Conv(nn.Module):
    """Convolution of an odd number of taps around each frame: [B, T, C] -> [B, T, O]."""

    features: int
    kernel_size: int
    dilation: int = 1

    @nn.compact
    def __call__(self, x_BTC: jax.Array, lengths_B: jax.Array) -> jax.Array:
        x_BTC, kernel_kIO, bias_O = parameters_of(self, x_BTC, self.kernel_size, self.features)
        padding = self.kernel_size // 2 * self.dilation
        if padding:
            x_BTC = masked(x_BTC, lengths_B)
        return _conv(x_BTC, kernel_kIO, padding, dilation=self.dilation) + bias_O


class DownConv(nn.Module):
    """Convolution of 2 · stride taps: a row of T frames makes `_down_length(T)`."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x_BTC: jax.Array, lengths_B: jax.Array) -> jax.Array:
        x_BTC, kernel_kIO, bias_O = parameters_of(self, x_BTC, 2 * self.stride, self.features)
        return _conv(masked(x_BTC, lengths_B), kernel_kIO, _cut(self.stride), self.stride) + bias_O


class UpConv(nn.Module):
    """Transposed convolution of 2 · stride taps: a row of T frames makes `_up_length(T)`."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x_BTC: jax.Array, lengths_B: jax.Array) -> jax.Array:
        x_BTC, kernel_kIO, bias_O = parameters_of(self, x_BTC, 2 * self.stride, self.features)
        # One frame of silence more, for what the last frame adds to the next block.
        ended_BTC = jnp.pad(masked(x_BTC, lengths_B), ((0, 0), (0, 1), (0, 0)))
        y_BTO = causal_conv_transpose(ended_BTC, kernel_kIO, self.stride)
        return y_BTO[:, _cut(self.stride) : y_BTO.shape[1] - _cut(self.stride)] + bias_O


class ResidualUnit(nn.Module):
    """x + conv k1(snake(dilated conv k7(snake(x)))), at the width of x."""

    dilation: int

    @nn.compact
    def __call__(self, x_BTC: jax.Array, lengths_B: jax.Array) -> jax.Array:
        channels = x_BTC.shape[-1]
        dilated_BTC = Conv(channels, 7, self.dilation, name="dilated")(Snake(name="dilated_snake")(x_BTC), lengths_B)
        return x_BTC + Conv(channels, 1, name="mix")(Snake(name="mix_snake")(dilated_BTC), lengths_B)


class Encoder(nn.Module):
    """Waveform [B, W] -> frame vectors [B, `config.num_frames(W)`, D]; `lengths_B` are samples of each row."""

    config: DacConfig

    @nn.compact
    def __call__(self, wave_BW: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
        if lengths_B is None:
            lengths_B = jnp.full(wave_BW.shape[0], wave_BW.shape[1])
        x_BTC = Conv(self.config.channels, 7, name="first")(wave_BW[..., None], lengths_B)
        for block, stride in enumerate(self.config.strides):
            for unit, dilation in enumerate(DILATIONS):
                x_BTC = ResidualUnit(dilation, name=f"unit_{block}_{unit}")(x_BTC, lengths_B)
            down = DownConv(2 * x_BTC.shape[-1], stride, name=f"down_{block}")
            x_BTC = down(Snake(name=f"down_{block}_snake")(x_BTC), lengths_B)
            lengths_B = _down_length(lengths_B, stride)
        return Conv(self.config.embed_dim, 3, name="last")(Snake(name="last_snake")(x_BTC), lengths_B)


class Decoder(nn.Module):
    """Frame vectors [B, T, D] -> waveform [B, `config.num_samples(T)`]; `lengths_B` are frames of each row.

    Samples after a row's own are zeros.
    """

    config: DacConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
        if lengths_B is None:
            lengths_B = jnp.full(x_BTD.shape[0], x_BTD.shape[1])
        x_BTC = Conv(self.config.decoder_channels, 7, name="first")(x_BTD, lengths_B)
        for block, stride in enumerate(self.config.decoder_strides):
            up = UpConv(x_BTC.shape[-1] // 2, stride, name=f"up_{block}")
            x_BTC = up(Snake(name=f"up_{block}_snake")(x_BTC), lengths_B)
            lengths_B = _up_length(lengths_B, stride)
            for unit, dilation in enumerate(DILATIONS):
                x_BTC = ResidualUnit(dilation, name=f"unit_{block}_{unit}")(x_BTC, lengths_B)
        last_BTC = Conv(1, 7, name="last")(Snake(name="last_snake")(x_BTC), lengths_B)
        return masked(jnp.tanh(last_BTC[..., 0]), lengths_B)
