"""k-means on the accelerator: k-means++ seeding and Lloyd's iterations.

`add` and `update` are the two halves of an iteration, for points that come block by block (`semantic/kmeans.py`);
`lloyd` and `fit` take points that are all in memory.

Shape suffixes: M points, D dimensions, K clusters, R points far from their centroids.
"""

import functools
import math

import jax
import jax.numpy as jnp

# Of the points assigned so far: sums and counts of the clusters, the sum of squared distances, and the farthest points.
Totals = dict[str, jax.Array]


def squared_distances(x_MD: jax.Array, centroids_KD: jax.Array) -> jax.Array:
    """Squared Euclidean distances [M, K], less each point's own squared norm (the same for every k)."""
    precise = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(centroids_KD), axis=-1) - 2.0 * precise(x_MD, centroids_KD.T)


def nearest(x_MD: jax.Array, centroids_KD: jax.Array) -> jax.Array:
    """Index of the nearest centroid of each point, int32 [M]; ties go to the lower index."""
    return _assign(x_MD, centroids_KD)[0]


def _assign(x_MD: jax.Array, centroids_KD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`nearest`, and the least of the `squared_distances` [M].

    By two minima, which a CPU takes in half the time of an argmin. Both must see the same distances, to the last bit:
    the barrier keeps the compiler from working them out twice.
    """
    distances_MK = jax.lax.optimization_barrier(squared_distances(x_MD, centroids_KD))
    least_M1 = jnp.min(distances_MK, axis=-1, keepdims=True)
    last = centroids_KD.shape[0] - 1
    labels_M = jnp.min(jnp.where(distances_MK == least_M1, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)
    return labels_M, least_M1[:, 0]


def plus_plus_seeds(key: jax.Array, x_MD: jax.Array, num_clusters: int) -> jax.Array:
    """Greedy k-means++: seeds [K, D] that are points.

    Each seed is the best of 2 + ln K candidates drawn with probability ~ squared distance: the one that leaves the
    least inertia (Arthur & Vassilvitskii, 2007, §5): one product with all candidates, so hardly dearer than one.
    """
    num_candidates = 2 + int(math.log(num_clusters))
    norms_M = jnp.sum(jnp.square(x_MD), axis=-1)
    first_key, key = jax.random.split(key)
    first_1D = x_MD[jax.random.randint(first_key, (1,), 0, x_MD.shape[0])]
    distances = lambda seeds_RD: jnp.maximum(squared_distances(x_MD, seeds_RD) + norms_M[:, None], 0.0)

    def add_seed(k, carry):
        seeds_KD, closest_M = carry
        # Where every point already is a seed, all weights are 0: draw uniformly instead.
        weights_M = jnp.where(jnp.max(closest_M) > 0, closest_M, 1.0)
        ends_M = jnp.cumsum(weights_M)
        drawn_R = jax.random.uniform(jax.random.fold_in(key, k), (num_candidates,), x_MD.dtype) * ends_M[-1]
        drawn_R = jnp.minimum(jnp.searchsorted(ends_M, drawn_R, side="right"), x_MD.shape[0] - 1)
        closest_MR = jnp.minimum(closest_M[:, None], distances(x_MD[drawn_R]))
        best = jnp.argmin(jnp.sum(closest_MR, axis=0))
        return seeds_KD.at[k].set(x_MD[drawn_R[best]]), closest_MR[:, best]

    seeds_KD = jnp.zeros((num_clusters, x_MD.shape[1]), x_MD.dtype).at[0].set(first_1D[0])
    return jax.lax.fori_loop(1, num_clusters, add_seed, (seeds_KD, distances(first_1D)[:, 0]))[0]


def empty_totals(centroids_KD: jax.Array, num_far: int) -> Totals:
    """The totals of no points.

    Args:
      centroids_KD: for shape and type.
      num_far: R; so many clusters that fall empty can restart at once.
    """
    num_clusters, num_dims = centroids_KD.shape
    dtype = centroids_KD.dtype
    return {
        "sums_KD": jnp.zeros_like(centroids_KD),
        "counts_K": jnp.zeros(num_clusters, jnp.int32),
        "inertia": jnp.zeros((), dtype),
        "far_errors_R": jnp.full(num_far, -jnp.inf, dtype),
        "far_points_RD": jnp.zeros((num_far, num_dims), dtype),
    }


def add(totals: Totals, x_MD: jax.Array, exists_M: jax.Array, centroids_KD: jax.Array) -> Totals:
    """Assigns a block of points to their nearest centroids and adds them to the totals.

    Args:
      totals: of the points so far.
      x_MD: points, all of them finite.
      exists_M: False where a row is none.
      centroids_KD: the iteration's, which `update` is to move.
    """
    num_clusters, num_far = centroids_KD.shape[0], totals["far_errors_R"].shape[0]
    labels_M, least_M = _assign(x_MD, centroids_KD)
    errors_M = jnp.maximum(least_M + jnp.sum(jnp.square(x_MD), axis=-1), 0.0)
    labels_M = jnp.where(exists_M, labels_M, num_clusters)  # A cluster that there is not.
    block_R, at_R = jax.lax.top_k(jnp.where(exists_M, errors_M, -jnp.inf), min(num_far, x_MD.shape[0]))
    far_errors_R, kept_R = jax.lax.top_k(jnp.concatenate([totals["far_errors_R"], block_R]), num_far)
    # By index a CPU adds in a hundredth of the product's time; a GPU adds in no fixed order, and a TPU slowly.
    by_index, by_product = (functools.partial(f, num_clusters=num_clusters) for f in (sums_by_index, sums_by_product))
    sums_KD = jax.lax.platform_dependent(x_MD, labels_M, cpu=by_index, default=by_product)
    return {
        "sums_KD": totals["sums_KD"] + sums_KD,
        "counts_K": totals["counts_K"].at[labels_M].add(1, mode="drop"),
        "inertia": totals["inertia"] + jnp.sum(errors_M, where=exists_M),
        "far_errors_R": far_errors_R,
        "far_points_RD": jnp.concatenate([totals["far_points_RD"], x_MD[at_R]])[kept_R],
    }


def sums_by_index(x_MD: jax.Array, labels_M: jax.Array, num_clusters: int) -> jax.Array:
    """Sum [K, D] of the points of each cluster; labels of K and above are left out."""
    return jnp.zeros((num_clusters, x_MD.shape[1]), x_MD.dtype).at[labels_M].add(x_MD, mode="drop")


def sums_by_product(x_MD: jax.Array, labels_M: jax.Array, num_clusters: int) -> jax.Array:
    """`sums_by_index` as a product of matrices: as dear as the distances, but always in the same order."""
    members_MK = jax.nn.one_hot(labels_M, num_clusters, dtype=x_MD.dtype)
    return jnp.matmul(members_MK.T, x_MD, precision=jax.lax.Precision.HIGHEST)


def merge(totals_L: Totals) -> Totals:
    """The totals of all points from those of several shares of them, stacked along a first axis; the order is fixed."""
    num_far = totals_L["far_errors_R"].shape[1]
    far_errors_R, kept_R = jax.lax.top_k(totals_L["far_errors_R"].reshape(-1), num_far)
    far_points_RD = totals_L["far_points_RD"].reshape(-1, totals_L["far_points_RD"].shape[-1])[kept_R]
    summed = {name: jnp.sum(totals_L[name], axis=0) for name in ("sums_KD", "counts_K", "inertia")}
    return {**summed, "far_errors_R": far_errors_R, "far_points_RD": far_points_RD}


def update(totals: Totals, centroids_KD: jax.Array) -> jax.Array:
    """Lloyd's new centroids [K, D]: the mean of each cluster's points, and `restart` for a cluster without any."""
    counts_K1 = totals["counts_K"].astype(centroids_KD.dtype)[:, None]
    means_KD = totals["sums_KD"] / jnp.maximum(counts_K1, 1.0)
    return restart(totals, jnp.where(counts_K1 > 0, means_KD, centroids_KD))


def nudge(totals: Totals, centroids_KD: jax.Array, weights_K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mini-batch step (Sculley, 2010, algorithm 1): every centroid stays the mean of all points it ever got.

    Args:
      totals: of the mini-batch.
      centroids_KD: those it was assigned to.
      weights_K: points that each has had so far, int32.

    Returns:
      the moved centroids and the new weights.
    """
    counts_K, weights_K = totals["counts_K"], weights_K + totals["counts_K"]
    shifts_KD = totals["sums_KD"] - counts_K.astype(centroids_KD.dtype)[:, None] * centroids_KD
    return centroids_KD + shifts_KD / jnp.maximum(weights_K, 1).astype(centroids_KD.dtype)[:, None], weights_K


def restart(totals: Totals, centroids_KD: jax.Array) -> jax.Array:
    """Puts empty clusters where the farthest points are, one each; where these run out, a cluster stays as it is."""
    empty_K = totals["counts_K"] == 0
    rank_K = jnp.cumsum(empty_K) - 1
    there_K = jnp.take(totals["far_errors_R"], rank_K, mode="fill", fill_value=-jnp.inf) > -jnp.inf
    points_KD = jnp.take(totals["far_points_RD"], rank_K, axis=0, mode="clip")
    return jnp.where((empty_K & there_K)[:, None], points_KD, centroids_KD)


def lloyd(x_MD: jax.Array, centroids_KD: jax.Array, num_iterations: int) -> tuple[jax.Array, jax.Array]:
    """Lloyd's iterations; a cluster that falls empty restarts at a point far from its centroid.

    Args:
      x_MD: points; an array [M, K] must find room beside them.
      centroids_KD: where to start.
      num_iterations: iterations.

    Returns:
      centroids [K, D] and the inertia (sum of squared distances) they leave.
    """
    empty = empty_totals(centroids_KD, min(centroids_KD.shape[0], x_MD.shape[0]))
    assigned = lambda centroids_KD: add(empty, x_MD, jnp.ones(x_MD.shape[0], bool), centroids_KD)
    iterate = lambda _, centroids_KD: update(assigned(centroids_KD), centroids_KD)
    centroids_KD = jax.lax.fori_loop(0, num_iterations, iterate, centroids_KD)
    return centroids_KD, assigned(centroids_KD)["inertia"]


@functools.partial(jax.jit, static_argnames=("num_clusters", "num_iterations"))
def fit(key: jax.Array, x_MD: jax.Array, num_clusters: int, num_iterations: int) -> tuple[jax.Array, jax.Array]:
    """Fits k-means from k-means++ seeds; see `lloyd` for the results.

    Args:
      key: PRNG key for the seeding.
      x_MD: points.
      num_clusters: K; fewer distinct points than K leave duplicate centroids.
      num_iterations: Lloyd iterations.
    """
    return lloyd(x_MD, plus_plus_seeds(key, x_MD, num_clusters), num_iterations)
