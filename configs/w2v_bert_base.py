"""A w2v-BERT of HuBERT base's size for 16 kHz speech: half the XL's width, half its blocks, 0.08 B parameters.

    audiolm train --config=w2v_bert_base --workdir=runs/w2v_bert_base --config.data_dir=DIR
    audiolm fit-kmeans --encoder=runs/w2v_bert_base --layer=10 --input=DIR --num_clusters=1024 --seed=0 --output=OUT

For some 1,000 hours such as LibriSpeech, whose utterances come in batches of like lengths, on eight TPU or GPU chips.
The sizes and the batch are this project's; everything else is the XL's (arXiv 2108.06209).
"""

from audiolm_jax.config import w2v_bert_config


def get_config():
    config = w2v_bert_config()
    config.batch_size = 256
    config.bucket_seconds = (7.5, 15.0)
    config.model.update(
        {
            "embed_dim": 512,
            "mlp_dim": 2048,
            "num_contrastive_layers": 6,
            "num_masked_layers": 6,
            "codebook_dim": 512,
            "default_layer": 10,
        }
    )
    config.optimizer.update({"warmup_steps": 10_000})
    return config
