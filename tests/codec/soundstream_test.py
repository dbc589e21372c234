"""The codec's networks: convolutions against plain loops, sizes against the paper, causality by gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.codec.convolution import initialize
from audiolm_jax.codec.soundstream import Decoder, Encoder, SoundStreamConfig, causal_conv, causal_conv_transpose

TINY = SoundStreamConfig(sample_rate=16_000, channels=2, strides=(2, 3), embed_dim=4, num_quantizers=2, codebook_size=8)


def params_of(module, *inputs):
    return {"params": nn.meta.unbox(initialize(module, jax.random.key(0), *inputs))}


@pytest.mark.parametrize("taps, stride, dilation", [(7, 1, 1), (7, 1, 9), (1, 1, 1), (4, 2, 1), (10, 5, 1), (3, 1, 3)])
def test_causal_conv_is_the_sum_over_past_taps(taps, stride, dilation):
    rng = np.random.default_rng(0)
    x_BTC, kernel_kIO = rng.standard_normal((2, 20, 3)), rng.standard_normal((taps, 3, 4))
    expected_BTC = np.zeros((2, 20 // stride, 4))
    for t in range(20 // stride):
        for i in range(taps):
            # The last tap sits on the newest sample of the output's own block.
            source = (t + 1) * stride - 1 - (taps - 1 - i) * dilation
            if source >= 0:
                expected_BTC[:, t] += x_BTC[:, source] @ kernel_kIO[i]
    found_BTC = causal_conv(jnp.asarray(x_BTC), jnp.asarray(kernel_kIO), stride, dilation)
    np.testing.assert_allclose(found_BTC, expected_BTC, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [2, 5])
def test_transposed_conv_adds_each_frame_to_its_block_and_the_next(stride):
    rng = np.random.default_rng(1)
    x_BTC, kernel_kIO = rng.standard_normal((2, 6, 3)), rng.standard_normal((2 * stride, 3, 4))
    expected_BTC = np.zeros((2, 7 * stride, 4))
    for t in range(6):
        for i in range(2 * stride):
            expected_BTC[:, t * stride + i] += x_BTC[:, t] @ kernel_kIO[i]
    found_BTC = causal_conv_transpose(jnp.asarray(x_BTC), jnp.asarray(kernel_kIO), stride)
    np.testing.assert_allclose(found_BTC, expected_BTC[:, : 6 * stride], rtol=1e-4, atol=1e-4)


def test_transposed_conv_refuses_another_kernel_length():
    with pytest.raises(ValueError, match="twice the stride"):
        causal_conv_transpose(jnp.zeros((1, 4, 2)), jnp.zeros((3, 2, 2)), 2)


@pytest.mark.parametrize("channels, millions", [(32, 9.5), (16, 2.5)])
def test_parameter_count_is_the_papers(channels, millions):
    config = SoundStreamConfig(16_000, channels, (2, 4, 5, 8), 64, 12, 1024)
    shapes = [
        jax.eval_shape(Encoder(config).init, jax.random.key(0), jnp.zeros((1, 640))),
        jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2, 64))),
    ]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6, 1) == millions


def test_rates_of_the_papers_strides():
    config = SoundStreamConfig(16_000, 32, (2, 4, 5, 8), 64, 12, 1024)
    assert (config.hop_length, config.num_frames(16_000), config.num_samples(50)) == (320, 50, 16_000)


@pytest.mark.parametrize("size, frames", [(1, 1), (6, 1), (7, 2), (60, 10)])
def test_encoder_gives_a_frame_for_every_hop_begun(size, frames):
    encoder = Encoder(TINY)
    shape = jax.eval_shape(encoder.init_with_output, jax.random.key(0), jnp.zeros((3, size)))[0].shape
    assert shape == (3, frames, 4)


def test_encoder_frames_see_no_later_sample():
    encoder, size = Encoder(TINY), 60
    params = params_of(encoder, jnp.zeros((1, size)))
    wave_BW = jax.random.normal(jax.random.key(1), (1, size))
    grads_TW = jax.jit(jax.jacobian(lambda x: jnp.sum(encoder.apply(params, x)[0], axis=-1)))(wave_BW)[:, 0]
    later_TW = np.arange(size) >= (np.arange(10) + 1)[:, None] * TINY.hop_length
    assert not np.any(np.asarray(grads_TW)[later_TW])
    newest_T = np.asarray(grads_TW)[np.arange(10), (np.arange(10) + 1) * TINY.hop_length - 1]
    assert np.all(newest_T != 0)


def test_decoder_samples_see_no_later_frame():
    decoder, frames = Decoder(TINY), 8
    params = params_of(decoder, jnp.zeros((1, frames, 4)))
    x_BTD = jax.random.normal(jax.random.key(1), (1, frames, 4))
    grads_WT = np.abs(jax.jit(jax.jacobian(lambda x: decoder.apply(params, x)[0]))(x_BTD)[:, 0]).sum(axis=-1)
    frame_W = np.arange(frames * TINY.hop_length) // TINY.hop_length
    assert not np.any(grads_WT[np.arange(frames) > frame_W[:, None]])
    assert np.all(grads_WT[np.arange(len(frame_W)), frame_W] > 0)


def test_computes_in_the_precision_of_its_parameters(float64):
    encoder = Encoder(TINY)
    wave_BW = jax.random.normal(jax.random.key(1), (1, 12), jnp.float32)
    params = params_of(encoder, wave_BW)
    assert encoder.apply(params, wave_BW).dtype == jnp.float32
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    assert encoder.apply(wide, wave_BW.astype(jnp.float64)).dtype == jnp.float64


def test_kernels_name_their_channels():
    boxed = jax.eval_shape(Encoder(TINY).init, jax.random.key(0), jnp.zeros((1, 6)))
    specs = nn.get_partition_spec(boxed)["params"]
    assert tuple(specs["down_1"]["kernel"]) == (None, "conv_in", "conv_out")
    assert tuple(specs["unit_0_2"]["dilated"]["bias"]) == ("conv_out",)


def test_residual_units_start_near_the_identity():
    config = SoundStreamConfig(16_000, 32, (2, 2), 4, 2, 8)
    params = params_of(Encoder(config), jnp.zeros((1, 4)))["params"]
    # 64 channels: a kernel of variance 1 / fan-in would have a deviation of 1 / 8.
    assert np.std(params["unit_1_0"]["mix"]["kernel"]) == pytest.approx(0.1 / 8, rel=0.1)
    assert np.std(params["unit_1_0"]["dilated"]["kernel"]) == pytest.approx((7 * 64) ** -0.5, rel=0.1)
