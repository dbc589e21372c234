"""The losses of SoundStream (arXiv 2107.03312 §III-E), and the measures of a reconstruction.

Shape suffixes: B batch, W waveform samples, T frames, M mel bins.
"""

import jax
import jax.numpy as jnp

from audiolm_jax import spectral
from audiolm_jax.codec.discriminators import Judgement

LOG_FLOOR = 1e-5
BANDS = ("low", "middle", "high")


def _hinge(logits_BT: jax.Array) -> jax.Array:
    return jnp.mean(jax.nn.relu(1.0 - logits_BT))


def discriminator_loss(real: list[Judgement], fake: list[Judgement]) -> jax.Array:
    """Hinge loss of the discriminators, averaged over them, the batch and time (eq. 1)."""
    losses = [_hinge(a.logits_BT) + _hinge(-b.logits_BT) for a, b in zip(real, fake)]
    return jnp.mean(jnp.stack(losses))


def adversarial_loss(fake: list[Judgement]) -> jax.Array:
    """Hinge loss of the codec, which wants its reconstructions taken for real (eq. 2)."""
    return jnp.mean(jnp.stack([_hinge(judgement.logits_BT) for judgement in fake]))


def accuracy(real: list[Judgement], fake: list[Judgement]) -> tuple[jax.Array, jax.Array]:
    """Shares of the logits that are right, above 0 for real and below 0 for fake, averaged as the losses are."""
    share = lambda right_BT, logits_BT: jnp.mean(right_BT, dtype=logits_BT.dtype)
    real_shares = [share(one.logits_BT > 0, one.logits_BT) for one in real]
    fake_shares = [share(one.logits_BT < 0, one.logits_BT) for one in fake]
    return jnp.mean(jnp.stack(real_shares)), jnp.mean(jnp.stack(fake_shares))


def feature_loss(real: list[Judgement], fake: list[Judgement]) -> jax.Array:
    """Mean absolute difference of the discriminators' activations, averaged over their layers (eq. 3).

    The mean is over batch, time and channels (and frequency) alike; the paper writes out that over time only.
    """
    pairs = [pair for a, b in zip(real, fake) for pair in zip(a.features, b.features)]
    return jnp.mean(jnp.stack([jnp.mean(jnp.abs(a - b)) for a, b in pairs]))


def reconstruction_loss(
    target_BW: jax.Array,
    wave_BW: jax.Array,
    *,
    sample_rate: int,
    num_mels: int,
    min_log2_window: int,
    max_log2_window: int,
) -> jax.Array:
    """Multi-scale spectral loss (eq. 4–5): L1 of mel spectrograms plus sqrt(s / 2) · L2 of their logarithms.

    Windows s = 2^min … 2^max, hop s / 4, norms over the mel bins. The paper sums over frames and scales; here it is
    their mean, so that neither the length of a crop nor the number of scales shifts the balance against other losses.

    Returns:
      [B].
    """
    total_B = jnp.zeros(wave_BW.shape[0], wave_BW.dtype)
    scales = range(min_log2_window, max_log2_window + 1)
    for window in (2**scale for scale in scales):
        mel = lambda x_BW: spectral.mel_spectrogram(x_BW, sample_rate, window, window // 4, num_mels)  # noqa: B023
        target_BTM, mel_BTM = mel(target_BW), mel(wave_BW)
        l1_BT = jnp.sum(jnp.abs(target_BTM - mel_BTM), axis=-1)
        squared_BT = jnp.sum(jnp.square(_log(target_BTM) - _log(mel_BTM)), axis=-1)
        # The root's gradient is infinite at 0, which a frame of digital silence reaches.
        l2_BT = jnp.sqrt(jnp.maximum(squared_BT, 1e-8))
        total_B += jnp.mean(l1_BT + (window / 2) ** 0.5 * l2_BT, axis=-1)
    return total_B / len(scales)


def _log(mel_BTM: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(mel_BTM, LOG_FLOOR))


def log_mel_distance(target_BW: jax.Array, wave_BW: jax.Array, sample_rate: int) -> jax.Array:
    """Mean absolute difference of log-mel spectrograms (80 bins, 25 ms windows every 10 ms), in nepers: [B, T]."""
    return jnp.mean(_log_mel_differences(target_BW, wave_BW, sample_rate), axis=-1)


def log_mel_distance_by_band(target_BW: jax.Array, wave_BW: jax.Array, sample_rate: int) -> dict[str, jax.Array]:
    """The mean over `log_mel_distance` in thirds of the mel scale: at 16 kHz up to 0.9, 3.1 and 8 kHz."""
    thirds = jnp.array_split(_log_mel_differences(target_BW, wave_BW, sample_rate), len(BANDS), axis=-1)
    return {band: jnp.mean(third_BTM) for band, third_BTM in zip(BANDS, thirds)}


def _log_mel_differences(target_BW: jax.Array, wave_BW: jax.Array, sample_rate: int) -> jax.Array:
    window, hop = sample_rate // 40, sample_rate // 100
    mel = lambda x_BW: spectral.mel_spectrogram(x_BW, sample_rate, window, hop, num_mels=80)
    return jnp.abs(_log(mel(target_BW)) - _log(mel(wave_BW)))


def si_sdr(target_BW: jax.Array, wave_BW: jax.Array) -> jax.Array:
    """Scale-invariant signal-to-distortion ratio (Le Roux et al., arXiv 1811.02508) in dB: [B]."""
    tiny = 1e-8
    scale_B1 = jnp.sum(target_BW * wave_BW, -1, keepdims=True) / (jnp.sum(target_BW**2, -1, keepdims=True) + tiny)
    signal_B = jnp.sum(jnp.square(scale_B1 * target_BW), axis=-1)
    distortion_B = jnp.sum(jnp.square(wave_BW - scale_B1 * target_BW), axis=-1)
    return 10.0 * jnp.log10((signal_B + tiny) / (distortion_B + tiny))
