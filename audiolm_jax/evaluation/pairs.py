"""The suites `swuggy`, `sblimp`, `storycloze` and `salmon`: which of two recordings the semantic stage finds likelier.

The rule of ZeroSpeech 2021 (arXiv 2011.11588 §3): a pair counts 1 where the right recording has the higher score, 1/2
where both have the same, 0 otherwise; that is averaged over the voices of a pair, and then over pairs.
"""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from audiolm_jax import bundle
from audiolm_jax.data import manifest
from audiolm_jax.data.manifest import Recording
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import batches, pair_layouts, statistics
from audiolm_jax.evaluation.journal import Journal
from audiolm_jax.evaluation.pair_layouts import Trial
from audiolm_jax.evaluation.recordings import stacked
from audiolm_jax.evaluation.report import Clip, Group, Table, render
from audiolm_jax.evaluation.statistics import Estimate, shown
from audiolm_jax.evaluation.suites import Findings, Request
from audiolm_jax.generate import AudioLM
from audiolm_jax.progress import seconds_bar

LAYOUTS: dict[str, Callable[[str, str | None], list[Trial]]] = {
    "swuggy": pair_layouts.read_swuggy,
    "sblimp": pair_layouts.read_sblimp,
    "storycloze": pair_layouts.read_storycloze,
    "salmon": pair_layouts.read_salmon,
}
TITLES = {"swuggy": "sWUGGY", "sblimp": "sBLIMP", "storycloze": "Spoken StoryCloze", "salmon": "SALMon"}
NORMALIZED, SUM = "normalized", "sum"
BATCH_SECONDS, BATCH_RECORDINGS = 120.0, 32
HEARD_PAIRS = 3

# Scores of recordings by id, for each of the two normalisations.
Scores = Mapping[str, Mapping[str, float]]


def evaluate_pairs(request: Request, journal: Journal) -> Findings:
    """A suite of pairs, by the request's name."""
    folder, data = request.need("bundle"), request.need("data")
    trials = LAYOUTS[request.suite](data, request.split)
    model = bundle.load_bundle(folder)
    window = model.semantic_stage(f"suite {request.suite}").stage.crop_seconds
    recordings = list({member.id: member for trial in trials for member in (trial.right, trial.wrong)}.values())
    seconds = read_lengths(recordings)
    scores = score(model, trials, seconds, journal)
    metrics = estimate(trials, scores, request.seed)
    notes = []
    if longer := sum(length > window for length in seconds.values()):
        stretches = f"scored in consecutive stretches of {window:g} s, what the semantic stage was trained on"
        notes.append(f"{longer} of {len(seconds)} recordings are longer and were {stretches}")
    if request.suite == "swuggy" and f"{pair_layouts.IN_VOCABULARY}.{SUM}" not in metrics:
        notes.append("in the vocabulary: not measured, no word of these pairs occurs in LibriSpeech")
    submissions = {f"scores_{name}.txt": submission(scores[name]) for name in scores}
    page = _page(request, model, trials, scores, metrics, notes)
    return Findings(metrics, notes, page, submissions)


def read_lengths(recordings: Sequence[Recording]) -> dict[str, float]:
    """Seconds of the recordings by id.

    Raises:
      UserError: the first that cannot be read: a score without it would be another set's.
    """
    lengths = {}
    for recording, length in zip(recordings, manifest.in_threads(Recording.seconds, recordings), strict=True):
        if isinstance(length, UserError):
            raise length
        lengths[recording.id] = length
    return lengths


def score(model: AudioLM, trials: Sequence[Trial], seconds: Mapping[str, float], journal: Journal) -> Scores:
    """Log-likelihoods of the semantic tokens of all recordings: divided by their number, and as they are.

    The two recordings of a trial are in one batch, so that equal tokens have equal scores.
    """
    lengths = [max(seconds[trial.right.id], seconds[trial.wrong.id]) for trial in trials]
    scores: dict[str, dict[str, float]] = {NORMALIZED: {}, SUM: {}}
    rate = model.codec.sample_rate
    samples = lambda recordings: sum(round(seconds[recording.id] * rate) for recording in recordings)
    total = samples(member for trial in trials for member in (trial.right, trial.wrong))
    with seconds_bar("score", total, rate) as progress:
        for number, indices in enumerate(batches.by_length(lengths, BATCH_SECONDS / 2, BATCH_RECORDINGS // 2)):
            recordings = [member for index in indices for member in (trials[index].right, trials[index].wrong)]
            found = journal.once(f"batch/{number}", functools.partial(_score_batch, model, recordings))
            for recording, likelihood, count in zip(recordings, found["likelihoods"], found["counts"], strict=True):
                scores[NORMALIZED][recording.id] = float(likelihood / count)
                scores[SUM][recording.id] = float(likelihood)
            progress.update(samples(recordings))
    return scores


def _score_batch(model: AudioLM, recordings: Sequence[Recording]) -> dict[str, np.ndarray]:
    """Log-likelihoods in nats, and numbers of tokens."""
    waves = [recording.read(model.codec.sample_rate) for recording in recordings]
    wave_BW, lengths_B = stacked(waves)
    for recording, length in zip(recordings, lengths_B.tolist(), strict=True):
        if model.tokenizer is not None and model.tokenizer.num_frames(length) < 1:
            raise UserError(f"too short for a token ({length} samples)", recording.path, "fetch the data set anew")
    likelihoods_B, counts_B = model.semantic_log_likelihoods(wave_BW, lengths_B)
    return {"likelihoods": likelihoods_B, "counts": counts_B}


def outcomes(trials: Sequence[Trial], scores: Mapping[str, float]) -> dict[str, float]:
    """Of each pair the share of its voices in which the right recording has the higher score; a tie is half a voice."""
    by_pair = collections.defaultdict(list)
    for trial in trials:
        right, wrong = scores[trial.right.id], scores[trial.wrong.id]
        by_pair[trial.pair].append(1.0 if right > wrong else 0.5 if right == wrong else 0.0)
    return {pair: float(np.mean(of_voices)) for pair, of_voices in by_pair.items()}


def estimate(trials: Sequence[Trial], scores: Scores, seed: int) -> dict[str, Estimate]:
    """Means over pairs: `SUBSET.NORMALISATION`, the whole set being the subset `all`."""
    subsets: dict[str, dict[str, None]] = {"all": {}}
    for trial in trials:
        for subset in ("all", *trial.subsets):
            subsets.setdefault(subset, {})[trial.pair] = None
    metrics = {}
    for name, of_recordings in scores.items():
        found = outcomes(trials, of_recordings)
        for subset, pairs in subsets.items():
            metrics[f"{subset}.{name}"] = statistics.bootstrap_mean([found[pair] for pair in pairs], seed)
    return metrics


def submission(scores: Mapping[str, float]) -> str:
    """A line for each recording, its name and its score, as ZeroSpeech's own programs read them."""
    return "".join(f"{name} {value!r}\n" for name, value in sorted(scores.items()))


# --- the page


def _page(
    request: Request,
    model: AudioLM,
    trials: Sequence[Trial],
    scores: Scores,
    metrics: Mapping[str, Estimate],
    notes: Sequence[str],
) -> str:
    introduction = (
        f"{request.bundle} on {metrics[f'all.{SUM}'].count} pairs of {request.data}: the share in which the semantic "
        "stage finds the right recording likelier than the wrong one, 0.5 for a coin. A tie counts half, a pair in "
        "several voices as the mean over them. 95 % bootstrap intervals over pairs. To hear: what it got most wrong."
    )
    subsets = [name.removesuffix(f".{SUM}") for name in metrics if name.endswith(f".{SUM}")]
    rows = [
        [
            subset,
            str(metrics[f"{subset}.{SUM}"].count),
            *(shown(metrics[f"{subset}.{name}"]) for name in (NORMALIZED, SUM)),
        ]
        for subset in subsets
    ]
    table = Table(
        "Pairs told apart",
        ("pairs", "number", "log-likelihood per token", "log-likelihood"),
        rows,
        "Log-likelihood of the semantic tokens, divided by their number as in AudioLM, or not. Each recording's is in "
        "scores_normalized.txt and scores_sum.txt.",
    )
    margin = lambda trial: scores[NORMALIZED][trial.right.id] - scores[NORMALIZED][trial.wrong.id]
    rate = model.codec.sample_rate
    groups = [
        Group(
            trial.pair,
            f"The right recording's score is {margin(trial):+.3f} nats a token from the wrong one's.",
            [
                Clip(title, member.read(rate), rate)
                for title, member in (("right", trial.right), ("wrong", trial.wrong))
            ],
        )
        for trial in sorted(trials, key=margin)[:HEARD_PAIRS]
    ]
    return render(TITLES[request.suite], introduction, [table], [], groups, notes=notes)
