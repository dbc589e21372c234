"""benchmarks/abx*.py: what they measure and make, in the smallest size."""

import numpy as np

from tests.benchmarks import load


def test_a_row_counts_what_was_compared():
    benchmark = load("abx")
    found = benchmark.row(2000, frame_rate=25.0, dimensions=4)
    assert tuple(found) == benchmark.COLUMNS
    assert found["triphones"] == 2000 and found["pairs of tokens"] > 100 and found["triples"] > 100
    assert found["processor seconds"] > 0
    assert benchmark.slope([300.0, 100.0], [5.0, 1.0]) == 0.02 and benchmark.slope([100.0], [5.0]) == 0.05


def test_warping_is_the_path_of_least_total():
    script = load("abx_items")
    generator = np.random.default_rng()
    x_TD = generator.standard_normal((9, 3))
    # Each frame once, twice or three times.
    repeats_T = generator.integers(1, 4, 9)
    found_T = script.warping(x_TD, np.repeat(x_TD, repeats_T, axis=0))
    ends_T = np.cumsum(repeats_T)
    np.testing.assert_allclose(found_T, ends_T - repeats_T / 2 - 0.5)


def test_stress_belongs_to_the_phone_behind_and_space_to_the_one_before():
    script = load("abx_voices")
    edges = np.arange(9) / 10
    assert script.phones_of("a b\u02c8cd.", edges) == [
        (0.1, 0.3, "a"),
        (0.3, 0.4, "b"),
        (0.4, 0.6, "c"),
        (0.6, 0.7, "d"),
        (0.7, 0.8, "sil"),
    ]
