"""benchmarks/kmeans.py: four k-means of the same frames find the same inertia; a large run reads what is on disk."""

import numpy as np

from tests.benchmarks import load


def test_a_row_for_each_kmeans():
    kmeans = load("kmeans")
    rows = kmeans.compare(num_frames=600, num_dims=4, num_clusters=7, num_iterations=5, mini_batch=200)
    assert [row["k-means"].split(",")[0] for row in rows] == ["ours", "ours", "scikit-learn", "scikit-learn"]
    assert all(tuple(row) == kmeans.COLUMNS and row["seconds"] > 0 and 1 <= row["x best"] < 1.2 for row in rows)


def test_a_large_run_finds_the_same_on_disk_and_its_memory(tmp_path):
    kmeans = load("kmeans")
    made, stored = (kmeans.large(600, 4, 7, 2, 0, folder) for folder in (None, tmp_path / "frames"))
    np.testing.assert_allclose(stored["inertias"], made["inertias"], rtol=1e-2)
    assert made["passes"] == stored["passes"] == 3 and 0 < made["peak GiB"] < 24
