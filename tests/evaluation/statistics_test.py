"""Intervals against what theory says they are."""

import numpy as np
import pytest

from audiolm_jax.evaluation.statistics import bootstrap_mean, bootstrap_perplexity, entropy


def test_interval_of_a_mean_is_the_normal_one_for_many_recordings():
    values = np.random.default_rng(0).normal(3.0, 2.0, 500)
    found = bootstrap_mean(values, seed=1)
    margin = 1.96 * values.std() / np.sqrt(500)
    assert found.value == pytest.approx(values.mean()) and found.count == 500
    assert found.low == pytest.approx(values.mean() - margin, abs=0.15 * margin)
    assert found.high == pytest.approx(values.mean() + margin, abs=0.15 * margin)
    assert bootstrap_mean(values, seed=1) == found and bootstrap_mean(values, seed=2).low != found.low


def test_one_recording_has_no_spread():
    found = bootstrap_mean([2.5], seed=0)
    assert (found.value, found.low, found.high, found.count) == (2.5, 2.5, 2.5, 1)


def test_perplexity_of_known_shares():
    shares_N = np.array([0.5, 0.25, 0.125, 0.125])
    assert float(entropy(shares_N * 80)) == pytest.approx(1.75 * np.log(2))
    counts_RN = np.random.default_rng(0).multinomial(1000, shares_N, size=200)
    found = bootstrap_perplexity(counts_RN, seed=0)
    assert found.value == pytest.approx(2**1.75, rel=0.01)
    assert found.low < 2**1.75 < found.high and found.high - found.low < 0.05
    assert bootstrap_perplexity(np.ones((3, 8), int), seed=0).high == 8.0


def test_interval_of_a_perplexity_covers_it_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    shares_N = np.exp(-np.arange(32) / 8)
    shares_N /= shares_N.sum()
    expected, covered = float(np.exp(entropy(shares_N))), 0
    for _ in range(100):
        # Recordings differ in the codes they use.
        shares_RN = generator.dirichlet(100 * shares_N, size=50)
        found = bootstrap_perplexity(generator.multinomial(1000, shares_RN), seed=0)
        assert 1 <= found.low <= found.value <= found.high <= 32
        covered += found.low <= expected <= found.high
    assert 85 <= covered <= 99
