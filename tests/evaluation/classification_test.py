"""detect, detection-data and the suites that judge by classifiers, beside scikit-learn on what the classifier says."""

import json

import numpy as np
import pytest
import soundfile
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

import audiolm_jax
from audiolm_jax import audio, bundle
from audiolm_jax.classifier.classifier import Classifier
from audiolm_jax.classifier.objective import classify
from audiolm_jax.data import manifest
from audiolm_jax.evaluation import classification, statistics
from audiolm_jax.evaluation.statistics import area_under_curve
from audiolm_jax.parts import write_part
from tests import tiny
from tests.cli_test import assert_user_error, run

RATE = 16_000


def noise(seconds, seed):
    generator = np.random.default_rng(seed)
    wave_W = np.convolve(
        generator.standard_normal(round(seconds * RATE)), np.ones(1 + seed % 5) / (1 + seed % 5), "same"
    )
    return 0.9 * generator.uniform(0.02, 1) * wave_W / np.abs(wave_W).max()


def write_classifier(folder, labels):
    """One with random weights, in doubt about noise."""
    part = tiny.part_of("classifier", **{"model.labels": labels, "split_by": "speaker"})
    model = Classifier.from_weights(part.config, part.weights)
    clips_BW = np.stack([noise(1.0, seed) for seed in range(8)]).astype(np.float32)
    logits_BK, _ = classify(model.config, model.weights, clips_BW, np.full(8, RATE), False)
    scale, head = 2 / np.std(logits_BK, axis=0).mean(), part.weights["params"]["head"]
    head["kernel"], head["bias"] = scale * head["kernel"], -scale * np.mean(logits_BK, axis=0)
    folder.mkdir()
    write_part(folder, part)
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("models") / "detector", ("real", "generated"))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Four recordings of two speakers, one of whom is held out."""
    folder = tmp_path_factory.mktemp("recordings")
    for index, seconds in enumerate((2.5, 3.0, 2.2, 1.1)):
        path = folder / ("anna" if index % 2 else "bert") / f"r{index}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, noise(seconds, index), RATE)
    splits = {recording.speaker: recording.split for recording in manifest.read_manifest(folder)}
    assert set(splits.values()) == {"train", "validation"}
    return folder


def write_run(folder, recordings, mode, prompt_seconds, new_seconds, samples=2, **changed):
    """What `audiolm generate` leaves: two samples of each recording."""
    folder.mkdir()
    entries = []
    for number, recording in enumerate(manifest.read_manifest(recordings)):
        for sample in range(samples):
            wave_W = noise(prompt_seconds + new_seconds, 10 * number + sample + len(mode))
            name = f"{recording.path.stem}_{sample:02}.wav"
            soundfile.write(folder / name, wave_W, RATE)
            entry = {
                "path": name, "mode": mode, "prompt": str(recording.path), "prompt_stretches": [[0.0, None]],
                "prompt_seconds": prompt_seconds, "seconds": len(wave_W) / RATE, "sample_rate": RATE,
            }  # fmt: skip
            entries.append(entry | changed)
    (folder / "generation.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def runs(recordings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / "continued", recordings, "continuation", 0.5, 1.5),
        write_run(folder / "resung", recordings, "acoustic", 0.0, 2.0),
    ]


@pytest.fixture(scope="module")
def pairs(runs, recordings, bundle_folder, tmp_path_factory):
    from audiolm_jax.evaluation import detection_data

    output = tmp_path_factory.mktemp("data") / "pairs"
    detection_data.write([str(path) for path in runs], str(bundle_folder / "codec"), str(recordings), str(output))
    return output


def test_pairs_are_of_one_recording_from_the_prompt_s_end_on(pairs, runs, recordings, bundle_folder):
    rows = {row.id: row for row in manifest.read_manifest(pairs / "manifest.jsonl")}
    originals = {r.path.stem: r for r in manifest.read_manifest(recordings)}
    codec = audiolm_jax.load_codec(bundle_folder / "codec")
    sources = {"continuation": runs[0], "acoustic": runs[1]}
    names = {(mode, f"{stem}_{sample:02}") for mode in sources for stem in originals for sample in range(2)}
    # The last recording ends 0.6 s after the prompt.
    short = {(mode, name) for mode, name in names if mode == "continuation" and name.startswith("r3")}
    assert len(short) == 2
    ids = {f"{m}/{kind}/{sources[m].name}/{name}" for m, name in names - short for kind in ("real", "generated")}
    assert {name for name in rows if "/original/" not in name} == ids
    for mode, name in sorted(names - short):
        original = originals[name[:-3]]
        start = RATE // 2 if mode == "continuation" else 0
        given_W = original.read(RATE)
        generated_W = audio.read(sources[mode] / f"{name}.wav", RATE)
        real_W = np.asarray(codec.decode(codec.encode(given_W[None])))[0]
        stop = min(len(given_W), len(generated_W))
        kinds = {"real": real_W, "generated": generated_W}
        if original.split == "validation":
            kinds["original"] = given_W
        assert (f"{mode}/original/{sources[mode].name}/{name}" in rows) == ("original" in kinds)
        for kind, wave_W in kinds.items():
            row = rows[f"{mode}/{kind}/{sources[mode].name}/{name}"]
            assert row.label == ("generated" if kind == "generated" else "real") and row.speaker == original.speaker
            assert row.split == ("control" if kind == "original" else original.split)
            np.testing.assert_allclose(row.read(RATE), np.clip(wave_W[start:stop], -1, 1), atol=1e-4)


def test_detect_prints_a_line_for_each_recording(capsys, detector, recordings, tmp_path):
    loud = tmp_path / "loud.flac"
    soundfile.write(loud, noise(1.3, 4), 22050)
    status, out, _, _ = run(capsys, "detect", loud, recordings, f"--detector={detector}")
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["path"] for line in lines] == [str(loud), *(str(r.path) for r in manifest.read_manifest(recordings))]
    model = audiolm_jax.load_classifier(detector)
    for line in lines:
        wave_W = audio.read(line["path"], RATE)
        assert set(line) == {"path", "seconds", "generated", "verdict"} and line["seconds"] == len(wave_W) / RATE
        assert line["generated"] == pytest.approx(model.predict(wave_W[None])[0, 1], abs=1e-6)
        assert line["verdict"] == ("generated" if line["generated"] > 0.5 else "real")
    assert np.ptp([line["generated"] for line in lines]) > 1e-3


def test_detect_refuses(capsys, detector, recordings, bundle_folder, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    speakers = write_classifier(tmp_path / "speakers", ("anna", "bert"))
    for arguments, message in (
        ((broken, f"--detector={detector}"), "not audio that can be read"),
        ((tmp_path / "nowhere.wav", f"--detector={detector}"), "input not found"),
        ((recordings,), "required: --detector"),
        ((recordings, f"--detector={speakers}"), "not a detector but a classifier of anna, bert"),
        ((recordings, f"--detector={bundle_folder}"), "bundle without a detector"),
        ((recordings, f"--detector={bundle_folder / 'codec'}"), "not a classifier but a soundstream"),
    ):
        result = run(capsys, "detect", *arguments)
        assert_user_error(result, message)
        assert result[1] == ""
    result = run(capsys, "detect", broken, recordings, f"--detector={detector}")
    assert_user_error(result, "1 of 5 recordings could not be read")
    assert len(result[1].splitlines()) == 4 and "left out: not audio that can be read" in result[3]


def test_area_under_curve_is_scikit_learn_s():
    generator = np.random.default_rng()
    for _ in range(20):
        sizes = generator.integers(1, 30, 2)
        scores = [generator.integers(0, 12, size) / 10 for size in sizes]
        weights = [generator.integers(1, 4, size).astype(float) for size in sizes]
        labels = np.repeat([1, 0], sizes)
        expected = roc_auc_score(labels, np.concatenate(scores), sample_weight=np.concatenate(weights))
        assert area_under_curve(*scores, *weights) == pytest.approx(expected)


def test_intervals_are_over_prompts():
    generator = np.random.default_rng()
    names = [f"run/p-{prompt}_{sample:02}" for prompt in range(40) for sample in range(3)]
    level = {f"run/p-{prompt}": generator.normal() for prompt in range(40)}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    generated = {name: sigmoid(level[name[:-3]] + 1 + 0.1 * generator.normal()) for name in names}
    real = {name: sigmoid(level[name[:-3]]) for name in names}
    found = classification.separation(generated, real, seed=1)
    labels, scores = np.repeat([1, 0], 120), [*generated.values(), *real.values()]
    assert found["auc"].value == pytest.approx(roc_auc_score(labels, scores))
    assert found["accuracy"].value == pytest.approx(balanced_accuracy_score(labels, np.array(scores) > 0.5))
    assert found["auc"].count == 240
    # Drawn by hand, prompt by prompt, with scikit-learn.
    draws = []
    for _ in range(300):
        drawn = generator.integers(40, size=40)
        rows = (3 * drawn[:, None] + np.arange(3)).ravel()
        draws.append(roc_auc_score(labels, np.take(scores, [*rows, *(120 + rows)])))
    low, high = np.percentile(draws, (2.5, 97.5))
    assert found["auc"].low == pytest.approx(low, abs=0.04) and found["auc"].high == pytest.approx(high, abs=0.04)


def evaluate(capsys, suite, output, **options):
    flags = [f"--{name}={value}" for name, value in options.items()]
    return run(capsys, "evaluate", f"--suite={suite}", f"--output={output}", "--seed=3", *flags)


def test_suite_detector(capsys, detector, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLINGS", 100)
    data = pairs / "manifest.jsonl"
    status, _, _, error = evaluate(capsys, "detector", tmp_path / "out", detector=detector, data=data)
    assert status == 0, error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    model = audiolm_jax.load_classifier(detector)
    held_out = [row for row in manifest.read_manifest(data) if row.split != "train"]
    scores = {row.id: float(model.predict(row.read(RATE)[None])[0, 1]) for row in held_out}
    kinds = {
        "": [(name.split("/")[1], score) for name, score in scores.items() if "/original/" not in name],
        **{
            f"{mode}.": [(name.split("/")[1], s) for name, s in scores.items() if name.startswith(mode)]
            for mode in ("acoustic", "continuation")
        },
    }
    metrics = results["metrics"]
    assert len(metrics) == 2 + 4 * len([name for name in kinds if kinds[name] and name])
    for prefix, found in kinds.items():
        for against, suffix in (("real", ""), ("original", "_uncompressed")):
            some = [(kind == "generated", score) for kind, score in found if kind in ("generated", against)]
            if not found or (not prefix and suffix):
                continue
            labels, values = zip(*some)
            metric = metrics[f"{prefix}auc{suffix}"]
            assert metric["value"] == pytest.approx(roc_auc_score(labels, values), abs=1e-6)
            assert metric["low"] <= metric["value"] <= metric["high"] and metric["count"] == len(some)
            accuracy = balanced_accuracy_score(labels, np.array(values) > 0.5)
            assert metrics[f"{prefix}accuracy{suffix}"]["value"] == pytest.approx(accuracy)
    assert results["fingerprints"].keys() == {"detector"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "against uncompressed speech" in page and "<audio" in page


def test_suite_detector_takes_a_bundle(capsys, detector, pairs, bundle_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLINGS", 10)
    parts = {folder.name: str(folder) for folder in bundle_folder.iterdir() if folder.is_dir()}
    bundle.write_bundle({**parts, "detector": str(detector)}, tmp_path / "bundle")
    results = []
    for number, folder in enumerate((detector, tmp_path / "bundle")):
        output = tmp_path / str(number)
        status, _, _, error = evaluate(capsys, "detector", output, detector=folder, data=pairs / "manifest.jsonl")
        assert status == 0, error
        results.append(json.loads((output / "results.json").read_text()))
    assert all(results[0][name] == results[1][name] for name in ("metrics", "fingerprints", "notes"))
    answer = evaluate(capsys, "detector", tmp_path / "no", detector=bundle_folder, data=pairs / "manifest.jsonl")
    assert_user_error(answer, "bundle without a detector")


def test_suite_speaker(capsys, recordings, tmp_path):
    classifier = write_classifier(tmp_path / "speakers", ("anna", "bert"))
    lines = [{"path": str(r.path), "id": r.id, "speaker": r.speaker} for r in manifest.read_manifest(recordings)]
    lines.append({**lines[0], "id": "another", "speaker": "carl"})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**line, "split": "validation"}) + "\n" for line in lines))
    status, _, _, error = evaluate(capsys, "speaker", tmp_path / "out", classifier=classifier, data=data)
    assert status == 0, error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    model, right = audiolm_jax.load_classifier(classifier), {}
    for line in lines[:4]:
        guess = model.labels[model.predict(audio.read(line["path"], RATE)[None])[0].argmax()]
        right.setdefault(line["speaker"], []).append(guess == line["speaker"])
    metrics = results["metrics"]
    assert metrics["accuracy"]["value"] == np.mean(sum(right.values(), [])) and metrics["accuracy"]["count"] == 4
    for speaker, found in right.items():
        assert metrics[f"{speaker}.accuracy"]["value"] == np.mean(found)
    assert results["notes"] == ["1 recordings of labels that the classifier does not know"]


def test_suites_refuse(capsys, detector, recordings, pairs, runs, bundle_folder, tmp_path):
    for suite, options, message in (
        ("detector", {"data": pairs / "manifest.jsonl"}, "suite detector needs --detector"),
        ("detector", {"detector": detector}, "suite detector needs --data"),
        ("detector", {"detector": detector, "data": recordings}, "no pairs of split validation"),
        ("detector", {"detector": bundle_folder / "codec", "data": recordings}, "not a classifier but a soundstream"),
        ("speaker", {"data": recordings}, "suite speaker needs --classifier"),
        ("speaker", {"classifier": detector, "data": recordings}, "no recordings of split validation with the"),
    ):
        assert_user_error(evaluate(capsys, suite, tmp_path / "out", **options), message)
    codec = bundle_folder / "codec"
    other = write_run(tmp_path / "other", recordings, "unconditional", 0.0, 1.0)
    slower = write_run(tmp_path / "slower", recordings, "acoustic", 0.0, 1.0, sample_rate=8000)
    brief = write_run(tmp_path / "brief", recordings, "acoustic", 0.0, 0.5)
    damaged = write_run(tmp_path / "damaged", recordings, "acoustic", 0.0, 1.0, seconds=None)
    for some, given, message in (
        ([other], recordings, "generated audio of mode unconditional"),
        ([damaged], recordings, "no generated audio"),
        ([slower], recordings, "generated audio of another sample rate: 8000 Hz, the codec's 16000 Hz"),
        ([brief], recordings, "no pair of 1 s or more"),
        ([recordings], recordings, "no generated audio"),
        ([runs[0]], recordings / "anna", "prompt is not among the recordings"),
        ([runs[0], runs[0]], recordings, "two runs of one name"),
    ):
        flags = (f"--codec={codec}", f"--input={given}", f"--output={tmp_path / 'pairs'}")
        assert_user_error(run(capsys, "detection-data", *some, *flags), message)
    assert not (tmp_path / "pairs").exists() and not (tmp_path / "out").exists()
