"""The suite `sampling`: quality and diversity of continuations over temperature, top-k and top-p.

Low temperatures repeat what is safe, high ones say anything: where the two meet is to be seen in a plot, not guessed.

Shape suffixes: B rows, W waveform samples, T tokens, S tokens of another row.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from audiolm_jax import bundle
from audiolm_jax.data.manifest import Recording
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import adapters, quality, recordings, speakers, statistics
from audiolm_jax.evaluation.adapters import Judge
from audiolm_jax.evaluation.journal import Journal
from audiolm_jax.evaluation.report import Clip, Group, IntervalPlot, Table, render
from audiolm_jax.evaluation.speech import MAX_SECONDS, MIN_SECONDS, PROMPT_SECONDS, SECONDS
from audiolm_jax.evaluation.statistics import Estimate, shown
from audiolm_jax.evaluation.suites import Findings, Request
from audiolm_jax.generate import AudioLM, Generation
from audiolm_jax.lm.sampling import Sampling
from audiolm_jax.lm.stages import run_starts
from audiolm_jax.progress import report

KINDS = {quality.KIND: quality.QUALITY, speakers.KIND: speakers.EMBEDDERS}
TEMPERATURES = (0.4, 0.6, 0.8, 1.0, 1.2)
MEASURES = {
    "quality": "quality",
    "speaker_similarity": "speaker similarity to the prompt",
    "distance": "distance of a prompt's continuations",
    "entropy": "entropy of tokens, bits",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of the grid, a `Sampling` of the stages under test."""

    sampling: Sampling

    @property
    def name(self) -> str:
        one = self.sampling
        return f"temperature_{one.temperature:g}_top_k_{one.top_k}_top_p_{one.top_p:g}"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is done with each prompt, and who judges."""

    prompt_seconds: float
    seconds: float
    num_samples: int
    seed: int
    stages: Sequence[str]
    quality: Judge | None
    embedder: Judge | None


def edit_distance(first_T: np.ndarray, second_S: np.ndarray) -> int:
    """How many tokens must be put in, left out or changed to make one row the other (Levenshtein)."""
    places = np.arange(len(second_S) + 1)
    distance = places.copy()
    for token in first_T:
        changed = np.minimum(distance[:-1] + (second_S != token), distance[1:] + 1)
        # What is put in costs one a place: a running minimum of the distance less the place.
        distance = np.minimum.accumulate(np.concatenate([[distance[0] + 1], changed]) - places) + places
    return int(distance[-1])


def diversity(rows: Sequence[np.ndarray]) -> tuple[float | None, float | None]:
    """Of several rows of tokens from one prompt.

    Returns:
      mean edit distance of the pairs, each over the longer row's length, 0 to 1: None for a single row or empty ones;
      and the entropy of all their tokens in bits, None where there are none.
    """
    pairs = [pair for pair in itertools.combinations(rows, 2) if max(map(len, pair))]
    distances = [edit_distance(*pair) / max(map(len, pair)) for pair in pairs]
    counts = np.unique(np.concatenate(rows), return_counts=True)[1]
    entropy = float(statistics.entropy(counts)) / np.log(2) if len(counts) else None
    return float(np.mean(distances)) if distances else None, entropy


def evaluate_sampling(request: Request, journal: Journal) -> Findings:
    """The suite `sampling`: a grid of sampling settings on the same prompts and seed."""
    folder, data = request.need("bundle"), request.need("data")
    if request.num_samples < 2:
        raise UserError(
            "diversity needs several continuations", f"--num_samples={request.num_samples}", "give 2 or more"
        )
    grid = [
        Setting(Sampling(temperature, top_k, top_p))
        for top_k, top_p, temperature in itertools.product(
            request.top_k or (0,), request.top_p or (1.0,), request.temperatures or TEMPERATURES
        )
    ]
    chosen, notes = adapters.choose(request.judges, KINDS)
    for note in notes:
        report(note)
    model = bundle.load_bundle(folder)
    for stage in request.stages:
        if stage not in model.stages:
            raise UserError("the bundle has no such stage", f"--stage={stage}", f"use one of {', '.join(model.stages)}")
    prompt_seconds = PROMPT_SECONDS if request.prompt_seconds is None else request.prompt_seconds
    seconds = SECONDS if request.seconds is None else request.seconds
    recordings.check_prompt(model, prompt_seconds, seconds)
    shortest = max(prompt_seconds, MIN_SECONDS if request.min_seconds is None else request.min_seconds)
    longest = MAX_SECONDS if request.max_seconds is None else request.max_seconds
    found, left_out = recordings.of_length(data, request.split, shortest, longest)
    judges = {kind: adapter.start() for kind, (_, adapter) in chosen.items()}
    protocol = Protocol(
        prompt_seconds,
        seconds,
        request.num_samples,
        request.seed,
        request.stages or tuple(model.stages),
        judges.get(quality.KIND),
        judges.get(speakers.KIND),
    )
    rate, heard = model.codec.sample_rate, found[0].id
    measured = {}
    for setting in grid:
        measure = functools.partial(_measure, model, protocol, setting, heard)
        measured[setting.name] = recordings.measure_in_batches(
            journal, setting.name, found, rate, protocol.num_samples, measure
        )
    originals = recordings.measure_in_batches(
        journal, "original", found, rate, 1, functools.partial(_measure_originals, protocol, rate)
    )
    metrics = estimate({**measured, "original": originals}, request.seed)
    notes += left_out
    return Findings(metrics, notes, _page(request, protocol, grid, measured, metrics, notes, rate))


def _measure(
    model: AudioLM,
    protocol: Protocol,
    setting: Setting,
    heard: str,
    batch: Sequence[Recording],
    waves: Sequence[np.ndarray],
) -> list[dict[str, Any]]:
    """For each prompt the means over its continuations, and the first of them to be heard of the recording `heard`."""
    rate = model.codec.sample_rate
    size = round(protocol.prompt_seconds * rate)
    prompt_BW = np.stack([wave_W[:size] for wave_W in waves])
    out = model.generate(
        prompt_BW,
        seconds=protocol.seconds,
        num_samples=protocol.num_samples,
        seed=protocol.seed,
        sampling={stage: setting.sampling for stage in protocol.stages},
        ignore_end=True,
    )
    found = []
    for index, recording in enumerate(batch):
        rows = range(index * protocol.num_samples, (index + 1) * protocol.num_samples)
        continued = [out.wave_BW[row, size : out.lengths_B[row]] for row in rows]
        distance, entropy = diversity([_tokens(model, out, row, size) for row in rows])
        scores = _judge(protocol, prompt_BW[index], continued, rate)
        wave_W = out.wave_BW[rows[0]] if recording.id == heard else None
        found.append({**scores, "distance": distance, "entropy": entropy, "wave_W": wave_W})
    return found


def _tokens(model: AudioLM, out: Generation, row: int, prompt_samples: int) -> np.ndarray:
    """A continuation's semantic tokens without repeats; without a semantic stage its first acoustic level."""
    if model.tokenizer is not None:
        tokens_T = out.semantic_BT[row, model.tokenizer.num_frames(prompt_samples) :]
    else:
        tokens_T = out.acoustic_BTQ[row, prompt_samples // model.codec.hop_length :, 0]
    tokens_T = tokens_T[tokens_T >= 0]
    return tokens_T[run_starts(tokens_T)]


def _measure_originals(
    protocol: Protocol, sample_rate: int, _: Sequence[Recording], waves: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """What the judges say of how the recordings truly go on."""
    size = round(protocol.prompt_seconds * sample_rate)
    return [_judge(protocol, wave_W[:size], [wave_W[size:]], sample_rate) for wave_W in waves]


def _judge(
    protocol: Protocol, prompt_W: np.ndarray, continued: Sequence[np.ndarray], sample_rate: int
) -> dict[str, float | None]:
    says: dict[str, float | None] = {}
    if protocol.quality is not None:
        says["quality"] = _mean([protocol.quality(wave_W, sample_rate) for wave_W in continued])
    if (embed := protocol.embedder) is not None:
        voice_D = embed(prompt_W, sample_rate)
        likeness = [speakers.cosine(voice_D, embed(wave_W, sample_rate)) for wave_W in continued]
        says["speaker_similarity"] = _mean(likeness)
    return says


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def estimate(measured: Mapping[str, Mapping[str, Mapping[str, Any]]], seed: int) -> dict[str, Estimate]:
    """Metrics over prompts, `SETTING.MEASURE`, and `original.MEASURE` of the recordings themselves."""
    metrics = {}
    for system, of_prompts in measured.items():
        for name in MEASURES:
            values = [value for one in of_prompts.values() if (value := one.get(name)) is not None]
            if values:
                metrics[f"{system}.{name}"] = statistics.bootstrap_mean(values, seed)
    return metrics


def _page(
    request: Request,
    protocol: Protocol,
    grid: Sequence[Setting],
    measured: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Estimate],
    notes: Sequence[str],
    sample_rate: int,
) -> str:
    introduction = (
        f"{request.bundle}: {protocol.num_samples} continuations of {protocol.seconds:g} s of each of "
        f"{len(next(iter(measured.values())))} prompts of {protocol.prompt_seconds:g} s, at each setting of the stages "
        f"{', '.join(protocol.stages)}; other stages have the paper's."
    )
    clips = [
        Clip(setting.name.replace("_", " "), one["wave_W"], sample_rate, protocol.prompt_seconds)
        for setting in grid
        for one in measured[setting.name].values()
        if one["wave_W"] is not None
    ]
    return render(
        "Sampling: quality and diversity",
        introduction,
        [_table(grid, metrics)],
        _plots(grid, metrics),
        [Group("One prompt at each setting", "", clips)] if clips else [],
        notes=notes,
    )


def _table(grid: Sequence[Setting], metrics: Mapping[str, Estimate]) -> Table:
    there = [name for name in MEASURES if any(metric.endswith(f".{name}") for metric in metrics)]
    rows = [
        [f"{one.temperature:g}", str(one.top_k or "all"), f"{one.top_p:g}"]
        + [shown(metrics.get(f"{setting.name}.{name}")) for name in there]
        for setting in grid
        for one in [setting.sampling]
    ]
    rows.append(["the recordings", "", "", *(shown(metrics.get(f"original.{name}")) for name in there)])
    note = (
        "Distance: how many of a continuation's semantic tokens, repeats left out, must change to make it another "
        "continuation of the same prompt (first acoustic level where there is no semantic stage); 0 the same, 1 "
        "nothing in common. Entropy: of a prompt's continuations' tokens together. Intervals: 95 % bootstrap, prompts."
    )
    return Table("Settings", ("temperature", "top-k", "top-p", *(MEASURES[name] for name in there)), rows, note)


def _plots(grid: Sequence[Setting], metrics: Mapping[str, Estimate]) -> list[IntervalPlot]:
    """Every measure over temperature, then each judge's over the distance; a line for each top-k and top-p."""
    over, against = (
        {name: collections.defaultdict[str, list[tuple[float, Estimate]]](list) for name in MEASURES} for _ in range(2)
    )
    for setting, name in itertools.product(grid, MEASURES):
        if (found := metrics.get(f"{setting.name}.{name}")) is None:
            continue
        cut = f"top-k {setting.sampling.top_k or 'all'}, top-p {setting.sampling.top_p:g}"
        over[name][cut].append((setting.sampling.temperature, found))
        distance = metrics.get(f"{setting.name}.distance")
        if name in ("quality", "speaker_similarity") and distance is not None:
            against[name][cut].append((distance.value, found))
    return [
        IntervalPlot(MEASURES[name], label, series, _floor(next(iter(series)), name, metrics))
        for label, measures in (("temperature", over), (MEASURES["distance"], against))
        for name, series in measures.items()
        if series
    ]


def _floor(series: str, name: str, metrics: Mapping[str, Estimate]) -> dict[str, float]:
    """The recordings' own value, as a dashed line."""
    found = metrics.get(f"original.{name}")
    return {} if found is None else {series: found.value}
