"""A w2v-BERT that two CPU cores train in about two minutes on ten minutes of speech.

    audiolm train --config=w2v_bert_tiny --workdir=runs/w2v_bert_tiny --config.data_dir=DIR
    audiolm fit-kmeans --encoder=runs/w2v_bert_tiny --layer=3 --input=DIR --num_clusters=64 --seed=0 --output=OUT

On held-out speech expect a masked accuracy of about 0.2 where the most frequent target has a share of about 0.07, and
a target perplexity above 40 of 64 codes.
"""

from audiolm_jax.config import tiny_w2v_bert_config


def get_config():
    return tiny_w2v_bert_config()
