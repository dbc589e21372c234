"""The suites `acoustic` and `continuation`: what a bundle makes of recordings of speech (arXiv 2209.03143 §4).

Every version of a recording goes before the same judges: the original, the codec's reconstruction, generations from
its semantic tokens and, in `continuation`, continuations of its first seconds. What was not generated of a continuation
counts in no version: all are judged from the end of the prompt on, only transcripts are of the whole.

Shape suffixes: B rows, W waveform samples.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from audiolm_jax import audio, bundle
from audiolm_jax.data.manifest import Recording
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import adapters, quality, recognizers, recordings, speakers, statistics
from audiolm_jax.evaluation.adapters import Judge
from audiolm_jax.evaluation.codec import reconstruct
from audiolm_jax.evaluation.journal import Journal
from audiolm_jax.evaluation.report import GENERATED, ORIGINAL, RECONSTRUCTION, Clip, Group, Table, render
from audiolm_jax.evaluation.statistics import Estimate, shown
from audiolm_jax.evaluation.suites import Findings, Request
from audiolm_jax.generate import AudioLM
from audiolm_jax.progress import report

KINDS = {
    recognizers.KIND: recognizers.RECOGNIZERS,
    speakers.KIND: speakers.EMBEDDERS,
    quality.KIND: quality.QUALITY,
}
TITLES = {
    "original": "original",
    "reconstruction": "codec reconstruction",
    "acoustic": "acoustic generation",
    "continuation": "continuation",
    "other_speaker": "another speaker",
}
# The paper's: recordings of 4 to 10 s, prompts of 3 s, continuations of 7 s.
MIN_SECONDS, MAX_SECONDS, PROMPT_SECONDS, SECONDS = 4.0, 10.0, 3.0, 7.0
HEARD = 3


@dataclasses.dataclass(frozen=True)
class Panel:
    """Who judges; None where nobody does.

    Attributes:
      recognizer, embedder, quality: judges.
      classifier: of speakers.
    """

    recognizer: Judge | None
    embedder: Judge | None
    quality: Judge | None
    classifier: Any


@dataclasses.dataclass(frozen=True)
class Version:
    """One version of a recording.

    Attributes:
      whole_W: what is transcribed; None where there is nothing to hold a transcript against.
      judged_W: what the other judges hear.
    """

    whole_W: np.ndarray | None
    judged_W: np.ndarray


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is done with each recording.

    Attributes:
      prompt_seconds: of the prompt, 0 in the suite `acoustic`.
      seconds: of new audio.
      num_samples: generations of each kind.
      seed: of the sampling, and of who is the other speaker.
    """

    prompt_seconds: float
    seconds: float
    num_samples: int
    seed: int


def evaluate_acoustic(request: Request, journal: Journal) -> Findings:
    """The suite `acoustic`: recordings again from their semantic tokens: are the words there still, is the voice?"""
    return _evaluate(request, journal, Protocol(0.0, 0.0, request.num_samples, request.seed))


def evaluate_continuation(request: Request, journal: Journal) -> Findings:
    """The suite `continuation`: do continuations keep the voice of their prompts?"""
    prompt_seconds = PROMPT_SECONDS if request.prompt_seconds is None else request.prompt_seconds
    seconds = SECONDS if request.seconds is None else request.seconds
    return _evaluate(request, journal, Protocol(prompt_seconds, seconds, request.num_samples, request.seed))


def _evaluate(request: Request, journal: Journal, protocol: Protocol) -> Findings:
    folder, data = request.need("bundle"), request.need("data")
    if protocol.num_samples < 1:
        raise UserError("must be 1 or more", f"--num_samples={protocol.num_samples}", "change it")
    chosen, notes = adapters.choose(request.judges, KINDS)
    for note in notes:
        report(note)
    shortest = MIN_SECONDS if request.min_seconds is None else request.min_seconds
    longest = MAX_SECONDS if request.max_seconds is None else request.max_seconds
    continues = request.suite == "continuation"
    if continues and protocol.prompt_seconds >= shortest:
        raise UserError(
            "the shortest recordings end with the prompt",
            f"--prompt_seconds={protocol.prompt_seconds:g} --min_seconds={shortest:g}",
            "give a larger --min_seconds",
        )
    model = bundle.load_bundle(folder)
    if "semantic" not in model.stages:
        raise UserError("the bundle has no semantic stage", folder, "choose a bundle with one")
    if continues:
        recordings.check_prompt(model, protocol.prompt_seconds, protocol.seconds)
    else:
        shortest = max(shortest, 1 / model.stages["semantic"].stage.semantic_rate)
    found, left_out = recordings.of_length(data, request.split, shortest, longest)
    judges = {kind: adapter.start() for kind, (_, adapter) in chosen.items()}
    classifier, about_labels = _classifier(request.classifier, found)
    panel = Panel(judges.get(recognizers.KIND), judges.get(speakers.KIND), judges.get(quality.KIND), classifier)
    others = _other_speakers(found, protocol.seed)
    if not any(others.values()):
        about_labels.append("one speaker alone, so no other one as a floor")
    measure = functools.partial(_measure, model, panel, protocol, others)
    heard = {recording.id for recording in found[:HEARD]}
    measured = recordings.measure_in_batches(
        journal,
        request.suite,
        found,
        model.codec.sample_rate,
        protocol.num_samples,
        lambda batch, waves: measure(batch, waves, heard),
    )
    kept = [recording for recording in found if recording.id in measured]
    metrics, about_texts = estimate(kept, measured, panel, request.seed)
    notes = [*notes, *left_out, *about_labels, *about_texts]
    return Findings(metrics, notes, _page(request, protocol, kept, measured, metrics, panel, notes, model))


def _classifier(folder: str | None, found: Sequence[Recording]) -> tuple[Any, list[str]]:
    """The speaker classifier, None without one, and a note on the recordings whose speakers it does not know."""
    if folder is None:
        return None, ["speaker accuracy: not measured, give a classifier with --classifier"]
    classifier = bundle.load_classifier(folder)
    known = sum(recording.speaker in classifier.labels for recording in found)
    if not known:
        raise UserError("the classifier knows none of the speakers", folder, "train it on these speakers")
    unknown = len(found) - known
    return classifier, [f"speaker accuracy: without {unknown} recordings of other speakers"] if unknown else []


def _other_speakers(found: Sequence[Recording], seed: int) -> dict[str, Recording | None]:
    """For each recording one of another speaker, by chance; None where all have the same."""
    chosen: dict[str, Recording | None] = {}
    for recording in found:
        others = [other for other in found if other.speaker and recording.speaker not in ("", other.speaker)]
        generator = np.random.default_rng([seed, zlib.crc32(recording.id.encode())])
        chosen[recording.id] = others[generator.integers(len(others))] if others else None
    return chosen


# --- one batch


def _measure(
    model: AudioLM,
    panel: Panel,
    protocol: Protocol,
    others: Mapping[str, Recording | None],
    batch: Sequence[Recording],
    waves: Sequence[np.ndarray],
    heard: set[str],
) -> list[dict[str, Any]]:
    """For each recording what the judges say of its versions, by system, and clips of those that are to be heard."""
    size = round(protocol.prompt_seconds * model.codec.sample_rate)
    wave_BW, lengths_B = recordings.stacked(waves)
    generate = functools.partial(model.generate, num_samples=protocol.num_samples, seed=protocol.seed)
    acoustic = generate(wave_BW, "acoustic", lengths_B=lengths_B)
    continued = None
    if size:
        continued = generate(wave_BW[:, :size], seconds=protocol.seconds, ignore_end=True)
    found = []
    for index, (recording, wave_W) in enumerate(zip(batch, waves, strict=True)):
        rows = range(index * protocol.num_samples, (index + 1) * protocol.num_samples)
        again = [acoustic.wave_BW[row, : len(wave_W)] for row in rows]
        rebuilt_W = reconstruct(model.codec, wave_W)
        versions = {
            "original": [Version(wave_W, wave_W[size:] if size else wave_W)],
            "reconstruction": [Version(rebuilt_W, rebuilt_W[size:])],
            "acoustic": [Version(other_W, other_W[size:]) for other_W in again],
        }
        clips = {"original": [wave_W], "reconstruction": [rebuilt_W], "acoustic": again}
        if continued is not None:
            longer = [continued.wave_BW[row, : continued.lengths_B[row]] for row in rows]
            versions["continuation"] = [Version(None, other_W[size:]) for other_W in longer]
            clips["continuation"] = longer
        if (other := others[recording.id]) is not None and panel.embedder is not None:
            other_W = recordings.read_or_none(other, model.codec.sample_rate)
            versions["other_speaker"] = [] if other_W is None else [Version(None, other_W[size:])]
        reference_W = wave_W[:size] if size else wave_W
        found.append(
            {
                "versions": _judge(panel, model.codec.sample_rate, versions, reference_W),
                "clips": clips if recording.id in heard else {},
            }
        )
    return found


def _judge(
    panel: Panel, sample_rate: int, versions: Mapping[str, Sequence[Version]], reference_W: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    """Of each version its transcript `text`, its likeness to the reference's `voice`, its `speaker` and `quality`."""
    voice_D = None if panel.embedder is None else panel.embedder(reference_W, sample_rate)
    judged: dict[str, list[dict[str, Any]]] = {}
    for system, group in versions.items():
        judged[system] = []
        for one in group:
            says: dict[str, Any] = {"text": None, "voice": None, "speaker": None, "quality": None}
            # The original itself is the reference where there is no prompt.
            if panel.embedder is not None and one.judged_W is not reference_W:
                says["voice"] = speakers.cosine(voice_D, panel.embedder(one.judged_W, sample_rate))
            if system != "other_speaker":
                if panel.recognizer is not None and one.whole_W is not None:
                    says["text"] = panel.recognizer(one.whole_W, sample_rate)
                if panel.quality is not None:
                    says["quality"] = panel.quality(one.judged_W, sample_rate)
                if panel.classifier is not None:
                    says["speaker"] = _speaker(panel.classifier, one.judged_W, sample_rate)
            judged[system].append(says)
    return judged


def _speaker(classifier: Any, wave_W: np.ndarray, sample_rate: int) -> str:
    """The label that the classifier finds most likely."""
    wave_W = audio.resample(wave_W, sample_rate, classifier.sample_rate)
    probabilities_BK = classifier.predict(wave_W[None], np.array([len(wave_W)]))
    return classifier.labels[int(np.argmax(probabilities_BK[0]))]


# --- figures


def estimate(
    kept: Sequence[Recording], measured: Mapping[str, Any], panel: Panel, seed: int
) -> tuple[dict[str, Estimate], list[str]]:
    """Metrics over recordings, `SYSTEM.MEASURE`, each recording with the mean or sum of its generations; and notes."""
    metrics: dict[str, Estimate] = {}
    references, are_heard, notes = _references(kept, measured, panel)
    systems = dict.fromkeys(system for one in measured.values() for system in one["versions"])
    for system in systems:
        versions = {recording.id: measured[recording.id]["versions"].get(system, []) for recording in kept}
        pairs = [
            [recognizers.errors(reference, one["text"]) for one in versions[name] if one["text"] is not None]
            for name, reference in references.items()
        ]
        totals_R4 = np.array([np.sum(group, axis=0) for group in pairs if group]).reshape(-1, 4)
        if len(totals_R4) and not (system == "original" and are_heard):
            wrong_R, words_R, wrong_characters_R, characters_R = totals_R4.T.tolist()
            metrics[f"{system}.wer"] = statistics.bootstrap_ratio(wrong_R, words_R, seed)
            metrics[f"{system}.cer"] = statistics.bootstrap_ratio(wrong_characters_R, characters_R, seed)
        for name, measure in _means(kept, None if system == "other_speaker" else panel.classifier):
            means, without = _over_recordings(versions, measure)
            if means:
                metrics[f"{system}.{name}"] = statistics.bootstrap_mean(means, seed)
                if without:
                    notes.append(f"{TITLES[system]}, {name}: no score for {without}, too short or silent")
    return metrics, notes


def _references(
    kept: Sequence[Recording], measured: Mapping[str, Any], panel: Panel
) -> tuple[dict[str, str], bool, list[str]]:
    """What should be heard, by id, of those recordings of which it is known.

    Returns:
      the references, whether they are what the recogniser heard in the originals, and notes.
    """
    if panel.recognizer is None:
        return {}, False, []
    words = {recording.id: recording.text for recording in kept if recognizers.normalized(recording.text)}
    if words:
        missing = len(kept) - len(words)
        return words, False, [f"word errors: without {missing} recordings that have no transcript"] if missing else []
    heard = {recording.id: measured[recording.id]["versions"]["original"][0]["text"] for recording in kept}
    known = {name: text for name, text in heard.items() if recognizers.normalized(text)}
    note = f"no recording has a transcript: word errors are against what {panel.recognizer.title} heard in the original"
    return known, True, [note]


def _means(kept: Sequence[Recording], classifier: Any) -> Iterator[tuple[str, Callable[[str, dict], float | None]]]:
    """Name of each measure that is a mean, and (id, what was said) -> its value; of speakers with a classifier."""
    yield "speaker_similarity", lambda _, one: one["voice"]
    yield "quality", lambda _, one: one["quality"]
    if classifier:
        labels = set(classifier.labels)
        truth = {recording.id: recording.speaker for recording in kept if recording.speaker in labels}
        yield "speaker_accuracy", lambda name, one: float(one["speaker"] == truth[name]) if name in truth else None


def _over_recordings(
    versions: Mapping[str, Sequence[dict]], measure: Callable[[str, dict], float | None]
) -> tuple[list[float], int]:
    """Means of each recording's versions that have a value, and how many versions have none."""
    values = [[measure(name, one) for one in group] for name, group in versions.items()]
    known = [[value for value in group if value is not None] for group in values]
    without = sum(len(group) - len(there) for group, there in zip(values, known, strict=True))
    return [float(np.mean(group)) for group in known if group], without


# --- the page

MEASURES = {
    "wer": "WER",
    "cer": "CER",
    "speaker_similarity": "speaker similarity",
    "speaker_accuracy": "speaker accuracy",
    "quality": "quality",
}


def table(metrics: Mapping[str, Estimate], note: str) -> Table:
    """A row a system, a column a measure that there is."""
    measures = [name for name in MEASURES if any(metric.endswith(f".{name}") for metric in metrics)]
    systems = dict.fromkeys(metric.partition(".")[0] for metric in metrics)
    rows = [
        [TITLES[system], *(shown(metrics.get(f"{system}.{name}")) for name in measures)]
        for system in TITLES
        if system in systems
    ]
    return Table("Words, voice and quality", ("version", *(MEASURES[name] for name in measures)), rows, note)


def _page(
    request: Request,
    protocol: Protocol,
    kept: Sequence[Recording],
    measured: Mapping[str, Any],
    metrics: Mapping[str, Estimate],
    panel: Panel,
    notes: Sequence[str],
    model: AudioLM,
) -> str:
    size = protocol.prompt_seconds
    if size:
        title = "Continuations"
        what = f"{protocol.num_samples} continuations of {protocol.seconds:g} s of each one's first {size:g} s"
        voice = f"Voice and quality are of what follows the first {size:g} s, the voice beside that of these seconds."
    else:
        title = "Acoustic generations"
        what = f"{protocol.num_samples} generations from each one's semantic tokens"
        voice = "The voice is held beside the original's."
    introduction = f"{request.bundle}: {what}, for {len(kept)} recordings of {request.data}. {voice}"
    judges = [one.title for one in (panel.recognizer, panel.embedder, panel.quality) if one is not None]
    note = (
        f"Judges: {', '.join(judges) or 'none'}. Means over recordings with 95 % bootstrap intervals. Words are "
        "compared in lower case without punctuation. Another speaker: what a voice is not, the floor of the similarity."
    )
    groups = []
    for recording in kept:
        if clips := measured[recording.id]["clips"]:
            groups.append(Group(recording.id, recording.text, _clips(clips, model.codec.sample_rate, size)))
    return render(title, introduction, [table(metrics, note)], [], groups, notes=notes)


def _clips(clips: Mapping[str, Sequence[np.ndarray]], sample_rate: int, prompt_seconds: float) -> list[Clip]:
    found = []
    for system, waves in clips.items():
        kind = {"original": ORIGINAL, "reconstruction": RECONSTRUCTION}.get(system, GENERATED)
        boundary = prompt_seconds if system == "continuation" else None
        for number, wave_W in enumerate(waves, 1):
            title = f"{TITLES[system]} {number}" if len(waves) > 1 else TITLES[system]
            found.append(Clip(title, wave_W, sample_rate, boundary, kind))
    return found
