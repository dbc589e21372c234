"""audiolm train --config=acoustic_piano_tiny --workdir=WORKDIR --config.data_dir=TOKENS

`coarse_piano_tiny` without its condition: acoustic tokens alone.
"""

from audiolm_jax.config import tiny_language_model_config


def get_config():
    config = tiny_language_model_config("coarse")
    config.stage.update({"codebook_size": 512, "num_quantizers": 3, "num_coarse_quantizers": 3})
    config.stage.semantic_condition = False
    return config
