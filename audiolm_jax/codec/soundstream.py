"""SoundStream's encoder and decoder: causal convolutions between waveform and frame vectors.

Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec" (arXiv 2107.03312 §III-A, B). No normalisation, ELU
throughout (or snake), left padding only: frame t depends on samples before (t + 1) · hop, and a sample on frames up to
its own.

Shape suffixes: B batch, W waveform samples, T frames (of any rate), C channels, D embedding, k kernel taps, I and O
channels in and out.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from audiolm_jax.codec.convolution import elu, parameters_of
from audiolm_jax.codec.factorised import FactorisedQuantizer
from audiolm_jax.codec.quantizer import ResidualQuantizer
from audiolm_jax.codec.snake import Snake

DILATIONS = (1, 3, 9)
# Variable collection of what a causal convolution remembers from one chunk to the next.
STREAM = "stream"


@dataclasses.dataclass(frozen=True)
class SoundStreamConfig:
    """Architecture of the codec: the fields of a config's `model`.

    Attributes:
      sample_rate: Hz.
      channels: C, the width at the waveform's rate; it doubles with each stride.
      strides: of the encoder's blocks, waveform first; their product is the hop.
      embed_dim: D, the width of the frame vectors that are quantized.
      num_quantizers: Q, levels of the residual quantizer.
      codebook_size: N, codes per level.
      snake: the snake activation (`Snake`) in place of ELU.
      codebook_dim: width of factorised codes (`FactorisedQuantizer`; DAC's are 8); 0: codes are vectors of width D
        that follow the frames (`ResidualQuantizer`).
    """

    sample_rate: int
    channels: int
    strides: tuple[int, ...]
    embed_dim: int
    num_quantizers: int
    codebook_size: int
    snake: bool = False
    codebook_dim: int = 0

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
    def quantizer(self) -> ResidualQuantizer | FactorisedQuantizer:
        """Frame vectors to codes and back."""
        if self.codebook_dim:
            return FactorisedQuantizer(self.num_quantizers, self.codebook_size, self.embed_dim, self.codebook_dim)
        return ResidualQuantizer(self.num_quantizers, self.codebook_size, self.embed_dim)

    @property
    def streams(self) -> bool:
        """Whether encoder and decoder take a recording chunk by chunk."""
        return True

    @property
    def reach(self) -> None:
        """A sample depends on all frames before it: a stream carries them along."""
        return None

    def num_frames(self, num_samples):
        """Frames of so many samples (an integer or an array of them)."""
        return -(-num_samples // self.hop_length)

    def num_samples(self, num_frames):
        """Samples that so many frames are decoded to."""
        return num_frames * self.hop_length


def causal_conv(
    x_BTC: jax.Array, kernel_kIO: jax.Array, stride: int = 1, dilation: int = 1, past_BPC: jax.Array | None = None
) -> jax.Array:
    """Convolution whose output t sees inputs before (t + 1) · stride; T must be a multiple of the stride.

    Args:
      x_BTC: inputs.
      kernel_kIO: kernel.
      stride, dilation: of the convolution.
      past_BPC: the `past_length` inputs before these; None: zeros, as at the beginning.

    Returns:
      [B, T / stride, O].
    """
    zeros = past_length(kernel_kIO.shape[0], stride, dilation)
    if past_BPC is not None:
        x_BTC, zeros = jnp.concatenate([past_BPC, x_BTC], axis=1), 0
    return jax.lax.conv_general_dilated(
        x_BTC,
        kernel_kIO,
        window_strides=(stride,),
        padding=[(zeros, 0)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )


def past_length(kernel_size: int, stride: int, dilation: int) -> int:
    """How many inputs before the first of its own frame a causal convolution sees."""
    return (kernel_size - 1) * dilation + 1 - stride


def causal_conv_transpose(
    x_BTC: jax.Array, kernel_kIO: jax.Array, stride: int, past_B1C: jax.Array | None = None, groups: int = 1
) -> jax.Array:
    """Transposed convolution with k = 2 · stride: output[t · stride + i] += x[t] @ kernel[i], cut to T · stride.

    As a convolution of two taps, x[t - 1] and x[t], that makes a whole stride of outputs at once: what the compiler
    makes of a convolution over an input full of zeros takes five to ten times as long on a CPU.

    Args:
      x_BTC: inputs.
      kernel_kIO: [k, I, O / groups].
      stride: s.
      past_B1C: the input before these; None: zeros, as at the beginning.
      groups: of channels, each with its own outputs.

    Returns:
      [B, T · stride, O].
    """
    taps, width, features = kernel_kIO.shape
    if taps != 2 * stride:
        raise ValueError(f"a kernel of {taps} taps is not twice the stride {stride}")
    zeros = 1
    if past_B1C is not None:
        x_BTC, zeros = jnp.concatenate([past_B1C, x_BTC], axis=1), 0
    # What x[t] adds to the stride that begins at t comes second, what it adds to the next one first.
    kernel_2sGIO = kernel_kIO.reshape(2, stride, groups, width // groups, features)[::-1]
    kernel_2IO = jnp.transpose(kernel_2sGIO, (0, 3, 2, 1, 4)).reshape(2, width // groups, -1)
    y_BTO = jax.lax.conv_general_dilated(
        x_BTC, kernel_2IO, (1,), [(zeros, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )
    y_BTGsO = y_BTO.reshape(*y_BTO.shape[:2], groups, stride, features)
    return jnp.swapaxes(y_BTGsO, 2, 3).reshape(y_BTO.shape[0], -1, groups * features)


class CausalConv(nn.Module):
    """`causal_conv`, or its transpose, with their parameters: a kernel [k, I, O] and a bias [O].

    Where the collection `STREAM` is mutable, the inputs continue those of the call before, of which it holds what is
    still needed (nothing yet: the beginning).
    """

    features: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    transpose: bool = False

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        x_BTC, kernel_kIO, bias_O = parameters_of(self, x_BTC, self.kernel_size, self.features)
        size = 1 if self.transpose else past_length(self.kernel_size, self.stride, self.dilation)
        past_BPC = remember(self, x_BTC, size)
        if self.transpose:
            return causal_conv_transpose(x_BTC, kernel_kIO, self.stride, past_BPC) + bias_O
        return causal_conv(x_BTC, kernel_kIO, self.stride, self.dilation, past_BPC) + bias_O


def remember(
    module: nn.Module, x_BTC: jax.Array, size: int, name: str = "past", first_BPC: jax.Array | None = None
) -> jax.Array | None:
    """The `size` inputs before these, kept from the call before, while these are kept for the next.

    Args:
      module: whose inputs they are.
      x_BTC: this call's inputs.
      size: how many are needed.
      name: under which they are kept.
      first_BPC: what comes before a stream; zeros by default.

    Returns:
      [B, size, C]; None where the collection `STREAM` is not mutable: nothing streams.
    """
    if module.is_initializing() or not module.is_mutable_collection(STREAM):
        return None
    batch, frames, *channels = x_BTC.shape
    past_BPC = module.get_variable(STREAM, name, jnp.zeros((batch, size, *channels), x_BTC.dtype))
    if first_BPC is not None:
        begun = module.get_variable(STREAM, "begun", jnp.zeros((), bool))
        module.put_variable(STREAM, "begun", jnp.ones((), bool))
        past_BPC = jnp.where(begun, past_BPC, first_BPC)
    module.put_variable(STREAM, name, jnp.concatenate([past_BPC, x_BTC], axis=1)[:, frames:])
    return past_BPC


def activate(x_BTC: jax.Array, snake: bool, layer: str) -> jax.Array:
    """The inputs of a layer after ELU, or after the snake that belongs to it, which the calling module declares."""
    return Snake(name=f"{layer}_snake")(x_BTC) if snake else elu(x_BTC)


class ResidualUnit(nn.Module):
    """x + conv k1(ELU(dilated conv k7(ELU(x)))), at the width of x; with `snake`, that in place of ELU."""

    dilation: int
    snake: bool

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        dilated = CausalConv(x_BTC.shape[-1], 7, dilation=self.dilation, name="dilated")
        inner_BTC = dilated(activate(x_BTC, self.snake, "dilated"))
        return x_BTC + CausalConv(x_BTC.shape[-1], 1, name="mix")(activate(inner_BTC, self.snake, "mix"))


class Encoder(nn.Module):
    """Waveform [B, W] -> frame vectors [B, ceil(W / hop), D]; the waveform is padded with zeros to whole frames.

    Of `lengths_B`, samples of each row, it takes no notice: what follows a frame does not change it.
    """

    config: SoundStreamConfig

    @nn.compact
    def __call__(self, wave_BW: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
        del lengths_B
        config = self.config
        missing = -wave_BW.shape[1] % config.hop_length
        x_BTC = jnp.pad(wave_BW, ((0, 0), (0, missing)))[..., None]
        x_BTC = CausalConv(config.channels, 7, name="first")(x_BTC)
        for block, stride in enumerate(config.strides):
            for unit, dilation in enumerate(DILATIONS):
                x_BTC = ResidualUnit(dilation, config.snake, name=f"unit_{block}_{unit}")(x_BTC)
            down = CausalConv(2 * x_BTC.shape[-1], 2 * stride, stride, name=f"down_{block}")
            x_BTC = down(activate(x_BTC, config.snake, f"down_{block}"))
        return CausalConv(config.embed_dim, 3, name="last")(activate(x_BTC, config.snake, "last"))


class Decoder(nn.Module):
    """Frame vectors [B, T, D] -> waveform [B, T · hop]: the encoder's mirror image; `lengths_B`, frames, as there."""

    config: SoundStreamConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
        del lengths_B
        config = self.config
        x_BTC = CausalConv(config.channels * 2 ** len(config.strides), 7, name="first")(x_BTD)
        for block, stride in reversed(list(enumerate(config.strides))):
            up = CausalConv(x_BTC.shape[-1] // 2, 2 * stride, stride, transpose=True, name=f"up_{block}")
            x_BTC = up(activate(x_BTC, config.snake, f"up_{block}"))
            for unit, dilation in enumerate(DILATIONS):
                x_BTC = ResidualUnit(dilation, config.snake, name=f"unit_{block}_{unit}")(x_BTC)
        return CausalConv(1, 7, name="last")(activate(x_BTC, config.snake, "last"))[..., 0]
