"""A w2v-BERT that two CPU cores train in an hour or two on some hours of speech in short recordings.

audiolm train --config=w2v_bert_small --workdir=runs/w2v_bert_small --config.data_dir=RECORDINGS
"""

from audiolm_jax.config import tiny_w2v_bert_config


def get_config():
    config = tiny_w2v_bert_config()
    config.num_train_steps = 6_000
    config.batch_size = 16
    config.bucket_seconds = (1.0, 2.0)
    config.log_every_steps = 50
    config.eval_every_steps = 500
    config.checkpoint_every_steps = 250
    config.model.update(
        {
            "subsampling_channels": 32,
            "embed_dim": 192,
            "mlp_dim": 768,
            "num_contrastive_layers": 3,
            "num_masked_layers": 3,
            "codebook_size": 256,
            "codebook_dim": 128,
            "default_layer": 5,
        }
    )
    config.optimizer.update({"learning_rate": 1.5e-3, "warmup_steps": 300})
    return config
