"""How far tokens of long audio, which are those of overlapping windows, agree with one pass over all of it.

    python benchmarks/window_agreement.py --semantic_tokenizer=runs/semantic_tokenizer --input=RECORDINGS --seconds=120

Recordings of one speaker are joined until they last so long. For each length of window: the share of frames whose token
is the same, near the seams and elsewhere, and the cosine between the hidden states. Whisper's encoder sees no more than
its window, so it cannot be asked.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

COLUMNS = (
    "window, s",
    "frames",
    "same token",
    "within 1 s of a seam",
    "elsewhere",
    "cosine, mean",
    "cosine, lowest 1 %",
)
NEAR_SECONDS = 1.0


def joined(path: str, split: str | None, sample_rate: int, seconds: float, count: int) -> Iterator[np.ndarray]:
    """Waveforms [W] of so many seconds, each of one speaker's recordings in order."""
    from audiolm_jax.data.manifest import read_manifest

    by_speaker: dict[str, list[np.ndarray]] = {}
    for recording in read_manifest(path):
        if split in (None, recording.split) and count:
            parts = by_speaker.setdefault(recording.speaker, [])
            parts.append(recording.read(sample_rate))
            if sum(map(len, parts)) >= seconds * sample_rate:
                count -= 1
                yield np.concatenate(by_speaker.pop(recording.speaker))[: round(seconds * sample_rate)]


def seam_frames(tokenizer, num_samples: int) -> np.ndarray:
    """The first frame of each window but the first one."""
    return np.array([window.first for window in tokenizer.windows(0, num_samples)][1:], int)


def compare(tokenizer, waves: Sequence[np.ndarray], window_seconds: float) -> list[str]:
    """One row of the table."""
    from audiolm_jax.semantic.tokenizer import tokens_of

    rate, layer = tokenizer.frame_rate, tokenizer.clusters["layer"]
    seen = lambda seconds: dataclasses.replace(
        tokenizer, encoder=dataclasses.replace(tokenizer.encoder, window_seconds=seconds)
    )
    in_windows = seen(window_seconds)
    same, near, cosines = [], [], []
    for wave_W in waves:
        in_one_pass = seen(len(wave_W) / tokenizer.sample_rate + 1.0)
        cut_TD, whole_TD = (one.features(wave_W[None], None, layer)[0] for one in (in_windows, in_one_pass))
        same.append(np.asarray(tokens_of(tokenizer.clusters, cut_TD) == tokens_of(tokenizer.clusters, whole_TD)))
        seams = seam_frames(in_windows, len(wave_W))
        near.append(np.abs(np.arange(len(cut_TD))[:, None] - seams).min(axis=1, initial=10**9) < NEAR_SECONDS * rate)
        norms = np.linalg.norm(cut_TD, axis=1) * np.linalg.norm(whole_TD, axis=1)
        cosines.append(np.sum(cut_TD * whole_TD, axis=1) / norms)
    same_F, near_F, cosine_F = (np.concatenate(parts) for parts in (same, near, cosines))
    figures = same_F.mean(), same_F[near_F].mean(), same_F[~near_F].mean(), cosine_F.mean(), np.quantile(cosine_F, 0.01)
    return [f"{window_seconds:g}", str(len(same_F)), *(f"{figure:.4f}" for figure in figures)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--semantic_tokenizer", required=True, help="an encoder with clusters")
    parser.add_argument("--input", required=True, help="folder, recording or .jsonl manifest")
    parser.add_argument("--split", help="only these recordings")
    parser.add_argument("--seconds", type=float, default=120.0, help="of joined audio at a time (default: 120)")
    parser.add_argument("--count", type=int, default=4, help="stretches of joined audio (default: 4)")
    parser.add_argument("--windows", default="30,20,10,5", help="lengths of window to compare, in seconds")
    arguments = parser.parse_args()

    import audiolm_jax

    tokenizer = audiolm_jax.load_semantic_tokenizer(arguments.semantic_tokenizer)
    waves = list(joined(arguments.input, arguments.split, tokenizer.sample_rate, arguments.seconds, arguments.count))
    print("| " + " | ".join(COLUMNS) + " |")
    print("| " + " | ".join(["---:"] * len(COLUMNS)) + " |")
    for window in map(float, arguments.windows.split(",")):
        print("| " + " | ".join(compare(tokenizer, waves, window)) + " |", flush=True)


if __name__ == "__main__":
    main()
