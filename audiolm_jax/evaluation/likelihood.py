"""The suite `likelihood`: how well each stage predicts recordings that it was not trained on.

Every stage is scored on its target's tokens given its condition, in consecutive stretches of its training crop, as the
held-out loss of training is. All stages together give the bits that a code made of their predictions would need for a
second of audio: to be held against the codec's own rate.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from audiolm_jax import bundle
from audiolm_jax.data import manifest, tokenize
from audiolm_jax.data.token_dataset import TokenDataset
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import batches, statistics
from audiolm_jax.evaluation.journal import Journal
from audiolm_jax.evaluation.report import Table, render
from audiolm_jax.evaluation.statistics import Estimate, shown
from audiolm_jax.evaluation.suites import Findings, Request
from audiolm_jax.generate import AudioLM
from audiolm_jax.progress import report, seconds_bar

BATCH_SECONDS, BATCH_RECORDINGS = 60.0, 32
ALL = "all"

# Seconds of a batch, whole ones, and what gives its records, fewer than there are recordings where some are unreadable.
Batch = tuple[int, Callable[[], Sequence[Mapping[str, Any]]]]


def evaluate_likelihood(request: Request, journal: Journal) -> Findings:
    """Losses of all stages of a bundle, on recordings or on a token dataset."""
    folder, data = request.need("bundle"), request.need("data")
    model = bundle.load_bundle(folder)
    is_dataset = (pathlib.Path(data) / "dataset_info.json").is_file()
    asked, found = (_of_dataset if is_dataset else _of_recordings)(model, data, request.split)
    columns: dict[str, list[float]] = {}
    with seconds_bar("likelihood", sum(seconds for seconds, _ in found), 1) as progress:
        for number, (seconds, read) in enumerate(found):
            measured = journal.once(f"batch/{number}", functools.partial(_measure, model, read))
            for name, values in measured.items():
                columns.setdefault(name, []).extend(values.tolist())
            progress.update(seconds)
    if not columns["seconds"]:
        raise UserError("no recording could be read", data, "see the lines above")
    metrics = estimate(list(model.stages), columns, request.seed)
    left_out = asked - len(columns["seconds"])
    notes = [f"{left_out} of {asked} recordings could not be read and were left out"] if left_out else []
    return Findings(metrics, notes, _page(request, model, metrics, notes))


def _of_recordings(model: AudioLM, data: str, split: str | None) -> tuple[int, list[Batch]]:
    """The number of recordings asked for, and batches of those whose headers can be read."""
    if model.tokenizer is None:
        what = "the bundle has no semantic tokenizer, which sets the windows"
        raise UserError(what, "suite likelihood", "give a token dataset, or a bundle with one")
    tokenizers = tokenize.Tokenizers(model.codec, model.tokenizer, model.fingerprints)
    chosen = manifest.of_split(manifest.read_manifest(data), split)
    usable, lengths = manifest.usable(chosen, report)

    def read(indices: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        recordings, seconds = tuple(usable[index] for index in indices), tuple(lengths[index] for index in indices)
        shard = tokenize.Shard("", "", recordings, seconds)
        return tokenize.encode_shard(shard, tokenizers, BATCH_SECONDS, report, lambda _: None)[0]

    planned = batches.by_length(lengths, BATCH_SECONDS, BATCH_RECORDINGS)
    whole_seconds = lambda indices: round(sum(lengths[index] for index in indices))
    return len(chosen), [(whole_seconds(indices), functools.partial(read, indices)) for indices in planned]


def _of_dataset(model: AudioLM, data: str, split: str | None) -> tuple[int, list[Batch]]:
    """The number of records of a token dataset, and their batches.

    Raises:
      UserError: no such split, or tokens that other tokenizers made.
    """
    dataset = TokenDataset(data)
    for role in ("codec", "semantic_tokenizer"):
        if model.fingerprints.get(role, getattr(dataset.metadata, role)) != getattr(dataset.metadata, role):
            raise UserError(f"tokens of another {role} than the bundle's", data, "tokenize with the bundle's parts")
    if split is not None and split not in dataset.splits:
        raise UserError("no such split", f"--split={split}", f"use one of {', '.join(dataset.splits)}")
    found: list[Batch] = []
    total = 0
    for name in dataset.splits if split is None else (split,):
        source = dataset.source(name)
        lengths = (dataset.num_frames(name) / dataset.metadata.semantic_rate).tolist()
        total += len(lengths)
        for indices in batches.by_length(lengths, BATCH_SECONDS, BATCH_RECORDINGS):
            read = functools.partial(lambda source, indices: [source[index] for index in indices], source, indices)
            found.append((round(sum(lengths[index] for index in indices)), read))
    return total, found


def _measure(model: AudioLM, read: Callable[[], Sequence[Mapping[str, Any]]]) -> dict[str, np.ndarray]:
    """Of each record that could be read: `seconds`, and `nats/STAGE` and `tokens/STAGE` of each stage."""
    records = [dict(record) for record in read()]
    samples_R = np.array([record["num_samples"] for record in records], np.float64)
    measured = {"seconds": samples_R / model.codec.sample_rate}
    for stage in model.stages:
        likelihoods_R, counts_R = model.token_log_likelihoods(stage, records)
        measured |= {f"nats/{stage}": -likelihoods_R, f"tokens/{stage}": counts_R.astype(np.float64)}
    return measured


def estimate(stages: Sequence[str], columns: Mapping[str, Sequence[float]], seed: int) -> dict[str, Estimate]:
    """Metrics with intervals over recordings, of sums over all of them.

    `STAGE.nats_per_token` is the held-out loss, `STAGE.perplexity_per_token` its exponential; `STAGE.nats_per_second`
    is nats over seconds of audio, the logarithm of the perplexity per second, which has hundreds of digits;
    `STAGE.bits_per_second` is that over ln 2. `all.…` adds up the stages.
    """
    metrics: dict[str, Estimate] = {}
    for stage in stages:
        per_token = statistics.bootstrap_ratio(columns[f"nats/{stage}"], columns[f"tokens/{stage}"], seed)
        metrics[f"{stage}.nats_per_token"] = per_token
        metrics[f"{stage}.perplexity_per_token"] = _changed(per_token, math.exp)
        metrics |= _rates(stage, columns[f"nats/{stage}"], columns["seconds"], seed)
    nats_R = np.sum([columns[f"nats/{stage}"] for stage in stages], axis=0).tolist()
    return metrics | _rates(ALL, nats_R, columns["seconds"], seed)


def _rates(name: str, nats_R: Sequence[float], seconds_R: Sequence[float], seed: int) -> dict[str, Estimate]:
    rate = statistics.bootstrap_ratio(nats_R, seconds_R, seed)
    bits = _changed(rate, lambda nats: nats / math.log(2))
    return {f"{name}.nats_per_second": rate, f"{name}.bits_per_second": bits}


def _changed(found: Estimate, function: Callable[[float], float]) -> Estimate:
    """Of an increasing function of the measure."""
    return Estimate(function(found.value), function(found.low), function(found.high), found.count)


# --- the page


def _page(request: Request, model: AudioLM, metrics: Mapping[str, Estimate], notes: Sequence[str]) -> str:
    uniform = dict(_uniform_bits(model))
    rows = [
        [
            name,
            shown(metrics.get(f"{name}.nats_per_token"), 4),
            shown(metrics.get(f"{name}.perplexity_per_token"), 4),
            shown(metrics[f"{name}.nats_per_second"], 4),
            shown(metrics[f"{name}.bits_per_second"], 4),
            f"{uniform[name]:.4g}",
        ]
        for name in (*model.stages, ALL)
    ]
    table = Table(
        "How well the stages predict",
        ("stage", "nats a token", "perplexity a token", "nats a second", "bits a second", "bits a second, all alike"),
        rows,
        "The perplexity per second of audio is e to the nats a second. All alike: were every code as likely as every "
        "other, and no semantic token left out as a repeat.",
    )
    introduction = (
        f"{request.bundle} on {metrics[f'{ALL}.bits_per_second'].count} recordings of {request.data}. Longer ones than "
        "a stage's training crop are scored in consecutive stretches of that length. 95 % bootstrap intervals over "
        "recordings."
    )
    return render("Likelihood", introduction, [table], [], [], notes=notes)


def _uniform_bits(model: AudioLM) -> Iterator[tuple[str, float]]:
    """Bits a second of each stage's target, and of all, where no code is likelier than another."""
    total = 0.0
    for name, lm in model.stages.items():
        target = lm.stage.target
        bits = target.frame_rate * target.num_levels * math.log2(target.codebook_size)
        total += bits
        yield name, bits
    yield ALL, total
