"""A trained classifier: waveforms to probabilities of its labels.

Shape suffixes: B batch, W waveform samples, N windows, K labels.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from audiolm_jax import waves
from audiolm_jax.classifier.network import ClassifierConfig
from audiolm_jax.classifier.objective import classify
from audiolm_jax.errors import UserError

WINDOW_SECONDS, HOP_SECONDS = 1.0, 0.25
BATCH_WINDOWS = 32


@dataclasses.dataclass(frozen=True)
class Classifier:
    """The network with its weights: `params`, `batch_stats` and `statistics`."""

    config: ClassifierConfig
    weights: Any

    @classmethod
    def from_weights(cls, config: Mapping[str, Any], weights: Any) -> "Classifier":
        """The classifier of a training config (its `model` fields count), with its weights put on the device."""
        return cls(ClassifierConfig(**dict(config["model"])), jax.device_put(weights))

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def labels(self) -> tuple[str, ...]:
        """What is told apart."""
        return self.config.labels

    def predict(self, wave_BW, lengths_B=None) -> np.ndarray:
        """Probabilities of the labels, float32 [B, K]: means over windows of a second, one every quarter.

        A row of a batch gives what that clip alone does; one shorter than a second is a single window.

        Args:
          wave_BW: float waveforms at `sample_rate`.
          lengths_B: samples of each row; what lies beyond them does not matter. The whole row by default.

        Raises:
          UserError: not a finite float [B, W], lengths that do not fit, or a clip without samples.
        """
        wave_BW = waves.checked_waveform(wave_BW)
        batch, size = wave_BW.shape
        lengths_B = waves.checked_lengths(np.full(batch, size) if lengths_B is None else lengths_B, batch, size)
        if batch and not lengths_B.min():
            raise UserError("clip without samples", f"row {int(np.argmin(lengths_B))}", "leave it out")
        window, hop = (round(seconds * self.sample_rate) for seconds in (WINDOW_SECONDS, HOP_SECONDS))
        windows = [
            (row, start, min(start + window, length))
            for row, length in enumerate(lengths_B.tolist())
            for start in range(0, max(0, length - window) + 1, hop)
        ]
        sums_BK, counts_B1 = np.zeros((batch, len(self.labels))), np.zeros((batch, 1))
        for first in range(0, len(windows), BATCH_WINDOWS):
            some = windows[first : first + BATCH_WINDOWS]
            # Few sizes, so that few programs are compiled.
            wave_NW = np.zeros((1 << (len(some) - 1).bit_length(), window), np.float32)
            lengths_N = np.ones(len(wave_NW), np.int32)
            for index, (row, start, stop) in enumerate(some):
                wave_NW[index, : stop - start] = wave_BW[row, start:stop]
                lengths_N[index] = stop - start
            probabilities_NK = _probabilities(self.config, self.weights, wave_NW, lengths_N)
            rows = [row for row, _, _ in some]
            np.add.at(sums_BK, rows, np.asarray(probabilities_NK)[: len(some)])
            np.add.at(counts_B1, rows, 1)
        return (sums_BK / counts_B1).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(config: ClassifierConfig, weights: Any, wave_NW: jax.Array, lengths_N: jax.Array) -> jax.Array:
    logits_NK, _ = classify(config, weights, wave_NW, lengths_N, train=False)
    return jax.nn.softmax(logits_NK)
