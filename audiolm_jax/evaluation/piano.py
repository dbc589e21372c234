"""The suite `piano`: does a continuation stay in the harmony, the key and the pace of its prompt?

A transcriber finds the notes of prompt and continuation; the same is asked of how the piece truly goes on, of the
codec's reconstruction of that, and of another piece, which is the floor.

Shape suffixes: W waveform samples, N notes, P pitch classes.
"""

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from audiolm_jax import bundle
from audiolm_jax.data.manifest import Recording
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import adapters, music, recordings, statistics, transcribers
from audiolm_jax.evaluation.adapters import Judge
from audiolm_jax.evaluation.codec import reconstruct
from audiolm_jax.evaluation.journal import Journal
from audiolm_jax.evaluation.report import GENERATED, ORIGINAL, RECONSTRUCTION, Clip, Group, Table, render
from audiolm_jax.evaluation.statistics import Estimate, shown
from audiolm_jax.evaluation.suites import Findings, Request
from audiolm_jax.generate import AudioLM

# The paper's: a prompt of 4 s, 20 s in all.
PROMPT_SECONDS, SECONDS = 4.0, 16.0
HEARD = 3
TITLES = {
    "original": "original",
    "reconstruction": "codec reconstruction",
    "continuation": "continuation",
    "other_piece": "another piece",
}
# In the blind test.
KINDS = {"original": ORIGINAL, "reconstruction": RECONSTRUCTION, "continuation": GENERATED}
MEASURES = {
    "pitch_class_similarity": "pitch classes alike",
    "same_key": "same key",
    "key_score": "key score",
    "onset_rate": "onsets a second",
    "onset_rate_ratio": "onset rate off by, octaves",
    "inter_onset_seconds": "median inter-onset, s",
    "inter_onset_distance": "inter-onset distance, octaves",
}


def evaluate_piano(request: Request, journal: Journal) -> Findings:
    """The suite `piano`."""
    folder, data = request.need("bundle"), request.need("data")
    if request.num_samples < 1:
        raise UserError("must be 1 or more", f"--num_samples={request.num_samples}", "change it")
    chosen, _ = adapters.choose(request.judges, {transcribers.KIND: transcribers.TRANSCRIBERS})
    if transcribers.KIND not in chosen:
        what, _, advice = str(transcribers.TRANSCRIBERS["basic_pitch"].missing()).partition("; ")
        raise UserError(f"nobody to transcribe: {what}", "suite piano", advice)
    model = bundle.load_bundle(folder)
    prompt_seconds = PROMPT_SECONDS if request.prompt_seconds is None else request.prompt_seconds
    seconds = SECONDS if request.seconds is None else request.seconds
    recordings.check_prompt(model, prompt_seconds, seconds)
    shortest = max(prompt_seconds + seconds, request.min_seconds or 0.0)
    longest = math.inf if request.max_seconds is None else request.max_seconds
    found, notes = recordings.of_length(data, request.split, shortest, longest)
    found = [recording.crop(0.0, prompt_seconds + seconds) for recording in found]
    others = _other_pieces(found, request.seed)
    transcribe = chosen[transcribers.KIND][1].start()
    measured = recordings.measure_in_batches(
        journal,
        "piano",
        found,
        model.codec.sample_rate,
        request.num_samples,
        functools.partial(
            _measure, model, transcribe, prompt_seconds, seconds, request, others, {one.id for one in found[:HEARD]}
        ),
    )
    metrics, without = estimate(measured, request.seed)
    if len(found) == 1:
        notes.append("one piece alone, so no other one as a floor")
    notes += without
    return Findings(metrics, notes, _page(request, prompt_seconds, seconds, measured, metrics, notes, model))


def _other_pieces(found: Sequence[Recording], seed: int) -> dict[str, Recording]:
    """For each piece another, by chance; none where there is one alone."""
    if len(found) < 2:
        return {}
    chosen = {}
    for index, recording in enumerate(found):
        generator = np.random.default_rng([seed, zlib.crc32(recording.id.encode())])
        chosen[recording.id] = found[(index + int(generator.integers(1, len(found)))) % len(found)]
    return chosen


def _measure(
    model: AudioLM,
    transcribe: Judge,
    prompt_seconds: float,
    seconds: float,
    request: Request,
    others: Mapping[str, Recording],
    heard: set[str],
    batch: Sequence[Recording],
    waves: Sequence[np.ndarray],
) -> list[dict[str, Any]]:
    """For each piece what is measured of its versions, by system, and clips of those that are to be heard."""
    rate = model.codec.sample_rate
    size = round(prompt_seconds * rate)
    out = model.generate(
        np.stack([wave_W[:size] for wave_W in waves]),
        seconds=seconds,
        num_samples=request.num_samples,
        seed=request.seed,
        ignore_end=True,
    )
    found = []
    for index, (recording, wave_W) in enumerate(zip(batch, waves, strict=True)):
        rows = range(index * request.num_samples, (index + 1) * request.num_samples)
        versions = {
            "original": [wave_W],
            "reconstruction": [reconstruct(model.codec, wave_W)],
            "continuation": [out.wave_BW[row, : out.lengths_B[row]] for row in rows],
        }
        clips = dict(versions) if recording.id in heard else {}
        if recording.id in others:
            other_W = recordings.read_or_none(others[recording.id], rate)
            versions["other_piece"] = [] if other_W is None else [other_W]
        prompt_N3 = transcribe(wave_W[:size], rate)
        says = {
            system: [compare(prompt_N3, transcribe(other_W[size:], rate), prompt_seconds, seconds) for other_W in group]
            for system, group in versions.items()
        }
        found.append({"versions": says, "clips": clips})
    return found


def compare(
    prompt_N3: np.ndarray, notes_N3: np.ndarray, prompt_seconds: float, seconds: float
) -> dict[str, float | None]:
    """What two stretches of music have in common.

    Args:
      prompt_N3, notes_N3: onset, offset in seconds and MIDI pitch of each note; see `music`.
      prompt_seconds, seconds: how long the two last.

    Returns:
      `MEASURES` by name, None where there are too few notes to tell: the cosine of the pitch-class histograms; whether
      the keys are the same, and MIREX's score of them; onsets a second, and how many times two it is more or less often
      than in the prompt; the median time from one onset to the next, and how far apart the distributions of its
      logarithm are (1-Wasserstein, in factors of two).
    """
    histograms = [music.pitch_classes(notes) for notes in (prompt_N3, notes_N3)]
    key, other_key = (music.key(histogram_P) for histogram_P in histograms)
    times = [music.onsets(notes) for notes in (prompt_N3, notes_N3)]
    rates = [len(found) / length for found, length in zip(times, (prompt_seconds, seconds), strict=True)]
    steps = [np.log2(np.diff(found)) for found in times]
    has_steps = all(map(len, steps))
    return {
        "pitch_class_similarity": music.likeness(*histograms),
        "same_key": float(key == other_key) if key and other_key else None,
        "key_score": music.key_score(key, other_key) if key and other_key else None,
        "onset_rate": rates[1],
        "onset_rate_ratio": float(abs(np.log2(rates[1] / rates[0]))) if all(rates) else None,
        "inter_onset_seconds": float(2 ** np.median(steps[1])) if len(steps[1]) else None,
        "inter_onset_distance": float(scipy.stats.wasserstein_distance(*steps)) if has_steps else None,
    }


def estimate(measured: Mapping[str, Any], seed: int) -> tuple[dict[str, Estimate], list[str]]:
    """Metrics over pieces, `SYSTEM.MEASURE`, each piece with the mean of its continuations; and notes."""
    metrics, notes = {}, []
    for system in dict.fromkeys(system for one in measured.values() for system in one["versions"]):
        for name in MEASURES:
            groups = [[says[name] for says in one["versions"].get(system, [])] for one in measured.values()]
            known = [[value for value in group if value is not None] for group in groups]
            means = [float(np.mean(group)) for group in known if group]
            if means:
                metrics[f"{system}.{name}"] = statistics.bootstrap_mean(means, seed)
            if without := sum(map(len, groups)) - sum(map(len, known)):
                notes.append(f"{TITLES[system]}, {MEASURES[name]}: not told for {without}, too few notes")
    return metrics, notes


def _page(
    request: Request,
    prompt_seconds: float,
    seconds: float,
    measured: Mapping[str, Any],
    metrics: Mapping[str, Estimate],
    notes: Sequence[str],
    model: AudioLM,
) -> str:
    introduction = (
        f"{request.bundle}: {request.num_samples} continuations of {seconds:g} s of the first {prompt_seconds:g} s of "
        f"{len(measured)} pieces of {request.data}. Each version is held against the prompt from its end on."
    )
    systems = [system for system in TITLES if any(metric.startswith(f"{system}.") for metric in metrics)]
    rows = [[TITLES[system], *(shown(metrics.get(f"{system}.{name}")) for name in MEASURES)] for system in systems]
    note = (
        "Pitch classes: cosine of the histograms of how long each sounds. Keys by Krumhansl and Schmuckler; key score "
        "by MIREX: the same 1, a fifth above 0.5, relative 0.3, parallel 0.2. Octaves: factors of two. Means over "
        "pieces with 95 % bootstrap intervals; the transcriber errs, on generated sound more than on a piano."
    )
    table = Table("Continuation and prompt", ("version", *MEASURES.values()), rows, note)
    groups = [
        Group(
            name,
            "",
            [
                Clip(f"{TITLES[system]} {number}", wave_W, model.codec.sample_rate, prompt_seconds, KINDS.get(system))
                for system, waves in one["clips"].items()
                for number, wave_W in enumerate(waves, 1)
            ],
        )
        for name, one in measured.items()
        if one["clips"]
    ]
    return render("Piano", introduction, [table], [], groups, notes=notes)
