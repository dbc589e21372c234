"""w2v-BERT XL as in AudioLM (arXiv 2108.06209, 2209.03143 §4.1), on 16 kHz speech such as Libri-Light.

    audiolm train --config=w2v_bert_xl --workdir=runs/w2v_bert_xl --config.data_dir=DIR
    audiolm fit-kmeans --encoder=runs/w2v_bert_xl --layer=19 --input=DIR --num_clusters=1024 --seed=0 --output=OUT

0.6 B parameters, 400 k steps of 2048 crops: a large slice's work. With the paper's data expect an ABX error of
about 6.7 (within speakers) and 7.6 (across) from the 1024 clusters of layer 19.
"""

from audiolm_jax.config import w2v_bert_config


def get_config():
    return w2v_bert_config()
