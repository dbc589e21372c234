"""audiolm train --config=fine_tiny --workdir=WORKDIR --config.data_dir=TOKENS

The fine stage for the quickstart: a few minutes on two CPU cores.
"""

from audiolm_jax.config import tiny_language_model_config


def get_config():
    return tiny_language_model_config("fine")
