"""How well classifiers hear: the suites `detector` (generated or real) and `speaker` (who it is).

Shape suffixes: P prompts, S resamplings, K labels.
"""

import collections
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from audiolm_jax import bundle
from audiolm_jax.classifier.classifier import Classifier
from audiolm_jax.data import manifest, pipeline
from audiolm_jax.data.manifest import Recording
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import statistics
from audiolm_jax.evaluation.detection import THRESHOLD, load_detector
from audiolm_jax.evaluation.detection_data import CONTROL_SPLIT, GENERATED, MODES, ORIGINAL, REAL
from audiolm_jax.evaluation.journal import Journal
from audiolm_jax.evaluation.report import Clip, Group, Table, render
from audiolm_jax.evaluation.statistics import Estimate, shown
from audiolm_jax.evaluation.suites import Findings, Request
from audiolm_jax.progress import report, seconds_bar

HEARD_PAIRS = 3
DETECTION_DATA = "give the manifest that `audiolm detection-data` wrote"


def heard(
    classifier: Classifier, recordings: Sequence[Recording], journal: Journal
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Probabilities [K] by the id of each recording that can be read, and a note on those that cannot."""
    usable, seconds = manifest.usable(list(recordings), report)
    probabilities: dict[str, np.ndarray] = {}
    with seconds_bar("evaluate", sum(seconds), 1) as progress:
        for recording, length in zip(usable, seconds, strict=True):
            try:
                measure = functools.partial(_probabilities, classifier, recording)
                probabilities[recording.id] = journal.once(recording.id, measure)
            except UserError as error:
                report(f"left out: {error}")
            progress.update(length)
    left_out = len(recordings) - len(probabilities)
    note = f"{left_out} of {len(recordings)} recordings could not be read and were left out"
    return probabilities, [note] if left_out else []


def _probabilities(classifier: Classifier, recording: Recording) -> np.ndarray:
    return classifier.predict(recording.read(classifier.sample_rate)[None])[0]


# --- generated or real


def evaluate_detector(request: Request, journal: Journal) -> Findings:
    """The suite `detector`: accuracy and area under the ROC curve, each way of generating for itself.

    Metrics: `MODE.accuracy` and `MODE.auc` against real speech from the codec, `MODE.accuracy_uncompressed` and
    `MODE.auc_uncompressed` against the recordings as they are, MODE being "acoustic" or "continuation"; `accuracy` and
    `auc` of all together. Accuracies are means of the shares found of generated and of real speech.
    """
    folder, data = request.need("detector"), request.need("data")
    detector = load_detector(folder)
    split = request.split or "validation"
    splits = (split, CONTROL_SPLIT) if split == "validation" else (split,)
    recordings = [r for r in manifest.read_manifest(data) if r.split in splits]
    recordings = [r for r in recordings if r.id.count("/") >= 3 and r.id.split("/")[0] in MODES]
    probabilities, notes = heard(detector, recordings, journal)
    position = detector.labels.index(GENERATED)
    scores: dict[tuple[str, str], dict[str, float]] = collections.defaultdict(dict)
    for name, probabilities_K in probabilities.items():
        mode, kind, rest = name.split("/", 2)
        scores[mode, kind][rest] = float(probabilities_K[position])
    modes = [mode for mode in MODES if scores[mode, GENERATED] and scores[mode, REAL]]
    if not modes:
        raise UserError(f"no pairs of split {split}", data, DETECTION_DATA)
    metrics: dict[str, Estimate] = {}
    for mode in modes:
        generated = scores[mode, GENERATED]
        for other, suffix in ((REAL, ""), (ORIGINAL, "_uncompressed")):
            if scores[mode, other]:
                found = separation(generated, scores[mode, other], request.seed)
                metrics |= {f"{mode}.{name}{suffix}": estimate for name, estimate in found.items()}
    together = [{f"{m}/{n}": s for m in modes for n, s in scores[m, kind].items()} for kind in (GENERATED, REAL)]
    metrics |= separation(together[0], together[1], request.seed)
    pairs = _heard_pairs(recordings, scores, modes, detector.sample_rate)
    return Findings(metrics, notes, _detector_page(request, pairs, metrics, scores, modes, notes))


def separation(generated: Mapping[str, float], real: Mapping[str, float], seed: int) -> dict[str, Estimate]:
    """`accuracy` and `auc` of probabilities of being generated, with intervals over prompts.

    Args:
      generated, real: probabilities by name, .../NAME_nn being sample nn of prompt NAME. All that was made of a
        prompt, and the prompt itself, are drawn together.
      seed: of the resampling.
    """
    prompt_of = lambda name: name.rpartition("/")[2].rpartition("_")[0]
    prompts = sorted({prompt_of(name) for name in (*generated, *real)})
    indices = {prompt: index for index, prompt in enumerate(prompts)}
    sides = [
        (np.array([indices[prompt_of(name)] for name in side]), np.array(list(side.values())))
        for side in (generated, real)
    ]

    def measured(weights_P: np.ndarray) -> tuple[float, float]:
        (which, high), (others, low) = sides
        high_weights, low_weights = weights_P[which], weights_P[others]
        if not high_weights.sum() or not low_weights.sum():
            return np.nan, np.nan
        right = np.average(high > THRESHOLD, weights=high_weights), np.average(low <= THRESHOLD, weights=low_weights)
        return float(np.mean(right)), statistics.area_under_curve(high, low, high_weights, low_weights)

    shares = np.full(len(prompts), 1 / len(prompts))
    draws_SP = np.random.default_rng(seed).multinomial(len(prompts), shares, size=statistics.RESAMPLINGS)
    resampled_S2 = np.array([measured(weights_P) for weights_P in draws_SP.astype(np.float64)])
    values = measured(np.ones(len(prompts)))
    lows, highs = np.nanpercentile(resampled_S2, (2.5, 97.5), axis=0)
    count = len(generated) + len(real)
    return {
        name: Estimate(values[index], float(lows[index]), float(highs[index]), count)
        for index, name in enumerate(("accuracy", "auc"))
    }


def _detector_page(
    request: Request,
    pairs: Sequence[Group],
    metrics: Mapping[str, Estimate],
    scores: Mapping[tuple[str, str], Mapping[str, float]],
    modes: Sequence[str],
    notes: Sequence[str],
) -> str:
    introduction = (
        f"{request.detector} on {request.data}: generated speech against real speech that went through the same codec, "
        "of held-out speakers, prompts left out. 95 % bootstrap intervals over prompts. A detector that finds "
        "everything shows a weak model as well as a strong detector."
    )
    rows = [
        [
            f"{mode}, against {against}",
            shown(metrics.get(f"{mode}.accuracy{suffix}")),
            shown(metrics.get(f"{mode}.auc{suffix}")),
            *(f"{np.mean(list(scores[mode, kind].values()) or [np.nan]):.3f}" for kind in (GENERATED, other)),
        ]
        for mode in modes
        for other, suffix, against in (
            (REAL, "", "the codec's speech"),
            (ORIGINAL, "_uncompressed", "uncompressed speech"),
        )
    ]
    rows.append(["all, against the codec's speech", shown(metrics["accuracy"]), shown(metrics["auc"]), "", ""])
    header = ("generated", "accuracy", "area under the curve", "mean probability: generated", "real")
    note = "Uncompressed speech is the control: a difference to the line above is the codec's sound, not speech."
    return render(
        "Detector: generated or real",
        introduction,
        [Table("Detection", header, rows, note)],
        [],
        pairs,
        notes=notes,
    )


def _heard_pairs(
    recordings: Sequence[Recording],
    scores: Mapping[tuple[str, str], Mapping[str, float]],
    modes: Sequence[str],
    rate: int,
) -> list[Group]:
    """The generated recordings that sound most real to the detector, beside their counterparts."""
    by_id = {recording.id: recording for recording in recordings}
    groups = []
    for mode in modes:
        for name in sorted(scores[mode, GENERATED], key=scores[mode, GENERATED].__getitem__)[:HEARD_PAIRS]:
            clips = []
            for kind in (GENERATED, REAL, ORIGINAL):
                if (score := scores[mode, kind].get(name)) is not None:
                    wave_W = by_id[f"{mode}/{kind}/{name}"].read(rate)
                    clips.append(Clip(f"{kind}, {score:.3f}", wave_W, rate))
            groups.append(Group(f"{mode}: {name}", "The detector's probability of being generated.", clips))
    return groups


# --- who it is


def evaluate_speaker(request: Request, journal: Journal) -> Findings:
    """The suite `speaker`: how often a classifier is right, over recordings that its training held out.

    Metrics: `accuracy`, and `LABEL.accuracy` for each of the labels.
    """
    folder, data = request.need("classifier"), request.need("data")
    classifier, config = bundle.load_classifier(folder), bundle.read_classifier(folder).config
    config.data_dir = data
    split = request.split or "validation"
    recordings = [r for r in pipeline.read_recordings(config) if r.split == split]
    known = [r for r in recordings if r.class_label in classifier.labels]
    if not known:
        raise UserError(f"no recordings of split {split} with the classifier's labels", data, "see its config.json")
    probabilities, notes = heard(classifier, known, journal)
    if len(known) < len(recordings):
        notes.append(f"{len(recordings) - len(known)} recordings of labels that the classifier does not know")
    guesses = [
        (recording.class_label, classifier.labels[int(probabilities[recording.id].argmax())])
        for recording in known
        if recording.id in probabilities
    ]
    if not guesses:
        raise UserError("no recording could be read", data, "see the lines above")
    metrics = {"accuracy": statistics.bootstrap_mean([label == guess for label, guess in guesses], request.seed)}
    rows = []
    for label in sorted({label for label, _ in guesses}):
        own = [guess for other, guess in guesses if other == label]
        metrics[f"{label}.accuracy"] = statistics.bootstrap_mean([guess == label for guess in own], request.seed)
        wrong = collections.Counter(guess for guess in own if guess != label)
        taken = ", ".join(f"{guess} ({count})" for guess, count in wrong.most_common(3))
        rows.append([label, str(len(own)), shown(metrics[f"{label}.accuracy"]), taken or "–"])
    rows.append(["all", str(len(guesses)), shown(metrics["accuracy"]), ""])
    introduction = (
        f"{request.classifier} on recordings of {data} that its training held out. Probabilities are means over "
        f"windows of a second; there are {len(classifier.labels)} labels. 95 % bootstrap intervals over recordings."
    )
    page = render(
        "Speaker classifier",
        introduction,
        [Table("Accuracy", ("speaker", "recordings", "accuracy", "taken for"), rows)],
        [],
        [],
        notes=notes,
    )
    return Findings(metrics, notes, page)
