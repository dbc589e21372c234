"""How good a codec's reconstructions are, beside silence and noise."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from audiolm_jax.codec import losses
from audiolm_jax.codec.codec import Codec


def codec_quality(codec: Codec, waves: Sequence[np.ndarray], seed: int = 0) -> dict[str, float | list[float]]:
    """Means over recordings.

    Args:
      codec: under test.
      waves: recordings at its sample rate, float [W] each.
      seed: of the noise.

    Returns:
      `log_mel_distance` of the reconstruction (mean absolute difference of natural-log mel spectra),
      `log_mel_distance_silence` and `log_mel_distance_noise` of digital silence and of white noise of
      each recording's level, `si_sdr` in dB, and `codebook_perplexity`, `codes_used` a level.
    """
    generator = np.random.default_rng(seed)
    names = ("log_mel_distance", "log_mel_distance_silence", "log_mel_distance_noise", "si_sdr")
    measured: dict[str, list[float]] = {name: [] for name in names}
    counts_QN = np.zeros((codec.num_quantizers, codec.codebook_size), np.int64)
    for wave_W in waves:
        codes_BTQ = np.asarray(codec.encode(wave_W[None]))
        for level in range(codec.num_quantizers):
            counts_QN[level] += np.bincount(codes_BTQ[0, :, level], minlength=codec.codebook_size)
        rebuilt_W = np.asarray(codec.decode(codes_BTQ))[0, : len(wave_W)]
        noise_W = generator.standard_normal(len(wave_W)) * np.sqrt(np.mean(np.square(wave_W)))
        target_BW = jnp.asarray(wave_W[None])
        for name, other_W in zip(names, (rebuilt_W, np.zeros_like(wave_W), noise_W), strict=False):
            distance_BT = losses.log_mel_distance(target_BW, jnp.asarray(other_W[None], jnp.float32), codec.sample_rate)
            measured[name].append(float(jnp.mean(distance_BT)))
        measured["si_sdr"].append(float(losses.si_sdr(target_BW, jnp.asarray(rebuilt_W[None]))[0]))
    shares_QN = counts_QN / counts_QN.sum(axis=1, keepdims=True)
    entropy_Q = -np.sum(shares_QN * np.log(np.maximum(shares_QN, 1e-12)), axis=1)
    return {
        **{name: float(np.mean(values)) for name, values in measured.items()},
        "codebook_perplexity": np.exp(entropy_Q).tolist(),
        "codes_used": (counts_QN > 0).sum(axis=1).tolist(),
    }
