"""The suites `acoustic`, `continuation`, `sampling` and `piano` on the smallest bundle, before judges of ours."""

import itertools
import json
import math
import types

import jiwer
import ml_collections
import numpy as np
import pytest
import soundfile

from audiolm_jax import audio, bundle
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import piano, recordings, sampling, statistics, transcribers
from audiolm_jax.evaluation.adapters import Adapter
from audiolm_jax.evaluation.statistics import Estimate
from audiolm_jax.evaluation.suites import Request, evaluate
from audiolm_jax.generate import AudioLM
from audiolm_jax.lm.sampling import Sampling
from tests.evaluation import fakes

RATE, PROMPT = 16_000, 0.5
TEXTS = {"a/0": "one two three four five", "a/1": "Six, seven!", "b/2": "four four four"}


@pytest.fixture(autouse=True)
def judges(monkeypatch):
    fakes.install(monkeypatch)
    monkeypatch.setattr(statistics, "RESAMPLINGS", 50)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A manifest of three recordings of two speakers, one that is too short, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("speech")
    rows = []
    for index, (name, text) in enumerate(TEXTS.items()):
        wave_W = 0.2 * np.random.default_rng(index).standard_normal(round((0.8 + 0.1 * index) * RATE))
        soundfile.write(folder / f"{index}.wav", np.convolve(wave_W, np.ones(3 + index) / 3, "same"), RATE)
        rows.append({"path": f"{index}.wav", "id": name, "speaker": name[0], "text": text})
    soundfile.write(folder / "short.wav", 0.1 * np.ones(RATE // 4), RATE)
    (folder / "bad.wav").write_bytes(b"RIFF")
    rows += [{"path": "short.wav", "speaker": "a"}, {"path": "bad.wav", "speaker": "a"}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "manifest.jsonl"


def measure(bundle_folder, data, output, suite, **settings):
    """The results of a suite."""
    settings = {"min_seconds": 0.7, "num_samples": 2, **settings}
    evaluate(Request(suite, str(output), bundle=str(bundle_folder), data=str(data), **settings))
    return json.loads((output / "results.json").read_text(), parse_constant=pytest.fail)


def waves(data):
    return [audio.read(data.parent / f"{index}.wav", RATE) for index in range(len(TEXTS))]


def test_continuation(model, bundle_folder, data, tmp_path, monkeypatch):
    ours = types.SimpleNamespace(
        labels=("a", "b"),
        sample_rate=RATE,
        predict=lambda wave_BW, lengths_B: np.array([[len(wave_BW[0]) % 2, 0.5]]),
    )
    part = types.SimpleNamespace(fingerprint=lambda: "of the classifier", config=ml_collections.ConfigDict())
    monkeypatch.setattr(bundle, "load_classifier", lambda folder: ours)
    monkeypatch.setattr(bundle, "read_classifier", lambda folder: part)
    results = measure(
        bundle_folder,
        data,
        tmp_path / "out",
        "continuation",
        prompt_seconds=PROMPT,
        seconds=0.5,
        seed=3,
        classifier="DIR",
    )
    found = {name: one["value"] for name, one in results["metrics"].items()}
    size = round(PROMPT * RATE)
    originals = waves(data)
    lengths_B = np.array([len(wave_W) for wave_W in originals])
    wave_BW = np.stack([np.pad(wave_W, (0, lengths_B.max() - len(wave_W))) for wave_W in originals])
    continued = model.generate(wave_BW[:, :size], seconds=0.5, num_samples=2, seed=3, ignore_end=True)
    again = model.generate(wave_BW, "acoustic", num_samples=2, seed=3, lengths_B=lengths_B)
    versions = {
        "original": [[wave_W] for wave_W in originals],
        "acoustic": [[again.wave_BW[2 * i + k, : lengths_B[i]] for k in (0, 1)] for i in range(3)],
        "continuation": [[continued.wave_BW[2 * i + k, : 2 * size] for k in (0, 1)] for i in range(3)],
    }
    rebuilt = [np.asarray(model.codec.decode(model.codec.encode(w[None])))[0, : len(w)] for w in originals]
    versions["reconstruction"] = [[wave_W] for wave_W in rebuilt]
    voices = [fakes.voice(np.clip(wave_W[:size], -1, 1)) for wave_W in originals]
    for system, groups in versions.items():
        of_rest = lambda judge, groups=groups: [
            [judge(np.clip(wave_W[size:], -1, 1)) for wave_W in group] for group in groups
        ]
        expected = np.mean([np.mean(group) for group in of_rest(fakes.level)])
        assert found[f"{system}.quality"] == pytest.approx(expected, rel=1e-4)
        cosines = [
            [voice_D @ other_D / np.linalg.norm(voice_D) / np.linalg.norm(other_D) for other_D in group]
            for voice_D, group in zip(voices, of_rest(fakes.voice), strict=True)
        ]
        assert found[f"{system}.speaker_similarity"] == pytest.approx(np.mean(np.mean(cosines, axis=1)), rel=1e-4)
        # The classifier says "a" of an odd number of samples, and "b" of the others.
        labels = [["ab"[len(wave_W[size:]) % 2 == 0] for wave_W in group] for group in groups]
        right = [np.mean([label == name[0] for label in group]) for name, group in zip(TEXTS, labels, strict=True)]
        assert found[f"{system}.speaker_accuracy"] == pytest.approx(np.mean(right))
        assert results["metrics"][f"{system}.quality"]["count"] == 3
    texts = [text.lower().replace(",", "").replace("!", "") for text in TEXTS.values()]
    heard = [fakes.words(np.clip(wave_W, -1, 1)) for wave_W in originals]
    assert found["original.wer"] == pytest.approx(jiwer.wer(texts, heard))
    assert found["original.cer"] == pytest.approx(jiwer.cer(texts, heard))
    assert "continuation.wer" not in found and "reconstruction.wer" in found
    # Both of speaker a have b for the other one, b has one of a.
    assert results["metrics"]["other_speaker.speaker_similarity"]["count"] == 3
    assert "other_speaker.quality" not in found
    assert results["notes"] == [
        "1 of 5 recordings could not be read and were left out",
        "1 of 5 recordings are shorter than 0.7 s or longer than 10 s and were left out",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<audio") == 3 * 6 and "another speaker" in page


def test_acoustic_without_transcripts(bundle_folder, data, tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    for index, wave_W in enumerate(waves(data)[:2]):
        soundfile.write(folder / f"{index}.wav", wave_W, RATE)
    results = measure(bundle_folder, folder, tmp_path / "out", "acoustic")
    found = results["metrics"]
    assert {"reconstruction.wer", "acoustic.cer", "acoustic.speaker_similarity", "original.quality"} <= set(found)
    # Of the original's own transcript there is no error to be told, and of its voice no likeness to itself.
    assert not {"original.wer", "original.speaker_similarity", "other_speaker.speaker_similarity"} & set(found)
    notes = " ".join(results["notes"])
    assert "no recording has a transcript: word errors are against what ear heard in the original" in notes
    assert "one speaker alone" in notes and "speaker accuracy: not measured" in notes


def test_sampling(model, bundle_folder, data, tmp_path):
    settings = dict(prompt_seconds=PROMPT, seconds=0.5, temperatures=[0.0, 1.5], stages=["semantic"])
    results = measure(bundle_folder, data, tmp_path / "out", "sampling", **settings)
    found = {name: one["value"] for name, one in results["metrics"].items()}
    greedy, hot = "temperature_0_top_k_0_top_p_1", "temperature_1.5_top_k_0_top_p_1"
    # Greedily the same tokens come twice; what the judges hear differs, since the other stages draw.
    assert found[f"{greedy}.distance"] == 0.0 < found[f"{hot}.distance"] <= 1.0
    assert found[f"{greedy}.entropy"] < found[f"{hot}.entropy"] <= 3.0
    size = round(PROMPT * RATE)
    rest = [fakes.level(wave_W[size:]) for wave_W in waves(data)]
    assert found["original.quality"] == pytest.approx(np.mean(rest), rel=1e-4)
    assert {f"{hot}.quality", f"{hot}.speaker_similarity"} <= set(found)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('alt="Curve') == 4 + 2 and page.count("<audio") == 2
    for changes, message in (
        (dict(stages=["medium"]), "no such stage: --stage=medium"),
        (dict(temperatures=[-1.0]), "temperature out of range"),
    ):
        with pytest.raises(UserError, match=message):
            measure(bundle_folder, data, tmp_path / "other", "sampling", **{**settings, **changes})


def test_plots_have_a_line_for_each_cut():
    grid = [sampling.Setting(Sampling(heat, top_k, 1.0)) for heat in (0.5, 1.0) for top_k in (0, 9)]
    names = ("quality", "distance", "entropy")
    metrics = {f"{one.name}.{name}": Estimate(1.0, 0.9, 1.1, 4) for one in grid for name in names}
    metrics["original.quality"] = Estimate(3.0, 2.9, 3.1, 4)
    plots = sampling._plots(grid, metrics)
    assert [plot.label for plot in plots] == ["temperature"] * 3 + [sampling.MEASURES["distance"]]
    for plot in plots:
        assert list(plot.series) == ["top-k all, top-p 1", "top-k 9, top-p 1"]
        assert list(plot.floors.values()) == ([3.0] if plot.title == "quality" else [])
    temperatures = [[place for place, _ in points] for points in plots[0].series.values()]
    assert temperatures == [[0.5, 1.0]] * 2
    assert all(plot.picture_uri().startswith("data:image/") for plot in plots)


def test_diversity():
    generator = np.random.default_rng(0)
    rows = [generator.integers(4, size=size) for size in (12, 9, 0)]

    def levenshtein(first, second):
        table = {(i, 0): i for i in range(len(first) + 1)} | {(0, j): j for j in range(len(second) + 1)}
        for i, j in itertools.product(range(1, len(first) + 1), range(1, len(second) + 1)):
            changed = table[i - 1, j - 1] + (first[i - 1] != second[j - 1])
            table[i, j] = min(changed, table[i - 1, j] + 1, table[i, j - 1] + 1)
        return table[len(first), len(second)]

    for first, second in itertools.product(rows, rows):
        assert sampling.edit_distance(first, second) == levenshtein(first, second)
    distance, entropy = sampling.diversity(rows)
    assert distance == pytest.approx(np.mean([levenshtein(rows[0], rows[1]) / 12, 1.0, 1.0]))
    shares = np.bincount(np.concatenate(rows)) / 21
    assert entropy == pytest.approx(-np.sum(shares * np.log2(shares)))
    assert sampling.diversity([rows[2], rows[2]]) == (None, None)


def test_piano(model, bundle_folder, data, tmp_path):
    settings = dict(prompt_seconds=0.4, seconds=0.4, seed=5, max_seconds=math.inf)
    results = measure(bundle_folder, data, tmp_path / "out", "piano", **settings)
    assert results["settings"]["max_seconds"] == "inf"
    found = {name: one["value"] for name, one in results["metrics"].items()}
    pieces = [wave_W[: round(0.8 * RATE)] for wave_W in waves(data)]
    size = round(0.4 * RATE)
    out = model.generate(
        np.stack([wave_W[:size] for wave_W in pieces]), seconds=0.4, num_samples=2, seed=5, ignore_end=True
    )
    continued = [[out.wave_BW[2 * i + k] for k in (0, 1)] for i in range(3)]
    for system, groups in (("original", [[wave_W] for wave_W in pieces]), ("continuation", continued)):
        says = [
            [
                piano.compare(fakes.notes(wave_W[:size]), fakes.notes(np.clip(other_W[size:], -1, 1)), 0.4, 0.4)
                for other_W in group
            ]
            for wave_W, group in zip(pieces, groups, strict=True)
        ]
        for name in ("pitch_class_similarity", "onset_rate", "inter_onset_seconds"):
            expected = np.mean([np.mean([one[name] for one in group]) for group in says])
            assert found[f"{system}.{name}"] == pytest.approx(expected, rel=1e-4), (system, name)
    assert results["metrics"]["other_piece.key_score"]["count"] <= 3


def test_bad_input(bundle_folder, data, tmp_path, monkeypatch):
    def fails(message, suite="continuation", **settings):
        with pytest.raises(UserError, match=message):
            measure(bundle_folder, data, tmp_path / "out", suite, **settings)

    # The coarse stage of the bundle was trained on crops of 2 s.
    fails("no recording fits", prompt_seconds=0.65, max_seconds=0.71)
    fails("the shortest recordings end with the prompt", prompt_seconds=3.0)
    fails("prompt shorter than a token", prompt_seconds=0.01)
    fails("prompt shorter than a token", prompt_seconds=0.0)
    fails("no recording fits: none lasts 0.04 to 0.01 s", "acoustic", min_seconds=0.0, max_seconds=0.01)
    monkeypatch.setattr(AudioLM, "generate", lambda *_, **__: pytest.fail("generated something"))
    for suite, seconds in itertools.product(("continuation", "sampling", "piano"), (0.0, -1.0, math.inf, math.nan)):
        fails("no length of new audio", suite, prompt_seconds=0.4, seconds=seconds)
    fails("no recording fits: none lasts 1.5 s", "piano", prompt_seconds=0.4, seconds=0.4, min_seconds=1.5)
    fails("prompt longer than the model's window: the coarse stage sees 2 s", "sampling", prompt_seconds=2.5)
    fails("prompt longer than the model's window", "piano", prompt_seconds=2.0)
    fails("no recordings of this split", "acoustic", split="test")
    fails("--seconds is refused: suite acoustic; leave it out, it is for continuation", "acoustic", seconds=1.0)
    fails("--temperature is refused: suite continuation; leave it out, it is for sampling", temperatures=[0.5])
    fails("--stage is refused", "piano", stages=["coarse"])
    fails("--generated is refused", "acoustic", generated=["x"])
    fails("unknown judge: --judge=pesq", judges=["pesq"])
    with pytest.raises(UserError, match="not a bundle"):
        evaluate(Request("acoustic", str(tmp_path / "out"), bundle=str(tmp_path), data=str(data)))
    absent = Adapter("absent", RATE, lambda: None, ("no_such_module",), "pip install it")
    monkeypatch.setitem(transcribers.TRANSCRIBERS, "basic_pitch", absent)
    monkeypatch.delitem(transcribers.TRANSCRIBERS, "grid")
    fails("nobody to transcribe: no module no_such_module: suite piano; pip install it", "piano", prompt_seconds=0.4)
    fails("diversity needs several continuations", "sampling", num_samples=1)
    assert not (tmp_path / "out").exists()


def test_prompts_of_a_bundle_without_a_semantic_stage():
    stage = types.SimpleNamespace(semantic_rate=25, crop_seconds=2.0)
    acoustic_only = types.SimpleNamespace(stages={"coarse": types.SimpleNamespace(stage=stage)})
    recordings.check_prompt(acoustic_only, 0.04, 1.0)
    with pytest.raises(UserError, match=r"prompt shorter than a token: .*; give at least 0\.04"):
        recordings.check_prompt(acoustic_only, 0.03, 1.0)
