"""audiolm train --config=acoustic_piano --workdir=WORKDIR --config.data_dir=TOKENS

The baseline of AudioLM's piano experiment: acoustic tokens alone (arXiv 2209.03143 §4.6; raters prefer AudioLM in
83.3 % of their ratings). It is `coarse_piano` without its condition, on the same tokens; its bundle is codec and stage.
"""

from audiolm_jax.config import language_model_config


def get_config():
    config = language_model_config("coarse")
    config.stage.update({"codebook_size": 2**14, "num_quantizers": 3, "num_coarse_quantizers": 3})
    config.stage.semantic_condition = False
    return config
