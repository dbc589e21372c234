"""audiolm train --config=coarse_piano --workdir=WORKDIR --config.data_dir=TOKENS

AudioLM's coarse stage on piano:
semantic tokens to all 3 acoustic levels of 2^14 codes; there is no fine stage (arXiv 2209.03143 §4.6).
"""

from audiolm_jax.config import language_model_config


def get_config():
    config = language_model_config("coarse")
    config.stage.update({"codebook_size": 2**14, "num_quantizers": 3, "num_coarse_quantizers": 3})
    return config
