"""Reading recordings of every kind, against scipy where it can judge."""

import os
import pathlib
import re
import tempfile

import numpy as np
import pytest
import scipy.signal
import soundfile
import soxr

from audiolm_jax import audio
from audiolm_jax.errors import UserError


def tone(rate, seconds=1.0, hz=440.0):
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)


# MP3 has two channels at most; Vorbis makes a woofer's of the sixth.
@pytest.mark.parametrize(
    ("extension", "channels"),
    [*((e, c) for e in ("wav", "flac", "ogg", "mp3") for c in (1, 2)), ("wav", 6), ("flac", 6)],
)
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_any_format_rate_and_channel_count(tmp_path, extension, rate, channels):
    path = tmp_path / f"tone.{extension}"
    soundfile.write(path, np.repeat(tone(rate)[:, None], channels, axis=1), rate)
    wave_W = audio.read(path, 16000)
    assert wave_W.dtype == np.float32
    assert abs(len(wave_W) - 16000) <= (2500 if extension == "mp3" else 1)
    spectrum = np.abs(np.fft.rfft(wave_W[2000:14000] * np.hanning(12000)))
    assert abs(np.argmax(spectrum) * 16000 / 12000 - 440) < 2
    assert np.sqrt(np.mean(wave_W[2000:14000] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)


def test_resampling_agrees_with_scipy(tmp_path):
    generator = np.random.default_rng(0)
    low = scipy.signal.butter(8, 3000, fs=48000, output="sos")
    wave = scipy.signal.sosfilt(low, generator.standard_normal(48000)) * 0.1
    soundfile.write(tmp_path / "noise.wav", wave, 48000, subtype="FLOAT")
    ours = audio.read(tmp_path / "noise.wav", 16000)
    theirs = scipy.signal.resample_poly(wave, 1, 3)
    np.testing.assert_allclose(ours[500:-500], theirs[500 : len(ours) - 500], atol=2e-3)


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "two.wav", np.array([[0.5, -0.25]] * 100), 16000, subtype="FLOAT")
    np.testing.assert_allclose(audio.read(tmp_path / "two.wav", 16000), 0.125)


@pytest.mark.parametrize("extension", ["wav", "flac"])
def test_a_stretch_is_the_stretch_of_the_whole(tmp_path, extension):
    path = tmp_path / f"noise.{extension}"
    audio_W = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    soundfile.write(path, audio_W, 16000)
    whole = audio.read(path, 16000)
    np.testing.assert_array_equal(audio.read(path, 16000, 0.25, 0.5), whole[4000:8000])
    np.testing.assert_array_equal(audio.read(path, 16000, 0.9), whole[14400:])
    np.testing.assert_array_equal(audio.read(path, 16000, 0.9, 5.0), whole[14400:])


@pytest.mark.parametrize(("rate", "extension"), [(16000, "wav"), (44100, "flac"), (8000, "wav"), (22050, "mp3")])
@pytest.mark.parametrize("size", [700, 100_000])
def test_blocks_are_the_whole_recording(tmp_path, rate, extension, size):
    path = tmp_path / f"noise.{extension}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (40_000, 2)), rate)
    decoded_WC, _ = soundfile.read(path, dtype="float32")
    whole_W = decoded_WC.mean(axis=1)
    if rate != 16000:
        whole_W = soxr.resample(whole_W, rate, 16000)
    blocks = list(audio.blocks(path, 16000, size))
    assert {len(block_W) for block_W in blocks[:-1]} <= {size} and 0 < len(blocks[-1]) <= size
    # Bit for bit, but for a decoder of MP3 that rounds by the length it is asked for.
    atol = 5e-7 if extension == "mp3" else 0
    np.testing.assert_allclose(np.concatenate(blocks), whole_W, rtol=0, atol=atol)
    np.testing.assert_allclose(audio.read(path, 16000), whole_W, rtol=0, atol=atol)


def test_high_rates_and_many_channels_are_brought_down(tmp_path):
    wave_WC = np.repeat(tone(384_000)[:, None], 6, axis=1) * np.arange(6)
    soundfile.write(tmp_path / "high.wav", wave_WC, 384_000, subtype="FLOAT")
    wave_W = audio.read(tmp_path / "high.wav", 16000)
    np.testing.assert_allclose(wave_W[500:-500], 2.5 * tone(16000)[500:-500], atol=1e-4)


def test_the_extension_does_not_matter(tmp_path):
    soundfile.write(tmp_path / "tone.mp3", tone(16000), 16000)
    (tmp_path / "tone.mp3").rename(tmp_path / "tone.wav")
    assert audio.duration(tmp_path / "tone.wav") == 1.0
    assert np.corrcoef(audio.read(tmp_path / "tone.wav", 16000), tone(16000))[0, 1] > 0.99


def test_lengths_that_a_pipe_leaves_are_no_cut(tmp_path):
    soundfile.write(tmp_path / "piped.wav", tone(16000), 16000)
    data = bytearray((tmp_path / "piped.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4
    (tmp_path / "piped.wav").write_bytes(data)
    assert audio.duration(tmp_path / "piped.wav") == 1.0 and len(audio.read(tmp_path / "piped.wav", 16000)) == 16000


def bad_files(folder):
    """What is said of each."""
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("these are words, not samples\n" * 40)
    soundfile.write(folder / "nothing.wav", np.zeros(0), 16000)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan, 0.1]), 16000, subtype="FLOAT")
    return {
        "missing.wav": "recording not found",
        "empty.wav": "empty file",
        "text.wav": "not audio",
        "nothing.wav": "zero length",
        "nan.wav": "not finite",
    }


def more_bad_files(folder):
    (folder / "text.flac").write_text("these are words, not samples\n" * 40)
    (folder / "broken.wav").symlink_to(folder / "nowhere.wav")
    soundfile.write(folder / "infinite.wav", np.array([0.0, np.inf, 0.1]), 16000, subtype="FLOAT")
    data = {}
    for extension in ("wav", "aiff", "flac", "mp3"):
        path = folder / f"cut.{extension}"
        soundfile.write(path, np.random.default_rng().uniform(-0.5, 0.5, 48_000), 16000)
        data[extension] = path.read_bytes()
        path.write_bytes(data[extension][: len(data[extension]) // 2])
    (folder / "header.wav").write_bytes(data["wav"][:44])
    (folder / "header.flac").write_bytes(data["flac"][:100])
    middle = len(data["flac"]) // 2
    (folder / "hole.flac").write_bytes(data["flac"][:middle] + bytes(100) + data["flac"][middle + 100 :])
    # Half a byte and four more are the number of samples: zero is "unknown".
    count = bytes([data["flac"][21] & 0xF0]) + bytes(4)
    (folder / "endless.flac").write_bytes(data["flac"][:21] + count + data["flac"][26:])
    return {
        "text.flac": "not audio",
        "broken.wav": "link to nothing",
        "infinite.wav": "not finite",
        "cut.wav": "cut-off audio (50.0%",
        "cut.aiff": "cut-off audio (50.0%",
        "cut.flac": "damaged or cut-off audio",
        "cut.mp3": "cut-off audio",
        "header.wav": "zero length",
        "header.flac": "damaged or cut-off audio",
        "hole.flac": "damaged or cut-off audio",
        "endless.flac": "header has no length",
    }


def test_bad_files_are_named(tmp_path):
    for name, message in (bad_files(tmp_path) | more_bad_files(tmp_path)).items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            audio.read(tmp_path / name, 16000)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        for read in (audio.check, lambda path: list(audio.blocks(path, 16000, 1 << 20))):
            with pytest.raises(UserError) as other:
                read(tmp_path / name)
            assert str(other.value) == str(caught.value)
        if name in ("nan.wav", "infinite.wav", "cut.flac", "cut.mp3", "header.flac", "hole.flac"):
            # Headers do not show it.
            assert audio.duration(tmp_path / name) > 0
        else:
            with pytest.raises(UserError, match=re.escape(message)):
                audio.duration(tmp_path / name)


def test_a_forbidden_file_is_named():
    # Not below pytest's folders: nobody else may enter them. Permissions do not bind the superuser.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = pathlib.Path(folder) / "locked.wav"
        soundfile.write(path, tone(16000), 16000)
        path.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(UserError, match="cannot be read .Permission denied.: .*locked.wav; check"):
                audio.read(path, 16000)
        finally:
            os.seteuid(user)


def test_lossless_files_hold_the_very_samples(tmp_path):
    generator = np.random.default_rng()
    whole_WC = generator.integers(-(2**15), 2**15, (500, 2))
    path = audio.write_lossless(tmp_path / "whole.numbers", whole_WC, 22050)
    assert path.name == "whole.numbers.flac"
    back_WC, rate = soundfile.read(path, dtype="int16")
    np.testing.assert_array_equal(back_WC, whole_WC)
    wave_W = generator.standard_normal(500).astype(np.float32)
    back_W, _ = soundfile.read(audio.write_lossless(tmp_path / "floats", wave_W, 16000), dtype="float32")
    np.testing.assert_array_equal(back_W, wave_W)
    with pytest.raises(UserError, match="more than 16 bits"):
        audio.write_lossless(tmp_path / "wide", np.array([2**15]), 16000)


def test_written_files_are_16_bit_and_whole(tmp_path):
    wave_W = np.concatenate([tone(16000), [2.0, -2.0]])
    audio.write(tmp_path / "new" / "out.wav", wave_W, 16000)
    info = soundfile.info(tmp_path / "new" / "out.wav")
    assert (info.subtype, info.samplerate, info.channels, info.frames) == ("PCM_16", 16000, 1, 16002)
    back = audio.read(tmp_path / "new" / "out.wav", 16000)
    np.testing.assert_allclose(back, np.clip(wave_W, -1, 1), atol=1 / 32000)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.wav"]


def test_written_piece_by_piece_is_written_at_once(tmp_path):
    wave_W = np.random.default_rng(0).uniform(-1.2, 1.2, 5000).astype(np.float32)
    audio.write(tmp_path / "whole.wav", wave_W, 16000)
    with audio.writer(tmp_path / "pieces.wav", 16000) as write:
        for piece_W in np.split(wave_W, [1, 1000, 1000, 4321]):
            write(piece_W)
        assert not (tmp_path / "pieces.wav").exists()
    assert (tmp_path / "pieces.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()


def test_an_unfinished_recording_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="stopped"), audio.writer(tmp_path / "out.wav", 16000) as write:
        write(np.zeros(100, np.float32))
        raise ValueError("stopped")
    assert list(tmp_path.iterdir()) == []
