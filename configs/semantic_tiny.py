"""audiolm train --config=semantic_tiny --workdir=WORKDIR --config.data_dir=TOKENS

The semantic stage for the quickstart: a few minutes on two CPU cores.
"""

from audiolm_jax.config import tiny_language_model_config


def get_config():
    return tiny_language_model_config("semantic")
