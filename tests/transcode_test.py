"""`audiolm encode` and `decode`: block by block as at once, whatever the input, in little memory."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from audiolm_jax import audio, bundle, transcode
from tests import tiny
from tests.cli_test import assert_user_error, run


@pytest.fixture(scope="module")
def folder(bundle_folder):
    return bundle_folder / "codec"


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape)


def encoded(folder, wav, npz, *arguments):
    transcode.encode(str(folder), str(wav), str(npz), *arguments)
    with np.load(npz) as archive:
        return {name: archive[name] for name in archive}


# 16,001 samples end in a frame that is not whole, 16,000 in a whole block.
@pytest.mark.parametrize(("rate", "channels", "samples"), [(16000, 1, 16001), (16000, 1, 16000), (44100, 2, 44103)])
def test_block_by_block_is_at_once(folder, tmp_path, monkeypatch, capsys, rate, channels, samples):
    wav, npz = tmp_path / "in.wav", tmp_path / "codes.npz"
    soundfile.write(wav, noise(samples, channels), rate)
    codec, wave_W = bundle.load_codec(folder), audio.read(wav, 16000)
    codes_BTQ = np.asarray(codec.encode(wave_W[None]))
    assert all(len(np.unique(codes_T)) > 2 for codes_T in codes_BTQ[0].T)
    monkeypatch.setattr(transcode, "BLOCK_SECONDS", 0.1)
    whole, blocks = type(codec).encode, []
    monkeypatch.setattr(type(codec), "encode", lambda *_: pytest.fail("not in blocks"))
    found = encoded(folder, wav, npz)
    monkeypatch.setattr(type(codec), "encode", whole)
    np.testing.assert_array_equal(found["codes"], codes_BTQ[0])
    assert found["num_samples"] == len(wave_W) and found["sample_rate"] == 16000

    step = type(codec).decode_chunk
    monkeypatch.setattr(type(codec), "decode_chunk", lambda *a: blocks.append(a[1].shape[1]) or step(*a))
    transcode.decode(str(folder), str(npz), str(tmp_path / "back.wav"))
    assert blocks[:-1] == [5] * (len(blocks) - 1) and sum(blocks) == codes_BTQ.shape[1]
    back_W, back_rate = soundfile.read(tmp_path / "back.wav", dtype="int16")
    expected_W = np.asarray(codec.decode(codes_BTQ))[0, : len(wave_W)]
    assert back_rate == 16000 and back_W.shape == wave_W.shape
    np.testing.assert_allclose(back_W, np.clip(expected_W, -1, 1) * 32768, atol=1.5)
    said = capsys.readouterr().err
    for command in ("encode", "decode"):
        line = re.search(rf"^{command}: ([\d.]+) s of audio in [\d.]+ s, ([\d.]+) times real time; .*$", said, re.M)
        assert float(line[1]) == pytest.approx(len(wave_W) / 16000, abs=0.01) and float(line[2]) > 0


def test_fewer_levels_of_blocks(folder, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "in.wav", noise(5000), 16000)
    monkeypatch.setattr(transcode, "BLOCK_SECONDS", 0.1)
    full = encoded(folder, tmp_path / "in.wav", tmp_path / "a.npz")["codes"]
    two = encoded(folder, tmp_path / "in.wav", tmp_path / "b.npz", 2)["codes"]
    assert full.shape[1] == tiny.LEVELS
    np.testing.assert_array_equal(two, full[:, :2])


@pytest.mark.parametrize(
    ("wave", "subtype"),
    [
        (np.array([0.3]), "PCM_16"),
        (np.zeros(5000), "PCM_16"),
        (np.tile([32767, -32768], 2500).astype(np.int16), "PCM_16"),
        (3.0 * noise(5000), "FLOAT"),
    ],
    ids=["one sample", "silence", "full scale", "beyond full scale"],
)
def test_what_is_legal(folder, tmp_path, wave, subtype):
    wav, npz, back = tmp_path / "in.wav", tmp_path / "codes.npz", tmp_path / "back.wav"
    soundfile.write(wav, wave, 16000, subtype=subtype)
    codes_TQ = encoded(folder, wav, npz)["codes"]
    assert codes_TQ.shape == (-(-len(wave) // 320), tiny.LEVELS)
    assert 0 <= codes_TQ.min() <= codes_TQ.max() < tiny.CODES
    transcode.decode(str(folder), str(npz), str(back))
    assert soundfile.info(back).frames == len(wave)


@pytest.fixture
def good(folder, tmp_path):
    soundfile.write(tmp_path / "in.wav", noise(5000), 16000)
    return encoded(folder, tmp_path / "in.wav", tmp_path / "good.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.full((16, 3), tiny.CODES)}, f"codes from {tiny.CODES} to {tiny.CODES}"),
        ({"codes": np.full((16, 3), -1)}, "codes from -1 to -1"),
        ({"codes": np.zeros((16, 4), int)}, "codes of 4 levels"),
        ({"codes": np.zeros((16, 0), int)}, "codes of 0 levels"),
        ({"codes": np.zeros((16, 3))}, "codes are not integers"),
        ({"codes": np.zeros(16, int)}, "not codes of ours"),
        ({"codes": np.zeros((0, 3), int)}, "0 frames do not make 5000 samples"),
        ({"codes": np.zeros((15, 3), int)}, "15 frames do not make 5000 samples"),
        ({"num_samples": 0}, "do not make 0 samples"),
        ({"num_samples": "many"}, "not codes of ours"),
        ({"codes": np.array([{}, {}])}, "not codes of ours"),
        ({"codes": None}, "not codes of ours"),
        ({"fingerprint": "0" * 32}, "codes were made by another codec"),
    ],
)
def test_decode_refuses(capsys, folder, tmp_path, good, change, message):
    archive = {name: value for name, value in {**good, **change}.items() if value is not None}
    np.savez(tmp_path / "bad.npz", **archive)
    before = sorted(tmp_path.iterdir())
    result = run(
        capsys, "decode", f"--codec={folder}", f"--input={tmp_path / 'bad.npz'}", f"--output={tmp_path / 'x.wav'}"
    )
    assert_user_error(result, message)
    assert sorted(tmp_path.iterdir()) == before


def test_decode_refuses_damaged_files(capsys, folder, tmp_path, good):
    data = (tmp_path / "good.npz").read_bytes()
    flipped = bytearray(data)
    flipped[60:90] = bytes(30)
    for name, damaged in {"empty": b"", "half": data[: len(data) // 2], "torn": data[:-3], "flipped": flipped}.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(damaged)
        result = run(capsys, "decode", f"--codec={folder}", f"--input={path}", f"--output={tmp_path / 'x.wav'}")
        assert_user_error(result, "not codes of ours")
    np.save(tmp_path / "array.npy", good["codes"])
    arguments = (f"--input={tmp_path / 'array.npy'}", f"--output={tmp_path / 'x.wav'}")
    assert_user_error(run(capsys, "decode", f"--codec={folder}", *arguments), "not codes of ours")
    assert not (tmp_path / "x.wav").exists()


def test_a_bad_block_leaves_nothing(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(transcode, "BLOCK_SECONDS", 0.1)
    wave_W = noise(20_000)
    wave_W[15_000] = np.nan
    soundfile.write(tmp_path / "nan.wav", wave_W, 16000, subtype="FLOAT")
    encode = ("encode", f"--codec={folder}", f"--output={tmp_path / 'x.npz'}")
    assert_user_error(run(capsys, *encode, f"--input={tmp_path / 'nan.wav'}"), "not finite")
    soundfile.write(tmp_path / "good.wav", noise(20_000), 16000)
    for levels in (0, 4):
        result = run(capsys, *encode, f"--input={tmp_path / 'good.wav'}", f"--num_quantizers={levels}")
        assert_user_error(result, f"num_quantizers={levels}")
    codes = encoded(folder, tmp_path / "good.wav", tmp_path / "good.npz")
    codes["codes"][50] = 99
    np.savez(tmp_path / "bad.npz", **codes)
    decode = ("decode", f"--codec={folder}", f"--input={tmp_path / 'bad.npz'}", f"--output={tmp_path / 'x.wav'}")
    assert_user_error(run(capsys, *decode), "codes from")
    assert {path.name for path in tmp_path.iterdir()} == {"nan.wav", "good.wav", "good.npz", "bad.npz"}


@pytest.mark.slow
def test_a_long_recording_needs_no_more_memory_than_a_short_one(folder, tmp_path):
    minute_W = (0.2 * np.sin(2 * np.pi * 220 * np.arange(22_050 * 60) / 22_050) + 0.1 * noise(22_050 * 60)) * 32_768

    def peak_mib(*arguments):
        process = subprocess.Popen([sys.executable, "-m", "audiolm_jax", *arguments], stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        return usage.ru_maxrss / 1024

    peaks = {}
    for minutes in (1, 15):
        wav, npz, back = (tmp_path / f"{minutes}{end}" for end in (".wav", ".npz", "-back.wav"))
        with soundfile.SoundFile(wav, "w", 22_050, 1, "PCM_16") as sound:
            for _ in range(minutes):
                sound.write(minute_W.astype(np.int16))
        peaks["encode", minutes] = peak_mib("encode", f"--codec={folder}", f"--input={wav}", f"--output={npz}")
        peaks["decode", minutes] = peak_mib("decode", f"--codec={folder}", f"--input={npz}", f"--output={back}")
        assert soundfile.info(back).frames == minutes * 60 * 16_000
    # The samples of fourteen minutes more are 51 MiB, at the rate of the file 71, and a layer of the encoder 103.
    for command in ("encode", "decode"):
        assert peaks[command, 15] < peaks[command, 1] + 25, peaks
