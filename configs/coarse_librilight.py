"""audiolm train --config=coarse_librilight --workdir=WORKDIR --config.data_dir=TOKENS

AudioLM's coarse stage on Libri-Light:
semantic tokens to the 4 coarse acoustic levels, 10 s crops; 12 layers of width 1024, batch 256,
1 M steps on 16 TPU v4 (arXiv 2209.03143 §4.1).
"""

from audiolm_jax.config import language_model_config


def get_config():
    return language_model_config("coarse")
