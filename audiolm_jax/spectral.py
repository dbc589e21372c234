"""Short-time spectra shared by the codec's losses, the semantic encoder's features and the report.

Shape suffixes: B batch, W waveform samples, T frames, F frequency bins, M mel bins.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def mel_filterbank(num_bins: int, num_mels: int, sample_rate: int, low_hz: float = 0.0, high_hz: float | None = None):
    """Triangular filters, peak 1, equally spaced on the HTK mel scale.

    Args:
      num_bins: frequency bins from 0 Hz to the Nyquist frequency, ends included.
      num_mels: filters.
      sample_rate: Hz.
      low_hz, high_hz: lower edge of the first and upper edge of the last filter; the Nyquist
        frequency by default.

    Returns:
      float32 NumPy array [F, M].
    """
    nyquist = sample_rate / 2
    mel = lambda hz: 2595.0 * np.log10(1.0 + hz / 700.0)  # noqa: E731
    edges_mel = np.linspace(mel(low_hz), mel(high_hz or nyquist), num_mels + 2)
    edges_hz = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    bins_hz = np.linspace(0.0, nyquist, num_bins)[:, None]
    rising = (bins_hz - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    falling = (edges_hz[2:] - bins_hz) / (edges_hz[2:] - edges_hz[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


def frame(wave_BW: jax.Array, window_length: int, hop_length: int) -> jax.Array:
    """Cuts overlapping frames; samples past the end count as zeros.

    Frame t covers samples [t·hop, t·hop + window), and there are ceil(W / hop) frames. Slices and a
    concatenation only, so the gradient is additions rather than a scatter.

    Returns:
      [B, T, window_length].
    """
    batch, num_samples = wave_BW.shape
    num_frames = -(-num_samples // hop_length)
    pieces = -(-window_length // hop_length)
    padded_length = (num_frames + pieces - 1) * hop_length
    hops_BTh = jnp.pad(wave_BW, ((0, 0), (0, padded_length - num_samples))).reshape(batch, -1, hop_length)
    frames_BTw = jnp.concatenate([hops_BTh[:, i : i + num_frames] for i in range(pieces)], axis=-1)
    return frames_BTw[..., :window_length]


def stft(wave_BW: jax.Array, window_length: int, hop_length: int, fft_length: int | None = None) -> jax.Array:
    """Complex short-time Fourier transform with a periodic Hann window over `frame`'s frames.

    Returns:
      complex array [B, T, fft_length // 2 + 1], T = ceil(W / hop_length).
    """
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window_length) / window_length)
    frames_BTw = frame(wave_BW, window_length, hop_length) * window.astype(wave_BW.dtype)
    # XLA cannot cut an FFT along the batch: on a mesh it would gather all frames on every device. A matrix product is
    # cut like any other, and fast where there are matrix units.
    return jax.lax.platform_dependent(
        frames_BTw,
        cpu=functools.partial(jnp.fft.rfft, n=fft_length or window_length),
        default=functools.partial(rfft_by_products, num_points=fft_length or window_length),
    )


def rfft_by_products(frames_BTw: jax.Array, num_points: int) -> jax.Array:
    """`jnp.fft.rfft(frames, num_points)` as two matrix products: complex [B, T, num_points // 2 + 1].

    Args:
      frames_BTw: of at most `num_points` samples, which zeros would fill up.
    """
    bins, samples = np.arange(num_points // 2 + 1), np.arange(frames_BTw.shape[-1])
    angles_wF = 2.0 * np.pi * (samples[:, None] * bins % num_points) / num_points
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGH)
    real_BTF, imaginary_BTF = (
        product(frames_BTw, table_wF.astype(frames_BTw.dtype)) for table_wF in (np.cos(angles_wF), -np.sin(angles_wF))
    )
    return jax.lax.complex(real_BTF, imaginary_BTF)


def mel_spectrogram(
    wave_BW: jax.Array,
    sample_rate: int,
    window_length: int,
    hop_length: int,
    num_mels: int,
    fft_length: int | None = None,
    low_hz: float = 0.0,
    high_hz: float | None = None,
    power: float = 1.0,
) -> jax.Array:
    """Mel spectrogram of magnitudes (power 1) or energies (power 2): [B, T, M]."""
    spectrum_BTF = stft(wave_BW, window_length, hop_length, fft_length)
    energy_BTF = jnp.square(spectrum_BTF.real) + jnp.square(spectrum_BTF.imag)
    # sqrt's gradient is infinite at 0; digital silence is common in recordings.
    strength_BTF = energy_BTF if power == 2.0 else jnp.maximum(energy_BTF, 1e-14) ** (power / 2.0)
    filters_FM = mel_filterbank(spectrum_BTF.shape[-1], num_mels, sample_rate, low_hz, high_hz)
    return strength_BTF @ jnp.asarray(filters_FM, strength_BTF.dtype)
