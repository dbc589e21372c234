"""The suite `fad`: Fréchet distance (arXiv 1812.08466) between the embeddings of two sets of recordings.

Shape suffixes: W samples, T frames, N embeddings of a recording, M of a set, D dimensions, R recordings.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from audiolm_jax import audio, bundle
from audiolm_jax.data import manifest
from audiolm_jax.data.manifest import Recording
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import adapters, speakers
from audiolm_jax.evaluation.journal import Journal
from audiolm_jax.evaluation.report import Clip, Group, Table, render
from audiolm_jax.evaluation.statistics import Estimate, shown
from audiolm_jax.evaluation.suites import Findings, Request
from audiolm_jax.progress import items_bar, report

SAMPLE_RATE = 16_000
EMBEDDING_SECONDS = 1.0
RESAMPLINGS = 100
HEARD, HEARD_SECONDS = 2, 10.0
HALVES = "reference_halves"  # A metric beside those of the folders.

Embed = Callable[[np.ndarray, int], np.ndarray | None]


def frechet_distance(first_MD: np.ndarray, second_MD: np.ndarray) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of two sets of embeddings, in float64.

    With the centred sets X and Y over the roots of their numbers less one, Σ₁ = XᵀX and Σ₂ = YᵀY, and the eigenvalues
    of Σ₁ Σ₂ are the squared singular values of X Yᵀ: no root of a matrix is taken, so fewer embeddings than dimensions
    do no harm to the arithmetic, though then the covariances are poor estimates and the distance comes out too large.
    """
    first_MD, second_MD = np.asarray(first_MD, np.float64), np.asarray(second_MD, np.float64)
    shift_D = first_MD.mean(axis=0) - second_MD.mean(axis=0)
    x_MD, y_MD = _root(first_MD), _root(second_MD)
    overlap = float(np.linalg.svd(x_MD @ y_MD.T, compute_uv=False).sum())
    return max(0.0, float(np.sum(shift_D**2) + np.sum(x_MD**2) + np.sum(y_MD**2)) - 2 * overlap)


def _root(set_MD: np.ndarray) -> np.ndarray:
    """A matrix [at most D, D] whose product with itself, transposed first, is the covariance."""
    centred_MD = (set_MD - set_MD.mean(axis=0)) / np.sqrt(max(1, len(set_MD) - 1))
    return np.asarray(np.linalg.qr(centred_MD, mode="r")) if len(set_MD) > set_MD.shape[1] else centred_MD


def estimate(reference: Sequence[np.ndarray], other: Sequence[np.ndarray], seed: int) -> Estimate:
    """The distance of two sets of recordings' embeddings [N, D], ± 1.96 standard deviations of resamplings.

    A resampling repeats recordings, so its own distances lie too high; how they scatter is of use.
    """
    generator = np.random.default_rng(seed)
    value = frechet_distance(np.concatenate(reference), np.concatenate(other))
    found = []
    for _ in range(RESAMPLINGS):
        drawn = [
            [group[index] for index in generator.integers(len(group), size=len(group))] for group in (reference, other)
        ]
        found.append(frechet_distance(*(np.concatenate(one) for one in drawn)))
    margin = 1.96 * float(np.std(found))
    return Estimate(value, max(0.0, value - margin), value + margin, sum(map(len, other)))


def _resemblyzer() -> Callable[[np.ndarray], np.ndarray]:
    """Its embeddings of stretches of 1.6 s, one a second."""
    embed = speakers.resemblyzer_encoder()
    return lambda wave_W: embed(wave_W, return_partials=True, rate=1 / EMBEDDING_SECONDS)[1]


EMBEDDINGS = {
    "resemblyzer": adapters.Adapter(
        "Resemblyzer", 16_000, _resemblyzer, speakers.RESEMBLYZER, speakers.INSTALL, min_seconds=0.4
    )
}


def _of_encoder(folder: str, layers: Sequence[int]) -> Embed:
    """Means over seconds of an encoder's hidden states: [N, D], at least one."""
    encoder = bundle.load_semantic_tokenizer(folder)
    if layers and not 0 <= layers[0] <= encoder.num_layers:
        raise UserError("no such layer", f"--layer={layers[0]} of {folder}", f"choose 0 to {encoder.num_layers}")
    rate = round(EMBEDDING_SECONDS * encoder.frame_rate)

    def embed(wave_W: np.ndarray, sample_rate: int) -> np.ndarray | None:
        wave_W = audio.resample(wave_W, sample_rate, encoder.sample_rate)
        if encoder.num_frames(len(wave_W)) < 1:
            return None
        x_TD = encoder.features(wave_W[None], None, layers[0] if layers else None)[0]
        pieces = np.array_split(x_TD, range(rate, len(x_TD) - rate + 1, rate))
        return np.stack([piece_TD.mean(axis=0) for piece_TD in pieces])

    return embed


def evaluate_frechet(request: Request, journal: Journal) -> Findings:
    """The suite `fad`: how far folders of generated recordings are from the recordings of --data.

    Raises:
      UserError: an option that is missing, nothing to embed with, a set without a recording that can be used.
    """
    reference, folders = request.need("data"), list(dict.fromkeys(request.need("generated")))
    title, embed = _embedding(request)
    sets: dict[str, list[np.ndarray]] = {}
    notes: list[str] = []
    heard: list[Group] = []
    for data in dict.fromkeys([reference, *folders]):
        found = manifest.of_split(manifest.read_manifest(data), request.split if data == reference else None)
        sets[data], clips = _embed_all(data, found, embed, journal)
        if left_out := len(found) - len(sets[data]):
            notes.append(f"{data}: {left_out} of {len(found)} recordings could not be used and were left out")
        heard.append(Group(data, "", clips))
    width = sets[reference][0].shape[1]
    for data, group in sets.items():
        if (count := sum(map(len, group))) <= width:
            notes.append(
                f"{data}: {count} embeddings of {width} dimensions are too few for their covariance; the distance is "
                "too large, compare only sets of like size"
            )
    metrics = {_name(folder, folders): estimate(sets[reference], sets[folder], request.seed) for folder in folders}
    first, second = _halves(sets[reference], request.seed)
    if second:
        metrics[HALVES] = estimate(first, second, request.seed)
    else:
        notes.append("one reference recording has no halves to compare")
    return Findings(metrics, notes, _page(request, title, metrics, notes, heard))


def _embedding(request: Request) -> tuple[str, Embed]:
    if len(request.semantic_tokenizer) > 1 or len(request.layers) > 1:
        raise UserError("one embedding is enough", "--semantic_tokenizer, --layer", "give one of each")
    if request.semantic_tokenizer:
        if request.judges:
            raise UserError("two embeddings", "--semantic_tokenizer and --judge", "give one of them")
        folder = request.semantic_tokenizer[0]
        return f"{folder}, means over {EMBEDDING_SECONDS:g} s", _of_encoder(folder, request.layers)
    chosen, _ = adapters.choose(request.judges, {"embedding": EMBEDDINGS})
    if "embedding" not in chosen:
        missing = EMBEDDINGS["resemblyzer"].missing()
        raise UserError(
            f"nothing to embed with: {missing}", "suite fad", "or give an encoder: --semantic_tokenizer=DIR"
        )
    _, adapter = chosen["embedding"]
    return adapter.title, adapter.start()


def _embed_all(
    data: str, found: Sequence[Recording], embed: Embed, journal: Journal
) -> tuple[list[np.ndarray], list[Clip]]:
    """Embeddings [N, D] of each recording that has some, and the first ones to be heard."""
    embedded: list[np.ndarray] = []
    clips: list[Clip] = []
    with items_bar(f"embed {data}", len(found)) as progress:
        for index, recording in enumerate(found):
            measure = functools.partial(_embed_one, recording, embed, index < HEARD)
            one = journal.once(f"{data} {recording.id}", measure)
            progress.update(1)
            if one["error"]:
                report(f"left out: {one['error']}")
                continue
            embedded.append(one["embeddings_ND"])
            if one["wave_W"] is not None:
                clips.append(Clip(recording.id, one["wave_W"], one["sample_rate"]))
    if not embedded:
        raise UserError("no recording can be used", data, "see the lines above")
    return embedded, clips


def _embed_one(recording: Recording, embed: Embed, is_heard: bool) -> dict[str, Any]:
    nothing = {"embeddings_ND": None, "wave_W": None, "sample_rate": SAMPLE_RATE}
    try:
        wave_W = recording.read(SAMPLE_RATE)
        embeddings_ND = embed(wave_W, SAMPLE_RATE)
    except UserError as error:
        return {**nothing, "error": str(error)}
    if embeddings_ND is None:
        return {**nothing, "error": f"too short or silent: {recording.id}"}
    heard_W = wave_W[: round(HEARD_SECONDS * SAMPLE_RATE)] if is_heard else None
    return {**nothing, "error": "", "embeddings_ND": np.asarray(embeddings_ND, np.float32), "wave_W": heard_W}


def _halves(group: Sequence[np.ndarray], seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The recordings in two halves by chance; the second is empty where there is one alone."""
    order = np.random.default_rng(seed).permutation(len(group))
    middle = -(-len(group) // 2)
    return [group[index] for index in order[:middle]], [group[index] for index in order[middle:]]


def _name(folder: str, folders: Sequence[str]) -> str:
    """Of a folder's metric: its last part, where that tells them apart."""
    name = folder.rstrip("/").rpartition("/")[2]
    others = [HALVES, *(other.rstrip("/").rpartition("/")[2] for other in folders)]
    return name if others.count(name) == 1 else folder


def _page(
    request: Request, title: str, metrics: Mapping[str, Estimate], notes: Sequence[str], heard: Sequence[Group]
) -> str:
    introduction = (
        f"Fréchet distance between the embeddings of {request.data} and those of each folder. Embedding: {title}. "
        f"Intervals are ± 1.96 standard deviations of {RESAMPLINGS} resamplings of the recordings."
    )
    rows = [[name, shown(found, 4), str(found.count)] for name, found in metrics.items()]
    note = (
        "Smaller is nearer. reference_halves is the distance between two halves of the reference by chance: what the "
        "number of recordings alone does. Distances of other embeddings or other numbers are not comparable."
    )
    table = Table("Fréchet distance", ("recordings", "distance to the reference", "embeddings"), rows, note)
    return render("Fréchet distance", introduction, [table], [], heard, notes=notes)
