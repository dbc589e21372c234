"""The discriminators' shapes against the paper's, and weight normalisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from audiolm_jax.codec.convolution import initialize
from audiolm_jax.codec.discriminators import (
    DilatedSTFTDiscriminator,
    Discriminators,
    STFTDiscriminator,
    WaveformDiscriminator,
    WeightNormConv,
)
from audiolm_jax.codec.objective import discriminators_from_config
from audiolm_jax.config import soundstream_config
from audiolm_jax.errors import UserError


def shapes_of(module, size):
    judgements, params = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((2, size)))
    return judgements, nn.meta.unbox(params)["params"]


def test_waveform_discriminator_is_melgans():
    judgement, params = shapes_of(WaveformDiscriminator((16, 64, 256, 1024, 1024, 1024), 4), 16_384)
    assert judgement.logits_BT.shape == (2, 64)
    assert [feature.shape[1:] for feature in judgement.features] == [
        (16_384, 16), (4096, 64), (1024, 256), (256, 1024), (64, 1024), (64, 1024)
    ]  # fmt: skip
    kernels = [params[f"WeightNormConv_{layer}"]["kernel"].shape for layer in range(7)]
    assert kernels == [
        (15, 1, 16), (41, 4, 64), (41, 4, 256), (41, 4, 1024), (41, 4, 1024), (5, 1024, 1024), (3, 1024, 1)
    ]  # fmt: skip


def test_stft_discriminator_is_the_papers():
    judgement, params = shapes_of(STFTDiscriminator(32, 1024, 256), 16_384)
    # Time / (hop · 2^3) logits, from a last kernel over all F / 2^6 frequencies.
    assert judgement.logits_BT.shape == (2, 8)
    assert [feature.shape[1:] for feature in judgement.features] == [
        (64, 512, 32), (64, 256, 64), (32, 128, 128), (32, 64, 128), (16, 32, 256), (16, 16, 256), (8, 8, 512)
    ]  # fmt: skip
    assert params["SpectralConv_0"]["kernel"].shape == (7, 7, 2, 32)
    assert params["SpectralConv_1"]["kernel"].shape == (1, 8, 512, 1)
    assert params["SpectralUnit_0"]["same"]["kernel"].shape == (3, 3, 32, 32)
    assert params["SpectralUnit_0"]["down"]["kernel"].shape == (3, 4, 32, 64)
    assert params["SpectralUnit_1"]["down"]["kernel"].shape == (4, 4, 64, 128)


def test_a_codec_has_three_waveform_scales_and_a_spectrum():
    judgements, params = shapes_of(discriminators_from_config(soundstream_config()), 16_384)
    assert [judgement.features[0].shape[1] for judgement in judgements] == [16_384, 8192, 4096, 64]
    assert sorted(params) == ["stft", "waveform_0", "waveform_1", "waveform_2"]


def test_weight_norm_ignores_the_kernels_length_and_scales_by_scale():
    conv = WeightNormConv(3, (5,))
    x_BTC = jax.random.normal(jax.random.key(0), (1, 7, 2))
    params = nn.meta.unbox(conv.init(jax.random.key(1), x_BTC))["params"]
    y_BTC = conv.apply({"params": params}, x_BTC)
    longer = {**params, "kernel": 3.0 * params["kernel"]}
    np.testing.assert_allclose(conv.apply({"params": longer}, x_BTC), y_BTC, rtol=1e-5, atol=1e-6)
    doubled = {**params, "scale": 2.0 * params["scale"]}
    np.testing.assert_allclose(conv.apply({"params": doubled}, x_BTC), 2.0 * y_BTC, rtol=1e-5, atol=1e-6)
    # With scale 1 an output sums the inputs under a kernel of length 1.
    one_hot_BTC = jnp.zeros((1, 5, 2)).at[0, 2, 0].set(1.0).at[0, 2, 1].set(0.0)
    response_kO = conv.apply({"params": params}, one_hot_BTC)[0, ::-1]
    norm_O = np.sqrt(np.sum(np.square(params["kernel"]), axis=(0, 1)))
    np.testing.assert_allclose(response_kO, params["kernel"][:, 0] / norm_O, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("group_width, groups", [(2, 2), (4, 1), (64, 1)])
def test_group_width_sets_the_number_of_groups(group_width, groups):
    _, params = shapes_of(WaveformDiscriminator((4, 8, 8), group_width), 64)
    assert params["WeightNormConv_1"]["kernel"].shape == (41, 4 // groups, 8)


def test_coarser_scales_hear_a_smoothed_waveform():
    module = Discriminators((2, 2, 2), 2, 64, 1, 64, 16)
    # An alternating signal is gone at half the rate.
    wave_BW = jnp.tile(jnp.array([1.0, -1.0]), 64)[None]
    params = nn.meta.unbox(initialize(module, jax.random.key(0), wave_BW))
    first_layers = jax.jit(lambda x: [one.features[0] for one in module.apply({"params": params}, x)[:2]])
    difference = [
        np.abs(loud - silent)[:, 8:-8].max() for loud, silent in zip(first_layers(wave_BW), first_layers(0.0 * wave_BW))
    ]
    assert difference[0] > 0.1
    assert difference[1] < 1e-6


def test_dilated_stft_discriminator_equals_its_pytorch_twin():
    """Logits, activations and the waveform's gradient, with random kernels, scales and biases."""
    generator, window, channels = np.random.default_rng(), 64, 4
    wave_BW = generator.standard_normal((2, 333)).astype(np.float32)
    module = DilatedSTFTDiscriminator(channels, window)
    shapes = shapes_of(module, wave_BW.shape[1])[1]
    params = jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape).astype(np.float32), shapes)

    layers = []
    for index, dilation in enumerate((1, 1, 2, 4, 1, 1)):
        kernel = params[f"WeightNormConv_{index}"]["kernel"]
        taps, bins, width_in, width_out = kernel.shape
        stride, padding = (1, 2 if 1 <= index <= 3 else 1), (dilation * (taps // 2), bins // 2)
        conv = torch.nn.Conv2d(width_in, width_out, (taps, bins), stride, padding, (dilation, 1))
        conv.weight.data = torch.tensor(kernel).permute(3, 2, 0, 1).contiguous()
        conv = torch.nn.utils.parametrizations.weight_norm(conv)
        conv.parametrizations.weight.original0.data = torch.tensor(params[f"WeightNormConv_{index}"]["scale"])[
            :, None, None, None
        ]
        conv.bias.data = torch.tensor(params[f"WeightNormConv_{index}"]["bias"])
        layers.append(conv)
    wave = torch.tensor(wave_BW, requires_grad=True)
    hann = torch.hann_window(window)
    # ceil(333 / 16) = 21 frames.
    padded = torch.nn.functional.pad(wave, (0, 20 * 16 + window - 333))
    spectrum = torch.stft(padded, window, 16, window=hann, center=False, return_complex=True) / hann.norm()
    x = torch.stack([spectrum.real, spectrum.imag], dim=1).transpose(2, 3)
    expected = []
    for layer in layers[:-1]:
        x = torch.nn.functional.leaky_relu(layer(x), 0.2)
        expected.append(x)
    expected.append(layers[-1](x))
    expected[-1].square().mean().backward()

    judge = lambda wave_BW: module.apply({"params": params}, wave_BW)
    judgement, pull_back = jax.vjp(judge, wave_BW)
    assert judgement.logits_BT.shape == (2, 21 * 5)
    found = [*judgement.features, judgement.logits_BT.reshape(2, 21, 5, 1)]
    assert len(found) == len(expected) == 6
    for ours, theirs in zip(found, expected):
        theirs = theirs.detach().permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    zeros = jax.tree.map(jnp.zeros_like, judgement)
    logits_BT = judgement.logits_BT
    (grad_BW,) = pull_back(zeros._replace(logits_BT=2.0 * logits_BT / logits_BT.size))
    np.testing.assert_allclose(grad_BW, wave.grad, rtol=1e-3, atol=1e-4 * float(wave.grad.abs().max()))


def test_windows_of_encodec_join_the_others():
    config = soundstream_config()
    config.discriminator.multi_stft_windows = (2048, 128)
    judgements, params = shapes_of(discriminators_from_config(config), 16_384)
    assert sorted(params) == ["stft", "stft_128", "stft_2048", "waveform_0", "waveform_1", "waveform_2"]
    # Time / (window / 4), and an eighth of the frequencies.
    assert [one.logits_BT.shape for one in judgements[-2:]] == [(2, 32 * 129), (2, 512 * 9)]
    assert params["stft_128"]["WeightNormConv_3"]["kernel"].shape == (3, 9, 32, 32)


@pytest.mark.parametrize("window", [0, 8, 1022, -64, "a"])
def test_windows_that_cannot_be(window):
    config = soundstream_config()
    config.discriminator.multi_stft_windows = (256, window)
    with pytest.raises(UserError, match=f"no window of {window} samples: config.discriminator.multi_stft_windows"):
        discriminators_from_config(config)
