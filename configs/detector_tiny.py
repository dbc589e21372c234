"""audiolm train --config=detector_tiny --workdir=WORKDIR --config.data_dir=DETECTION_DATA/manifest.jsonl

A detector of an eighth of the paper's channels: minutes on two CPU cores. See docs/detector.md.
"""

from audiolm_jax.config import tiny_classifier_config


def get_config():
    config = tiny_classifier_config()
    config.split_by = "speaker"
    config.model.labels = ("real", "generated")
    return config
