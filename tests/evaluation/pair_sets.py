"""Sets of paired recordings in the published layouts, made of recordings at hand."""

import csv

import numpy as np
import soundfile

RATE = 16_000
LEXICAL = ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct")
SYNTACTIC = ("filename", "id", "voice", "type", "subtype", "transcription", "correct")


def write_gold(folder, header, rows):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "gold.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_sets(folder, pairs):
    """The four sets by suite, of (right, wrong) waves at `RATE`.

    In sWUGGY two pairs each share an id, as two voices of one pair, and every other id is not in the vocabulary; in
    sBLIMP pairs take turns in two types of error; StoryCloze and SALMon have two folders.
    """
    lexical, syntactic = folder / "zr" / "lexical" / "dev", folder / "zr" / "syntactic" / "dev"
    lexical_rows, syntactic_rows = [], []
    for number, both in enumerate(pairs):
        task = ("first", "second")[number % 2]
        for correct, wave_W in zip((1, 0), both, strict=True):
            name = f"{'nr'[correct]}{number}"
            frequency = 3 * (number // 2 % 2) if correct else ""
            lexical_rows.append([name, number // 2, f"v{number % 2}", frequency, f"word{number}", "a b", 2, correct])
            syntactic_rows.append([name, number, "v0", task, "s", "he comes, he come", correct])
            for path in (
                lexical / f"{name}.wav",
                syntactic / f"{name}.wav",
                folder / "story" / task / f"{number}_{('incorrect', 'correct')[correct]}.wav",
                folder / "salmon" / task / f"sample_{number}_{1 - correct}.wav",
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, wave_W, RATE)
    write_gold(lexical, LEXICAL, lexical_rows)
    write_gold(syntactic, SYNTACTIC, syntactic_rows)
    zr = folder / "zr"
    return {"swuggy": zr, "sblimp": zr, "storycloze": folder / "story", "salmon": folder / "salmon"}


def noise_pairs(count, seed=0):
    """Pairs of noise of different lengths and colours."""
    generator = np.random.default_rng(seed)
    waves = [0.1 * generator.standard_normal(int(seconds * RATE)) for seconds in generator.uniform(0.3, 1.0, 2 * count)]
    return [
        (np.convolve(right_W, np.ones(4) / 4, "same"), wrong_W)
        for right_W, wrong_W in zip(waves[::2], waves[1::2], strict=True)
    ]
