import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans, kmeans_plusplus

from audiolm_jax import kmeans


def blobs(num_points: int = 600, num_dims: int = 5, num_blobs: int = 8) -> np.ndarray:
    generator = np.random.default_rng(0)
    centers_KD = 4.0 * generator.normal(size=(num_blobs, num_dims))
    noise_MD = generator.normal(size=(num_points, num_dims))
    return (centers_KD[generator.integers(num_blobs, size=num_points)] + noise_MD).astype(np.float32)


def test_lloyd_from_the_same_seeds_is_scikit_learns():
    x_MD = blobs()
    seeds_KD = x_MD[:12]
    centroids_KD, inertia = kmeans.lloyd(jnp.asarray(x_MD), jnp.asarray(seeds_KD), 30)
    theirs = KMeans(12, init=seeds_KD, n_init=1, max_iter=30, tol=0.0, algorithm="lloyd").fit(x_MD)
    np.testing.assert_allclose(inertia, theirs.inertia_, rtol=0.01)
    np.testing.assert_allclose(centroids_KD, theirs.cluster_centers_, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_fit_comes_close_to_scikit_learns_best(seed):
    x_MD = blobs()
    centroids_KD, inertia = kmeans.fit(jax.random.key(seed), jnp.asarray(x_MD), 8, 30)
    best = KMeans(8, n_init=10, random_state=0).fit(x_MD).inertia_
    one_blob = KMeans(1, n_init=1).fit(x_MD).inertia_
    assert inertia < best + 0.15 * (one_blob - best)
    distances_MK = np.square(x_MD[:, None] - np.asarray(centroids_KD)).sum(-1)
    np.testing.assert_allclose(inertia, distances_MK.min(1).sum(), rtol=1e-4)


def test_nearest_is_the_smallest_distance_and_ties_go_low():
    x_MD, centroids_KD = blobs(50), blobs(7)
    expected_M = np.square(x_MD[:, None] - centroids_KD).sum(-1).argmin(1)
    np.testing.assert_array_equal(kmeans.nearest(jnp.asarray(x_MD), jnp.asarray(centroids_KD)), expected_M)
    same_KD = jnp.ones((3, 5))
    np.testing.assert_array_equal(kmeans.nearest(jnp.asarray(x_MD), same_KD), np.zeros(50))


def test_an_empty_cluster_restarts_at_the_farthest_point():
    x_MD = jnp.asarray([[0.0], [1.0], [2.0], [50.0]])
    seeds_KD = jnp.asarray([[1.0], [1000.0]])
    centroids_KD, inertia = kmeans.lloyd(x_MD, seeds_KD, 5)
    np.testing.assert_allclose(np.sort(centroids_KD[:, 0]), [1.0, 50.0])
    np.testing.assert_allclose(inertia, 2.0)


def test_fewer_distinct_points_than_clusters_stay_finite():
    x_MD = jnp.asarray(np.repeat([[1.0, 2.0], [3.0, 4.0]], 5, axis=0))
    centroids_KD, inertia = kmeans.fit(jax.random.key(0), x_MD, 4, 5)
    assert np.isfinite(centroids_KD).all()
    assert inertia == 0.0


def test_seeds_are_points_and_spread():
    x_MD = jnp.asarray([[0.0], [0.0], [0.0], [0.0], [0.0], [0.0], [9.0]])
    for seed in range(5):
        seeds_KD = kmeans.plus_plus_seeds(jax.random.key(seed), x_MD, 2)
        assert sorted(seeds_KD[:, 0].tolist()) == [0.0, 9.0]


def test_blocks_add_up_to_the_whole_whatever_stands_in_rows_that_are_none():
    x_MD, centroids_KD = blobs(200), jnp.asarray(blobs(9))
    distances_MK = np.square(x_MD[:, None].astype(np.float64) - np.asarray(centroids_KD)).sum(-1)
    labels_M, errors_M = distances_MK.argmin(1), distances_MK.min(1)
    garbage_MD = np.full((60, 5), 1e4, np.float32)
    add, totals = jax.jit(kmeans.add), kmeans.empty_totals(centroids_KD, 4)
    for start in range(0, 200, 40):
        block_MD, exists_M = np.concatenate([x_MD[start : start + 40], garbage_MD]), np.arange(100) < 40
        totals = add(totals, block_MD, exists_M, centroids_KD)
    expected_KD = np.stack([x_MD[labels_M == k].sum(0, dtype=np.float64) for k in range(9)])
    np.testing.assert_allclose(totals["sums_KD"], expected_KD, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(totals["counts_K"], np.bincount(labels_M, minlength=9))
    np.testing.assert_allclose(totals["inertia"], errors_M.sum(), rtol=1e-5)
    farthest_R = np.argsort(-errors_M)[:4]
    np.testing.assert_allclose(totals["far_errors_R"], errors_M[farthest_R], rtol=1e-4)
    np.testing.assert_array_equal(totals["far_points_RD"], x_MD[farthest_R])


def test_sums_by_index_and_by_product_are_those_of_numpy():
    x_MD, labels_M = blobs(300), np.random.default_rng().integers(0, 9, 300)
    expected_KD = np.stack([x_MD[labels_M == k].sum(0, dtype=np.float64) for k in range(7)])
    for sums in (kmeans.sums_by_index, kmeans.sums_by_product):
        found_KD = sums(jnp.asarray(x_MD), jnp.asarray(labels_M), 7)
        np.testing.assert_allclose(found_KD, expected_KD, rtol=1e-4, atol=1e-4)


def test_more_empty_clusters_than_far_points_stay_where_they_are():
    x_MD = jnp.asarray([[0.0], [1.0], [50.0]])
    centroids_KD = jnp.asarray([[0.4], [1000.0], [2000.0], [3000.0]])
    totals = kmeans.add(kmeans.empty_totals(centroids_KD, 2), x_MD, jnp.ones(3, bool), centroids_KD)
    np.testing.assert_allclose(kmeans.update(totals, centroids_KD)[:, 0], [17.0, 50.0, 1.0, 3000.0])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_seeds_are_as_good_as_scikit_learns(seed):
    x_MD = blobs(2000, 5, 30)
    inertia = lambda seeds_KD: np.square(x_MD[:, None] - np.asarray(seeds_KD)).sum(-1).min(1).sum()
    ours = inertia(kmeans.plus_plus_seeds(jax.random.key(seed), jnp.asarray(x_MD), 30))
    theirs = np.mean([inertia(kmeans_plusplus(x_MD, 30, random_state=state)[0]) for state in range(10)])
    assert ours < 1.25 * theirs
