"""Frames in heaps, and what NumPy says of clusters."""

import numpy as np


def blobs(num_frames: int, num_dims: int, num_blobs: int, spread: float = 4.0, seed: int | None = None) -> np.ndarray:
    """Frames [M, D] around `num_blobs` random points; fresh ones, unless there is a seed."""
    generator = np.random.default_rng(seed)
    centers_KD = spread * generator.normal(size=(num_blobs, num_dims))
    noise_MD = generator.normal(size=(num_frames, num_dims))
    return (centers_KD[generator.integers(num_blobs, size=num_frames)] + noise_MD).astype(np.float32)


def assigned(x_MD: np.ndarray, centroids_KD) -> tuple[np.ndarray, float]:
    """Labels [M] and inertia, in float64 and by the definition."""
    distances_MK = np.square(x_MD[:, None].astype(np.float64) - np.asarray(centroids_KD, np.float64)).sum(-1)
    return distances_MK.argmin(1), float(distances_MK.min(1).sum())
