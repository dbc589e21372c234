"""`audiolm evaluate --suite=abx` on a tiny tokenizer: its figures against ones worked out here, and scikit-learn's."""

import json
import re

import numpy as np
import pytest
import soundfile
from sklearn import metrics as sklearn_metrics

from audiolm_jax import audio, bundle
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import alignment, phonetics, purity, statistics
from audiolm_jax.evaluation.alignment import Segment
from audiolm_jax.evaluation.items import write_items
from tests.cli_test import assert_user_error, run
from tests.evaluation.abx_test import published

RATE, PHONE_SECONDS = 16_000, 0.1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three speakers; x stands between a, b or silence, each phone a tone of its own."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    lines = ["path\tonset\toffset\tphone"]
    for speaker in range(3):
        phones = [phone for middle in generator.choice(["a", "a", "b", "b", "sil"], 11) for phone in ("x", middle)]
        time_W = np.arange(round(len(phones) * PHONE_SECONDS * RATE)) / RATE
        pitches = {"x": 300.0, "a": 700.0 + 90 * speaker, "b": 900.0 + 90 * speaker, "sil": 0.0}
        pitch_W = np.repeat([pitches[phone] for phone in phones], round(PHONE_SECONDS * RATE))
        wave_W = 0.2 * np.sin(2 * np.pi * pitch_W * time_W) + 0.02 * generator.standard_normal(len(time_W))
        (folder / f"s{speaker}").mkdir()
        soundfile.write(folder / f"s{speaker}" / "one.flac", wave_W, RATE)
        times = np.arange(len(phones) + 1) * PHONE_SECONDS
        lines += [f"s{speaker}/one.flac\t{a:.3f}\t{b:.3f}\t{p}" for a, b, p in zip(times, times[1:], phones)]
    (folder / alignment.TABLE).write_text("\n".join(lines) + "\n")
    return folder


def evaluate(capsys, folders, data, output, *arguments):
    given = [f"--semantic_tokenizer={folder}" for folder in folders]
    return run(capsys, "evaluate", "--suite=abx", *given, f"--data={data}", f"--output={output}", *arguments)


def published_errors(data, features, frame_rate):
    """Of features(wave_W) by the definition, one triple at a time."""
    segments, tokens = alignment.read_alignment(data / alignment.TABLE), []
    for before, middle, after in zip(segments, segments[1:], segments[2:]):
        phones = before.phone, middle.phone, after.phone
        if before.file == after.file and "sil" not in phones:
            x_TD = features[middle.file]
            first, last = np.ceil(before.onset * frame_rate - 0.5), np.floor(after.offset * frame_rate - 0.5)
            frames = tuple(map(tuple, x_TD[int(max(first, 0)) : int(last)].tolist()))
            tokens.append(((before.phone, after.phone), middle.speaker, middle.phone, frames))
    return published(tokens)


@pytest.fixture(scope="module")
def few_resamplings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLINGS", 50)
        yield


def test_figures(capsys, few_resamplings, bundle_folder, data, tmp_path):
    folder, output = bundle_folder / "semantic_tokenizer", tmp_path / "out"
    status, out, _, error = evaluate(capsys, [folder], data, output, "--seed=3")
    assert (status, out) == (0, f"report: {output}/report.html\n"), error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    results = json.loads((output / "results.json").read_text())
    assert results["fingerprints"] == {"semantic_tokenizer": bundle.read_part(folder).fingerprint()}
    metrics, tokenizer = results["metrics"], bundle.load_semantic_tokenizer(folder)
    paths = {f"s{speaker}/one": data / f"s{speaker}" / "one.flac" for speaker in range(3)}
    waves = {name: audio.read(path, RATE) for name, path in paths.items()}
    x = {name: tokenizer.features(wave_W[None])[0] for name, wave_W in waves.items()}
    z = {name: tokenizer.encode(wave_W[None])[0] for name, wave_W in waves.items()}
    whole_FD = np.concatenate(list(x.values())).astype(float)
    scaled = {name: (x_TD - whole_FD.mean(axis=0)) / whole_FD.std(axis=0) for name, x_TD in x.items()}
    centroids = {name: np.asarray(tokenizer.clusters["centroids"], float)[z_T] for name, z_T in z.items()}
    kinds = {
        "log_mel": ({name: phonetics.log_mel(wave_W) for name, wave_W in waves.items()}, 100),
        "semantic_tokenizer.layer_1": (x, 25),
        "semantic_tokenizer.layer_1.normalized": (scaled, 25),
        "semantic_tokenizer.centroids": (centroids, 25),
        "semantic_tokenizer.tokens": ({name: np.eye(8)[z_T] for name, z_T in z.items()}, 25),
    }
    for name, (features, frame_rate) in kinds.items():
        for mode, expected in published_errors(data, features, frame_rate).items():
            found = metrics[f"{name}.{mode}"]
            assert found["value"] == pytest.approx(expected, abs=1e-6), (name, mode)
            assert found["low"] <= found["value"] <= found["high"] and found["count"] > 0
    better = min(metrics[f"{name}.across"]["value"] for name in phonetics.BASELINES)
    below = metrics["semantic_tokenizer.layer_1.across.below_log_mel"]
    assert below["value"] == pytest.approx(better - metrics["semantic_tokenizer.layer_1.across"]["value"])

    labels = {}
    for segment in alignment.read_alignment(data / alignment.TABLE):
        for frame in range(round(segment.onset * 1000), round(segment.offset * 1000)):
            labels[segment.file, frame] = segment.phone
    pairs = [(labels[name, 40 * t + 20], token) for name, z_T in z.items() for t, token in enumerate(z_T)]
    phones, tokens = zip(*pairs)
    counts_PK = sklearn_metrics.cluster.contingency_matrix(phones, tokens)
    expected = {
        "phone_purity": counts_PK.max(axis=0).sum() / counts_PK.sum(),
        "cluster_purity": counts_PK.max(axis=1).sum() / counts_PK.sum(),
        "pnmi": sklearn_metrics.homogeneity_score(phones, tokens),
        "tokens_per_second": 25.0,
        "deduplicated_tokens_per_second": sum(1 + np.sum(z_T[1:] != z_T[:-1]) for z_T in z.values()) * 25 / len(pairs),
    }
    for name, value in expected.items():
        assert metrics[f"semantic_tokenizer.{name}"]["value"] == pytest.approx(value, abs=1e-9), name
    page = (output / "report.html").read_text()
    assert 'id="hear"' not in page and "PNMI" in page and "semantic_tokenizer.layer_1.normalized" in page


def test_layers_and_numbers_of_clusters_are_plotted(capsys, few_resamplings, bundle_folder, data, tmp_path):
    copies = []
    for name in ("few", "many"):
        (tmp_path / name).mkdir()
        for path in (bundle_folder / "semantic_tokenizer").iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        copies.append(tmp_path / name)
    items = alignment.triphones(alignment.read_alignment(data / alignment.TABLE))
    # An item file's names are stems; those of the table, paths, are found just as well.
    write_items(data / "x.item", items)
    status, *_, error = evaluate(capsys, copies, data / "x.item", tmp_path / "out", "--layer=0", "--layer=1")
    (data / "x.item").unlink()
    assert status == 0, error
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert {"few.layer_0.across", "many.layer_1.normalized.within", "many.tokens.within"} <= set(metrics)
    assert metrics["few.tokens_per_second"]["value"] == pytest.approx(25.0) and "few.pnmi" not in metrics
    titles = re.findall('alt="Curve: ([^"]*)"', (tmp_path / "out" / "report.html").read_text())
    assert titles == ["ABX error, few", "ABX error, few, normalized", "ABX error, many", "ABX error, many, normalized",
                      "ABX error, centroids", "ABX error, tokens"]  # fmt: skip


def test_more_frames_a_second_come_from_passes_in_between(capsys, few_resamplings, bundle_folder, data, tmp_path):
    folder, output = bundle_folder / "semantic_tokenizer", tmp_path / "out"
    status, *_, error = evaluate(capsys, [folder], data, output, "--frame_rate=75")
    assert status == 0, error
    metrics = json.loads((output / "results.json").read_text())["metrics"]
    tokenizer, features = bundle.load_semantic_tokenizer(folder), {}
    for speaker in range(3):
        wave_W = audio.read(data / f"s{speaker}" / "one.flac", RATE)
        # A frame is of 640 samples: passes a third of that earlier, in place, and later.
        passes = [
            tokenizer.features(np.concatenate(parts)[None])[0]
            for parts in ((np.zeros(213), wave_W[:-213]), (wave_W,), (wave_W[213:], np.zeros(213)))
        ]
        features[f"s{speaker}/one"] = np.array([x_TD[t] for t in range(len(passes[0])) for x_TD in passes])
    for mode, expected in published_errors(data, features, 75).items():
        assert metrics[f"semantic_tokenizer.layer_1.{mode}"]["value"] == pytest.approx(expected, abs=1e-6)
    assert metrics["semantic_tokenizer.tokens_per_second"]["value"] == pytest.approx(25.0)
    assert "75 of the layers of semantic_tokenizer" in (output / "report.html").read_text()


def test_refuses(capsys, bundle_folder, data, tmp_path):
    folder, output = bundle_folder / "semantic_tokenizer", tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.tsv"
    lone = tmp_path / "lone.item"
    lone.write_text("#header\nnowhere 0.1 0.2 a b c s\n")
    latin = tmp_path / "latin.item"
    latin.write_bytes(b"#header\ncaf\xe9 0.1 0.2 a b c s\n")
    for folders, path, arguments, message in (
        ([folder], empty, (), "no items"),
        ([folder], tmp_path / "nowhere", (), "no items"),
        ([folder], lone, (), "recording is not there: nowhere"),
        ([folder], data, ("--layer=9",), "no such layer: --layer=9"),
        ([folder], data, ("--frame_rate=30",), "not a multiple of the encoder's frame rate: --frame_rate=30"),
        *(
            (
                [folder],
                data,
                (f"--frame_rate={rate}",),
                f"not a multiple of the encoder's frame rate: --frame_rate={rate}",
            )
            for rate in ("0", "inf", "nan")
        ),
        ([folder], latin, (), "item file not in UTF-8"),
        ([folder, folder], data, (), "two parts of one name"),
        ([bundle_folder / "codec"], data, (), "not a semantic tokenizer"),
    ):
        assert_user_error(evaluate(capsys, folders, path, output, *arguments), message)
    for text, message in (
        ("path onset offset phone", "no column path"),
        ("path\tonset\toffset\tphone\n", "no phones"),
        ("path\tonset\toffset\tphone\nf.wav\t0\tx\ta", "line 2"),
        ("path\tonset\toffset\tphone\nf.wav\t0\t1", "line 2"),
        ("path\tonset\toffset\tphone\nf.wav\t2\t1\ta", "stretch of time"),
    ):
        broken.write_text(text)
        with pytest.raises(UserError, match=message):
            alignment.read_alignment(broken)
    broken.write_bytes(b"path\tonset\toffset\tphone\ncaf\xe9.wav\t0\t1\ta\n")
    with pytest.raises(UserError, match="alignment cannot be read"):
        alignment.read_alignment(broken)
    broken.write_text("\ufeffpath\tonset\toffset\tphone\nf.wav\t0\t1\ta\n")
    assert [segment.phone for segment in alignment.read_alignment(broken)] == ["a"]
    result = run(capsys, "evaluate", "--suite=abx", f"--data={data}", f"--output={output}")
    assert_user_error(result, "suite abx needs --semantic_tokenizer")
    assert not output.exists()


def test_a_recording_is_found_by_its_path_before_its_name(tmp_path):
    for name in ("a.wav", "deep/a.wav", "deep/b.wav", "other/b.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, np.zeros(100), RATE)
    lines = ["path\tonset\toffset\tphone", *(f"a.wav\t{t}\t{t + 1}\t{phone}" for t, phone in enumerate("pqr"))]
    table = tmp_path / alignment.TABLE
    table.write_text("\n".join(lines))
    assert alignment.read_material(tmp_path).paths == {"a": tmp_path / "a.wav"}
    table.write_text("\n".join(lines).replace("a.wav", "b.wav"))
    with pytest.raises(UserError, match="2 recordings of that name: b in"):
        alignment.read_material(table)


def test_triphones_stop_at_silence_gaps_and_ends():
    at = lambda file, names, start=0.0: [
        Segment(file, start + i, start + i + 1, phone, "s") for i, phone in enumerate(names.split())
    ]
    items = alignment.triphones([*at("f", "a b c SIL d e"), *at("f", "g h i", 6.5), *at("g", "j k")])
    assert [(i.file, i.onset, i.offset, i.previous, i.phone, i.following) for i in items] == [
        ("f", 0.0, 3.0, "a", "b", "c"),
        ("f", 6.5, 9.5, "g", "h", "i"),
    ]


def test_frames_take_the_phone_at_their_middle():
    segments = [
        Segment("f", 0.02, 0.05, "a", "s"),
        Segment("f", 0.05, 0.09, "b", "s"),
        Segment("f", 0.12, 0.2, "c", "s"),
    ]
    assert alignment.frame_phones(segments, 50, 7) == [None, "a", "b", "b", None, None, "c"]
    assert alignment.frame_phones([], 50, 2) == [None, None]


def test_agreement_of_known_tables():
    assert purity.agreement(np.eye(4) * 7) == pytest.approx({"phone_purity": 1, "cluster_purity": 1, "pnmi": 1})
    assert purity.agreement(np.full((4, 5), 3)) == pytest.approx(
        {"phone_purity": 0.25, "cluster_purity": 0.2, "pnmi": 0}
    )
    assert purity.agreement(np.array([[3, 1]]))["pnmi"] == 0.0


def test_ratio_of_sums():
    found = statistics.bootstrap_ratio([1.0, 9.0], [1.0, 3.0], seed=0)
    assert found.value == 2.5 and (found.low, found.high) == (1.0, 3.0) and found.count == 2
