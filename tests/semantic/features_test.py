import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from audiolm_jax.semantic import features, moments

SAMPLE_RATE = 16_000


def triangles(num_bins: int, num_mels: int) -> np.ndarray:
    """HTK mel filters by interpolation, one at a time."""
    top_mel = 2595 * np.log10(1 + 8000 / 700)
    edges_hz = 700 * (10 ** (np.linspace(0, top_mel, num_mels + 2) / 2595) - 1)
    bins_hz = np.linspace(0, 8000, num_bins)
    return np.stack([np.interp(bins_hz, edges_hz[m : m + 3], [0, 1, 0]) for m in range(num_mels)], axis=1)


def test_log_mel_is_scipys_spectrogram_through_triangles():
    wave_W = 0.1 * np.random.default_rng(0).normal(size=3200)
    padded_W = np.concatenate([wave_W, np.zeros(400)])
    _, _, spectrum_FT = scipy.signal.stft(
        padded_W, window="hann", nperseg=400, noverlap=240, nfft=512, boundary=None, padded=False
    )
    energy_TF = np.abs(spectrum_FT.T[:20] * scipy.signal.get_window("hann", 400).sum()) ** 2
    expected_TM = np.log(energy_TF @ triangles(257, 80) + features.ENERGY_FLOOR)
    ours_BTM = features.log_mel(jnp.asarray(wave_W[None], jnp.float32), jnp.array([3200]), SAMPLE_RATE, 80)
    np.testing.assert_allclose(ours_BTM[0], expected_TM, atol=1e-3)


def test_log_mel_is_transformers_spectrogram():
    audio_utils = pytest.importorskip("transformers.audio_utils")
    wave_W = 0.1 * np.random.default_rng(1).normal(size=3200)
    filters_FM = audio_utils.mel_filter_bank(257, 80, 0.0, 8000.0, SAMPLE_RATE, norm=None, mel_scale="htk")
    energy_MT = audio_utils.spectrogram(
        np.concatenate([wave_W, np.zeros(400)]), audio_utils.window_function(400, "hann"), frame_length=400,
        hop_length=160, fft_length=512, power=2.0, center=False, mel_filters=filters_FM, mel_floor=0.0,
    )  # fmt: skip
    expected_TM = np.log(energy_MT.T[:20] + features.ENERGY_FLOOR)
    ours_BTM = features.log_mel(jnp.asarray(wave_W[None], jnp.float32), jnp.array([3200]), SAMPLE_RATE, 80)
    np.testing.assert_allclose(ours_BTM[0], expected_TM, atol=1e-3)


@pytest.mark.parametrize("num_samples, expected", [(0, 0), (1, 1), (640, 1), (641, 2), (16_000, 25)])
def test_a_semantic_frame_is_four_mel_frames(num_samples, expected):
    assert features.num_frames(num_samples, SAMPLE_RATE) == expected
    mel_BTM = features.log_mel(jnp.zeros((1, num_samples)), jnp.array([num_samples]), SAMPLE_RATE, 80)
    assert mel_BTM.shape == (1, 4 * expected, 80)


def test_what_stands_behind_a_row_does_not_matter(batch):
    together_BTM = features.log_mel(batch["wave_BW"], batch["lengths_B"], SAMPLE_RATE, 20)
    for row in (1, 3):
        alone_BW = batch["wave_BW"][row : row + 1, : batch["lengths_B"][row]]
        alone_TM = features.log_mel(alone_BW, batch["lengths_B"][row : row + 1], SAMPLE_RATE, 20)[0]
        np.testing.assert_allclose(together_BTM[row, : len(alone_TM)], alone_TM, atol=1e-5)


def test_statistics_are_those_of_the_clips_without_padding(batch):
    shorter = {"wave_BW": batch["wave_BW"][:2, :16_000] * 3, "lengths_B": np.array([16_000, 640], np.int32)}
    statistics = features.fit_statistics([batch, shorter], SAMPLE_RATE, 20)
    frames_MM = np.concatenate(
        [
            features.log_mel(wave_W[None, :length], jnp.array([length]), SAMPLE_RATE, 20)[0]
            for part in (batch, shorter)
            for wave_W, length in zip(part["wave_BW"], part["lengths_B"])
        ]
    )
    np.testing.assert_allclose(statistics["feature_mean"], frames_MM.mean(0), rtol=1e-4)
    np.testing.assert_allclose(statistics["feature_std"], frames_MM.std(0), rtol=1e-4)
    normed_MM = features.normalize(frames_MM, statistics)
    np.testing.assert_allclose(normed_MM.std(0), np.ones(20), rtol=1e-3)


def test_statistics_of_silence_or_of_nothing_normalise_to_finite_numbers():
    silence = {"wave_BW": np.zeros((2, 6400), np.float32), "lengths_B": np.array([6400, 640], np.int32)}
    loud_BTM = features.log_mel(jnp.ones((1, 640)), jnp.array([640]), SAMPLE_RATE, 20)
    for batches in ([silence], []):
        statistics = features.fit_statistics(batches, SAMPLE_RATE, 20)
        assert np.isfinite(features.normalize(loud_BTM, statistics)).all()
        assert (np.asarray(statistics["feature_std"]) > 0).all()


def test_moments_do_not_cancel_far_from_zero():
    x_MD = 1e4 + np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32)
    running = moments.empty(2)
    for start in range(0, 3000, 500):
        running = moments.update(running, jnp.asarray(x_MD[start : start + 500]), jnp.arange(500) < 400)
    kept_MD = x_MD.reshape(6, 500, 2)[:, :400].reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(running["mean"], kept_MD.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.deviation(running), kept_MD.std(0), rtol=1e-2)
    assert running["count"] == 2400
