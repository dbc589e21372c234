"""audiolm train --config=soundstream_piano_tiny --workdir=WORKDIR --config.data_dir=RECORDINGS

`soundstream_tiny` in the piano's layout: 3 levels of 512 codes. Minutes on two CPU cores.
"""

from audiolm_jax.config import tiny_soundstream_config


def get_config():
    config = tiny_soundstream_config()
    config.model.update({"num_quantizers": 3, "codebook_size": 512})
    return config
