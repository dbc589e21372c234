"""Log-mel features of w2v-BERT, and their normalisation by statistics of the training set.

80 mel bands over 25 ms windows every 10 ms (arXiv 2108.06209 §3.1). A semantic frame is 40 ms: exactly
four mel frames, so a wave is padded with zeros to whole semantic frames first and every clip of W
samples has ceil(W / 640) of them at 16 kHz.

Shape suffixes: B batch, W waveform samples, T frames, M mel bands.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax import spectral
from audiolm_jax.semantic import moments

FRAME_RATE = 25  # Semantic frames a second.
MELS_PER_FRAME = 4
ENERGY_FLOOR = 1e-6  # About a filter's energy of 16-bit rounding noise: silence, digital or not, looks the same.
DEVIATION_FLOOR = 1e-2  # A band that never changes (training on silence) is not blown up.


def samples_per_frame(sample_rate: int) -> int:
    """Samples of one semantic frame: 640 at 16 kHz."""
    return sample_rate // FRAME_RATE


def num_frames(num_samples, sample_rate: int):
    """Semantic frames of clips of that many samples (integer or integer array): ceil(W / 640) at 16 kHz."""
    return -(-num_samples // samples_per_frame(sample_rate))


def length_mask(lengths_B: jax.Array, size: int) -> jax.Array:
    """Boolean [B, size], True before each row's length."""
    return jnp.arange(size) < lengths_B[:, None]


def log_mel(wave_BW: jax.Array, lengths_B: jax.Array, sample_rate: int, num_mels: int) -> jax.Array:
    """Log energies of the mel bands.

    Samples past a row's length are taken as zeros whatever they hold, so a row's frames are those of
    that clip alone. Frames past its end are those of silence: mask them.

    Args:
      wave_BW: waveforms in [-1, 1].
      lengths_B: samples of each row.
      sample_rate: Hz, a multiple of 100.
      num_mels: M.

    Returns:
      [B, 4 · ceil(W / 640), M] (at 16 kHz), natural logarithm.
    """
    num_samples = wave_BW.shape[1]
    padding = num_frames(num_samples, sample_rate) * samples_per_frame(sample_rate) - num_samples
    wave_BW = jnp.where(length_mask(lengths_B, num_samples), wave_BW, 0.0)
    energy_BTM = spectral.mel_spectrogram(
        jnp.pad(wave_BW, ((0, 0), (0, padding))),
        sample_rate,
        window_length=sample_rate // 40,
        hop_length=sample_rate // 100,
        num_mels=num_mels,
        fft_length=1 << (sample_rate // 40 - 1).bit_length(),
        power=2.0,
    )
    return jnp.log(energy_BTM + ENERGY_FLOOR)


def initial_statistics(num_mels: int) -> dict[str, jax.Array]:
    """Statistics that leave features as they are, until `fit_statistics` has seen data."""
    return {"feature_mean": jnp.zeros(num_mels), "feature_std": jnp.ones(num_mels)}


def normalize(mel_BTM: jax.Array, statistics: dict[str, jax.Array]) -> jax.Array:
    """Zero mean and unit variance of each band over the training set."""
    return (mel_BTM - statistics["feature_mean"]) / statistics["feature_std"]


def fit_statistics(batches: Iterable[dict[str, jax.Array]], sample_rate: int, num_mels: int) -> dict[str, jax.Array]:
    """Mean and standard deviation [M] of each band over batches of `wave_BW` and `lengths_B`, padding left out."""

    @jax.jit
    def add(running, wave_BW, lengths_B):
        mel_BTM = log_mel(wave_BW, lengths_B, sample_rate, num_mels)
        mask_BT = length_mask(num_frames(lengths_B, sample_rate) * MELS_PER_FRAME, mel_BTM.shape[1])
        return moments.update(running, mel_BTM.reshape(-1, num_mels), mask_BT.reshape(-1))

    running = moments.empty(num_mels)
    for batch in batches:
        running = add(running, batch["wave_BW"], batch["lengths_B"])
    deviation_M = jnp.maximum(moments.deviation(running), DEVIATION_FLOOR)
    return {"feature_mean": running["mean"], "feature_std": deviation_M.astype(np.float32)}
