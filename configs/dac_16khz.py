"""audiolm train --config=dac_16khz --workdir=WORKDIR --config.data_dir=RECORDINGS

DAC's networks (arXiv 2306.06546) on AudioLM's grid: 16 kHz, 50 Hz frames, 12 levels of 1024 codes of 8 dimensions, as
the public weights have them; trained by SoundStream's objective. A public model is fine-tuned with `init_from`.
"""

import ml_collections

from audiolm_jax.config import soundstream_config


def get_config():
    config = soundstream_config()
    config.model = ml_collections.ConfigDict(
        {
            "architecture": "dac",
            "sample_rate": 16_000,
            "channels": 64,
            "strides": (2, 4, 5, 8),
            "decoder_channels": 1536,
            "decoder_strides": (8, 5, 4, 2),
            "embed_dim": 1024,
            "num_quantizers": 12,
            "codebook_size": 1024,
            "codebook_dim": 8,
        }
    )
    return config
