"""`audiolm compare`: every run's audio beside the recording, grouped by prompt."""

import json
import re

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


def test_a_folder_without_generated_audio_is_refused(tmp_path, capsys):
    assert run(str(tmp_path), f"--output={tmp_path / 'page'}") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: no generated audio: {tmp_path}; ")
    assert not (tmp_path / "page").exists()
