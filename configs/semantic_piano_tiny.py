"""audiolm train --config=semantic_piano_tiny --workdir=WORKDIR --config.data_dir=TOKENS

The semantic stage over the tokens of `soundstream_piano_tiny`: 3 levels of 512 codes, no fine stage.
"""

from audiolm_jax.config import tiny_language_model_config


def get_config():
    config = tiny_language_model_config("semantic")
    config.stage.update({"codebook_size": 512, "num_quantizers": 3, "num_coarse_quantizers": 3})
    return config
