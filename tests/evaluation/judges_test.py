"""Each judge against its definition, or against what it must say of known damage."""

import numpy as np
import pytest

from audiolm_jax import audio
from audiolm_jax.codec import losses
from audiolm_jax.config import shipped_folder
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import judges
from audiolm_jax.evaluation.judges import JUDGES, Judge

RATE = 16_000


@pytest.fixture(scope="module")
def speech_W():
    return audio.read(shipped_folder("samples") / "asterisk-en/agent-alreadyon.flac", RATE)[:48_000]


def with_noise(wave_W, decibels, seed=0):
    noise_W = np.random.default_rng(seed).standard_normal(len(wave_W))
    noise_W *= np.sqrt(np.mean(wave_W**2) / np.mean(noise_W**2)) * 10 ** (-decibels / 20)
    return (wave_W + noise_W).astype(np.float32)


@pytest.mark.parametrize("size", [700, 48_000])
def test_si_sdr_is_its_definition(speech_W, size):
    reference_W = speech_W[4000 : 4000 + size]
    other_W = 0.3 * with_noise(reference_W, 7.0)
    target_W = reference_W * (other_W @ reference_W) / (reference_W @ reference_W)
    expected = 10 * np.log10(np.sum(target_W**2) / np.sum((other_W - target_W) ** 2))
    assert JUDGES["si_sdr"].score(reference_W, other_W, RATE) == pytest.approx(expected, abs=1e-3)


def test_log_mel_distance_takes_no_notice_of_its_padding(speech_W):
    reference_W, other_W = speech_W[:33_001], with_noise(speech_W[:33_001], 10.0)
    expected = np.mean(losses.log_mel_distance(reference_W[None], other_W[None], RATE))
    assert JUDGES["log_mel_distance"].score(reference_W, other_W, RATE) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name, best", [("pesq", 4.644), ("stoi", 1.0), ("visqol", 5.0)])
@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_packages_rank_noise(speech_W, name, best, rate):
    if JUDGES[name].missing():
        pytest.skip(JUDGES[name].missing())
    wave_W = audio.resample(speech_W, RATE, rate)
    same, little, much = (
        JUDGES[name].score(wave_W, other_W, rate)
        for other_W in (wave_W, with_noise(wave_W, 25.0), with_noise(wave_W, 5.0))
    )
    assert same == pytest.approx(best, abs=0.12)
    assert same > little > much + 0.05


def test_silence_and_snippets_have_no_score(speech_W):
    for name, judge in JUDGES.items():
        if judge.missing():
            continue
        assert judge.score(np.zeros(RATE, np.float32), with_noise(speech_W[:RATE], 0.0), RATE) is None
        if judge.package:
            snippet_W = speech_W[4000:4100]
            assert judge.score(snippet_W, snippet_W, RATE) is None, name


def test_who_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(JUDGES, "pesq", Judge("PESQ", judges.si_sdr, None, "no_such_module"))
    chosen, notes = judges.choose([])
    assert "pesq" not in chosen and {"si_sdr", "log_mel_distance"} <= set(chosen)
    assert any(note.startswith("PESQ: not measured, no module no_such_module") for note in notes)
    with pytest.raises(UserError, match="no module no_such_module: --judge=pesq; pip install"):
        judges.choose(["pesq"])
    with pytest.raises(UserError, match="unknown judge: --judge=ear"):
        judges.choose(["ear"])
    assert list(judges.choose(["si_sdr", "si_sdr"])[0]) == ["si_sdr"]
