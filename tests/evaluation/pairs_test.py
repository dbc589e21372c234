"""`audiolm evaluate` on pairs of recordings: ZeroSpeech's rule, the layouts, and what is said of bad input."""

import collections
import json
import os
import shutil

import numpy as np
import pytest
import soundfile

from audiolm_jax import audio
from audiolm_jax.evaluation import pair_layouts, pairs, statistics
from tests.cli_test import assert_user_error, run
from tests.evaluation.pair_sets import LEXICAL, RATE, SYNTACTIC, noise_pairs, write_gold, write_sets


def official_lexical(rows, scores):
    """Of every id the mean over voices; the means over all and, weighted by their sizes, over all bands but `oov`."""
    words = {(row["id"], row["voice"]): row for row in rows if row["correct"] == "1"}
    of_voices, frequency = collections.defaultdict(list), {}
    for row in rows:
        if row["correct"] == "0":
            word = words[row["id"], row["voice"]]
            difference = scores[word["filename"]] - scores[row["filename"]]
            of_voices[row["id"]].append((np.sign(difference) + 1) / 2)
            frequency[row["id"]] = int(word["frequency"])
    by_pair = {name: np.mean(voices) for name, voices in of_voices.items()}
    bands = collections.defaultdict(list)
    for name, value in by_pair.items():
        bands[int(np.digitize(frequency[name], [1, 5, 20, 100]))].append(value)
    sizes, means = zip(*((len(band), np.mean(band)) for number, band in sorted(bands.items()) if number > 0))
    return np.mean(list(by_pair.values())), np.average(means, weights=sizes)


def official_syntactic(rows, scores):
    """The k-th correct row against the k-th that is not; means over (type, subtype, id), then by type."""
    right, wrong = ([row for row in rows if row["correct"] == correct] for correct in "10")
    of_voices = collections.defaultdict(list)
    for one, other in zip(right, wrong, strict=True):
        mine, its = scores[one["filename"]], scores[other["filename"]]
        of_voices[one["type"], one["subtype"], one["id"]].append(0.5 * (mine == its) + (mine > its))
    by_type = collections.defaultdict(list)
    for (kind, _, _), voices in of_voices.items():
        by_type[kind].append(np.mean(voices))
    everything = np.mean([value for values in by_type.values() for value in values])
    return {"all": everything, **{kind: np.mean(values) for kind, values in by_type.items()}}


def generated(tmp_path, header, part, describe, seed):
    """A gold.csv with names without sound behind them, and scores of which many are equal."""
    generator, rows = np.random.default_rng(seed), []
    for pair in range(60):
        for voice in generator.choice(["A", "B", "C"], generator.integers(1, 4), replace=False):
            for correct in (1, 0):
                rows.append([f"f{len(rows)}", pair // 2 if part == "syntactic" else pair, voice])
                rows[-1] += [*describe(pair, generator), correct]
    folder = tmp_path / part / "test"
    write_gold(folder, header, rows)
    for row in rows:
        (folder / f"{row[0]}.wav").touch()
    scores = {row[0]: float(score) for row, score in zip(rows, generator.integers(-9, -3, len(rows)), strict=True)}
    return [dict(zip(header, map(str, row), strict=True)) for row in rows], scores


def test_the_official_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLINGS", 50)
    seed = np.random.default_rng().integers(1000)
    frequency_of = lambda pair, _: [(pair * 7) % 130 * (pair % 4 > 0), f"word{pair}", "a b", 4]
    rows, scores = generated(tmp_path, LEXICAL, "lexical", frequency_of, seed)
    found = pairs.estimate(pair_layouts.read_swuggy(str(tmp_path), "test"), {"sum": scores}, 0)
    everything, in_vocabulary = official_lexical(rows, scores)
    assert found["all.sum"].value == pytest.approx(everything, abs=1e-12)
    assert found["in_vocabulary.sum"].value == pytest.approx(in_vocabulary, abs=1e-12)
    assert found["all.sum"].count == 60 > found["in_vocabulary.sum"].count > 30
    assert found["all.sum"].low < everything < found["all.sum"].high and everything != in_vocabulary

    # Two pairs of one id differ in their subtype alone.
    kind_of = lambda pair, _: [f"type{pair % 6 // 2}", f"subtype{pair % 2}", "she sings"]
    rows, scores = generated(tmp_path, SYNTACTIC, "syntactic", kind_of, seed)
    found = pairs.estimate(pair_layouts.read_sblimp(str(tmp_path), "test"), {"sum": scores}, 0)
    wanted = official_syntactic(rows, scores)
    assert {name.removesuffix(".sum"): estimate.value for name, estimate in found.items()} == pytest.approx(wanted)
    assert [estimate.count for estimate in found.values()] == [60, 20, 20, 20]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    waves = noise_pairs(6)
    # The fourth pair is a tie, in whatever batch.
    waves[3] = waves[3][0], waves[3][0]
    return write_sets(tmp_path_factory.mktemp("sets"), waves)


def evaluate(capsys, suite, bundle, data, output, *arguments):
    given = [f"--suite={suite}", f"--bundle={bundle}", f"--data={data}", f"--output={output}"]
    return run(capsys, "evaluate", *given, *arguments)


def read_scores(output, name):
    lines = (output / f"scores_{name}.txt").read_text().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines}


@pytest.mark.parametrize("suite", ("swuggy", "sblimp", "storycloze", "salmon"))
def test_figures(suite, capsys, model, bundle_folder, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLINGS", 50)
    monkeypatch.setattr(pairs, "BATCH_RECORDINGS", 8)
    monkeypatch.setattr(pairs, "HEARD_PAIRS", 1)
    status, out, _, error = evaluate(capsys, suite, bundle_folder, sets[suite], tmp_path / "out")
    assert status == 0 and out == f"report: {tmp_path / 'out'}/report.html\n", error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["fingerprints"] == model.fingerprints and results["notes"] == []
    folder = sets[suite] / {"swuggy": "lexical/dev", "sblimp": "syntactic/dev"}.get(suite, "")
    if suite in ("swuggy", "sblimp"):
        members = [(f"r{number}", f"n{number}") for number in range(6)]
    else:
        right, wrong = ("{}_correct", "{}_incorrect") if suite == "storycloze" else ("sample_{}_0", "sample_{}_1")
        task = lambda number: ("first/", "second/")[number % 2]
        members = [(task(n) + right.format(n), task(n) + wrong.format(n)) for n in range(6)]
    subsets = {
        "swuggy": {"all": (0, 1, 2, 3, 4, 5), "in_vocabulary": (2, 3)},
        "sblimp": {"all": range(6), "first": (0, 2, 4), "second": (1, 3, 5)},
    }
    for name in ("normalized", "sum"):
        scores = read_scores(tmp_path / "out", name)
        assert set(scores) == {member for pair in members for member in pair}
        for member, value in scores.items():
            wave_W = audio.read(folder / f"{member}.wav", RATE)
            (plain,) = model.log_likelihood(wave_W[None], normalize=name == "normalized")
            assert value == pytest.approx(plain, rel=1e-5)
        outcomes = [(np.sign(scores[right] - scores[wrong]) + 1) / 2 for right, wrong in members]
        assert outcomes[3] == 0.5
        for subset, numbers in subsets.get(suite, subsets["sblimp"]).items():
            found = results["metrics"][f"{subset}.{name}"]
            assert found["value"] == pytest.approx(np.mean([outcomes[number] for number in numbers]))
            assert found["count"] == len(numbers) / (2 if suite == "swuggy" else 1)
    assert len(results["metrics"]) == 2 * len(subsets.get(suite, subsets["sblimp"]))
    assert (tmp_path / "out" / "report.html").read_text().count("<audio") == 2


def test_long_recordings_are_scored_in_stretches_of_the_crop(capsys, model, bundle_folder, tmp_path):
    generator = np.random.default_rng(0)
    # 4 s, the tiny crop, are 64000 samples.
    waves = [0.1 * generator.standard_normal(length).astype(np.float32) for length in (70_000, 30_000)]
    data = write_sets(tmp_path, [tuple(waves)])["salmon"]
    assert evaluate(capsys, "salmon", bundle_folder, data / "first", tmp_path / "out")[0] == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (note,) = results["notes"]
    assert note.startswith("1 of 2 recordings are longer") and "stretches of 4 s" in note
    assert set(results["metrics"]) == {f"{name}.{how}" for name in ("all", "first") for how in ("normalized", "sum")}
    scores, lm = read_scores(tmp_path / "out", "sum"), model.stages["semantic"]
    semantic_T = model.tokenizer.encode(audio.read(data / "first" / "sample_0_0.wav", RATE)[None])[0]
    parts = [
        {"semantic": part_T, "acoustic": np.zeros((0, 3)), "is_end": False} for part_T in np.split(semantic_T, [100])
    ]
    likelihoods, counts = model.token_log_likelihoods("semantic", parts)
    assert scores["sample_0_0"] == pytest.approx(likelihoods.sum(), rel=1e-5) and min(counts) > 0
    assert lm.stage.crop_frames == 100


def with_gold(change):
    """Damage to sWUGGY's table, which is a list of lines."""

    def damage(folder):
        gold = folder / "zr" / "lexical" / "dev" / "gold.csv"
        lines = gold.read_text().splitlines()
        change(lines)
        gold.write_text("\n".join(lines) + "\n")

    return damage


def replace(number, old, new):
    def change(lines):
        assert old in lines[number]
        lines[number] = lines[number].replace(old, new)

    return with_gold(change)


@pytest.mark.parametrize(
    ("suite", "damage", "message"),
    [
        ("swuggy", lambda folder: (folder / "zr/lexical/dev/n2.wav").unlink(), "recording is missing"),
        ("swuggy", with_gold(lambda lines: lines.pop(2)), "here are 1 and 0: "),
        ("swuggy", replace(4, "v1", "v0"), "here are 1 and 2: "),
        ("swuggy", with_gold(lambda lines: lines.append(lines[1])), "r0 comes twice"),
        ("swuggy", replace(1, ",1", ",yes"), "correct is 'yes', not 0 or 1"),
        ("swuggy", replace(5, ",3,", ",often,"), "gold.csv is damaged (could not convert string to float: 'often')"),
        ("swuggy", replace(3, ",a b,2,1", ""), "a row is cut off"),
        ("swuggy", replace(0, "frequency", "often"), "gold.csv lacks the column frequency"),
        ("swuggy", with_gold(lambda lines: lines.__delitem__(slice(1, None))), "no pairs"),
        ("swuggy", lambda folder: (folder / "zr/lexical/dev/gold.csv").write_bytes(b"\xff\xfe"), "gold.csv is damaged"),
        ("swuggy", lambda folder: (folder / "zr/lexical/dev/gold.csv").write_bytes(b""), "lacks the column filename"),
        ("swuggy", replace(0, ",", ";"), "lacks the column filename: "),
        ("swuggy", lambda folder: (folder / "zr/lexical/dev/r1.wav").write_bytes(b"no sound"), "r1.wav"),
        ("sblimp", lambda folder: shutil.rmtree(folder / "zr/syntactic"), "no gold.csv"),
        ("storycloze", lambda folder: (folder / "story/first/2_correct.wav").unlink(), "here are 0 and 1: "),
        ("storycloze", lambda folder: [path.unlink() for path in (folder / "story").rglob("*.wav")], "no pairs"),
        ("storycloze", lambda folder: shutil.rmtree(folder / "story"), "no such folder"),
        ("salmon", lambda folder: (folder / "salmon/second/sample_1_1.wav").unlink(), "here are 1 and 0: "),
        (
            "salmon",
            lambda folder: shutil.copy(folder / "salmon/first/sample_0_0.wav", folder / "salmon/first/sample_0_2.wav"),
            "here are 1 and 2: ",
        ),
        ("salmon", lambda folder: [path.unlink() for path in (folder / "salmon").rglob("*.wav")], "no pairs"),
    ],
)
def test_damaged_sets(suite, damage, message, capsys, bundle_folder, tmp_path):
    sets = write_sets(tmp_path, [(np.ones(800) / 9, np.ones(900) / 9)] * 3)
    damage(tmp_path)
    assert_user_error(evaluate(capsys, suite, bundle_folder, sets[suite], tmp_path / "out"), message)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("suite", ("swuggy", "storycloze", "salmon"))
def test_tables_of_spreadsheets_and_other_suffixes(suite, tmp_path):
    data = str(write_sets(tmp_path, noise_pairs(2))[suite])
    plain = pairs.LAYOUTS[suite](data, None)
    for path in tmp_path.rglob("*_*.wav"):
        path.rename(path.with_suffix(".WAV"))
    for path in tmp_path.rglob("n*.wav"):
        path.rename(path.with_suffix(".flac"))
    for path in tmp_path.rglob("gold.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = pairs.LAYOUTS[suite](data, None)
    names = lambda trials: [(trial.pair, trial.subsets, trial.right.id, trial.wrong.id) for trial in trials]
    assert names(found) == names(plain)
    assert found[0].wrong.path.suffix == (".flac" if suite == "swuggy" else ".WAV") and found[0].wrong.path.exists()


def test_names_that_are_not_text(capsys, bundle_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLINGS", 50)
    folder = os.fsencode(write_sets(tmp_path, noise_pairs(1))["storycloze"] / "first")
    for kind in (b"correct", b"incorrect"):
        os.rename(folder + b"/0_" + kind + b".wav", folder + b"/caf\xe9_" + kind + b".wav")
    status, *_, error = evaluate(capsys, "storycloze", bundle_folder, os.fsdecode(folder), tmp_path / "out")
    assert status == 0, error
    assert (tmp_path / "out" / "scores_sum.txt").read_bytes().startswith(rb"caf\udce9_correct ")
    assert b"caf\xe9" in (tmp_path / "out" / "report.html").read_bytes()


def test_refuses(capsys, bundle_folder, sets, tmp_path):
    story, output = sets["storycloze"], tmp_path / "out"
    refused = evaluate(capsys, "storycloze", bundle_folder, story, output, "--split=dev")
    assert_user_error(refused, "this set has no splits")
    assert_user_error(evaluate(capsys, "swuggy", bundle_folder, sets["swuggy"], output, "--split=test"), "no gold.csv")
    assert_user_error(evaluate(capsys, "salmon", tmp_path, sets["salmon"], output), "not a bundle")
    assert_user_error(run(capsys, "evaluate", "--suite=salmon", f"--output={output}"), "suite salmon needs --bundle")
    silent = tmp_path / "short" / "sample_0_1.wav"
    silent.parent.mkdir()
    soundfile.write(silent, np.zeros(0), RATE)
    soundfile.write(silent.with_name("sample_0_0.wav"), np.ones(800) / 9, RATE)
    assert_user_error(evaluate(capsys, "salmon", bundle_folder, silent.parent, output), "sample_0_1.wav")
