"""The discriminators' shapes against the paper's, and weight normalisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.codec.convolution import initialize
from audiolm_jax.codec.discriminators import Discriminators, STFTDiscriminator, WaveformDiscriminator, WeightNormConv
from audiolm_jax.codec.objective import discriminators_from_config
from audiolm_jax.config import soundstream_config


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
    conv = WeightNormConv(3, 5)
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
