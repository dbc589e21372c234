"""Every figure of `audiolm inspect` against plain loops over random tokens."""

import base64
import collections
import dataclasses
import io
import itertools
import json
import math
import re
import tracemalloc

import numpy as np
import pytest
import scipy.stats
import soundfile

import audiolm_jax
from audiolm_jax import cli
from audiolm_jax.data import token_dataset
from audiolm_jax.evaluation import inspection, token_statistics
from audiolm_jax.parts import write_part
from tests import tiny

METADATA = token_dataset.TokenMetadata("c" * 8, "s" * 8, 9, 7, 3, 25, 50, 16000, 1.5)


def random_records(metadata, split, count, generator):
    records = []
    for number in range(count):
        frames = int(generator.integers(1, 90))
        # Few of the tokens, in runs, and unevenly: as tokens are.
        semantic = np.repeat(generator.geometric(0.3, frames) % metadata.num_clusters, generator.integers(1, 4, frames))
        shape = (2 * frames, metadata.num_quantizers)
        records.append(
            {
                "id": f"{split}/{number}",
                "semantic": semantic[:frames].astype(np.int32),
                "acoustic": (generator.geometric(0.2, shape) % metadata.codebook_size).astype(np.int32),
                "num_samples": 640 * frames - int(generator.integers(320)),
                "speaker": f"speaker {number % 4}",
                "is_end": bool(generator.integers(2)),
            }
        )
    return records


def write(folder, metadata, records_by_split):
    folder.mkdir()
    for split, records in records_by_split.items():
        path = folder / token_dataset.shard_name(split, 0, 1)
        token_dataset.write_shard(path, records, metadata.num_quantizers)
    lengths = {split: [len(records)] for split, records in records_by_split.items()}
    frames = {split: [len(record["semantic"]) for record in records] for split, records in records_by_split.items()}
    token_dataset.write_info(folder, lengths, frames, metadata)
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", *map(str, arguments)])
    return stopped.value.code


def sequences(records, stream):
    """A stream's tokens of each record, and for an acoustic level those of the level below."""
    if stream == "semantic":
        return [record["semantic"].tolist() for record in records], None
    if stream == "semantic_deduplicated":
        return [[token for token, _ in itertools.groupby(record["semantic"].tolist())] for record in records], None
    level = int(stream.removeprefix("acoustic_")) - 1
    tokens, below = ([record["acoustic"][:, q].tolist() for record in records] for q in (level, level - 1))
    return tokens, below if level else None


def smoothed(train, held_out, size):
    """Mean of −log p(b | a) over held-out pairs, p add-one smoothed."""
    pairs, contexts = collections.Counter(train), collections.Counter(a for a, _ in train)
    return np.mean([-math.log((pairs[a, b] + 1) / (contexts[a] + size)) for a, b in held_out])


def pairs_of(tokens, below):
    kinds = {
        "unigram": [(None, token) for row in tokens for token in row],
        "bigram": [pair for row in tokens for pair in itertools.pairwise(row)],
    }
    if below is not None:
        kinds["level_bigram"] = [pair for rows in zip(below, tokens, strict=True) for pair in zip(*rows, strict=True)]
    return kinds


@pytest.mark.parametrize("sizes", [{}, {"num_clusters": 1024, "codebook_size": 2**14}], ids=["small", "piano"])
def test_figures_are_those_of_plain_loops(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(inspection, "STRETCH_FRAMES", 500)
    monkeypatch.setattr(token_statistics, "PENDING", 300)
    metadata = dataclasses.replace(METADATA, **sizes)
    generator = np.random.default_rng()
    counts = {"train": 40, "validation": 17, "prompts": 3}
    records = {split: random_records(metadata, split, count, generator) for split, count in counts.items()}
    write(tmp_path / "tokens", metadata, records)
    assert run(tmp_path / "tokens", f"--output={tmp_path / 'report'}") in (0, None)
    results = json.loads((tmp_path / "report" / "inspection.json").read_text())
    assert results["metadata"] == dataclasses.asdict(metadata) and results["examples"] == []
    assert set(results["splits"]) == set(counts)
    streams = ("semantic", "semantic_deduplicated", "acoustic_1", "acoustic_2", "acoustic_3")
    for split, found in results["splits"].items():
        seconds = [record["num_samples"] / 16000 for record in records[split]]
        assert found["records"] == counts[split] and found["speakers"] == min(4, counts[split])
        assert found["true_ends"] == sum(record["is_end"] for record in records[split])
        assert found["hours"] == pytest.approx(sum(seconds) / 3600)
        lengths = found["seconds"]
        assert [lengths[name] for name in ("shortest", "mean", "longest")] == pytest.approx(
            [min(seconds), np.mean(seconds), max(seconds)]
        )
        assert lengths["histogram"] == np.histogram(seconds, np.arange(int(max(seconds)) + 2))[0].tolist()
        runs = [
            len(list(run)) for record in records[split] for _, run in itertools.groupby(record["semantic"].tolist())
        ]
        assert found["repeats"]["share"] == pytest.approx(1 - len(runs) / sum(runs))
        assert found["repeats"]["mean_run_length"] == pytest.approx(np.mean(runs))
        times = collections.Counter(runs)
        assert found["repeats"]["run_lengths"] == [times[length] for length in range(max(runs) + 1)]
        assert tuple(found["tokens"]) == streams
        for stream, tokens in found["tokens"].items():
            times = collections.Counter(itertools.chain(*sequences(records[split], stream)[0]))
            size = metadata.num_clusters if stream.startswith("semantic") else metadata.codebook_size
            assert tokens["vocabulary"] == size and tokens["used"] == len(times)
            assert tokens["counts"] == [times[token] for token in range(size)]
            assert tokens["count"] == sum(times.values())
            entropy = scipy.stats.entropy(list(times.values()))
            assert tokens["entropy_nats"] == pytest.approx(entropy)
            assert tokens["entropy_bits"] == pytest.approx(entropy / np.log(2))
            assert tokens["perplexity"] == pytest.approx(np.exp(entropy))
    held_out_seconds = sum(record["num_samples"] for record in records["validation"]) / 16000
    assert tuple(results["baselines"]) == streams
    for stream, found in results["baselines"].items():
        size = metadata.num_clusters if stream.startswith("semantic") else metadata.codebook_size
        train, held_out = (pairs_of(*sequences(records[split], stream)) for split in ("train", "validation"))
        assert set(found) == {"tokens_per_second", *held_out}
        rate = len(held_out["unigram"]) / held_out_seconds
        assert found["tokens_per_second"] == pytest.approx(rate)
        for kind, pairs in held_out.items():
            nats = smoothed(train[kind], pairs, size)
            assert found[kind]["nats"] == pytest.approx(nats)
            assert found[kind]["bits"] == pytest.approx(nats / np.log(2))
            assert found[kind]["bits_per_second"] == pytest.approx(nats / np.log(2) * rate)
    page = (tmp_path / "report" / "report.html").read_text()
    for figure in (
        f"{results['baselines']['acoustic_2']['level_bigram']['nats']:.3f}",
        "What a language model must beat",
    ):
        assert figure in page
    assert page.count("data:image/png") == 4 * len(counts) and "<audio" not in page and "://" not in page


def test_examples_are_decoded_by_the_codec_that_made_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "EXAMPLE_SECONDS", 2.0)
    codec = tiny.codec_part()
    (tmp_path / "codec").mkdir()
    write_part(tmp_path / "codec", codec)
    sizes = {"codebook_size": tiny.CODES, "num_quantizers": tiny.LEVELS}
    metadata = dataclasses.replace(METADATA, codec=codec.fingerprint(), **sizes)
    records = {split: random_records(metadata, split, 4, np.random.default_rng(0)) for split in ("train", "validation")}
    tokens = write(tmp_path / "tokens", metadata, records)
    chosen = []
    for seed in (0, 0, 1):
        output = tmp_path / f"report{len(chosen)}"
        flags = [f"--codec={tmp_path / 'codec'}", "--num_examples=3", f"--seed={seed}", f"--output={output}"]
        assert run(tokens, *flags) in (0, None)
        chosen.append(json.loads((output / "inspection.json").read_text())["examples"])
        page = (output / "report.html").read_text()
        assert page.count("<audio") == 3 == len(set(chosen[-1])) and all(name in page for name in chosen[-1])
    assert chosen[0] == chosen[1] != chosen[2]
    by_id = {record["id"]: record for split in records.values() for record in split}
    heard = re.findall(r'<audio[^>]*src="data:[^,]*,([^"]*)"', page)
    model = audiolm_jax.load_codec(tmp_path / "codec")
    for name, data in zip(chosen[2], heard, strict=True):
        wave_W, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
        expected_W = np.asarray(model.decode(by_id[name]["acoustic"][None]))[0, : by_id[name]["num_samples"]]
        assert rate == 16000 and len(wave_W) == min(len(expected_W), 32000)
        np.testing.assert_allclose(wave_W, np.clip(expected_W[:32000], -1, 1), atol=2**-14)

    codec.weights["codebooks"]["embedding"] = codec.weights["codebooks"]["embedding"] + 1
    (tmp_path / "other").mkdir()
    write_part(tmp_path / "other", codec)
    for arguments, message in (
        ([tokens, f"--codec={tmp_path / 'other'}"], "error: the tokens were made by another codec: "),
        ([tmp_path / "nowhere"], "error: no token dataset: "),
        ([tokens, "--num_examples=-1"], "error: num_examples must be 0 or more: "),
    ):
        assert run(*arguments, f"--output={tmp_path / 'refused'}") == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(message)
        assert not (tmp_path / "refused").exists()


def test_without_held_out_records_there_is_nothing_to_beat(tmp_path):
    write(tmp_path / "tokens", METADATA, {"train": random_records(METADATA, "train", 5, np.random.default_rng())})
    assert run(tmp_path / "tokens", f"--output={tmp_path / 'report'}") in (0, None)
    assert json.loads((tmp_path / "report" / "inspection.json").read_text())["baselines"] is None
    assert "needs records in the splits train and validation" in (tmp_path / "report" / "report.html").read_text()


def test_missing_and_damaged_shards_are_named(tmp_path, capsys):
    records = random_records(METADATA, "train", 20, np.random.default_rng())
    tokens = write(tmp_path / "tokens", METADATA, {"train": records})
    shard = tokens / token_dataset.shard_name("train", 0, 1)
    whole = shard.read_bytes()
    middle = len(whole) // 2
    hole = whole[:middle] + bytes(400) + whole[middle + 400 :]
    for data, message in (
        (None, f"error: shard is missing: {shard}; restore it"),
        (whole[:middle], "error: shard is damaged"),
        (hole, "error: shard is damaged"),
    ):
        shard.unlink() if data is None else shard.write_bytes(data)
        assert run(tokens, f"--output={tmp_path / 'refused'}") == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(message) and str(shard) in line
        assert not (tmp_path / "refused").exists()
        shard.write_bytes(whole)


class _Generated:
    """A dataset that exists only as it is read."""

    metadata, splits = METADATA, ("train", "validation")

    def __init__(self, count):
        self._count = count
        self._records = random_records(METADATA, "any", 50, np.random.default_rng(0))

    def source(self, split):
        count, records = self._count, self._records

        class Source:
            __len__ = lambda self: count
            __getitem__ = lambda self, index: {name: np.array(v) for name, v in records[index % 50].items()}

        return Source()


def test_memory_does_not_grow_with_the_records(monkeypatch):
    monkeypatch.setattr(inspection, "STRETCH_FRAMES", 4000)
    monkeypatch.setattr(token_statistics, "PENDING", 4000)

    def peak(count):
        tracemalloc.start()
        try:
            inspection.measure(_Generated(count))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    assert peak(3000) < 1.1 * peak(1000)
