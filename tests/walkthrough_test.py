"""Runs the README's walk-through, command by command, in tiny sizes."""

import json
import pathlib
import re
import shlex

import numpy as np
import pytest
import soundfile

from audiolm_jax import cli
from audiolm_jax.evaluation.unigram import unigram_losses
from tests import tiny

README = pathlib.Path(__file__).parent.parent / "README.md"
OBJECTIVES = {"soundstream_tiny": "soundstream", "w2v_bert_tiny": "w2v_bert"}


def commands():
    block = re.search(r"<!-- walkthrough.*?```bash\n(.*?)```", README.read_text(), re.DOTALL)[1]
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
        objective = OBJECTIVES.get(config, config.removesuffix("_tiny"))
        words += [*tiny.flags_of(objective), "--config.num_train_steps=3", "--config.log_every_steps=1"]
    return words[1:]


@pytest.mark.slow
def test_walkthrough(tmp_path, monkeypatch):
    recordings = tiny.write_recordings(tmp_path / "recordings")
    monkeypatch.chdir(tmp_path)
    listed = commands()
    assert [words[1] for words in listed] == [
        *("train", "train", "fit-kmeans", "tokenize", "train", "train", "train", "bundle"),
        *("generate", "generate", "generate", "encode", "decode"),
    ]
    for words in listed:
        with pytest.raises(SystemExit) as stopped:
            cli.main(shrunk(words, recordings))
        assert not stopped.value.code, words
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
