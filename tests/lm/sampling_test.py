"""Temperature, top-k and top-p against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.errors import UserError
from audiolm_jax.lm.sampling import Sampling, filter_logits, sample


def kept(logits_V, **settings):
    filtered_BV = filter_logits(jnp.asarray(logits_V)[None], **{"top_k": 0, "top_p": None, **settings})
    return np.flatnonzero(np.isfinite(np.asarray(filtered_BV[0])))


def test_top_k_keeps_the_k_largest():
    logits_V = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    np.testing.assert_array_equal(kept(logits_V, top_k=7), np.sort(np.argsort(-logits_V)[:7]))
    assert len(kept(logits_V, top_k=500)) == 50


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8, 0.99])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    logits_V = np.random.default_rng(1).standard_normal(40).astype(np.float32) * 2
    probability_V = np.exp(logits_V) / np.exp(logits_V).sum()
    order = np.argsort(-probability_V)
    count = int(np.searchsorted(np.cumsum(probability_V[order]), p)) + 1
    np.testing.assert_array_equal(kept(logits_V, top_p=p), np.sort(order[:count]))


def test_top_p_renormalises_after_top_k():
    logits_V = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the two kept by top-k the first has 4/7: alone it reaches 0.5, while of all four it would not.
    np.testing.assert_array_equal(kept(logits_V, top_k=2, top_p=0.5), [0])
    np.testing.assert_array_equal(kept(logits_V, top_p=0.5), [0, 1])


def test_frequencies_follow_the_tempered_softmax():
    logits_V = np.array([1.0, 0.0, -1.0, -np.inf], np.float32)
    keys_B = jax.random.split(jax.random.key(0), 20000)
    drawn_B = np.asarray(sample(keys_B, jnp.tile(logits_V, (20000, 1)), temperature=0.5))
    expected_V = np.exp(2 * logits_V) / np.exp(2 * logits_V).sum()
    np.testing.assert_allclose(np.bincount(drawn_B, minlength=4) / 20000, expected_V, atol=0.015)


def test_greedy():
    logits_BV = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    keys_B = jax.random.split(jax.random.key(0), 5)
    np.testing.assert_array_equal(sample(keys_B, jnp.asarray(logits_BV)), logits_BV.argmax(-1))


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match="out of range"):
        Sampling(**settings)
