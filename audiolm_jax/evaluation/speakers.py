"""Embeddings of voices: the cosine of two says how alike they are."""

from collections.abc import Callable

import numpy as np

from audiolm_jax.evaluation.adapters import Adapter

KIND = "speaker similarity"
RESEMBLYZER = ("resemblyzer", "librosa", "torch", "webrtcvad")
INSTALL = "pip install 'audiolm_jax[eval]' torch; pip install --no-deps Resemblyzer"


def resemblyzer_encoder():
    """Its network, on the processor: a function of a recording at 16 kHz and of `embed_utterance`'s options."""
    import resemblyzer
    from resemblyzer import audio as preparation
    from resemblyzer.hparams import audio_norm_target_dBFS

    encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)

    def embed(wave_W: np.ndarray, **options):
        # Its own preparation also cuts silence out, and may leave nothing of a bad recording to judge.
        wave_W = preparation.normalize_volume(wave_W, audio_norm_target_dBFS, increase_only=True)
        return encoder.embed_utterance(wave_W.astype(np.float32), **options)

    return embed


def _resemblyzer() -> Callable[[np.ndarray], np.ndarray]:
    """GE2E (arXiv 1710.10467): a unit vector [256]."""
    return resemblyzer_encoder()


EMBEDDERS = {
    "resemblyzer": Adapter("Resemblyzer", 16_000, _resemblyzer, RESEMBLYZER, INSTALL, min_seconds=0.4),
}


def cosine(first_D: np.ndarray | None, second_D: np.ndarray | None) -> float | None:
    """Of two embeddings; None where one is missing."""
    if first_D is None or second_D is None:
        return None
    return float(first_D @ second_D / (np.linalg.norm(first_D) * np.linalg.norm(second_D)))
