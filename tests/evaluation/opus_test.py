"""Opus: alignment against known shifts, rates against files made by hand, and the tools themselves."""

import numpy as np
import pytest
import scipy.signal

from audiolm_jax import audio
from audiolm_jax.config import shipped_folder
from audiolm_jax.evaluation import judges, opus

needs_opus = pytest.mark.skipif(opus.missing() is not None, reason="no opus-tools")


@pytest.fixture(scope="module")
def speech_W():
    return audio.read(shipped_folder("samples") / "asterisk-en/agent-alreadyon.flac", 16_000)


@pytest.mark.parametrize("shift", [-60, -17, 0, 1, 60])
@pytest.mark.parametrize("extra", [-100, 0, 500])
def test_a_known_shift_is_undone(speech_W, shift, extra):
    generator = np.random.default_rng(0)
    moved_W = np.pad(speech_W, (max(shift, 0), 0))[max(-shift, 0) :]
    moved_W = 0.5 * moved_W + 0.01 * generator.standard_normal(len(moved_W))
    aligned_W = opus.align(speech_W, opus.fit_length(moved_W, len(speech_W) + extra), 60)
    assert aligned_W.shape == speech_W.shape
    inside = slice(100, -200)
    np.testing.assert_allclose(aligned_W[inside], 0.5 * speech_W[inside], atol=0.06)
    assert judges.si_sdr(speech_W[inside], aligned_W[inside], 16_000) > 15


def test_silence_stays_where_it_is():
    np.testing.assert_array_equal(opus.align(np.zeros(100), np.arange(100.0), 5), np.arange(100.0))


def page(*segments):
    return b"OggS" + bytes(22) + bytes([len(segments), *segments]) + b"x" * sum(segments)


def test_bytes_of_audio_packets():
    # Two headers, the second in two pages; then packets of 40, 255 + 10 over two pages, and 0 bytes.
    ogg = page(19) + page(255, 255) + page(7) + page(40, 255) + page(10, 0)
    assert opus.audio_bytes(ogg) == 40 + 255 + 10


@needs_opus
@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_rates_quality_and_alignment(speech_W, rate):
    wave_W = audio.resample(speech_W, 16_000, rate)
    quality = {}
    for kilobits in opus.KILOBITS:
        back_W, measured = opus.code(wave_W, rate, kilobits)
        assert back_W.shape == wave_W.shape and measured == pytest.approx(kilobits, rel=0.35)
        quality[kilobits] = judges.si_sdr(wave_W, back_W, rate)
        lags = scipy.signal.correlation_lags(len(wave_W), len(wave_W))
        assert abs(lags[np.argmax(scipy.signal.correlate(wave_W, back_W, method="fft"))]) <= 1
    assert quality[24] > quality[12] > quality[6] and quality[24] > 8


@needs_opus
def test_one_sample():
    back_W, _ = opus.code(np.array([0.5], np.float32), 16_000, 12)
    assert back_W.shape == (1,)
