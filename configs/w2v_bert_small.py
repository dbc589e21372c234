"""A w2v-BERT that two CPU cores train in two hours on some hours of speech in short recordings.

    audiolm train --config=w2v_bert_small --workdir=runs/w2v_bert_small --config.data_dir=RECORDINGS
    audiolm evaluate --suite=abx --semantic_tokenizer=runs/w2v_bert_small --data=ITEMS --output=runs/abx

docs/w2v_bert.md shows its curve, and how phonetic its layers are beside log-mel features and Whisper's encoder.
"""

from audiolm_jax.config import tiny_w2v_bert_config


def get_config():
    config = tiny_w2v_bert_config()
    config.num_train_steps = 16_000
    config.bucket_seconds = (1.0, 2.0)
    config.log_every_steps = 50
    config.eval_every_steps = 1000
    config.checkpoint_every_steps = 500
    config.ema_decay = 0.999
    config.model.update(
        {
            "embed_dim": 192,
            "mlp_dim": 512,
            "num_contrastive_layers": 3,
            "num_masked_layers": 3,
            "codebook_size": 128,
            "default_layer": 5,
        }
    )
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 200})
    return config
