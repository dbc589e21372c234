"""Short-time spectra shared by the codec's losses, the semantic encoder's features and the report.

Shape suffixes: B batch, W waveform samples, T frames, F frequency bins, M mel bins.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def mel_filterbank(
    num_bins: int,
    num_mels: int,
    sample_rate: int,
    low_hz: float = 0.0,
    high_hz: float | None = None,
    style: str = "htk",
) -> np.ndarray:
    """Triangular filters, equally spaced on a mel scale.

    Args:
      num_bins: frequency bins from 0 Hz to the Nyquist frequency, ends included.
      num_mels: filters.
      sample_rate: Hz.
      low_hz, high_hz: lower edge of the first and upper edge of the last filter; the Nyquist
        frequency by default.
      style: "htk", its scale, triangles over Hz of peak 1; "kaldi", the same scale, triangles over mels of peak 1;
        "slaney", Slaney's scale (linear up to 1 kHz, logarithmic above), triangles over Hz of area 1.

    Returns:
      float32 NumPy array [F, M].
    """
    nyquist = sample_rate / 2
    bins = np.linspace(0.0, nyquist, num_bins)
    low_mel, high_mel = (_hz_to_mel(np.array(hz), style) for hz in (low_hz, high_hz or nyquist))
    edges = np.linspace(low_mel, high_mel, num_mels + 2)
    if style == "kaldi":
        bins = _hz_to_mel(bins, style)
    else:
        edges = _mel_to_hz(edges, style)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    filters_FM = np.maximum(0.0, np.minimum(rising, falling))
    if style == "slaney":
        filters_FM *= 2.0 / (edges[2:] - edges[:-2])
    return filters_FM.astype(np.float32)


# Slaney's scale: 200/3 Hz a mel up to 1 kHz, from where 27 mels multiply a frequency by 6.4.
_SLANEY_BREAK_HZ, _SLANEY_BREAK_MEL, _SLANEY_LOG_STEP = 1000.0, 15.0, np.log(6.4) / 27.0


def _hz_to_mel(hz: np.ndarray, style: str) -> np.ndarray:
    if style != "slaney":
        return 2595.0 * np.log10(1.0 + hz / 700.0)
    above = _SLANEY_BREAK_MEL + np.log(np.maximum(hz, _SLANEY_BREAK_HZ) / _SLANEY_BREAK_HZ) / _SLANEY_LOG_STEP
    return np.where(hz < _SLANEY_BREAK_HZ, 3.0 * hz / 200.0, above)


def _mel_to_hz(mel: np.ndarray, style: str) -> np.ndarray:
    if style != "slaney":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    above = _SLANEY_BREAK_HZ * np.exp(_SLANEY_LOG_STEP * (mel - _SLANEY_BREAK_MEL))
    return np.where(mel < _SLANEY_BREAK_MEL, 200.0 * mel / 3.0, above)


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
    return rfft(frames_BTw, fft_length or window_length)


def rfft(frames_BTw: jax.Array, num_points: int) -> jax.Array:
    """Fourier transform of real frames, which zeros fill up: complex [B, T, num_points // 2 + 1]."""
    # XLA cannot cut an FFT along the batch: on a mesh it would gather all frames on every device. A matrix product is
    # cut like any other, and fast where there are matrix units.
    return jax.lax.platform_dependent(
        frames_BTw,
        cpu=functools.partial(jnp.fft.rfft, n=num_points),
        default=functools.partial(rfft_by_products, num_points=num_points),
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
    style: str = "htk",
) -> jax.Array:
    """Mel spectrogram of magnitudes (power 1) or energies (power 2): [B, T, M]; `style` as in `mel_filterbank`."""
    spectrum_BTF = stft(wave_BW, window_length, hop_length, fft_length)
    energy_BTF = jnp.square(spectrum_BTF.real) + jnp.square(spectrum_BTF.imag)
    # sqrt's gradient is infinite at 0; digital silence is common in recordings.
    strength_BTF = energy_BTF if power == 2.0 else jnp.maximum(energy_BTF, 1e-14) ** (power / 2.0)
    filters_FM = mel_filterbank(spectrum_BTF.shape[-1], num_mels, sample_rate, low_hz, high_hz, style)
    return strength_BTF @ jnp.asarray(filters_FM, strength_BTF.dtype)
