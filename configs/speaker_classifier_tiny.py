"""audiolm train --config=speaker_classifier_tiny --workdir=WORKDIR --config.data_dir=RECORDINGS

A speaker classifier of an eighth of the paper's channels: minutes on two CPU cores. See docs/detector.md.
"""

from audiolm_jax.config import tiny_classifier_config


def get_config():
    return tiny_classifier_config()
