"""Judges of a single recording: who is chosen, who is missing, and what those that are installed say."""

import jiwer
import numpy as np
import pytest

from audiolm_jax import audio
from audiolm_jax.config import shipped_folder
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import adapters, quality, recognizers, speakers, transcribers
from audiolm_jax.evaluation.adapters import Adapter

RATE = 16_000
HERE = Adapter("here", RATE, lambda: np.sum, ())
ABSENT = Adapter("absent", RATE, lambda: np.sum, ("no_such_module", "nor_this"), "pip install both")


def test_without_names_the_first_that_is_there_judges():
    kinds = {"voice": {"absent": ABSENT, "here": HERE}, "quality": {"absent": ABSENT}}
    chosen, notes = adapters.choose([], kinds)
    assert chosen == {"voice": ("here", HERE)}
    assert notes == ["quality: not measured, no module no_such_module, nor_this; pip install both"]


def test_named_judges():
    kinds = {"voice": {"here": HERE, "model": Adapter("m", RATE, lambda model: lambda _: model, (), takes_model=True)}}
    kinds["quality"] = {"absent": ABSENT, "there": HERE}
    chosen, notes = adapters.choose(["model:large"], kinds)
    name, adapter = chosen["voice"]
    assert name == "model:large" and adapter.start()(np.ones(3), RATE) == "large"
    assert notes == ["quality: not measured, no judge of it was named"]
    for names, message in (
        (["absent"], "no module no_such_module, nor_this: --judge=absent; pip install both"),
        (["ear"], "unknown judge: --judge=ear; use one of here, model, absent, there"),
        (["here", "model:large"], r"two judges of one kind \(voice\): --judge=model:large"),
        (["model"], "a model is missing: model; model:MODEL"),
        (["here:large"], "no model can be chosen: here:large"),
    ):
        with pytest.raises(UserError, match=message):
            adapters.choose(names, kinds)


def test_a_judge_hears_its_own_rate_and_nothing_of_silence():
    heard = []
    adapter = Adapter("a", 8_000, lambda: lambda wave_W: heard.append(wave_W) or 1.0, (), min_seconds=0.1, nothing="")
    judge = adapter.start()
    wave_W = 3 * np.sin(2 * np.pi * 100 * np.arange(RATE) / RATE)
    assert judge(wave_W, RATE) == 1.0
    assert len(heard[0]) == 8_000 and np.abs(heard[0]).max() == 1.0
    for nothing_W in (np.zeros(RATE), wave_W[:1600], np.zeros(0)):
        assert judge(nothing_W, RATE) == ""
    assert len(heard) == 1


def test_words_are_compared_as_they_are_spoken():
    assert recognizers.normalized("  Don’t PANIC: press_1, s'il vous plaît!") == "don't panic press 1 s'il vous plaît"
    found = recognizers.errors("The cat sat on the mat.", "the cat, sit on mat now")
    # sat -> sit, "the" left out, "now" put in.
    assert (found.words, found.of_words) == (3, 6)
    assert found.of_characters == len("the cat sat on the mat")
    assert found.characters / found.of_characters == pytest.approx(
        jiwer.cer("the cat sat on the mat", "the cat sit on mat now")
    )
    assert recognizers.errors("one two", "")[:2] == (2, 2)


def test_cosine():
    assert speakers.cosine(np.array([3.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(np.sqrt(0.5))
    assert speakers.cosine(None, np.ones(2)) is None


def sample(name):
    return audio.read(shipped_folder("samples") / f"{name}.flac", RATE)


def started(adapter):
    if adapter.missing():
        pytest.skip(adapter.missing())
    return adapter.start()


@pytest.mark.slow
@pytest.mark.parametrize("name", ("whisper_base", "whisper_tiny", "pocketsphinx"))
def test_recognizers_understand(name):
    heard = started(recognizers.RECOGNIZERS[name])(sample("asterisk-en/agent-alreadyon"), RATE)
    said = "That agent is already logged on. Please enter your agent number followed by the pound key."
    found = recognizers.errors(said, heard)
    assert found.words <= (3 if name == "pocketsphinx" else 0), heard


@pytest.mark.slow
def test_resemblyzer_knows_a_voice_again():
    embed = started(speakers.EMBEDDERS["resemblyzer"])
    first, again, other = (
        embed(sample(name), RATE)
        for name in ("asterisk-en/agent-alreadyon", "asterisk-en/vm-rec-name", "asterisk-es/vm-whichbox")
    )
    assert speakers.cosine(first, again) > speakers.cosine(first, other) + 0.05


@pytest.mark.slow
def test_dnsmos_ranks_noise():
    judge = started(quality.QUALITY["dnsmos"])
    wave_W = sample("asterisk-en/vm-rec-name")
    noise_W = 0.1 * np.random.default_rng(0).standard_normal(len(wave_W))
    assert judge(wave_W, RATE) > judge(wave_W + noise_W, RATE) + 0.5


@pytest.mark.slow
def test_basic_pitch_reads_a_tune():
    rate, onsets = transcribers.SAMPLE_RATE, 0.3 + 0.5 * np.arange(8)
    pitches = np.array([60, 64, 67, 72, 71, 67, 65, 62])
    wave_W, time_W = np.zeros(rate * 5), np.arange(round(0.45 * rate)) / rate
    for onset, pitch in zip(onsets, pitches, strict=True):
        hertz = 440 * 2 ** ((pitch - 69) / 12)
        # Struck strings: partials that die away, the higher the faster.
        note_W = sum(np.exp(-3 * k * time_W) * np.sin(2 * np.pi * k * hertz * time_W) / k for k in range(1, 9))
        start = round(onset * rate)
        wave_W[start : start + len(note_W)] += 0.2 * note_W
    notes_N3 = started(transcribers.TRANSCRIBERS["basic_pitch"])(wave_W, rate)
    assert np.array_equal(notes_N3[:, 0], np.sort(notes_N3[:, 0]))
    for onset, pitch in zip(onsets, pitches, strict=True):
        assert any(abs(note[0] - onset) < 0.06 and note[2] == pitch for note in notes_N3), (onset, pitch, notes_N3)
    assert len(notes_N3) <= len(pitches) + 4
