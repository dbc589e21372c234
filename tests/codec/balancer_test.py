"""The balancer against EnCodec's formula in NumPy, over several steps."""

import jax
import numpy as np
import pytest

from audiolm_jax.codec import balancer

WEIGHTS = {"mel": 1.0, "adversarial": 3.0, "unused": 5.0}


def gradients_of(step, generator):
    """Of very different scales; the adversarial loss joins at the third step."""
    scales = {"mel": 1e3 * (1 + step), "adversarial": 1e-4 if step >= 2 else 0.0}
    return {name: scale * generator.standard_normal((4, 50)) for name, scale in scales.items()}


def test_balanced_gradients_are_the_papers_formula(float64):
    generator = np.random.default_rng()
    state = jax.tree.map(np.float64, balancer.init(["mel", "adversarial"]))
    norms = {"mel": [], "adversarial": []}
    balance = jax.jit(balancer.balance)
    for step in range(6):
        gradients = gradients_of(step, generator)
        found = balance(state, gradients, WEIGHTS)
        state = found.state
        pulling = [name for name, gradient in gradients.items() if np.any(gradient)]
        expected, shares = 0.0, {}
        for name in pulling:
            norms[name].append(sum(np.linalg.norm(row) for row in gradients[name]))
            discounts = 0.999 ** np.arange(len(norms[name]))[::-1]
            average = np.sum(discounts * norms[name]) / np.sum(discounts)
            weight = WEIGHTS[name] / sum(WEIGHTS[other] for other in pulling)
            expected = expected + weight * gradients[name] / average
            shares[name] = weight * norms[name][-1] / average
        np.testing.assert_allclose(found.grad_BW, expected, rtol=1e-9, atol=1e-12)
        for name in gradients:
            assert found.shares[name] == pytest.approx(shares.get(name, 0.0) / sum(shares.values()), rel=1e-9)


def test_the_scale_of_a_loss_does_not_count_nor_does_the_batch_size(float64):
    gradients = gradients_of(3, np.random.default_rng())
    # Where a sum cancels, single precision would not be exact relative to it.
    start = lambda gradients: jax.tree.map(np.float64, balancer.init(gradients))
    first = balancer.balance(start(gradients), gradients, WEIGHTS)
    louder = {**gradients, "mel": 1e6 * gradients["mel"]}
    np.testing.assert_allclose(balancer.balance(start(louder), louder, WEIGHTS).grad_BW, first.grad_BW, rtol=1e-4)
    # Means over twice the rows: each row's gradient is half as large, and so it stays.
    twice = {name: np.concatenate([gradient, gradient]) / 2 for name, gradient in gradients.items()}
    doubled = balancer.balance(start(twice), twice, WEIGHTS).grad_BW
    np.testing.assert_allclose(doubled[:4], first.grad_BW / 2, rtol=1e-4)
    assert first.shares["mel"] == pytest.approx(0.25, rel=1e-5)


def test_a_gradient_that_is_not_finite_shows():
    gradients = {"mel": np.full((1, 3), np.nan), "adversarial": np.ones((1, 3))}
    assert not np.any(np.isfinite(balancer.balance(balancer.init(gradients), gradients, WEIGHTS).grad_BW))
