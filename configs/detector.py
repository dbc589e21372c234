"""The paper's detector of generated speech: real speech from the codec against AudioLM's (arXiv 2209.03143 §4).

    audiolm detection-data runs/continuations runs/acoustic --codec=runs/codec --input=RECORDINGS --output=runs/pairs
    audiolm train --config=detector --workdir=runs/detector --config.data_dir=runs/pairs/manifest.jsonl
    audiolm evaluate --suite=detector --detector=runs/detector --data=runs/pairs/manifest.jsonl --output=runs/detected

Held-out speakers; the paper's accuracy is 98.6 %. A detector knows the codec and the model that it was trained on.
"""

from audiolm_jax.config import classifier_config


def get_config():
    config = classifier_config()
    config.split_by = "speaker"
    config.model.labels = ("real", "generated")
    return config
