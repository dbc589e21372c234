from audiolm_jax.config import soundstream_config


def get_config():
    config = soundstream_config()
    config.num_train_steps = 600
    config.batch_size = 8
    config.crop_seconds = 1.0
    config.log_every_steps = 20
    config.eval_every_steps = 200
    config.checkpoint_every_steps = 200
    config.model.update({"channels": 8, "embed_dim": 32, "num_quantizers": 6, "codebook_size": 256})
    config.discriminator.update({
        "waveform_channels": (8, 16, 32, 64, 64, 64), "waveform_group_width": 64, "stft_channels": 4, "start_step": 400,
    })
    config.optimizer.update({"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 50, "clip_norm": 0.0})
    config.discriminator_optimizer.update({"learning_rate": 5e-4})
    return config
