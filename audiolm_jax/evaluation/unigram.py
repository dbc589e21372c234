"""What a language model must beat: the unigram distribution of its own training tokens."""

import numpy as np

from audiolm_jax.data import transforms
from audiolm_jax.data.token_dataset import TokenDataset
from audiolm_jax.evaluation.token_statistics import unigram_cross_entropy
from audiolm_jax.lm.stages import Stage


def unigram_losses(dataset: TokenDataset, stage: Stage) -> np.ndarray:
    """Cross-entropy of the validation split's target tokens under an add-one unigram of the training split's.

    The tokens are the stage's targets as training sees them: de-duplicated where the stage does, in
    windows of its crop; the end token is left out.

    Returns:
      nats per token for each level of the target, [Q].
    """
    levels = zip(_counts(dataset, stage, "train"), _counts(dataset, stage, "validation"), strict=True)
    return np.array([unigram_cross_entropy(counts_K, held_out_K) for counts_K, held_out_K in levels])


def _counts(dataset: TokenDataset, stage: Stage, split: str) -> np.ndarray:
    target = stage.target
    counts = np.zeros(target.vocabulary, np.int64)
    source = dataset.source(split)
    for index in range(len(source)):
        for window in transforms.windows(source[index], stage):
            counts += np.bincount(target.flatten(window[target.source]), minlength=target.vocabulary)
    return counts.reshape(target.num_levels, target.codebook_size)
