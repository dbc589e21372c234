"""The codec's losses against values worked out by hand or by SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from audiolm_jax import spectral
from audiolm_jax.codec import losses
from audiolm_jax.codec.discriminators import Judgement


def judgement(logits, *features):
    return Judgement(jnp.array([logits]), [jnp.array(feature) for feature in features])


def test_hinge_losses():
    real = [judgement([2.0, 0.5]), judgement([-1.0])]
    fake = [judgement([-2.0, 0.0]), judgement([0.5])]
    # max(0, 1 - real): mean(0, .5) and 2; max(0, 1 + fake): mean(0, 1) and 1.5.
    assert losses.discriminator_loss(real, fake) == pytest.approx((0.25 + 0.5 + 2.0 + 1.5) / 2)
    # max(0, 1 - fake): mean(3, 1) and 0.5.
    assert losses.adversarial_loss(fake) == pytest.approx((2.0 + 0.5) / 2)


def test_accuracy_is_averaged_over_discriminators():
    real = [judgement([2.0, 0.5, -1.0, 3.0]), judgement([-1.0])]
    fake = [judgement([-2.0, 0.0]), judgement([-0.5])]
    assert losses.accuracy(real, fake) == (pytest.approx((0.75 + 0.0) / 2), pytest.approx((0.5 + 1.0) / 2))


def test_feature_loss_averages_over_layers_of_all_discriminators():
    real = [judgement([0.0], [[1.0, 2.0]], [[0.0]]), judgement([0.0], [[5.0]])]
    fake = [judgement([0.0], [[2.0, 4.0]], [[3.0]]), judgement([0.0], [[5.0]])]
    assert losses.feature_loss(real, fake) == pytest.approx((1.5 + 3.0 + 0.0) / 3)


def spectrum(wave_W, window, hop):
    """Magnitudes [T, F] by SciPy; frames begin at multiples of the hop and zeros follow the end."""
    frames = -(-len(wave_W) // hop)
    padded_W = np.pad(wave_W, (0, (frames - 1) * hop + window - len(wave_W)))
    transform = scipy.signal.ShortTimeFFT(scipy.signal.get_window("hann", window), hop, fs=1.0)
    first = window // 2 // hop  # SciPy's slice p is centred on sample p · hop.
    return np.abs(transform.stft(padded_W, p0=first, p1=first + frames)).T


def test_reconstruction_loss_is_equation_4_to_5():
    rng = np.random.default_rng(0)
    target_BW, wave_BW = 0.1 * rng.standard_normal((2, 2, 512))
    found_B = losses.reconstruction_loss(
        jnp.asarray(target_BW), jnp.asarray(wave_BW), sample_rate=16_000, num_mels=10, min_log2_window=6,
        max_log2_window=7,
    )  # fmt: skip
    for row in range(2):
        total = 0.0
        for window in (64, 128):
            filters_FM = spectral.mel_filterbank(window // 2 + 1, 10, 16_000)
            a_TM, b_TM = (spectrum(x[row], window, window // 4) @ filters_FM for x in (target_BW, wave_BW))
            log_TM = np.log(np.maximum(a_TM, 1e-5)) - np.log(np.maximum(b_TM, 1e-5))
            l2_T = np.sqrt(np.sum(log_TM**2, axis=1))
            total += np.mean(np.sum(np.abs(a_TM - b_TM), axis=1) + np.sqrt(window / 2) * l2_T)
        assert found_B[row] == pytest.approx(total / 2, rel=1e-3)


def test_reconstruction_loss_of_silence_has_a_gradient():
    silence_BW = jnp.zeros((1, 256))
    loss = lambda x: jnp.sum(
        losses.reconstruction_loss(silence_BW, x, sample_rate=16_000, num_mels=8, min_log2_window=6, max_log2_window=6)
    )
    assert np.all(np.isfinite(jax.grad(loss)(silence_BW)))
    assert loss(silence_BW) < 1e-2


def test_log_mel_distance_of_a_gain_is_its_logarithm():
    wave_BW = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4000)), jnp.float32)
    distance_BT = losses.log_mel_distance(wave_BW, wave_BW * 2.0, 16_000)
    assert distance_BT.shape == (1, 25)
    np.testing.assert_allclose(distance_BT, np.log(2.0), rtol=1e-3)


def test_log_mel_distance_by_band_is_that_of_thirds_of_the_filters():
    target_BW, wave_BW = np.random.default_rng().standard_normal((2, 2, 4000)).astype(np.float32)
    found = losses.log_mel_distance_by_band(jnp.asarray(target_BW), jnp.asarray(wave_BW), 16_000)
    filters_FM = spectral.mel_filterbank(201, 80, 16_000)
    hann_w = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = lambda wave_W: np.stack([np.pad(wave_W, (0, 400))[start : start + 400] for start in range(0, 4000, 160)])
    mel = lambda wave_W: np.log(np.maximum(np.abs(np.fft.rfft(frames(wave_W) * hann_w)) @ filters_FM, 1e-5))
    distance_M = np.mean([np.abs(mel(a) - mel(b)) for a, b in zip(target_BW, wave_BW)], axis=(0, 1))
    expected = {"low": distance_M[:27].mean(), "middle": distance_M[27:54].mean(), "high": distance_M[54:].mean()}
    assert found == {band: pytest.approx(value, rel=1e-3) for band, value in expected.items()}
    centres_M = np.arange(201) @ filters_FM / filters_FM.sum(axis=0) * 40
    assert centres_M[26] < 930 < centres_M[28] and centres_M[53] < 3100 < centres_M[55]


def test_si_sdr_of_known_noise():
    rng = np.random.default_rng(0)
    target_BW = rng.standard_normal((2, 1000))
    noise_BW = rng.standard_normal((2, 1000))
    # Noise at right angles to the target, a tenth and a hundredth of its energy.
    noise_BW -= target_BW * np.sum(noise_BW * target_BW, 1, keepdims=True) / np.sum(target_BW**2, 1, keepdims=True)
    noise_BW *= np.sqrt(np.sum(target_BW**2, 1, keepdims=True) / np.sum(noise_BW**2, 1, keepdims=True))
    noise_BW *= np.sqrt([[0.1], [0.01]])
    found_B = losses.si_sdr(jnp.asarray(target_BW), jnp.asarray(3.0 * (target_BW + noise_BW)))
    np.testing.assert_allclose(found_B, [10.0, 20.0], atol=1e-2)
