"""audiolm train --config=soundstream_small --workdir=WORKDIR --config.data_dir=RECORDINGS

A quarter of the paper's SoundStream (C = 16) at AudioLM's rates: 12 levels of 1024 codes, 6 kbit/s. An hour and a half
on two CPU cores; docs/codec.md shows its curve and how it sounds beside Opus.
"""

from audiolm_jax.config import tiny_soundstream_config


def get_config():
    config = tiny_soundstream_config()
    config.num_train_steps = 9_000
    config.batch_size = 8
    config.crop_seconds = 0.5
    config.eval_every_steps = 1000
    config.checkpoint_every_steps = 500
    config.ema_decay = 0.999
    config.model.update({"channels": 16, "embed_dim": 64, "num_quantizers": 12, "codebook_size": 1024})
    config.quantizer.update({"decay": 0.99, "kmeans_iterations": 10})
    config.discriminator.start_step = 8_500
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 200})
    return config
