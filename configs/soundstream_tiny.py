"""audiolm train --config=soundstream_tiny --workdir=WORKDIR --config.data_dir=RECORDINGS

A codec of 6 levels of 32 codes, 1.5 kbit/s, for the quickstart: about six minutes on two CPU cores.
"""

from audiolm_jax.config import tiny_soundstream_config


def get_config():
    return tiny_soundstream_config()
