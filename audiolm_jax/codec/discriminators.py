"""The networks that tell real waveforms from reconstructions, and teach the codec by it.

SoundStream (arXiv 2107.03312 §III-D): a multi-scale discriminator of the waveform, as in MelGAN (arXiv 1910.06711), and
one of the complex short-time Fourier transform; on request EnCodec's (arXiv 2210.13438 §3.4), of transforms with
several windows. Each gives logits over time and the activations of its layers, which the feature-matching loss
compares.

Shape suffixes: B batch, W waveform samples, T frames, F frequency bins, C channels, k kernel taps, I and O channels in
and out.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from audiolm_jax import spectral
from audiolm_jax.codec.convolution import convolve, elu


class Judgement(NamedTuple):
    """One discriminator's view of a batch.

    Attributes:
      logits_BT: positive where the sound seems real; of some discriminators several a frame, one after the other.
      features: activations of the layers before the logits, waveform side first.
    """

    logits_BT: jax.Array
    features: list[jax.Array]


def _parameter(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> jax.Array:
    """A parameter whose last two axes are named as convolution channels."""
    axes = ((None,) * len(shape) + ("conv_in", "conv_out"))[-len(shape) :]
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class WeightNormConv(nn.Module):
    """Grouped convolution over one or two axes, zero padded, its kernel normalised: kernel · scale / |kernel|.

    The norm is that of the weights of one output channel.
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    dilations: tuple[int, ...] | None = None
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = _parameter(self, "kernel", nn.initializers.lecun_normal(), shape)
        scale_O = _parameter(self, "scale", nn.initializers.ones, shape[-1:])
        bias_O = _parameter(self, "bias", nn.initializers.zeros, shape[-1:])
        kernel = kernel * (scale_O / jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(len(shape) - 1)))))
        x, kernel, bias_O = nn.dtypes.promote_dtype(x, kernel, bias_O)
        strides = self.strides or (1,) * len(self.kernel_size)
        return convolve(x, kernel, strides, "SAME", self.groups, self.dilations) + bias_O


class WaveformDiscriminator(nn.Module):
    """One scale of the waveform discriminator: k15, strided k41s, k5, and k3 to a logit every 4^4 = 256 samples.

    Attributes:
      channels: of the layers before the logits; all but the first and the last divide the rate by 4.
      group_width: input channels of one group of a strided convolution (4 in MelGAN: 4, 16, 64 and 256 groups). A
        width of at least the layers' own makes them ungrouped, which on a CPU is several times faster.
    """

    channels: tuple[int, ...]
    group_width: int

    @nn.compact
    def __call__(self, wave_BW: jax.Array) -> Judgement:
        first, *strided, last = self.channels
        layers = [WeightNormConv(first, (15,))]
        for width_in, width_out in zip(self.channels, strided, strict=False):
            layers.append(WeightNormConv(width_out, (41,), (4,), groups=max(1, width_in // self.group_width)))
        layers.append(WeightNormConv(last, (5,)))
        x_BTC, features = wave_BW[..., None], []
        for layer in layers:
            x_BTC = nn.leaky_relu(layer(x_BTC), 0.2)
            features.append(x_BTC)
        return Judgement(WeightNormConv(1, (3,))(x_BTC)[..., 0], features)


class SpectralConv(nn.Module):
    """2-D convolution over time and frequency, zero padded so that a stride of 1 keeps the shape."""

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x_BTFC: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, x_BTFC.shape[-1], self.features)
        kernel = _parameter(self, "kernel", nn.initializers.lecun_normal(), shape)
        bias_O = _parameter(self, "bias", nn.initializers.zeros, shape[3:])
        x_BTFC, kernel, bias_O = nn.dtypes.promote_dtype(x_BTFC, kernel, bias_O)
        return convolve(x_BTFC, kernel, self.strides, self.padding) + bias_O


class SpectralUnit(nn.Module):
    """Residual unit of the STFT discriminator: 3x3, then (s_t + 2) x (s_f + 2) with stride; 1x1 on the way round."""

    features: int
    strides: tuple[int, int]

    @nn.compact
    def __call__(self, x_BTFC: jax.Array) -> jax.Array:
        kernel = (self.strides[0] + 2, self.strides[1] + 2)
        inner_BTFC = SpectralConv(x_BTFC.shape[-1], (3, 3), name="same")(elu(x_BTFC))
        inner_BTFC = SpectralConv(self.features, kernel, self.strides, name="down")(elu(inner_BTFC))
        return inner_BTFC + SpectralConv(self.features, (1, 1), self.strides, name="skip")(x_BTFC)


class STFTDiscriminator(nn.Module):
    """Discriminator of real and imaginary parts, [T, F] with T = ceil(W / hop) and F = window / 2 (without Nyquist's).

    Six units divide frequency by 2^6 and time by 2^3 (rounded up); a last convolution over all remaining frequencies
    gives the logits. ELU between layers: the paper leaves it open.

    Attributes:
      channels: of the first convolution; the units have 2, 4, 4, 8, 8 and 16 times as many.
      window, hop: of the transform, in samples.
    """

    channels: int
    window: int
    hop: int

    @nn.compact
    def __call__(self, wave_BW: jax.Array) -> Judgement:
        spectrum_BTF = spectral.stft(wave_BW, self.window, self.hop)[..., : self.window // 2]
        x_BTFC = jnp.stack([spectrum_BTF.real, spectrum_BTF.imag], axis=-1)
        x_BTFC = SpectralConv(self.channels, (7, 7))(x_BTFC)
        features = [x_BTFC]
        for unit, factor in enumerate((2, 4, 4, 8, 8, 16)):
            x_BTFC = SpectralUnit(factor * self.channels, (1, 2) if unit % 2 == 0 else (2, 2))(x_BTFC)
            features.append(x_BTFC)
        logits_BT11 = SpectralConv(1, (1, x_BTFC.shape[2]), padding="VALID")(elu(x_BTFC))
        return Judgement(logits_BT11[:, :, 0, 0], features)


class DilatedSTFTDiscriminator(nn.Module):
    """One window of EnCodec's multi-scale discriminator: real and imaginary parts, [T, F], F = window / 2 + 1.

    Five convolutions at one width, the middle three with kernels dilated in time by 1, 2 and 4 and a stride of 2 in
    frequency; leaky ReLU 0.2. The logits keep an eighth of the frequencies. The hop is a quarter of the window, and the
    spectrum is scaled by 1 / |window|, so that every window sees sounds equally loud.

    Attributes:
      channels: of all layers but the logits'.
      window: of the transform, in samples.
    """

    channels: int
    window: int

    @nn.compact
    def __call__(self, wave_BW: jax.Array) -> Judgement:
        # The squares of a periodic Hann window add up to three eighths of its length.
        spectrum_BTF = spectral.stft(wave_BW, self.window, self.window // 4) / (0.375 * self.window) ** 0.5
        x_BTFC, features = jnp.stack([spectrum_BTF.real, spectrum_BTF.imag], axis=-1), []
        # In time three taps, in frequency nine: the paper says eight, which has no middle.
        layers = [WeightNormConv(self.channels, (3, 9))]
        for dilation in (1, 2, 4):
            layers.append(WeightNormConv(self.channels, (3, 9), (1, 2), (dilation, 1)))
        layers.append(WeightNormConv(self.channels, (3, 3)))
        for layer in layers:
            x_BTFC = nn.leaky_relu(layer(x_BTFC), 0.2)
            features.append(x_BTFC)
        logits_BTF1 = WeightNormConv(1, (3, 3))(x_BTFC)
        return Judgement(logits_BTF1.reshape(wave_BW.shape[0], -1), features)


class Discriminators(nn.Module):
    """All discriminators of a codec: the waveform at full rate, at 1/2, at 1/4 …, its STFT, and those of more windows.

    The attributes are the fields of a config's `discriminator`; those of more windows are `stft_channels` wide, too.
    """

    waveform_channels: tuple[int, ...]
    waveform_scales: int
    waveform_group_width: int
    stft_channels: int
    stft_window: int
    stft_hop: int
    multi_stft_windows: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, wave_BW: jax.Array) -> list[Judgement]:
        judgements, scaled_BW = [], wave_BW
        for scale in range(self.waveform_scales):
            name = f"waveform_{scale}"
            judge = WaveformDiscriminator(self.waveform_channels, self.waveform_group_width, name=name)
            judgements.append(judge(scaled_BW))
            scaled_BW = nn.avg_pool(scaled_BW[..., None], (4,), (2,), "SAME")[..., 0]
        judgements.append(STFTDiscriminator(self.stft_channels, self.stft_window, self.stft_hop, name="stft")(wave_BW))
        for window in self.multi_stft_windows:
            judge = DilatedSTFTDiscriminator(self.stft_channels, window, name=f"stft_{window}")
            judgements.append(judge(wave_BW))
        return judgements
