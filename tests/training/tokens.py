"""A token dataset of the sizes of `tests.tiny`."""

import dataclasses

import numpy as np

from audiolm_jax.data import token_dataset
from tests import tiny


def write(folder, metadata, seed=0):
    """Writes 20 training and 4 validation records; returns the folder."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    lengths, frames = {}, {}
    for split, count in (("train", 20), ("validation", 4)):
        records = [
            {
                "id": f"{split}{i}",
                "semantic": generator.integers(0, tiny.CLUSTERS, 30 + 7 * i).astype(np.int32),
                "acoustic": generator.integers(0, tiny.CODES, (60 + 14 * i, tiny.LEVELS)).astype(np.int32),
                "num_samples": 640 * (30 + 7 * i),
                "speaker": "s",
                "is_end": True,
            }
            for i in range(count)
        ]
        token_dataset.write_shard(folder / token_dataset.shard_name(split, 0, 1), records, tiny.LEVELS)
        lengths[split] = [count]
        frames[split] = [len(record["semantic"]) for record in records]
    sizes = {"num_clusters": tiny.CLUSTERS, "codebook_size": tiny.CODES, "num_quantizers": tiny.LEVELS}
    token_dataset.write_info(folder, lengths, frames, dataclasses.replace(metadata, **sizes))
    return folder
