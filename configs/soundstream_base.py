"""audiolm train --config=soundstream_base --workdir=WORKDIR --config.data_dir=RECORDINGS

SoundStream as in AudioLM: 16 kHz, 50 frames a second, 12 levels of 1024 codes, 6 kbit/s (arXiv 2107.03312 and
2209.03143 §4.1). Expect ViSQOL 3.3 at 2 kbit/s (4 levels) and 3.9 at 6 kbit/s once trained on Libri-Light.
"""

from audiolm_jax.config import soundstream_config


def get_config():
    return soundstream_config()
