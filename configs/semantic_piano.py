"""audiolm train --config=semantic_piano --workdir=WORKDIR --config.data_dir=TOKENS

AudioLM's semantic stage on piano:
semantic tokens alone (arXiv 2209.03143 §4.6).
"""

from audiolm_jax.config import language_model_config


def get_config():
    config = language_model_config("semantic")
    config.stage.update({"codebook_size": 2**14, "num_quantizers": 3, "num_coarse_quantizers": 3})
    return config
