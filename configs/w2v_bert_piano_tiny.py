"""The tiny w2v-BERT for recordings of the piano, in 4 s crops (the prompt of arXiv 2209.03143 §4.6).

    audiolm train --config=w2v_bert_piano_tiny --workdir=runs/w2v_bert_piano_tiny --config.data_dir=DIR
    audiolm fit-kmeans --encoder=runs/w2v_bert_piano_tiny --layer=3 --input=DIR --num_clusters=64 --seed=0 --output=OUT

The speech recipe as it is; two CPU cores take about two minutes.
"""

from audiolm_jax.config import tiny_w2v_bert_config


def get_config():
    return tiny_w2v_bert_config()
