"""How good a codec's reconstructions are: at each number of levels, beside Opus, silence and noise.

Shape suffixes: W waveform samples, T frames, Q levels, N codes, R recordings.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from audiolm_jax import bundle
from audiolm_jax.codec.codec import Codec
from audiolm_jax.data import manifest
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import judges, opus, statistics
from audiolm_jax.evaluation.journal import Journal
from audiolm_jax.evaluation.judges import Judge
from audiolm_jax.evaluation.report import Clip, Group, IntervalPlot, Table, render
from audiolm_jax.evaluation.statistics import Estimate, shown
from audiolm_jax.evaluation.suites import Findings, Request
from audiolm_jax.progress import report, seconds_bar

PIECE_SECONDS = 20.0
HEARD_RECORDINGS, HEARD_SECONDS = 3, 6.0
FRAMES_PER_CODE = 10


def codec_quality(codec: Codec, waves: Sequence[np.ndarray], seed: int = 0) -> dict[str, float | list[float]]:
    """Means over recordings.

    Args:
      codec: under test.
      waves: recordings at its sample rate, float [W] each.
      seed: of the noise.

    Returns:
      `log_mel_distance` of the reconstruction (mean absolute difference of natural-log mel spectra),
      `log_mel_distance_silence` and `log_mel_distance_noise` of digital silence and of white noise of
      each recording's level, `si_sdr` in dB, and `codebook_perplexity`, `codes_used` a level.
    """
    generator = np.random.default_rng(seed)
    names = ("log_mel_distance", "log_mel_distance_silence", "log_mel_distance_noise", "si_sdr")
    measured: dict[str, list[float]] = {name: [] for name in names}
    counts_QN = np.zeros((codec.num_quantizers, codec.codebook_size), np.int64)
    for wave_W in waves:
        codes_TQ = np.asarray(codec.encode(wave_W[None]))[0]
        counts_QN += count_codes(codes_TQ, codec.codebook_size)
        rebuilt_W = _decode(codec, codes_TQ, len(wave_W))
        noise_W = generator.standard_normal(len(wave_W)) * np.sqrt(np.mean(np.square(wave_W)))
        for name, other_W in zip(names, (rebuilt_W, np.zeros_like(wave_W), noise_W), strict=False):
            measured[name].append(judges.log_mel_distance(wave_W, other_W, codec.sample_rate))
        measured["si_sdr"].append(judges.si_sdr(wave_W, rebuilt_W, codec.sample_rate))
    return {
        **{name: float(np.mean(values)) for name, values in measured.items()},
        "codebook_perplexity": np.exp(statistics.entropy(counts_QN)).tolist(),
        "codes_used": (counts_QN > 0).sum(axis=1).tolist(),
    }


def count_codes(codes_TQ: np.ndarray, codebook_size: int) -> np.ndarray:
    """How often each code of each level occurs: [Q, N]."""
    return np.stack([np.bincount(codes_T, minlength=codebook_size) for codes_T in codes_TQ.T])


def reconstruct(codec: Codec, wave_W: np.ndarray) -> np.ndarray:
    """The waveform [W] as it comes back from all of the codec's levels."""
    return _decode(codec, np.asarray(codec.encode(wave_W[None]))[0], len(wave_W))


def _decode(codec: Codec, codes_TQ: np.ndarray, size: int) -> np.ndarray:
    """The waveform [W] of that many samples."""
    return opus.fit_length(np.asarray(codec.decode(codes_TQ[None]))[0], size)


@dataclasses.dataclass
class Measured:
    """What was measured of one recording.

    Attributes:
      scores: by system and judge; None where the judge had nothing to go by.
      kilobits: a second, by system.
      counts_QN: codes.
      clips: waveforms by system, and the original as "original", as long as was asked for; empty where none were.
    """

    scores: Mapping[str, Mapping[str, float | None]]
    kilobits: Mapping[str, float]
    counts_QN: np.ndarray
    clips: Mapping[str, np.ndarray]


def measure_recording(
    codec: Codec, wave_W: np.ndarray, panel: Mapping[str, Judge], with_opus: bool, heard_seconds: float
) -> Measured:
    """Takes a recording, in equal pieces of at most `PIECE_SECONDS`, through every system and before every judge.

    The systems are `codec_n`, the codec's first n levels, and `opus_k`, Opus asked for k kbit/s.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    kilobits: dict[str, list[float]] = {}
    clips: dict[str, np.ndarray] = {}
    counts_QN = np.zeros((codec.num_quantizers, codec.codebook_size), np.int32)
    heard = round(heard_seconds * codec.sample_rate)
    for piece_W in np.array_split(wave_W, math.ceil(len(wave_W) / (PIECE_SECONDS * codec.sample_rate))):
        codes_TQ = np.asarray(codec.encode(piece_W[None]))[0]
        counts_QN += count_codes(codes_TQ, codec.codebook_size)
        clips.setdefault("original", piece_W[:heard])
        for system, other_W, rate in _systems(codec, piece_W, codes_TQ, with_opus):
            clips.setdefault(system, other_W[:heard])
            kilobits.setdefault(system, []).append(rate)
            for name, judge in panel.items():
                scored = scores.setdefault(system, {}).setdefault(name, [])
                if (score := judge.score(piece_W, other_W, codec.sample_rate)) is not None:
                    scored.append(score)
    mean = lambda values: float(np.mean(values)) if values else None
    return Measured(
        scores={system: {name: mean(values) for name, values in found.items()} for system, found in scores.items()},
        kilobits={system: float(np.mean(rates)) for system, rates in kilobits.items()},
        counts_QN=counts_QN,
        clips=clips if heard else {},
    )


def _systems(
    codec: Codec, wave_W: np.ndarray, codes_TQ: np.ndarray, with_opus: bool
) -> Iterator[tuple[str, np.ndarray, float]]:
    """Name, waveform [W] and kilobits a second of everything that the piece is taken through."""
    for levels in range(1, codec.num_quantizers + 1):
        kilobits = levels * math.log2(codec.codebook_size) * codec.frame_rate / 1000
        yield f"codec_{levels}", _decode(codec, codes_TQ[:, :levels], len(wave_W)), kilobits
    for asked in opus.KILOBITS if with_opus else ():
        yield f"opus_{asked}", *opus.code(wave_W, codec.sample_rate, asked)


def evaluate_codec(request: Request, journal: Journal) -> Findings:
    """The suite `codec`: rate and quality of a codec, beside Opus on the same recordings."""
    folder, data = request.need("codec"), request.need("data")
    codec = bundle.load_codec(folder)
    panel, notes = judges.choose(request.judges)
    if missing := opus.missing():
        notes.append(f"Opus: not measured, {missing}")
    for note in notes:
        report(note)
    chosen = manifest.of_split(manifest.read_manifest(data), request.split)
    usable, seconds = manifest.usable(chosen, report)
    measured: dict[str, Measured] = {}
    with seconds_bar("evaluate", round(sum(seconds) * codec.sample_rate), codec.sample_rate) as progress:
        for recording, length in zip(usable, seconds, strict=True):
            heard_seconds = HEARD_SECONDS if len(measured) < HEARD_RECORDINGS else 0.0
            measure = functools.partial(_measure, codec, recording, panel, not missing, heard_seconds)
            try:
                measured[recording.id] = Measured(**journal.once(recording.id, measure))
            except UserError as error:
                report(f"left out: {error}")
            progress.update(round(length * codec.sample_rate))
    if not measured:
        raise UserError("no recording could be read", data, "see the lines above")
    if left_out := len(chosen) - len(measured):
        notes.append(f"{left_out} of {len(chosen)} recordings could not be read and were left out")
    metrics = estimate(list(measured.values()), request.seed)
    for name, judge in panel.items():
        without = sum(any(scores[name] is None for scores in one.scores.values()) for one in measured.values())
        if without:
            notes.append(f"{judge.title}: no score for {without} of {len(measured)} recordings, too short or silent")
    return Findings(metrics, notes, _page(request, codec, measured, metrics, panel, notes))


def _measure(
    codec: Codec, recording: manifest.Recording, panel: Mapping[str, Judge], with_opus: bool, heard_seconds: float
) -> dict[str, Any]:
    """A `Measured` as a dictionary."""
    wave_W = recording.read(codec.sample_rate)
    return dataclasses.asdict(measure_recording(codec, wave_W, panel, with_opus, heard_seconds))


def estimate(measured: Sequence[Measured], seed: int) -> dict[str, Estimate]:
    """Metrics over recordings: `SYSTEM.JUDGE`, `SYSTEM.kilobits`, and `codebook_perplexity.LEVEL` from 1 on."""
    metrics = {}
    for system, judged in measured[0].scores.items():
        metrics[f"{system}.kilobits"] = statistics.bootstrap_mean([one.kilobits[system] for one in measured], seed)
        for name in judged:
            scores = [score for one in measured if (score := one.scores[system][name]) is not None]
            if scores:
                metrics[f"{system}.{name}"] = statistics.bootstrap_mean(scores, seed)
    for level in range(len(measured[0].counts_QN)):
        counts_RN = np.stack([one.counts_QN[level] for one in measured])
        metrics[f"codebook_perplexity.{level + 1}"] = statistics.bootstrap_perplexity(counts_RN, seed)
    return metrics


# --- the page


def _title(system: str) -> str:
    kind, _, number = system.partition("_")
    return f"Opus, {number} kbit/s" if kind == "opus" else f"codec, {number} level{'s' if number != '1' else ''}"


def _page(
    request: Request,
    codec: Codec,
    measured: Mapping[str, Measured],
    metrics: Mapping[str, Estimate],
    panel: Mapping[str, Judge],
    notes: Sequence[str],
) -> str:
    systems = list(next(iter(measured.values())).scores)
    introduction = (
        f"{request.codec} on {len(measured)} recordings of {request.data}: one model, any number of its levels, beside "
        f"Opus on the same recordings at {codec.sample_rate} Hz. Means over recordings with 95 % bootstrap intervals; "
        f"recordings longer than {PIECE_SECONDS:g} s are judged in equal pieces no longer than that."
    )
    return render(
        "Codec: rate and quality",
        introduction,
        [_quality_table(systems, metrics, panel), _perplexity_table(codec, measured, metrics)],
        [plot for name, judge in panel.items() if (plot := _rate_plot(systems, metrics, name, judge)).series],
        [Group(name, "", _clips(one, codec)) for name, one in measured.items() if one.clips],
        notes=notes,
    )


def _quality_table(systems: Sequence[str], metrics: Mapping[str, Estimate], panel: Mapping[str, Judge]) -> Table:
    rows = [
        [
            _title(system),
            f"{metrics[f'{system}.kilobits'].value:.2f}",
            *(shown(metrics.get(f"{system}.{name}")) for name in panel),
        ]
        for system in systems
    ]
    return Table(
        "Rate and quality",
        ("system", "kbit/s", *(judge.title for judge in panel.values())),
        rows,
        "Opus: what opusenc makes of a mono file at that --bitrate, its other settings its own; kbit/s are of the "
        "packets it made. The output is aligned with the original before it is judged.",
    )


def _perplexity_table(codec: Codec, measured: Mapping[str, Measured], metrics: Mapping[str, Estimate]) -> Table:
    counts_QN = np.sum([one.counts_QN for one in measured.values()], axis=0)
    half, frames = codec.codebook_size / 2, int(counts_QN[0].sum())
    rows = []
    for level, counts_N in enumerate(counts_QN, 1):
        found = metrics[f"codebook_perplexity.{level}"]
        verdict = "yes" if found.value > half else "no"
        rows.append([str(level), shown(found, 4), f"{half:g}", verdict, str(np.count_nonzero(counts_N))])
    note = f"exp(entropy) of the codes of {frames} frames; {codec.codebook_size} where all codes are used alike."
    if frames < FRAMES_PER_CODE * codec.codebook_size:
        note += " So few frames cannot show all codes: the perplexity of more recordings is higher."
    header = ("level", "perplexity", "half the codebook", "above it", "codes used")
    return Table("Codebook use", header, rows, note)


def _rate_plot(systems: Sequence[str], metrics: Mapping[str, Estimate], name: str, judge: Judge) -> IntervalPlot:
    series: dict[str, list[tuple[float, Estimate]]] = {}
    for system in systems:
        if (found := metrics.get(f"{system}.{name}")) is not None:
            points = series.setdefault("Opus" if system.startswith("opus") else "codec", [])
            points.append((metrics[f"{system}.kilobits"].value, found))
    return IntervalPlot(judge.title, "kbit/s", series)


def _clips(one: Measured, codec: Codec) -> list[Clip]:
    levels = sorted({1, math.ceil(codec.num_quantizers / 2), codec.num_quantizers})
    systems = [f"codec_{level}" for level in levels] + [name for name in one.clips if name.startswith("opus")]
    original = Clip("original", one.clips["original"], codec.sample_rate)
    return [original, *(Clip(_title(system), one.clips[system], codec.sample_rate) for system in systems)]
