"""What was measured on some recordings, and how far it may be from what all recordings would give.

Shape suffixes: R recordings, S resamplings, N codes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

RESAMPLINGS = 1000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % confidence interval over recordings.

    Attributes:
      value: over all recordings.
      low, high: the interval.
      count: recordings; contexts where the measure says so.
    """

    value: float
    low: float
    high: float
    count: int


def shown(found: Estimate | None, digits: int = 3) -> str:
    """For a table: the value and its interval; a dash for None."""
    if found is None:
        return "–"
    return f"{found.value:.{digits}g} [{found.low:.{digits}g}, {found.high:.{digits}g}]"


def bootstrap_mean(values_R: Sequence[float], seed: int) -> Estimate:
    """The mean over recordings and its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13)."""
    values = np.asarray(values_R, np.float64)
    indices_SR = np.random.default_rng(seed).integers(len(values), size=(RESAMPLINGS, len(values)))
    low, high = np.percentile(values[indices_SR].mean(axis=1), (2.5, 97.5))
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def bootstrap_ratio(numerators_R: Sequence[float], denominators_R: Sequence[float], seed: int) -> Estimate:
    """The ratio of two sums over recordings and its percentile bootstrap interval."""
    pairs_R2 = np.stack([numerators_R, denominators_R], axis=1).astype(np.float64)
    indices_SR = np.random.default_rng(seed).integers(len(pairs_R2), size=(RESAMPLINGS, len(pairs_R2)))
    sums_S2 = pairs_R2[indices_SR].sum(axis=1)
    low, high = np.percentile(sums_S2[:, 0] / sums_S2[:, 1], (2.5, 97.5))
    numerator, denominator = pairs_R2.sum(axis=0)
    return Estimate(float(numerator / denominator), float(low), float(high), len(pairs_R2))


def bootstrap_perplexity(counts_RN: np.ndarray, seed: int) -> Estimate:
    """Perplexity of the codes of all recordings.

    A resampling repeats recordings, so it uses fewer codes than there are: its entropies scatter as they should, but
    lie too low. The interval is therefore the entropy's ± 1.96 standard deviations of the resamplings.

    Args:
      counts_RN: how often each code occurs in each recording.
      seed: of the resampling.
    """
    num_recordings, num_codes = counts_RN.shape
    shares = np.full(num_recordings, 1 / num_recordings)
    weights_SR = np.random.default_rng(seed).multinomial(num_recordings, shares, size=RESAMPLINGS)
    margin = 1.96 * float(np.std(entropy(weights_SR.astype(np.float64) @ counts_RN)))
    value = float(entropy(counts_RN.sum(axis=0)))
    low, high, value = np.exp([value - margin, value + margin, value])
    return Estimate(float(value), max(1.0, float(low)), min(float(num_codes), float(high)), num_recordings)


def area_under_curve(
    positive: np.ndarray, negative: np.ndarray, positive_weights: np.ndarray, negative_weights: np.ndarray
) -> float:
    """How often a positive's score is above a negative's, a tie being half: the area under the ROC curve.

    Args:
      positive, negative: scores.
      positive_weights, negative_weights: how often each counts; not all 0.
    """
    values, places = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    positives = np.bincount(places[: len(positive)], positive_weights, len(values))
    negatives = np.bincount(places[len(positive) :], negative_weights, len(values))
    below = np.cumsum(negatives) - negatives
    return float(positives @ (below + negatives / 2) / (positives.sum() * negatives.sum()))


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy in nats of the shares of counts [..., N]: [...]."""
    shares = counts / counts.sum(axis=-1, keepdims=True)
    return -np.sum(shares * np.log(np.maximum(shares, 1e-12)), axis=-1)
