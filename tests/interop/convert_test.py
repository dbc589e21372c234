"""`audiolm convert`: a folder that every command takes, or one line that says why not."""

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import EncodecConfig, EncodecModel

import audiolm_jax
from audiolm_jax import cli
from audiolm_jax.config import load_config
from audiolm_jax.errors import UserError
from audiolm_jax.interop.convert import convert
from audiolm_jax.parts import read_part
from audiolm_jax.training.loop import train
from audiolm_jax.training.metrics import read_metrics
from tests import tiny
from tests.interop import parity


@pytest.fixture
def source(tmp_path):
    """The folder of an EnCodec with random weights."""
    torch.manual_seed(0)
    config = EncodecConfig(
        hidden_size=4, num_filters=2, upsampling_ratios=[2, 2], codebook_size=16, target_bandwidths=[48.0]
    )
    return parity.save(parity.randomized(EncodecModel(config)), tmp_path / "source")


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    return stopped.value.code or 0


def test_the_result_is_a_codec_to_load_and_to_train_on(source, tmp_path):
    output = tmp_path / "codec"
    assert run("convert", f"--source={source}", f"--output={output}") == 0
    codec = audiolm_jax.load_codec(output)
    assert (codec.sample_rate, codec.frame_rate, codec.num_quantizers, codec.codebook_size) == (24_000, 6000, 2, 16)
    theirs = EncodecModel.from_pretrained(source)
    wave_BW = parity.waves(1, 13)
    with torch.no_grad():
        codes_BQT = theirs.encode(torch.tensor(wave_BW)[None], bandwidth=48.0).audio_codes[0]
    np.testing.assert_array_equal(codec.encode(wave_BW), codes_BQT.transpose(1, 2))
    part = read_part(output)
    assert part.kind == part.config.objective == "soundstream"
    assert set(part.config) == set(load_config("soundstream_base"))
    assert run("convert", f"--source={source}", f"--output={output}") == 2


@pytest.mark.slow
def test_a_converted_codec_is_fine_tuned_by_its_own_config(source, tmp_path, capsys):
    convert(source, tmp_path / "codec")
    recordings = tiny.write_recordings(tmp_path / "recordings", (1.0, 1.2))
    overrides = {
        "init_from": tmp_path / "codec", "data_dir": recordings, "num_train_steps": 2, "batch_size": 2,
        "log_every_steps": 1, "crop_seconds": 0.02, "optimizer.learning_rate": 1e-3, "quantizer.dropout": False,
        "discriminator.stft_channels": 1, "discriminator.waveform_channels": (2, 2, 2),
    }  # fmt: skip
    config = load_config(str(tmp_path / "codec"), [f"--config.{name}={value}" for name, value in overrides.items()])
    assert train(config, tmp_path / "tuned") == 0
    assert "discriminator: not saved in" in capsys.readouterr().err
    rows = read_metrics(tmp_path / "tuned")
    assert [row["skipped_steps"] for row in rows] == [0, 0] and rows[0]["discriminator"] > 0
    before, after = (read_part(tmp_path / name).weights["generator"] for name in ("codec", "tuned"))
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), before, after)
    # Adam moves every weight that counts by its learning rate a step, and none that began elsewhere.
    assert 5e-4 < max(jax.tree.leaves(moved)) < 2.5e-3
    audiolm_jax.load_codec(tmp_path / "tuned")


def remove(folder):
    parity.rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != "decoder.layers.0.conv.bias"})


def add(folder):
    parity.rewrite(folder, lambda tensors: {**tensors, "encoder.layers.99.conv.bias": torch.zeros(1)})


def reshape(folder):
    parity.rewrite(folder, lambda tensors: {**tensors, "decoder.layers.0.conv.bias": torch.zeros(5)})


def tear(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickle(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def in_eight_bits(folder):
    parity.rewrite(folder, lambda tensors: {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()})


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove, "decoder.layers.0.conv.bias is missing"),
        (add, "encoder.layers.99.conv.bias belongs to no layer"),
        (reshape, r"decoder.layers.0.conv.bias is \[5\], not \[8\]"),
        (tear, "weights are damaged"),
        (pickle, "weights are a pickle .pytorch_model.bin."),
        (in_eight_bits, "of type F8_E4M3"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: parity.set_config(folder, model_type="vits"), "unknown model_type vits.*dac, encodec, hubert"),
        (lambda folder: parity.set_config(folder, audio_channels=2), "load_encodec_48khz"),
        (lambda folder: parity.set_config(folder, normalize=True), "load_encodec_48khz"),
        (lambda folder: parity.set_config(folder, pad_mode="circular"), "unknown padding"),
        (lambda folder: parity.set_config(folder, codebook_dim=3), "codes are not as wide as frames"),
    ],
)
def test_refuses_by_name_and_leaves_nothing_behind(source, tmp_path, damage, message):
    damage(source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "codec")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_refuses_a_folder_that_is_not_there(tmp_path):
    assert run("convert", f"--source={tmp_path / 'nothing'}", f"--output={tmp_path / 'codec'}") == 2
