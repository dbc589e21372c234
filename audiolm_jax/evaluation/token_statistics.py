"""Exact statistics of tokens that come bit by bit. K: different tokens."""

import numpy as np

# Pairs that wait to be counted together, where fewer different ones are known.
PENDING = 2**16


def entropy(counts_K: np.ndarray) -> float:
    """Entropy of the frequencies, in nats; nan without any token."""
    frequencies = counts_K[counts_K > 0] / max(1, counts_K.sum())
    return float(-np.sum(frequencies * np.log(frequencies))) if len(frequencies) else float("nan")


def unigram_cross_entropy(counts_K: np.ndarray, held_out_K: np.ndarray) -> float:
    """Nats per held-out token under the add-one smoothed frequencies of `counts_K`; nan without held-out tokens."""
    log_probabilities_K = np.log((counts_K + 1) / (counts_K.sum() + len(counts_K)))
    return float(-np.sum(held_out_K * log_probabilities_K) / held_out_K.sum()) if held_out_K.sum() else float("nan")


class Histogram:
    """How often each whole number from 0 on came."""

    def __init__(self):
        self.counts = np.zeros(0, np.int64)

    def add(self, numbers: np.ndarray):
        more = np.bincount(numbers, minlength=len(self.counts))
        more[: len(self.counts)] += self.counts
        self.counts = more


class Bigram:
    """Add-one smoothed probabilities of a token after another: p(b | a) = (n(a, b) + 1) / (n(a) + K).

    All held-out pairs are shown first (`hold_out`), then the training pairs (`fit`), of which only those that were held
    out are counted one by one. So the memory is that of the different held-out pairs, whatever K: 2^14 codes have 2^28.

    Args:
      num_tokens: K.
    """

    def __init__(self, num_tokens: int):
        self._num_tokens = num_tokens
        self._keys = np.zeros(0, np.int64)
        self._held_out, self._fitted = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._contexts_K = np.zeros(num_tokens, np.int64)
        self._pending: list[np.ndarray] = []

    def hold_out(self, first_P: np.ndarray, second_P: np.ndarray):
        """Takes P held-out pairs."""
        self._pending.append(first_P.astype(np.int64) * self._num_tokens + second_P)
        if sum(map(len, self._pending)) > max(PENDING, len(self._keys)):
            self._merge()

    def _merge(self):
        keys, counts = np.unique(np.concatenate([self._keys, *self._pending]), return_counts=True)
        # Known keys came once among all, as themselves.
        places = np.searchsorted(keys, self._keys)
        counts[places] += self._held_out - 1
        self._keys, self._held_out, self._pending = keys, counts, []
        self._fitted = np.zeros(len(keys), np.int64)

    def fit(self, first_P: np.ndarray, second_P: np.ndarray):
        """Takes P training pairs."""
        if self._pending:
            self._merge()
        self._contexts_K += np.bincount(first_P, minlength=self._num_tokens)
        if len(self._keys):
            keys_P = first_P.astype(np.int64) * self._num_tokens + second_P
            places_P = np.minimum(np.searchsorted(self._keys, keys_P), len(self._keys) - 1)
            np.add.at(self._fitted, places_P[self._keys[places_P] == keys_P], 1)

    def cross_entropy(self) -> float:
        """Nats per held-out pair; nan without any."""
        if self._pending:
            self._merge()
        if not len(self._keys):
            return float("nan")
        contexts = self._contexts_K[self._keys // self._num_tokens]
        losses = np.log(contexts + self._num_tokens) - np.log(self._fitted + 1)
        return float(np.sum(self._held_out * losses) / self._held_out.sum())
