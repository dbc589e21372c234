"""The paper's speaker classifier: train-clean-100 and test-clean of LibriSpeech, 291 speakers (arXiv 2209.03143 §4).

    audiolm train --config=speaker_classifier --workdir=runs/speakers --config.data_dir=RECORDINGS
    audiolm evaluate --suite=speaker --classifier=runs/speakers --data=RECORDINGS --output=runs/speaker_accuracy

The speakers are the first folders below RECORDINGS, or a manifest's. One in ten of all recordings is held out. The
paper's classifier recognises every speaker in reconstructions of the codec.
"""

from audiolm_jax.config import classifier_config


def get_config():
    return classifier_config()
