"""w2v-BERT for piano: the speech model's architecture on recordings of the piano (arXiv 2209.03143 §4.6).

    audiolm train --config=w2v_bert_piano --workdir=runs/w2v_bert_piano --config.data_dir=DIR
    audiolm fit-kmeans --encoder=runs/w2v_bert_piano --layer=19 --input=DIR --num_clusters=1024 --seed=0 --output=OUT

The paper trains on 40 k hours and names no change but the data.
"""

from audiolm_jax.config import w2v_bert_config


def get_config():
    return w2v_bert_config()
