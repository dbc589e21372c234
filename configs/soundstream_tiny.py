from audiolm_jax.config import soundstream_config


def get_config():
    config = soundstream_config()
    config.num_train_steps = 400
    config.batch_size = 8
    config.crop_seconds = 1.0
    config.log_every_steps = 20
    config.eval_every_steps = 200
    config.checkpoint_every_steps = 200
    config.model.update({"channels": 8, "embed_dim": 32, "num_quantizers": 6, "codebook_size": 256})
    config.quantizer.update({"decay": 0.97, "commitment_weight": 10.0, "kmeans_iterations": 10})
    config.discriminator.update({
        "waveform_channels": (4, 16, 32, 64, 64, 64), "waveform_group_width": 64,
        "stft_channels": 4, "stft_window": 512, "stft_hop": 256, "start_step": 280,
    })
    config.loss.waveform_weight = 300.0
    optimizer = {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 20, "beta1": 0.8, "beta2": 0.99}
    config.optimizer.update(optimizer)
    config.discriminator_optimizer.update({**optimizer, "learning_rate": 5e-4, "schedule": "constant"})
    return config
