import numpy as np
import pytest

from audiolm_jax import kmeans
from audiolm_jax.errors import UserError
from audiolm_jax.semantic.kmeans import fit_clusters


class WaveAsFeatures:
    """Stands in for an encoder: a frame is two samples of the wave."""

    def features(self, wave_BW, lengths_B, layer):
        assert layer == 5
        return wave_BW.reshape(len(wave_BW), -1, 2)

    def num_frames(self, num_samples):
        return num_samples // 2


def ragged_batches():
    generator = np.random.default_rng(0)
    batches = []
    for _ in range(4):
        x_BTD = generator.choice([-1.0, 0.0, 1.0], size=(3, 50, 1)) + 0.05 * generator.normal(size=(3, 50, 2))
        x_BTD = x_BTD * [1.0, 100.0] + [5.0, -300.0]
        lengths_B = np.array([100, 60, 2])
        for b, length in enumerate(lengths_B):
            x_BTD[b, length // 2 :] = 1e6
        batches.append((x_BTD.reshape(3, 100).astype(np.float32), lengths_B))
    frames = [w.reshape(-1, 2)[: n // 2] for wave_BW, lengths_B in batches for w, n in zip(wave_BW, lengths_B)]
    return batches, np.concatenate(frames)


def test_clusters_are_of_normalised_frames_without_padding():
    batches, frames_MD = ragged_batches()
    clusters = fit_clusters(WaveAsFeatures(), batches, 3, seed=0, layer=5)
    assert clusters["layer"] == 5
    np.testing.assert_allclose(clusters["mean"], frames_MD.mean(0), rtol=1e-4)
    np.testing.assert_allclose(clusters["std"], frames_MD.std(0), rtol=1e-4)
    normed_MD = (frames_MD - frames_MD.mean(0)) / frames_MD.std(0)
    expected_KD = [normed_MD[np.round(frames_MD[:, 0] - 5.0) == level].mean(0) for level in (-1, 0, 1)]
    order = np.argsort(clusters["centroids"][:, 0])
    np.testing.assert_allclose(clusters["centroids"][order], expected_KD, atol=1e-3)


def test_more_frames_than_fit_are_sampled_evenly(monkeypatch):
    wave_W = np.arange(8000, dtype=np.float32)
    batches = [(wave_W[None, start : start + 200], np.array([200])) for start in range(0, 8000, 200)]
    seen = []

    def fit(key, x_MD, num_clusters, num_iterations):
        seen.append(np.asarray(x_MD))
        return x_MD[:num_clusters], 0.0

    monkeypatch.setattr(kmeans, "fit", fit)
    clusters = fit_clusters(WaveAsFeatures(), batches, 2, seed=0, layer=5, max_frames=500)
    np.testing.assert_allclose(clusters["mean"], [3999.0, 4000.0], rtol=1e-5)
    kept_M = seen[0][:, 0] * clusters["std"][0] + clusters["mean"][0]
    assert len(np.unique(np.round(kept_M))) == 500
    np.testing.assert_allclose(np.histogram(kept_M, bins=4, range=(0, 8000))[0] / 500, 0.25, atol=0.07)


def test_more_clusters_than_frames_are_refused():
    batch = (np.zeros((1, 6), np.float32), np.array([6]))
    with pytest.raises(UserError, match="more clusters than frames"):
        fit_clusters(WaveAsFeatures(), [batch], 4, seed=0, layer=5)
    with pytest.raises(UserError, match="more clusters than frames"):
        fit_clusters(WaveAsFeatures(), [], 4, seed=0, layer=5)
