"""Runs the walk-throughs of the README and of docs/piano.md, command by command, in tiny sizes."""

import json
import pathlib
import re
import shlex

import numpy as np
import pytest
import soundfile

from audiolm_jax import cli
from audiolm_jax.evaluation.unigram import unigram_losses
from tests import scores, tiny
from tests.render_test import needs_fluidsynth

ROOT = pathlib.Path(__file__).parent.parent
OBJECTIVES = {"soundstream": "soundstream", "w2v_bert": "w2v_bert", "acoustic": "coarse"}


def commands(page):
    block = re.search(r"<!-- walkthrough.*?```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("audiolm ")]


def shrunk(words, recordings):
    """The command with this test's recordings and, for trainings, the smallest model."""
    words = [
        word.replace("RECORDINGS", str(recordings)).replace("PROMPT.wav", f"{recordings}/low/tone0.wav")
        for word in words
    ]
    words = [
        word.replace("--num_clusters=64", f"--num_clusters={tiny.CLUSTERS}").replace("--layer=3", "--layer=1")
        for word in words
    ]
    if words[1] == "train":
        config = next(word.partition("=")[2] for word in words if word.startswith("--config="))
        name = config.removesuffix("_tiny").removesuffix("_piano")
        objective = OBJECTIVES.get(name, name)
        words += [*tiny.flags_of(objective), "--config.num_train_steps=3", "--config.log_every_steps=1"]
        if "_piano" in config and objective in tiny.STAGES:
            words.append(f"--config.stage.num_coarse_quantizers={tiny.LEVELS}")
    return words[1:]


def run(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert not stopped.value.code, arguments


@pytest.mark.slow
def test_walkthrough(tmp_path, monkeypatch):
    recordings = tiny.write_recordings(tmp_path / "recordings")
    monkeypatch.chdir(tmp_path)
    listed = commands("README.md")
    assert [words[1] for words in listed] == [
        *("train", "train", "fit-kmeans", "tokenize", "train", "train", "train", "bundle"),
        *("generate", "generate", "generate", "encode", "decode"),
    ]
    for words in listed:
        run(shrunk(words, recordings))
    lengths = {}
    for mode in ("continuations", "acoustic", "unconditional"):
        entries = json.loads((tmp_path / "runs" / mode / "generation.json").read_text())
        for entry in entries:
            wave, rate = soundfile.read(tmp_path / "runs" / mode / entry["path"])
            assert rate == 16000 and len(wave) == round(entry["seconds"] * rate) and np.isfinite(wave).all()
            assert entry["ended"] or mode == "acoustic" or entry["seconds"] == 3.0
        lengths[mode] = len(entries)
    assert lengths == {"continuations": 16, "acoustic": 8, "unconditional": 1}
    assert soundfile.info("runs/decoded.wav").frames == round(4.2 * 16000)
    # The unigram baseline of the dataset that the walk-through made is a cross-entropy over its codes.
    from audiolm_jax.data.token_dataset import TokenDataset
    from audiolm_jax.lm.stages import make_stage

    sizes = tiny.config_of("coarse").stage
    losses_Q = unigram_losses(TokenDataset("runs/tokens"), make_stage("coarse", **sizes))
    assert losses_Q.shape == (tiny.COARSE_LEVELS,) and 0 < losses_Q[0] < 2 * np.log(tiny.CODES)


@pytest.mark.slow
@needs_fluidsynth
def test_piano_walkthrough(tmp_path, monkeypatch):
    """From scores to 20 s after 4 s of a held-out piece, by two stages and by acoustic tokens alone."""
    monkeypatch.chdir(tmp_path)
    scores.write_pieces(pathlib.Path("runs/midi"), 5, seconds=6.0)
    listed = commands("docs/piano.md")
    assert [words[1] for words in listed] == [
        *("render", "train", "train", "fit-kmeans", "tokenize", "inspect", "train", "train", "train"),
        *("bundle", "bundle", "generate", "generate", "compare"),
    ]
    run(listed[0][1:])
    rows = [json.loads(line) for line in pathlib.Path("runs/recordings/manifest.jsonl").read_text().splitlines()]
    held_out = next(f"runs/recordings/{row['path']}" for row in rows if row["split"] == "validation")
    for words in listed[1:]:
        run([word.replace("HELD_OUT", held_out) for word in shrunk(words, "RECORDINGS")])
    made = {}
    for folder in ("continuations", "acoustic_continuations"):
        (entry,) = json.loads(pathlib.Path(f"runs/{folder}/generation.json").read_text())
        made[folder], rate = soundfile.read(f"runs/{folder}/{entry['path']}")
        assert rate == entry["sample_rate"] == 16000 and entry["prompt_seconds"] == 4.0 and not entry["ended"]
        assert len(made[folder]) == 24 * 16000 and np.isfinite(made[folder]).all()
        stages = {"continuations": {"semantic", "coarse"}, "acoustic_continuations": {"coarse"}}[folder]
        assert set(entry["tokens_per_second"]) == stages
    # The prompt is the same codec's; what follows is not.
    first, second = (wave_W[: 64000 - 640] for wave_W in made.values())
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(*made.values())
    page = pathlib.Path("runs/comparison/report.html").read_text()
    assert page.count("<audio") == 3 and page.count(held_out) >= 1 and "24.00" in page
    inspection = json.loads(pathlib.Path("runs/inspection/inspection.json").read_text())
    assert len(inspection["examples"]) == 5 and all(name.startswith("rendered/") for name in inspection["examples"])
