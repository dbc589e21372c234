"""`audiolm compare`: every run's audio beside the recording, grouped by prompt; evaluations metric by metric."""

import base64
import html
import io
import json
import re
import shutil

import numpy as np
import pytest
import soundfile

from audiolm_jax import cli


def write_run(folder, prompts, level, generator):
    """A folder as `audiolm generate` leaves it: half a second of prompt, a second of noise of a level in dB."""
    folder.mkdir()
    entries = []
    for number, prompt in enumerate(prompts):
        wave_W = np.zeros(24000)
        noise_W = generator.standard_normal(16000)
        wave_W[8000:] = noise_W / np.sqrt(np.mean(noise_W**2)) * 10 ** (level / 20)
        soundfile.write(folder / f"made_{number:02}.wav", wave_W, 16000)
        entry = {"path": f"made_{number:02}.wav", "mode": "continuation", "prompt": prompt, "prompt_seconds": 0.5}
        entries.append({**entry, "sample": 0, "seconds": 1.5, "sample_rate": 16000, "ended": number == 1})
    (folder / "generation.json").write_text(json.dumps(entries))
    return str(folder)


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *arguments])
    return stopped.value.code or 0


def test_runs_are_heard_side_by_side(tmp_path):
    generator = np.random.default_rng()
    prompts = [str(tmp_path / f"piece{number}.wav") for number in range(2)]
    for prompt in prompts:
        soundfile.write(prompt, generator.uniform(-0.1, 0.1, 16000 * 3), 16000)
    levels = generator.uniform(-40, -20, 2).tolist()
    runs = [write_run(tmp_path / name, prompts, level, generator) for name, level in zip(("a", "b"), levels)]
    assert run(*runs, f"--output={tmp_path / 'page'}") == 0
    page = (tmp_path / "page" / "report.html").read_text()
    headings = re.findall(r"<h3>(.*?)</h3>", page)
    captions = re.findall(r"<figcaption>(.*?) <span class=\"soft\">(.*?) s</span>", page)
    assert headings == prompts
    assert captions == [
        pair
        for number in range(2)
        for pair in [("The recording", "1.50"), *((f"{folder}/made_0{number}.wav", "1.50") for folder in runs)]
    ]
    rows = re.findall(r"<tr>(.*?)</tr>", page)[1:]
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    expected = [(level, ended) for level in levels for ended in ("no", "yes")]
    for row, (level, ended) in zip(cells, expected, strict=True):
        assert row[1:4] == ["continuation", "1.50", ended]
        assert float(row[4].removesuffix(" dB")) == pytest.approx(level, abs=0.11)
    assert page.count("<audio") == 6 and "curves" not in page.partition("</style>")[2]


def test_stretches_of_one_recording_are_prompts_of_their_own(tmp_path):
    generator = np.random.default_rng()
    prompt = str(tmp_path / "long.wav")
    wave_W = generator.integers(-3000, 3000, 16000 * 4).astype(np.int16)
    soundfile.write(prompt, wave_W, 16000)
    folder = tmp_path / "run"
    write_run(folder, [prompt, prompt], -30, generator)
    entries = json.loads((folder / "generation.json").read_text())
    for entry, stretches in zip(entries, ([[0.5, None]], [[0.25, 0.75], [2, 3.5]])):
        entry["prompt_stretches"] = stretches
    (folder / "generation.json").write_text(json.dumps(entries))
    assert run(str(folder), f"--output={tmp_path / 'page'}") == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert re.findall(r"<h3>(.*?)</h3>", page) == [f"{prompt}, 0.5– s", f"{prompt}, 0.25–0.75, 2–3.5 s"]
    heard = [base64.b64decode(data) for data in re.findall(r'<audio[^>]*src="data:[^,]*,([^"]*)"', page)]
    expected = [wave_W[8000:32000], np.concatenate([wave_W[4000:12000], wave_W[32000:48000]])]
    for data, expected_W in zip(heard[::2], expected, strict=True):
        np.testing.assert_array_equal(soundfile.read(io.BytesIO(data), dtype="int16")[0], expected_W)


def test_a_recording_in_two_places_is_one_prompt(tmp_path):
    """Also of quickstart's workdirs, which compare their figures too."""
    generator = np.random.default_rng()
    losses = generator.uniform(1, 5, 2).tolist()
    for name, loss in zip(("a", "b"), losses):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "piece.wav", np.zeros(8000), 16000)
        prompts = {"continuations": [str(tmp_path / name / "piece.wav")], "acoustic": [], "unconditional": [None]}
        for folder, found in prompts.items():
            write_run(tmp_path / name / folder, found, -20, generator)
        results = {"minutes": 3.5, "language_models": {"coarse": {"loss": loss, "loss_per_level": [1.0]}}}
        (tmp_path / name / "results.json").write_text(json.dumps({**results, "generation": {"continuations": []}}))
    assert run(str(tmp_path / "a"), str(tmp_path / "b"), f"--output={tmp_path / 'page'}") == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert re.findall(r"<h3>(.*?)</h3>", page) == [str(tmp_path / "a" / "piece.wav"), "Unconditional"]
    assert re.findall('data-kind="(.*?)"', page) == ["original", *4 * ["generated"]]
    table = re.search("Measured by quickstart.*?</table>", page, re.DOTALL)[0]
    assert re.findall("<td>(.*?)</td>", table) == [
        *("minutes", "3.5", "3.5", "language_models.coarse.loss", *(f"{loss:.4g}" for loss in losses))
    ]


def write_evaluation(folder, metrics, **others):
    folder.mkdir()
    found = {name: dict(zip(("value", "low", "high", "count"), (*found, 9))) for name, found in metrics.items()}
    results = {"suite": "codec", "seed": 0, "fingerprints": {"codec": folder.name}, "settings": {}, "notes": ["quiet"]}
    (folder / "results.json").write_text(
        json.dumps({**results, "data_fingerprint": "d0", **others, "metrics": found}, indent=2)
    )
    return str(folder)


def test_intervals_that_do_not_meet_are_marked(tmp_path, capsys):
    generator = np.random.default_rng()
    metrics = [{f"m{n}": np.sort(generator.uniform(0, 1, 3))[[1, 0, 2]].tolist() for n in range(40)} for _ in range(3)]
    for found, low in zip(metrics, (0.4, 0.1, 0.7)):
        found["m1"] = [low + 0.1, low, low + 0.2]
    del metrics[1]["m0"]
    metrics[2]["own"] = [1, 1, 1]
    runs = [write_evaluation(tmp_path / name, found) for name, found in zip("abc", metrics)]
    assert run(*runs, f"--output={tmp_path / 'page'}") == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert re.findall('<th scope="col">(.*?)</th>', page) == ["metric", *runs]
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page)[1:]]
    assert [row[0] for row in rows] == [*(f"m{n}" for n in range(40)), "own"]
    seen = set()
    for name, *cells in rows:
        for cell, found in zip(cells, metrics):
            if name not in found:
                assert cell == "–"
                continue
            (value, low, high), (_, first_low, first_high) = found[name], metrics[0].get(name, (0, 0, 1))
            mark = " ▲ higher" if low > first_high else " ▼ lower" if high < first_low else ""
            seen.add(mark)
            assert cell == f"{value:.4g} [{low:.4g}, {high:.4g}]{mark}"
    assert len(seen) == 3
    assert "Warning" not in page and "warning" not in capsys.readouterr().err and f"{runs[1]}: quiet." in page
    details = html.unescape(page[page.index("<dl>") :])
    assert all(f'"codec": "{name}"' in details for name in "abc")


def test_what_should_be_alike_and_is_not_is_said(tmp_path, capsys):
    metrics = {"m": [0.5, 0.4, 0.6]}
    runs = [
        write_evaluation(tmp_path / "a", metrics),
        write_evaluation(tmp_path / "b", metrics, seed=3, data_fingerprint="d1"),
        write_evaluation(tmp_path / "c", {**metrics, "n": metrics["m"]}, suite="abx"),
    ]
    assert run(*runs, f"--output={tmp_path / 'page'}") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    a, b, c = runs
    assert warnings == [
        f"warning: the suites differ: codec in {a}, codec in {b}, abx in {c}",
        f"warning: the seeds differ: 0 in {a}, 3 in {b}, 0 in {c}",
        f"warning: the data differ: d0 in {a}, d1 in {b}, d0 in {c}",
    ]
    page = (tmp_path / "page" / "report.html").read_text()
    assert all(f"W{line[1:]}." in page for line in warnings)


def test_refuses(tmp_path, capsys):
    generator = np.random.default_rng()
    made = write_run(tmp_path / "made", [None], -20, generator)
    codec, other = (write_evaluation(tmp_path / name, {name: [0, 0, 0]}) for name in ("codec", "other"))
    broken, lacking, quickstart = tmp_path / "broken", tmp_path / "lacking", tmp_path / "quickstart"
    shutil.copytree(codec, broken)
    (broken / "results.json").write_text('{"suite": "codec", "metrics": {"m": {"value": 1}}}')
    shutil.copytree(made, lacking)
    (lacking / "made_00.wav").unlink()
    quickstart.mkdir()
    (quickstart / "results.json").write_text('{"generation": {}}')
    for runs, message in (
        ([tmp_path], f"nothing to compare: {tmp_path}; "),
        ([tmp_path / "nowhere"], "nothing to compare: "),
        ([codec, broken], f"nothing to compare: {broken}; "),
        ([made, lacking], f"recording not found: {lacking}/made_00.wav; "),
        ([quickstart], f"no generated audio: {quickstart}/continuations; "),
        ([made, codec], f"an evaluation ({codec}) cannot be compared with generated audio: {made}; "),
        ([codec, other], f"no metric in common (suites: codec): {other}; "),
    ):
        assert run(*map(str, runs), f"--output={tmp_path / 'page'}") == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith(f"error: {message}"), error
        assert not (tmp_path / "page").exists()


def test_damaged_runs(tmp_path, capsys):
    made = write_run(tmp_path / "made", [None], -20, np.random.default_rng())
    (entry,) = json.loads((tmp_path / "made" / "generation.json").read_text())
    found = {"suite": "codec", "metrics": {"m": {"value": 1.0, "low": 0.5, "high": 2.0, "count": 3}}}
    damaged = [
        *({name: entry[name] for name in entry if name != lacking} for lacking in ("path", "mode", "prompt", "ended")),
        *({**entry, name: "x"} for name in ("prompt_seconds", "seconds", "sample_rate", "prompt_stretches")),
        *({**entry, "prompt_stretches": stretches} for stretches in ([[1]], [["x", 1]], 5)),
        {**entry, "sample_rate": 0},
        "x",
    ]
    for entries in ([], *([one] for one in damaged)):
        (tmp_path / "made" / "generation.json").write_text(json.dumps(entries))
        assert run(made, f"--output={tmp_path / 'page'}") == 2, entries
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: no generated audio: {made}; ")
    (tmp_path / "made" / "generation.json").unlink()
    for metrics in ([1], None, {"m": 1}, {"m": {"value": None, "low": 0, "high": 1, "count": 1}}):
        (tmp_path / "made" / "results.json").write_text(json.dumps({**found, "metrics": metrics}))
        assert run(made, f"--output={tmp_path / 'page'}") == 2, metrics
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: nothing to compare: {made}; ")
