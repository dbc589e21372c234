"""The suite `abx`: how phonetic the layers of an encoder are, and its tokens; log-mel features beside them.

Shape suffixes: B batch, W waveform samples, T frames of a recording, F frames of all, D dimensions, K clusters.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from audiolm_jax import audio, bundle, files
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import abx, alignment, purity, statistics
from audiolm_jax.evaluation.alignment import Material
from audiolm_jax.evaluation.journal import Journal
from audiolm_jax.evaluation.report import IntervalPlot, Table, render
from audiolm_jax.evaluation.statistics import Estimate, shown
from audiolm_jax.evaluation.suites import Findings, Request
from audiolm_jax.progress import seconds_bar
from audiolm_jax.semantic import features, moments
from audiolm_jax.semantic.kmeans import normalisation
from audiolm_jax.semantic.tokenizer import tokens_of

MEL_RATE, NUM_MELS, SAMPLE_RATE = 100, 80, 16_000
BASELINES = ("log_mel", "log_mel.normalized")


@dataclasses.dataclass
class Store:
    """Features of one kind of all recordings, one after the other, in a file: memory does not grow with their number.

    Attributes:
      path: of the file, float32.
      frame_rate: Hz.
      sizes: frames of each recording, in the order in which they were added.
      of_all: moments of the frames.
    """

    path: pathlib.Path
    frame_rate: float
    sizes: list[int] = dataclasses.field(default_factory=list)
    of_all: moments.Moments = dataclasses.field(default_factory=moments.nothing)

    def write(self, x_TD: np.ndarray) -> moments.Moments:
        """Puts a recording's frames behind those that were added, over what a stopped run may have left there.

        Returns:
          their moments, for `add`.
        """
        x_TD = np.ascontiguousarray(x_TD, np.float32)
        with open(self.path, "r+b" if self.sizes else "wb") as file:
            file.seek(sum(self.sizes) * x_TD.shape[1] * x_TD.itemsize)
            file.write(x_TD.data)
            files.flush_to_disk(file)
        return moments.of(x_TD.astype(np.float64), np.ones(len(x_TD)))

    def add(self, of_recording: moments.Moments):
        """Counts a recording whose frames are in the file."""
        self.sizes.append(round(float(of_recording["count"])))
        self.of_all = moments.merge(self.of_all, of_recording)

    def frames(self) -> np.ndarray:
        """All frames [F, D], in the file."""
        shape = sum(self.sizes), np.size(self.of_all["mean"])
        return np.memmap(self.path, np.float32, "r", shape=shape) if shape[0] else np.zeros(shape, np.float32)

    def normalized(self) -> "Normalized":
        """The same with zero mean and unit variance of every dimension over all frames."""
        return Normalized(self.frames(), *normalisation(self.of_all))


@dataclasses.dataclass(frozen=True)
class Normalized:
    """Features, each dimension shifted and scaled."""

    x_FD: np.ndarray
    mean_D: np.ndarray
    deviation_D: np.ndarray

    def __getitem__(self, index_F: np.ndarray) -> np.ndarray:
        return (self.x_FD[index_F] - self.mean_D) / self.deviation_D


@dataclasses.dataclass(frozen=True)
class OfTokens:
    """Each token's row of a table as its features."""

    z_F: np.ndarray
    table_KD: np.ndarray

    def __getitem__(self, index_F: np.ndarray) -> np.ndarray:
        return self.table_KD[self.z_F[index_F]]


@dataclasses.dataclass
class Encoder:
    """One --semantic_tokenizer.

    Attributes:
      label: its name in the results.
      model: the tokenizer.
      layers: to measure.
      passes: over each recording, evenly shifted, for as many times as many frames a second.
      tokens: of each recording; empty where there are no clusters.
    """

    label: str
    model: Any
    layers: Sequence[int]
    passes: int = 1
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def frame_rate(self) -> float:
        """Of the layers' frames, Hz; tokens have the model's own."""
        return self.passes * self.model.frame_rate

    def read(self, wave_W: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Frames [T, D] of each layer by name, and the tokens [T], None where there are no clusters."""
        hop = self.model.sample_rate / self.frame_rate
        shifts = [round((number - (self.passes - 1) / 2) * hop) for number in range(self.passes)]
        passes = [
            list(self.model.features_of_layers(shifted(wave_W, shift)[None], None, self.layers)) for shift in shifts
        ]
        found = {
            f"{self.label}.layer_{layer}": interleaved([x_BTD[0] for x_BTD in of_passes])
            for layer, *of_passes in zip(self.layers, *passes, strict=True)
        }
        if (clusters := self.model.clusters) is None:
            return found, None
        if self.passes % 2 == 0:
            return found, self.model.encode(wave_W[None])[0]
        # The pass in the middle is not shifted.
        (x_TD,) = passes[self.passes // 2][self.layers.index(clusters["layer"])]
        return found, np.asarray(tokens_of(clusters, x_TD))


def shifted(wave_W: np.ndarray, shift: int) -> np.ndarray:
    """What was `shift` samples later, silence where nothing was: as long as before."""
    return np.pad(wave_W, (max(0, -shift), max(0, shift)))[max(0, shift) :][: len(wave_W)]


def interleaved(passes: Sequence[np.ndarray]) -> np.ndarray:
    """Frames [n T, D] of n passes [T, D] in turn, as far as the shortest goes."""
    size = min(len(x_TD) for x_TD in passes)
    return np.stack([x_TD[:size] for x_TD in passes], axis=1).reshape(len(passes) * size, -1)


def log_mel(wave_W: np.ndarray) -> np.ndarray:
    """Log-mel features [T, M] of a waveform at `SAMPLE_RATE`, `MEL_RATE` a second."""
    # Up to a power of two: few lengths are compiled.
    padded_W = np.pad(wave_W, (0, 2 ** math.ceil(math.log2(len(wave_W))) - len(wave_W)))
    mel_BTM = _log_mel(padded_W[None].astype(np.float32), np.array([len(wave_W)], np.int32))
    return np.asarray(mel_BTM)[0, : -(-len(wave_W) * MEL_RATE // SAMPLE_RATE)]


_log_mel = jax.jit(functools.partial(features.log_mel, sample_rate=SAMPLE_RATE, num_mels=NUM_MELS))


def evaluate_abx(request: Request, journal: Journal) -> Findings:
    """The suite `abx`: ABX errors of features and tokens; where there is an alignment, how tokens agree with phones."""
    folders = request.need("semantic_tokenizer")
    material = alignment.read_material(request.need("data"))
    encoders = _encoders(folders, request.layers, request.frame_rate)
    stores = _read_recordings(material, encoders, journal)
    metrics = _abx_metrics(material, encoders, stores, request.seed, journal)
    for encoder in encoders:
        if encoder.tokens:
            metrics.update(_token_metrics(material, encoder, request.seed))
    notes = []
    for mode in abx.MODES:
        if not any(name.endswith(f".{mode}") for name in metrics):
            notes.append(f"{mode} speakers: not measured, no two phones share a context there")
    return Findings(metrics, notes, _page(request, material, encoders, metrics, notes))


def _encoders(folders: Sequence[str], layers: Sequence[int], frame_rate: float | None) -> list[Encoder]:
    """The encoders with the layers asked for: all of one without clusters, the clusters' of one with."""
    encoders: list[Encoder] = []
    for folder in folders:
        label, model = pathlib.Path(folder).resolve().name, bundle.load_semantic_tokenizer(folder)
        own = range(model.num_layers + 1) if model.clusters is None else [model.clusters["layer"]]
        for layer in layers:
            if not 0 <= layer <= model.num_layers:
                raise UserError("no such layer", f"--layer={layer} of {folder}", f"choose 0 to {model.num_layers}")
        with_clusters = [] if model.clusters is None else [model.clusters["layer"]]
        passes = (model.frame_rate if frame_rate is None else frame_rate) / model.frame_rate
        if not 1 <= passes < math.inf or passes != round(passes):
            where = f"--frame_rate={frame_rate:g} of {folder}"
            raise UserError("not a multiple of the encoder's frame rate", where, f"it has {model.frame_rate:g} Hz")
        chosen = sorted({*layers, *with_clusters}) if layers else list(own)
        encoders.append(Encoder(label, model, chosen, round(passes)))
    return encoders


def _read_recordings(material: Material, encoders: Sequence[Encoder], journal: Journal) -> dict[str, Store]:
    """Takes each recording through everything once; features by name."""
    stores = {"log_mel": Store(journal.folder / "log_mel.f32", MEL_RATE)}
    for encoder in encoders:
        for layer in encoder.layers:
            name = f"{encoder.label}.layer_{layer}"
            stores[name] = Store(journal.folder / f"{name}.f32", encoder.frame_rate)
    total = sum(audio.duration(path) for path in material.paths.values())
    with seconds_bar("features", round(total * SAMPLE_RATE), SAMPLE_RATE) as progress:
        for file, path in material.paths.items():
            found = journal.once(f"recording/{file}", functools.partial(_read_recording, path, encoders, stores))
            for name, of_recording in found["moments"].items():
                stores[name].add(of_recording)
            for encoder in encoders:
                if encoder.model.clusters is not None:
                    encoder.tokens.append(found["tokens"][encoder.label])
            progress.update(found["samples"])
    return stores


def _read_recording(path: pathlib.Path, encoders: Sequence[Encoder], stores: Mapping[str, Store]) -> dict[str, Any]:
    """Writes one recording's features into the stores: their moments by name, tokens by encoder, samples."""
    wave_W = audio.read(path, SAMPLE_RATE)
    features_of, tokens = {"log_mel": log_mel(wave_W)}, {}
    for encoder in encoders:
        layers, tokens[encoder.label] = encoder.read(audio.resample(wave_W, SAMPLE_RATE, encoder.model.sample_rate))
        features_of.update(layers)
    return {
        "samples": len(wave_W),
        "moments": {name: stores[name].write(x_TD) for name, x_TD in features_of.items()},
        "tokens": tokens,
    }


def _abx_metrics(
    material: Material, encoders: Sequence[Encoder], stores: Mapping[str, Store], seed: int, journal: Journal
) -> dict[str, Estimate]:
    """`NAME.MODE`, the error of each kind of features, and `NAME.MODE.below_log_mel`, how far it is below the baseline.

    The baseline is the better of `BASELINES`; the interval of the difference is of paired resamplings.
    """
    metrics: dict[str, Estimate] = {}
    errors: dict[str, dict[str, np.ndarray]] = {mode: {} for mode in abx.MODES}
    for name, x, frame_rate, sizes in tqdm.tqdm(list(_kinds(encoders, stores)), "abx"):
        measure = functools.partial(_errors, material, x, frame_rate, sizes, seed)
        for mode, found in journal.once(f"abx/{name}", measure).items():
            errors[mode][name] = found["errors_S"]
            metrics[f"{name}.{mode}"] = abx.interval(found["value"], found["errors_S"], found["contexts"])
    for mode, samples in errors.items():
        present = [name for name in BASELINES if name in samples]
        if not present:
            continue
        baseline = min(present, key=lambda name: metrics[f"{name}.{mode}"].value)
        for name in set(samples) - set(BASELINES):
            found = metrics[f"{name}.{mode}"]
            difference = metrics[f"{baseline}.{mode}"].value - found.value
            paired_S = samples[baseline] - samples[name]
            metrics[f"{name}.{mode}.below_log_mel"] = abx.interval(difference, paired_S, found.count)
    return metrics


def _kinds(
    encoders: Sequence[Encoder], stores: Mapping[str, Store]
) -> Iterator[tuple[str, abx.Features, float, Sequence[int]]]:
    """Name, features, frame rate and frames of each recording of everything that ABX is measured on."""
    for name, store in stores.items():
        yield name, store.frames(), store.frame_rate, store.sizes
        yield f"{name}.normalized", store.normalized(), store.frame_rate, store.sizes
    for encoder in encoders:
        if encoder.tokens:
            z_F, sizes = np.concatenate(encoder.tokens), [len(z_T) for z_T in encoder.tokens]
            centroids_KD = np.asarray(encoder.model.clusters["centroids"])
            frame_rate = encoder.model.frame_rate
            yield f"{encoder.label}.centroids", OfTokens(z_F, centroids_KD), frame_rate, sizes
            yield f"{encoder.label}.tokens", OfTokens(z_F, np.eye(len(centroids_KD))), frame_rate, sizes


def _errors(
    material: Material, x: abx.Features, frame_rate: float, sizes: Sequence[int], seed: int
) -> dict[str, dict[str, Any]]:
    """By mode, where anything can be compared: the error, those of resamplings and how many contexts it is of."""
    cells, found = _cells(material, x, frame_rate, sizes, seed), {}
    for mode, chosen in zip(abx.MODES, (cells.within(), cells.across())):
        averaging = abx.Averaging.of(chosen)
        if not math.isnan(value := averaging.mean()):
            errors_S = abx.resampled(averaging, material.items, seed)
            found[mode] = {"value": value, "errors_S": errors_S, "contexts": len(np.unique(chosen.context_C))}
    return found


def _cells(material: Material, x: abx.Features, frame_rate: float, sizes: Sequence[int], seed: int) -> abx.Cells:
    """The protocol on features of `material.paths`' recordings, one after the other."""
    items = material.items
    numbers = {file: number for number, file in enumerate(material.paths)}
    number_I = np.array([numbers[file] for file in items.files])[items.file_I]
    first_I, last_I = items.frames(frame_rate, np.array(sizes)[number_I])
    start_I = (np.cumsum(sizes) - sizes)[number_I]
    return abx.measure(items, x, first_I + start_I, last_I + start_I, seed)


def _token_metrics(material: Material, encoder: Encoder, seed: int) -> dict[str, Estimate]:
    """Tokens a second before and after de-duplication; with an alignment, the measures of `purity`."""
    seconds = [len(z_T) / encoder.model.frame_rate for z_T in encoder.tokens]
    distinct = [1 + int(np.count_nonzero(np.diff(z_T))) if len(z_T) else 0 for z_T in encoder.tokens]
    metrics = {
        "tokens_per_second": statistics.bootstrap_ratio([len(z_T) for z_T in encoder.tokens], seconds, seed),
        "deduplicated_tokens_per_second": statistics.bootstrap_ratio(distinct, seconds, seed),
    }
    phones = {segment.phone: 0 for segments in material.segments.values() for segment in segments}
    phones = {phone: number for number, phone in enumerate(phones)}
    phones_R, tokens_R = [], []
    for file, z_T in zip(material.paths, encoder.tokens, strict=True):
        labels_T = alignment.frame_phones(material.segments.get(file, []), encoder.model.frame_rate, len(z_T))
        labelled_T = np.array([label is not None for label in labels_T], bool)
        if labelled_T.any():
            phones_R.append(np.array([phones[label] for label in labels_T if label is not None]))
            tokens_R.append(z_T[labelled_T])
    if phones_R:
        size = encoder.model.vocab_size
        metrics.update(purity.bootstrap_agreement(phones_R, tokens_R, len(phones), size, seed))
    return {f"{encoder.label}.{name}": found for name, found in metrics.items()}


# --- the page


def _page(
    request: Request,
    material: Material,
    encoders: Sequence[Encoder],
    metrics: Mapping[str, Estimate],
    notes: Sequence[str],
) -> str:
    items = material.items
    introduction = (
        f"{len(items)} items of {len(items.phones)} phones, {len(items.contexts)} contexts and {len(items.speakers)} "
        f"speakers in {len(material.paths)} recordings of {request.data}. The error is the share of triples A, B, X "
        "where X is farther from A, another token of its phone, than from B; chance is 0.5. Intervals are of 95 %, by "
        "a bootstrap over contexts, and over speakers where there are several. Frames a second: "
        f"{MEL_RATE} of log-mel, "
        + ", ".join(f"{encoder.frame_rate:g} of the layers of {encoder.label}" for encoder in encoders)
        + "."
    )
    tables, tokenizers = [_error_table(metrics)], [encoder for encoder in encoders if encoder.tokens]
    if tokenizers:
        tables.append(_token_table(tokenizers, metrics))
    plots = [plot for encoder in encoders if len(encoder.layers) > 1 for plot in _layer_plots(encoder, metrics)]
    if len(tokenizers) > 1:
        plots.extend(_size_plot(kind, tokenizers, metrics) for kind in ("centroids", "tokens"))
    return render("ABX: how phonetic features and tokens are", introduction, tables, plots, [], notes=notes)


def _error_table(metrics: Mapping[str, Estimate]) -> Table:
    names = dict.fromkeys(key.rpartition(".")[0] for key in metrics if key.endswith(tuple(abx.MODES)))
    keys = [f"{mode}{suffix}" for mode in abx.MODES for suffix in ("", ".below_log_mel")]
    rows = [[name, *(shown(metrics.get(f"{name}.{key}")) for key in keys)] for name in names]
    header = ("features", "within speakers", "below log-mel", "across speakers", "below log-mel")
    note = (
        "normalized: zero mean and unit variance of every dimension over these recordings. centroids: each frame's, in "
        "its place; tokens: one-hot. Below log-mel: the better of the two log-mel rows less the error, paired."
    )
    return Table("ABX error", header, rows, note)


def _token_table(encoders: Sequence[Encoder], metrics: Mapping[str, Estimate]) -> Table:
    columns = {
        "phone_purity": "phone purity",
        "cluster_purity": "cluster purity",
        "pnmi": "PNMI",
        "tokens_per_second": "tokens a second",
        "deduplicated_tokens_per_second": "without repeats",
    }
    rows = [
        [
            encoder.label,
            str(encoder.model.vocab_size),
            *(shown(metrics.get(f"{encoder.label}.{key}")) for key in columns),
        ]
        for encoder in encoders
    ]
    note = "Purities and PNMI are over the frames that have a phone in the alignment, silence included where it does."
    return Table("Tokens and phones", ("tokenizer", "clusters", *columns.values()), rows, note)


def _layer_plots(encoder: Encoder, metrics: Mapping[str, Estimate]) -> Iterator[IntervalPlot]:
    """The error by layer, as Figure 3 of AudioLM's appendix; the dashed lines are log-mel."""
    for suffix in ("", ".normalized"):
        at = [(layer, f"{encoder.label}.layer_{layer}{suffix}") for layer in encoder.layers]
        title = f"ABX error, {encoder.label}{', normalized' if suffix else ''}"
        yield _plot(title, "layer", at, metrics, f"log_mel{suffix}")


def _size_plot(kind: str, encoders: Sequence[Encoder], metrics: Mapping[str, Estimate]) -> IntervalPlot:
    at = sorted((encoder.model.vocab_size, f"{encoder.label}.{kind}") for encoder in encoders)
    plot = _plot(f"ABX error, {kind}", "clusters", at, metrics, "log_mel.normalized")
    return dataclasses.replace(plot, logarithmic=True)


def _plot(
    title: str, label: str, at: Sequence[tuple[int, str]], metrics: Mapping[str, Estimate], floor: str
) -> IntervalPlot:
    series = {
        mode: [(place, metrics[f"{name}.{mode}"]) for place, name in at if f"{name}.{mode}" in metrics]
        for mode in abx.MODES
    }
    floors = {mode: metrics[f"{floor}.{mode}"].value for mode in abx.MODES if f"{floor}.{mode}" in metrics}
    return IntervalPlot(title, label, {mode: points for mode, points in series.items() if points}, floors)
