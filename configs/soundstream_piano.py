"""audiolm train --config=soundstream_piano --workdir=WORKDIR --config.data_dir=RECORDINGS

AudioLM's codec for piano: 3 levels of 2^14 codes, 2.1 kbit/s, all of them predicted by the coarse stage
(arXiv 2209.03143 §4.7). The paper trains it on 40 k hours; MAESTRO is the public choice.
"""

from audiolm_jax.config import soundstream_config


def get_config():
    config = soundstream_config()
    config.model.update({"num_quantizers": 3, "codebook_size": 2**14})
    return config
