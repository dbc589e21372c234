import numpy as np
import pytest
from sklearn.cluster import KMeans, MiniBatchKMeans

from audiolm_jax.errors import UserError
from audiolm_jax.semantic import kmeans, moments
from audiolm_jax.semantic.kmeans import Clustering, FramesInMemory, Settings, fit_clusters
from tests.semantic.clusters import assigned, blobs


class WaveAsFeatures:
    """Stands in for an encoder: a frame is two samples of the wave."""

    def features_of_layers(self, wave_BW, lengths_B, layers):
        assert layers == [5]
        return (wave_BW.reshape(len(wave_BW), -1, 2),)

    def num_frames(self, num_samples):
        return num_samples // 2


def ragged_batches():
    generator = np.random.default_rng()
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


def test_more_clusters_than_frames_are_refused():
    batch = (np.zeros((1, 6), np.float32), np.array([6]))
    with pytest.raises(UserError, match="more clusters than frames"):
        fit_clusters(WaveAsFeatures(), [batch], 4, seed=0, layer=5)
    with pytest.raises(UserError, match="more clusters than frames"):
        fit_clusters(WaveAsFeatures(), [], 4, seed=0, layer=5)


def clustering(x_MD, mesh=None, seed=0, **settings):
    """Of frames as they are: mean 0, deviation 1."""
    num_dims = x_MD.shape[1]
    settings = Settings(**{"block_frames": 96, **settings})
    return Clustering(FramesInMemory(x_MD), np.zeros(num_dims), np.ones(num_dims), settings, seed, mesh)


def test_every_pass_is_an_exact_iteration_of_lloyds():
    x_MD = blobs(600, 4, 9)
    start, *later = (clustering(x_MD, num_iterations=iterations, tolerance=-1.0).fit([7])[0] for iterations in range(5))
    centroids_KD = np.asarray(start.centroids_KD, np.float64)
    for fit in later:
        labels_M, inertia = assigned(x_MD, centroids_KD)
        np.testing.assert_allclose(fit.inertias[-2], inertia, rtol=1e-5)
        centroids_KD = np.stack([x_MD[labels_M == k].mean(0, dtype=np.float64) for k in range(7)])
        np.testing.assert_allclose(fit.centroids_KD, centroids_KD, atol=1e-5)
        labels_M, inertia = assigned(x_MD, centroids_KD)
        np.testing.assert_allclose(fit.inertias[-1], inertia, rtol=1e-5)
        np.testing.assert_array_equal(fit.counts_K, np.bincount(labels_M, minlength=7))


def test_it_stops_at_the_tolerance_with_the_inertia_of_its_centroids():
    x_MD = blobs(600, 4, 9)
    (fit,) = clustering(x_MD, tolerance=0.01).fit([7])
    drops = -np.diff(fit.inertias) / fit.inertias[:-1]
    assert len(fit.inertias) < 50 and (drops[:-1] > 0.01).all() and drops[-1] <= 0.01
    np.testing.assert_allclose(fit.inertias[-1], assigned(x_MD, fit.centroids_KD)[1], rtol=1e-5)


def test_several_numbers_of_clusters_in_the_same_passes_are_each_alone():
    x_MD = blobs(600, 4, 9)
    together = clustering(x_MD).fit([7, 3])
    for fit, size in zip(together, (7, 3), strict=True):
        (alone,) = clustering(x_MD).fit([size])
        assert fit.inertias == alone.inertias
        np.testing.assert_array_equal(fit.centroids_KD, alone.centroids_KD)


@pytest.mark.parametrize("mini_batch", [0, 96])
def test_the_sample_of_many_frames_leads_to_the_optimum_of_all(monkeypatch, mini_batch):
    monkeypatch.setattr(kmeans, "SAMPLE_FRAMES", 100)
    monkeypatch.setattr(kmeans, "SAMPLE_FRAMES_PER_CLUSTER", 8)
    x_MD = blobs(4000, 4, 7, spread=20.0)
    (fit,) = clustering(x_MD, mini_batch=mini_batch).fit([7])
    best = KMeans(7, n_init=3).fit(x_MD).inertia_
    assert fit.inertias[-1] < 1.01 * best
    np.testing.assert_allclose(fit.inertias[-1], assigned(x_MD, fit.centroids_KD)[1], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("num_clusters", [100, 1024])
def test_the_inertia_is_scikit_learns_within_a_percent(num_clusters):
    x_MD = blobs(12_000, 24, 300, spread=1.0)
    (fit,) = clustering(x_MD, block_frames=4096, tolerance=1e-5, num_iterations=100).fit([num_clusters])
    theirs = KMeans(num_clusters, n_init=1, max_iter=100, random_state=0).fit(x_MD)
    assert fit.inertias[-1] < 1.01 * theirs.inertia_
    np.testing.assert_allclose(fit.inertias[-1], -estimator_of(fit).score(x_MD), rtol=1e-4)
    (fit,) = clustering(x_MD, mini_batch=2048, num_iterations=8, tolerance=0.0).fit([num_clusters])
    theirs = MiniBatchKMeans(num_clusters, n_init=1, batch_size=2048, max_iter=8, random_state=0).fit(x_MD)
    assert fit.inertias[-1] < 1.01 * theirs.inertia_


def estimator_of(fit):
    """scikit-learn's estimator with our centroids."""
    centroids_KD = np.asarray(fit.centroids_KD)
    estimator = KMeans(len(centroids_KD), init=centroids_KD, n_init=1, max_iter=1).fit(centroids_KD)
    estimator.cluster_centers_ = centroids_KD
    return estimator


def test_a_mini_batch_moves_each_centroid_to_the_mean_of_all_it_ever_got():
    x_MD = blobs(600, 4, 9)
    (start,) = clustering(x_MD, num_iterations=0).fit([7])
    fitter = clustering(x_MD, mini_batch=96, num_iterations=1)
    (fit,) = fitter.fit([7])
    centroids_KD, counts_K = np.asarray(start.centroids_KD, np.float64), np.zeros(7)
    for _, rows_M in fitter._blocks(0, 0):
        labels_M, _ = assigned(x_MD[rows_M], centroids_KD)
        for x_D, label in zip(x_MD[rows_M], labels_M, strict=True):
            counts_K[label] += 1
            centroids_KD[label] += (x_D - centroids_KD[label]) / counts_K[label]
    np.testing.assert_allclose(fit.centroids_KD, centroids_KD, atol=1e-4)


def test_a_mini_batch_is_from_all_over_and_a_pass_sees_every_frame_once():
    fitter = clustering(np.zeros((5000, 1), np.float32), mini_batch=512)
    batches = [rows_M for _, rows_M in fitter._blocks(3, 0)]
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(5000))
    assert all(448 < len(rows_M) <= 512 for rows_M in batches[:-1])
    assert all(np.ptp(rows_M) > 2500 for rows_M in batches[:-1])
    assert not np.array_equal(batches[0], next(fitter._blocks(4, 0))[1])


def test_empty_clusters_restart_at_the_farthest_frames(monkeypatch):
    far_MD = [[500.0, 0.0, 0.0, 0.0], [0.0, 900.0, 0.0, 0.0]]
    x_MD = np.concatenate([blobs(598, 4, 1), far_MD]).astype(np.float32)
    seeds_KD = np.array([x_MD[0], [1e4] * 4, [-1e4] * 4], np.float32)
    for settings in ({}, {"mini_batch": 96}):
        monkeypatch.setattr(kmeans, "_plus_plus_seeds", lambda *_: seeds_KD)
        (fit,) = clustering(x_MD, **settings).fit([3])
        centroids_KD = np.asarray(fit.centroids_KD)
        np.testing.assert_allclose(np.sort(centroids_KD[:, 0])[-1], 500.0, rtol=1e-5)
        np.testing.assert_allclose(np.sort(centroids_KD[:, 1])[-1], 900.0, rtol=1e-5)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("mini_batch", [0, 96])
@pytest.mark.parametrize("saves", [1, 4, 9, 14])
def test_going_on_from_what_was_saved_is_the_run_without_interruption(mini_batch, saves):
    x_MD, sizes = blobs(600, 4, 9), [7, 3]
    whole = clustering(x_MD, mini_batch=mini_batch, num_iterations=4, tolerance=0.01).fit(sizes)
    states = []

    def save(state):
        states.append(state)
        if len(states) == saves:
            raise Interrupted

    settings = {"mini_batch": mini_batch, "num_iterations": 4, "tolerance": 0.01}
    with pytest.raises(Interrupted):
        clustering(x_MD, save_seconds=0.0, **settings).fit(sizes, save=save)
    again = clustering(x_MD, **settings).fit(sizes, saved=states[-1])
    for fit, other in zip(whole, again, strict=True):
        assert fit.inertias == other.inertias
        np.testing.assert_array_equal(fit.centroids_KD, other.centroids_KD)
        np.testing.assert_array_equal(fit.counts_K, other.counts_K)


@pytest.mark.parametrize("size", [1, 37, 1000])
def test_moments_of_values_far_from_zero_that_hardly_differ(size):
    x_MD = 1e4 + np.random.default_rng().normal(size=(3000, 4)) * [1e-3, 0.05, 3.0, 0.0]
    running = {"count": np.zeros(()), "mean": np.zeros(4), "squares": np.zeros(4)}
    in_float32 = moments.empty(4)
    for start in range(0, 3000, size):
        block_MD = x_MD[start : start + size]
        mask_M = np.ones(len(block_MD), bool)
        running = moments.update(running, block_MD, mask_M)
        if size > 1:
            in_float32 = moments.update(in_float32, np.float32(block_MD), mask_M)
    np.testing.assert_allclose(running["mean"], x_MD.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.deviation(running), x_MD.std(0), rtol=1e-6, atol=1e-11)
    if size > 1:
        np.testing.assert_allclose(moments.deviation(in_float32)[1:3], np.float32(x_MD).std(0)[1:3], rtol=5e-3)


def test_a_dimension_that_never_changes_is_not_blown_up():
    mean_D, std_D = kmeans.normalisation(moments.of(np.full((10, 2), 7.5), np.ones(10)))
    np.testing.assert_array_equal(mean_D, 7.5)
    np.testing.assert_array_equal(std_D, np.float32(kmeans.DEVIATION_FLOOR))
