"""k-means on the accelerator: k-means++ seeding and Lloyd's iterations.

Shape suffixes: M points, D dimensions, K clusters.
"""

import functools

import jax
import jax.numpy as jnp


def squared_distances(x_MD: jax.Array, centroids_KD: jax.Array) -> jax.Array:
    """Squared Euclidean distances [M, K], less each point's own squared norm (the same for every k)."""
    precise = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(centroids_KD), axis=-1) - 2.0 * precise(x_MD, centroids_KD.T)


def nearest(x_MD: jax.Array, centroids_KD: jax.Array) -> jax.Array:
    """Index of the nearest centroid of each point, int32 [M]; ties go to the lower index.

    By two minima, which a CPU takes in half the time of an argmin. Both must see the same distances, to the last bit:
    the barrier keeps the compiler from working them out twice.
    """
    distances_MK = jax.lax.optimization_barrier(squared_distances(x_MD, centroids_KD))
    least_M1 = jnp.min(distances_MK, axis=-1, keepdims=True)
    last = centroids_KD.shape[0] - 1
    return jnp.min(jnp.where(distances_MK == least_M1, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


def plus_plus_seeds(key: jax.Array, x_MD: jax.Array, num_clusters: int) -> jax.Array:
    """k-means++ (Arthur & Vassilvitskii, 2007): seeds [K, D] drawn with probability ~ squared distance."""
    first_key, key = jax.random.split(key)
    first_D = x_MD[jax.random.randint(first_key, (), 0, x_MD.shape[0])]
    distance = lambda seed_D: jnp.sum(jnp.square(x_MD - seed_D), axis=-1)

    def add_seed(k, carry):
        seeds_KD, closest_M = carry
        # Where every point already is a seed, all weights are 0: draw uniformly instead.
        weights_M = jnp.where(jnp.max(closest_M) > 0, closest_M, 1.0)
        index = jax.random.categorical(jax.random.fold_in(key, k), jnp.log(weights_M))
        seed_D = x_MD[index]
        return seeds_KD.at[k].set(seed_D), jnp.minimum(closest_M, distance(seed_D))

    seeds_KD = jnp.zeros((num_clusters, x_MD.shape[1]), x_MD.dtype).at[0].set(first_D)
    return jax.lax.fori_loop(1, num_clusters, add_seed, (seeds_KD, distance(first_D)))[0]


def lloyd(x_MD: jax.Array, centroids_KD: jax.Array, num_iterations: int) -> tuple[jax.Array, jax.Array]:
    """Lloyd's iterations; a cluster that falls empty restarts at a point far from its centroid.

    Args:
      x_MD: points.
      centroids_KD: where to start.
      num_iterations: iterations.

    Returns:
      centroids [K, D] and the inertia (sum of squared distances) they leave.
    """
    norms_M = jnp.sum(jnp.square(x_MD), axis=-1)
    num_clusters = centroids_KD.shape[0]

    def assign(centroids_KD):
        distances_MK = squared_distances(x_MD, centroids_KD)
        return jnp.argmin(distances_MK, axis=-1), jnp.maximum(jnp.min(distances_MK, axis=-1) + norms_M, 0.0)

    def iterate(_, centroids_KD):
        labels_M, errors_M = assign(centroids_KD)
        counts_K = jnp.zeros(num_clusters, x_MD.dtype).at[labels_M].add(1.0)
        sums_KD = jnp.zeros_like(centroids_KD).at[labels_M].add(x_MD)
        farthest_K = jax.lax.top_k(errors_M, min(num_clusters, x_MD.shape[0]))[1]
        rank_K = jnp.clip(jnp.cumsum(counts_K == 0) - 1, 0, farthest_K.shape[0] - 1)
        restarts_KD = x_MD[farthest_K[rank_K]]
        means_KD = sums_KD / jnp.maximum(counts_K, 1.0)[:, None]
        return jnp.where((counts_K > 0)[:, None], means_KD, restarts_KD)

    centroids_KD = jax.lax.fori_loop(0, num_iterations, iterate, centroids_KD)
    return centroids_KD, jnp.sum(assign(centroids_KD)[1])


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
