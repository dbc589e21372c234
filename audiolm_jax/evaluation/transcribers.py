"""From recordings of music to notes."""

import contextlib
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import numpy as np

from audiolm_jax import audio
from audiolm_jax.evaluation.adapters import Adapter

KIND = "transcriber"
SAMPLE_RATE = 22_050
NO_NOTES = np.zeros((0, 3))


def _basic_pitch() -> Callable[[np.ndarray], np.ndarray]:
    """Basic Pitch (arXiv 2203.09893): notes [N, 3] of onset and offset in seconds and MIDI pitch, by their onsets."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # It names each engine that is not there.
    try:
        import basic_pitch
        from basic_pitch import inference

        model = inference.Model(basic_pitch.build_icassp_2022_model_path(basic_pitch.FilenameSuffix.onnx))
    finally:
        logging.disable(before)

    def transcribe(wave_W: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            path = pathlib.Path(folder) / "piece.wav"
            audio.write(path, wave_W, SAMPLE_RATE)
            _, _, notes = inference.predict(path, model)
        found = sorted((float(onset), float(offset), float(pitch)) for onset, offset, pitch, *_ in notes)
        return np.array(found).reshape(-1, 3)

    return transcribe


TRANSCRIBERS = {
    "basic_pitch": Adapter(
        "Basic Pitch",
        SAMPLE_RATE,
        _basic_pitch,
        ("basic_pitch", "onnxruntime", "librosa", "mir_eval", "pretty_midi", "resampy"),
        "pip install 'audiolm_jax[eval]'; pip install --no-deps basic-pitch",
        min_seconds=0.1,
        nothing=NO_NOTES,
    ),
}
