"""`audiolm inspect`: what is in a token dataset, and what a language model of it must beat.

One pass over the records in stretches of some thousand frames: memory is the same for an hour and for 60,000 (but for
the names of the speakers). The validation split comes first, since the bigrams count only pairs that are held out.
"""

import collections
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from audiolm_jax import bundle, files
from audiolm_jax.codec.codec import Codec
from audiolm_jax.codec.streaming import ChunkDecoder
from audiolm_jax.data.token_dataset import TokenDataset, TokenMetadata
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import token_statistics as statistics
from audiolm_jax.evaluation.report import Bars, Clip, Group, Lines, Table, render, software, with_details
from audiolm_jax.lm.stages import run_starts
from audiolm_jax.parts import read_part

STRETCH_FRAMES = 2**15
EXAMPLE_SECONDS = 20.0
TRAIN, HELD_OUT = "train", "validation"
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stream:
    """A stretch of one token stream.

    Attributes:
      tokens_T: of several records, one behind the other.
      starts_T: marks each record's first token.
      below_T: of an acoustic level above the first, the codes of the level below in the same frames.
    """

    tokens_T: np.ndarray
    starts_T: np.ndarray
    below_T: np.ndarray | None = None

    def contexts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Pairs of a known token and the one to predict from it, by the kind of bigram."""
        follows_T = ~self.starts_T[1:]
        pairs = {"bigram": (self.tokens_T[:-1][follows_T], self.tokens_T[1:][follows_T])}
        return pairs if self.below_T is None else {**pairs, "level_bigram": (self.below_T, self.tokens_T)}


def streams(records: Sequence[Record]) -> dict[str, Stream]:
    """The token streams of some records: semantic tokens, the same de-duplicated, and each acoustic level from 1 on."""
    semantic_T, starts_T = _joined([record["semantic"] for record in records])
    kept_T = starts_T | run_starts(semantic_T)
    found = {
        "semantic": Stream(semantic_T, starts_T),
        "semantic_deduplicated": Stream(semantic_T[kept_T], starts_T[kept_T]),
    }
    acoustic_TQ, starts_T = _joined([record["acoustic"] for record in records])
    for level in range(acoustic_TQ.shape[1]):
        below_T = acoustic_TQ[:, level - 1] if level else None
        found[f"acoustic_{level + 1}"] = Stream(acoustic_TQ[:, level], starts_T, below_T)
    return found


def _joined(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows one behind the other, and a mask of each one's first element."""
    return np.concatenate(rows), np.concatenate([np.arange(len(row)) == 0 for row in rows])


def vocabularies(metadata: TokenMetadata) -> dict[str, int]:
    """Different tokens of each stream."""
    semantic = dict.fromkeys(("semantic", "semantic_deduplicated"), metadata.num_clusters)
    levels = range(1, metadata.num_quantizers + 1)
    return {**semantic, **{f"acoustic_{level}": metadata.codebook_size for level in levels}}


class SplitStatistics:
    """What one split holds, from `add`ing its stretches."""

    def __init__(self, metadata: TokenMetadata):
        self._sample_rate = metadata.sample_rate
        self.counts = {name: np.zeros(size, np.int64) for name, size in vocabularies(metadata).items()}
        self._seconds, self._runs = statistics.Histogram(), statistics.Histogram()
        self._speakers: set[str] = set()
        self._records = self._true_ends = self._samples = 0
        self._longest, self._shortest = 0, sys.maxsize

    def add(self, records: Sequence[Record], found: Mapping[str, Stream]):
        num_samples = np.array([record["num_samples"] for record in records], np.int64)
        self._records += len(records)
        self._samples += int(num_samples.sum())
        self._longest = max(self._longest, int(num_samples.max()))
        self._shortest = min(self._shortest, int(num_samples.min()))
        self._true_ends += sum(bool(record["is_end"]) for record in records)
        self._speakers |= {str(record["speaker"]) for record in records}
        self._seconds.add(num_samples // self._sample_rate)
        semantic = found["semantic"]
        run_ends = np.append(np.flatnonzero(semantic.starts_T | run_starts(semantic.tokens_T)), len(semantic.tokens_T))
        self._runs.add(np.diff(run_ends))
        for name, stream in found.items():
            self.counts[name] += np.bincount(stream.tokens_T, minlength=len(self.counts[name]))

    @property
    def seconds(self) -> float:
        """Of audio."""
        return self._samples / self._sample_rate

    def results(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        frames, kept = (int(self.counts[name].sum()) for name in ("semantic", "semantic_deduplicated"))
        return {
            "records": self._records,
            "hours": self.seconds / 3600,
            "speakers": len(self._speakers),
            "true_ends": self._true_ends,
            "seconds": {
                "shortest": self._shortest / self._sample_rate,
                "mean": self.seconds / self._records,
                "longest": self._longest / self._sample_rate,
                "histogram": self._seconds.counts.tolist(),
            },
            "repeats": {
                "share": 1 - kept / frames,
                "mean_run_length": frames / kept,
                "run_lengths": self._runs.counts.tolist(),
            },
            "tokens": {name: _token_results(counts_K) for name, counts_K in self.counts.items()},
        }


def _token_results(counts_K: np.ndarray) -> dict[str, Any]:
    nats = statistics.entropy(counts_K)
    return {
        "count": int(counts_K.sum()),
        "vocabulary": len(counts_K),
        "used": int(np.sum(counts_K > 0)),
        "entropy_nats": nats,
        "entropy_bits": nats / math.log(2),
        "perplexity": math.exp(nats),
        "counts": counts_K.tolist(),
    }


def measure(dataset: TokenDataset) -> dict[str, Any]:
    """All figures of a dataset: `metadata`, `splits`, and `baselines`, which are None without both splits they need.

    A baseline is the cross-entropy of the validation split's tokens under add-one smoothed counts of the training
    split's: of the token alone ("unigram"), after the one before it in its stream ("bigram"), and after the level below
    in its frame ("level_bigram"). Tokens without a predecessor are left out of bigrams.
    """
    order = [name for name in (HELD_OUT, TRAIN) if name in dataset.splits]
    order += sorted(set(dataset.splits) - set(order))
    splits: dict[str, SplitStatistics] = {}
    sizes = vocabularies(dataset.metadata)
    bigrams: dict[tuple[str, str], statistics.Bigram] = {}
    for split in order:
        source = dataset.source(split)
        if not len(source):
            continue
        splits[split] = SplitStatistics(dataset.metadata)
        for records in _stretches(source, split):
            found = streams(records)
            splits[split].add(records, found)
            if split not in (HELD_OUT, TRAIN):
                continue
            for name, stream in found.items():
                for kind, pairs in stream.contexts().items():
                    bigram = bigrams.setdefault((name, kind), statistics.Bigram(sizes[name]))
                    (bigram.hold_out if split == HELD_OUT else bigram.fit)(*pairs)
    return {
        "metadata": dataclasses.asdict(dataset.metadata),
        "splits": {split: splits[split].results() for split in dataset.splits if split in splits},
        "baselines": _baselines(splits, bigrams) if {TRAIN, HELD_OUT} <= set(splits) else None,
    }


def _stretches(source: Sequence[Record], split: str) -> Iterator[list[Record]]:
    """The records in groups of about `STRETCH_FRAMES` acoustic frames."""
    group: list[Record] = []
    frames = 0
    quiet = 0.5 if sys.stderr.isatty() else 10.0
    for index in tqdm.trange(len(source), desc=f"inspect {split}", unit="record", mininterval=quiet):
        group.append(source[index])
        frames += len(group[-1]["acoustic"])
        if frames >= STRETCH_FRAMES:
            yield group
            group, frames = [], 0
    if group:
        yield group


def _baselines(splits: Mapping[str, SplitStatistics], bigrams: Mapping[tuple[str, str], statistics.Bigram]):
    counts, held_out = splits[TRAIN].counts, splits[HELD_OUT].counts
    found: dict[str, dict[str, Any]] = {}
    for name in counts:
        nats = {"unigram": statistics.unigram_cross_entropy(counts[name], held_out[name])}
        nats |= {kind: bigram.cross_entropy() for (stream, kind), bigram in bigrams.items() if stream == name}
        rate = int(held_out[name].sum()) / splits[HELD_OUT].seconds
        found[name] = {
            "tokens_per_second": rate,
            **{
                kind: {"nats": value, "bits": value / math.log(2), "bits_per_second": value / math.log(2) * rate}
                for kind, value in nats.items()
            },
        }
    return found


def inspect(dataset: str, output: str, codec: str | None, num_examples: int, seed: int):
    """Writes `inspection.json` and `report.html` about a token dataset into the new folder `output`.

    Args:
      dataset: folder of a token dataset.
      output: a new folder.
      codec: the codec that made its tokens, to decode examples with; None for none.
      num_examples: how many records to decode, the first `EXAMPLE_SECONDS` of each.
      seed: of their choice.

    Raises:
      UserError: no dataset, another codec, an output that exists.
    """
    files.refuse_existing(output)
    if num_examples < 0:
        raise UserError("num_examples must be 0 or more", num_examples, "change it")
    tokens = TokenDataset(dataset)
    if codec is not None and read_part(codec).fingerprint() != tokens.metadata.codec:
        raise UserError("the tokens were made by another codec", codec, "give the codec that made the dataset")
    results = measure(tokens)
    if not results["splits"]:
        raise UserError("dataset without a record", dataset, "tokenize anew")
    clips = _examples(tokens, codec, num_examples, seed) if codec is not None else {}
    results = {"seed": seed, **results, "examples": list(clips)}
    with files.new_folder(output) as scratch:
        (scratch / "inspection.json").write_text(json.dumps(_without_nan(results)) + "\n")
        files.write_text(scratch / "report.html", _page(dataset, results, clips))
    print(f"report: {output}/report.html")


def _examples(tokens: TokenDataset, codec: str, num_examples: int, seed: int) -> dict[str, Clip]:
    """Decoded records, drawn from all splits without repetition, by id."""
    model = bundle.load_codec(codec)
    places = [(split, size) for split in tokens.splits if (size := len(tokens.source(split)))]
    ends = np.cumsum([size for _, size in places])
    chosen = np.random.default_rng(seed).choice(ends[-1], min(num_examples, int(ends[-1])), replace=False)
    clips = {}
    for index in np.sort(chosen):
        which = int(np.searchsorted(ends, index, side="right"))
        split, size = places[which]
        record = tokens.source(split)[int(index - (ends[which] - size))]
        wave_W = _decode(model, record["acoustic"])[: int(record["num_samples"])]
        name = record["id"].decode() if isinstance(record["id"], bytes) else str(record["id"])
        clips[name] = Clip(f"{name} ({split})", wave_W, model.sample_rate)
    return clips


def _decode(model: Codec, codes_TQ: np.ndarray) -> np.ndarray:
    """The first `EXAMPLE_SECONDS` of codes as samples; whatever their number, by one compiled program."""
    frames = math.ceil(EXAMPLE_SECONDS * model.frame_rate)
    codes_TQ = codes_TQ[:frames]
    padded_TQ = np.pad(codes_TQ, ((0, frames - len(codes_TQ)), (0, 0)))
    decoder = ChunkDecoder(model)
    first_BW = decoder.decode(padded_TQ[None], np.array([len(codes_TQ)]))
    return np.concatenate([first_BW, decoder.finish()], axis=1)[0]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what cannot be measured is null."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _page(dataset: str, results: Mapping[str, Any], clips: Mapping[str, Clip]) -> str:
    metadata, splits = results["metadata"], results["splits"]
    hours = sum(split["hours"] for split in splits.values())
    introduction = (
        f"{sum(split['records'] for split in splits.values()):,} records, {hours:.2f} hours: "
        f"{metadata['num_clusters']} semantic tokens at {metadata['semantic_rate']} Hz, {metadata['num_quantizers']} "
        f"acoustic levels of {metadata['codebook_size']} codes at {metadata['acoustic_rate']} Hz."
    )
    groups = [Group("Decoded records", f"The first {EXAMPLE_SECONDS:.0f} s of each.", list(clips.values()))]
    page = render(
        f"Tokens: {dataset}",
        introduction,
        [_split_table(splits), _token_table(splits), *_baseline_tables(results["baselines"])],
        [plot for split in splits for plot in _plots(split, splits[split])],
        groups if clips else [],
    )
    return with_details(page, {"Token dataset": metadata, "Software": software()})


def _split_table(splits: Mapping[str, Any]) -> Table:
    lengths = ("shortest", "mean", "longest")
    header = ["split", "records", "hours", "speakers", "true ends", *(f"{length} s" for length in lengths)]
    rows = [
        [
            name,
            f"{split['records']:,}",
            f"{split['hours']:.3f}",
            f"{split['speakers']:,}",
            f"{split['true_ends']:,}",
            *(f"{split['seconds'][length]:.2f}" for length in lengths),
            f"{split['repeats']['share']:.1%}",
            f"{split['repeats']['mean_run_length']:.2f}",
        ]
        for name, split in splits.items()
    ]
    note = "Repeats: the share of semantic frames that de-duplication removes. Run: frames for each one that it keeps."
    return Table("Records", [*header, "repeats", "run"], rows, note)


def _token_table(splits: Mapping[str, Any]) -> Table:
    header = ["stream", "split", "tokens", "used", "entropy, bits", "perplexity", "of the vocabulary"]
    rows = [
        [
            stream,
            name,
            f"{found['count']:,}",
            f"{found['used']} of {found['vocabulary']}",
            f"{found['entropy_bits']:.3f}",
            f"{found['perplexity']:.1f}",
            f"{found['perplexity'] / found['vocabulary']:.1%}",
        ]
        for stream in next(iter(splits.values()))["tokens"]
        for name, found in ((name, split["tokens"][stream]) for name, split in splits.items())
    ]
    note = "Perplexity: the exponential of the entropy, the number of equally frequent tokens that would vary as much."
    return Table("Tokens", header, rows, note)


def _baseline_tables(baselines: Mapping[str, Any] | None) -> list[Table]:
    title = "What a language model must beat"
    if baselines is None:
        return [Table(title, ["stream"], [], f"Not measured: it needs records in the splits {TRAIN} and {HELD_OUT}.")]
    rows = [
        [stream, kind.replace("_", " "), *(f"{found[kind][unit]:.3f}" for unit in ("nats", "bits", "bits_per_second"))]
        for stream, found in baselines.items()
        for kind in ("unigram", "bigram", "level_bigram")
        if kind in found
    ]
    totals: dict[str, float] = collections.defaultdict(float)
    for stream, found in baselines.items():
        if stream.startswith("acoustic"):
            kinds = {kind: found[kind]["bits_per_second"] for kind in found if kind != "tokens_per_second"}
            totals["unigram"] += kinds["unigram"]
            totals["best"] += min(kinds.values())
    rows += [["all acoustic levels", kind, "", "", f"{bits:.3f}"] for kind, bits in totals.items()]
    note = (
        f"Cross-entropy per token of the split {HELD_OUT} under add-one smoothed counts of {TRAIN}. Unigram: the token "
        "alone. Bigram: after the one before it, of an acoustic level in the frame before. Level bigram: after the "
        "level below, in its frame. Best: of each level the least of these."
    )
    return [Table(title, ["stream", "model", "nats", "bits", "bits per second"], rows, note)]


def _plots(name: str, split: Mapping[str, Any]) -> list[Bars | Lines]:
    tokens = split["tokens"]
    frequencies = {
        stream: np.sort(np.array(found["counts"]) / max(1, found["count"]))[::-1] for stream, found in tokens.items()
    }
    semantic = {stream: shares for stream, shares in frequencies.items() if stream.startswith("semantic")}
    acoustic = {stream: shares for stream, shares in frequencies.items() if not stream.startswith("semantic")}
    return [
        Bars(f"{name}: lengths", "seconds", "records", split["seconds"]["histogram"]),
        Bars(f"{name}: runs of a semantic token", "frames", "runs", split["repeats"]["run_lengths"]),
        Lines(f"{name}: semantic tokens", "rank", "frequency", semantic),
        Lines(f"{name}: acoustic codes", "rank", "frequency", acoustic),
    ]
