"""Fits the clusters of a semantic tokenizer: hidden states, their normalisation, k-means (arXiv 2209.03143 §3.2).

Shape suffixes: B batch, W waveform samples, M frames of the whole set, D model, K clusters.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax import kmeans
from audiolm_jax.errors import UserError
from audiolm_jax.semantic import moments

DEVIATION_FLOOR = 1e-5  # A dimension that never changes is not blown up.


def fit_clusters(
    tokenizer,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    num_clusters: int,
    seed: int,
    layer: int,
    num_iterations: int = 50,
    max_frames: int = 250_000,
) -> dict[str, Any]:
    """Normalises every dimension over the recordings and clusters the frames.

    Args:
      tokenizer: anything with `features(wave_BW, lengths_B, layer)` and `num_frames(lengths_B)`.
      batches: pairs of wave_BW and lengths_B, read once.
      num_clusters: K.
      seed: of k-means's seeds, and of the sample of frames where there are more than `max_frames`.
      layer: hidden state to cluster.
      num_iterations: of Lloyd's.
      max_frames: the statistics are of all frames, but k-means sees a uniform sample of at most this many
        (250 000 frames are 2.8 hours, 1 GB at width 1024).

    Returns:
      {"layer": int, "mean": [D], "std": [D], "centroids": [K, D] of normalised frames}, float32 NumPy arrays.

    Raises:
      UserError: fewer frames than clusters, or what `features` raises.
    """
    generator = np.random.default_rng(seed)
    add = jax.jit(moments.update)
    running, sample_MD, num_seen = None, np.empty((0, 0), np.float32), 0
    for wave_BW, lengths_B in batches:
        x_BTD = np.asarray(tokenizer.features(wave_BW, lengths_B, layer))
        mask_BT = np.arange(x_BTD.shape[1]) < np.asarray(tokenizer.num_frames(np.asarray(lengths_B)))[:, None]
        if running is None:
            running = moments.empty(x_BTD.shape[-1])
            sample_MD = np.empty((max_frames, x_BTD.shape[-1]), np.float32)
        running = add(running, x_BTD.reshape(-1, x_BTD.shape[-1]), mask_BT.reshape(-1))
        _add_to_sample(generator, sample_MD, x_BTD[mask_BT], num_seen)
        num_seen += int(mask_BT.sum())
    if running is None or num_seen < num_clusters:
        raise UserError(
            "more clusters than frames", f"num_clusters={num_clusters}, {num_seen} frames", "add audio or ask for fewer"
        )
    std_D = jnp.maximum(moments.deviation(running), DEVIATION_FLOOR)
    normed_MD = (sample_MD[:num_seen] - running["mean"]) / std_D
    centroids_KD, _ = kmeans.fit(jax.random.key(seed), normed_MD, num_clusters, num_iterations)
    arrays = {"mean": running["mean"], "std": std_D, "centroids": centroids_KD}
    return {"layer": layer, **jax.tree.map(np.asarray, arrays)}


def _add_to_sample(generator: np.random.Generator, sample_MD: np.ndarray, x_MD: np.ndarray, num_seen: int) -> None:
    """Reservoir sampling in place (Vitter's algorithm R): every frame so far is as likely to be in the sample."""
    size = len(sample_MD)
    room = max(0, size - num_seen)
    sample_MD[num_seen : num_seen + room][: len(x_MD)] = x_MD[:room]
    late_MD = x_MD[room:]
    slots_M = generator.integers(0, num_seen + room + 1 + np.arange(len(late_MD)))
    kept_M = slots_M < size
    sample_MD[slots_M[kept_M]] = late_MD[kept_M]
