"""How well tokens and phones agree frame by frame: HuBERT's measures (arXiv 2106.07447 §V-A).

Shape suffixes: R recordings, P phones, K tokens.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from audiolm_jax.evaluation import statistics
from audiolm_jax.evaluation.statistics import Estimate


def agreement(counts_PK: np.ndarray) -> dict[str, float]:
    """The measures of how often each phone meets each token.

    Returns:
      `phone_purity`: the share of frames that are right where each token is taken for the phone it meets most;
      `cluster_purity`: the same where each phone is taken for its most frequent token;
      `pnmi`: the mutual information of phone and token as a share of the phones' entropy, 0 where that is 0.
    """
    joint_PK = counts_PK / counts_PK.sum()
    phone_P, token_K = joint_PK.sum(axis=1), joint_PK.sum(axis=0)
    total = float(statistics.entropy(phone_P))
    information = total + float(statistics.entropy(token_K) - statistics.entropy(joint_PK.ravel()))
    return {
        "phone_purity": float(joint_PK.max(axis=0).sum()),
        "cluster_purity": float(joint_PK.max(axis=1).sum()),
        "pnmi": information / total if total > 0 else 0.0,
    }


def bootstrap_agreement(
    phones_R: Sequence[np.ndarray], tokens_R: Sequence[np.ndarray], num_phones: int, num_tokens: int, seed: int
) -> dict[str, Estimate]:
    """The measures over all frames, with intervals over recordings.

    A resampling repeats recordings, so phones and tokens seem to agree better than they do: the intervals are the
    value's ± 1.96 standard deviations of the resamplings.

    Args:
      phones_R, tokens_R: of each recording a phone's and a token's number for each frame that has a phone.
      num_phones, num_tokens: P and K.
      seed: of the resampling.
    """
    size = num_phones * num_tokens
    counts = scipy.sparse.vstack([
        scipy.sparse.csr_array(np.bincount(phone_T * num_tokens + token_T, minlength=size)[None])
        for phone_T, token_T in zip(phones_R, tokens_R, strict=True)
    ])  # fmt: skip
    measured = lambda weights_R: agreement((weights_R @ counts).reshape(num_phones, num_tokens))
    num_recordings = len(phones_R)
    generator = np.random.default_rng(seed)
    shares_R = np.full(num_recordings, 1 / num_recordings)
    samples = [
        measured(generator.multinomial(num_recordings, shares_R).astype(np.float64))
        for _ in range(statistics.RESAMPLINGS)
    ]
    found = {}
    for name, value in measured(np.ones(num_recordings)).items():
        margin = 1.96 * float(np.std([sample[name] for sample in samples]))
        found[name] = Estimate(value, max(0.0, value - margin), min(1.0, value + margin), num_recordings)
    return found
