"""The network that tells speakers, or generated from real speech, by one second of audio (arXiv 2209.03143 §4).

64 log-mel bands over 25 ms windows every 10 ms; six blocks of a 3x1 convolution over time and a 1x3 convolution over
frequency, each followed by ReLU and batch normalisation; max-pooling by two along both axes wherever the channels
grow. The paper leaves open how the last block's map becomes one vector: here by its mean.

Shape suffixes: B batch, T frames, M mel bands, C channels, K labels.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

BATCH_NORM_MOMENTUM, BATCH_NORM_EPSILON = 0.9, 1e-5


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """A config's `model`.

    Attributes:
      sample_rate: Hz, a multiple of 100.
      num_mels: bands.
      channels: of each block.
      labels: what is told apart, in the order of the outputs; none while that is left to the recordings.
    """

    sample_rate: int
    num_mels: int
    channels: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def num_outputs(self) -> int:
        """One a label; one, too, while there are none."""
        return max(1, len(self.labels))


class ClassifierNetwork(nn.Module):
    """Normalised log-mel features [B, T, M] and a mask of their frames [B, T] → logits [B, K].

    A row's logits are those of its own frames alone, as if nothing stood behind them (where they are a multiple of
    what the pooling joins; else the last position is of fewer). Batch statistics leave out the masked frames.
    """

    config: ClassifierConfig

    @nn.compact
    def __call__(self, mel_BTM: jax.Array, mask_BT: jax.Array, train: bool) -> jax.Array:
        x_BTMC, mask_BTMC = mel_BTM[..., None], mask_BT[:, :, None, None]
        before = self.config.channels[0]
        for index, channels in enumerate(self.config.channels):
            if channels > before:
                x_BTMC, mask_BTMC = _pool(x_BTMC, mask_BTMC)
            x_BTMC = Block(channels, name=f"block_{index}")(x_BTMC, mask_BTMC, train)
            before = channels
        count_BC = jnp.maximum(1, jnp.sum(mask_BTMC, axis=(1, 2)) * x_BTMC.shape[2])
        pooled_BC = jnp.sum(x_BTMC, axis=(1, 2)) / count_BC
        return nn.Dense(self.config.num_outputs, name="head")(pooled_BC)


class Block(nn.Module):
    """Convolutions 3x1 and 1x3, each with ReLU and batch normalisation; zeros where the mask is False."""

    channels: int

    @nn.compact
    def __call__(self, x_BTMC: jax.Array, mask_BTMC: jax.Array, train: bool) -> jax.Array:
        x_BTMC = jnp.where(mask_BTMC, x_BTMC, 0.0)
        kernel_init = nn.with_logical_partitioning(nn.initializers.he_normal(), (None, None, "conv_in", "conv_out"))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
        for axis, kernel_size in (("time", (3, 1)), ("frequency", (1, 3))):
            x_BTMC = nn.Conv(
                self.channels, kernel_size, kernel_init=kernel_init, bias_init=bias_init, name=f"conv_{axis}"
            )(x_BTMC)
            x_BTMC = nn.BatchNorm(
                not train, momentum=BATCH_NORM_MOMENTUM, epsilon=BATCH_NORM_EPSILON, name=f"norm_{axis}"
            )(nn.relu(x_BTMC), mask=mask_BTMC)
            x_BTMC = jnp.where(mask_BTMC, x_BTMC, 0.0)
        return x_BTMC


def _pool(x_BTMC: jax.Array, mask_BTMC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of each two frames and two bands, masked ones left out; what is left over at an end stays."""
    pooled_BTMC = nn.max_pool(jnp.where(mask_BTMC, x_BTMC, -jnp.inf), (2, 2), (2, 2), "SAME")
    mask_BT11 = nn.max_pool(mask_BTMC.astype(x_BTMC.dtype), (2, 1), (2, 1), "SAME") > 0
    return jnp.where(mask_BT11, pooled_BTMC, 0.0), mask_BT11
