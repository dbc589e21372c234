"""The codec as its users see it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.codec.codec import Codec
from audiolm_jax.codec.convolution import initialize
from audiolm_jax.codec.soundstream import STREAM, Decoder, Encoder, SoundStreamConfig
from audiolm_jax.errors import UserError

MODEL = {
    "sample_rate": 16_000, "channels": 2, "strides": [2, 5], "embed_dim": 4, "num_quantizers": 3, "codebook_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def codec():
    config = SoundStreamConfig(**{**MODEL, "strides": (2, 5)})
    keys = jax.random.split(jax.random.key(0), 3)
    generator = {
        "encoder": initialize(Encoder(config), keys[0], jnp.zeros((1, 10))),
        "decoder": initialize(Decoder(config), keys[1], jnp.zeros((1, 1, 4))),
    }
    weights = {"generator": nn.meta.unbox(generator), "codebooks": config.quantizer.init(keys[2])[1]}
    weights["codebooks"]["embedding"] *= 0.5
    return Codec.from_weights({"model": MODEL}, weights)


def waves(batch, size):
    return np.random.default_rng(0).standard_normal((batch, size)).astype(np.float32)


def test_says_what_it_is(codec):
    assert (codec.sample_rate, codec.frame_rate, codec.hop_length) == (16_000, 1600.0, 10)
    assert (codec.num_quantizers, codec.codebook_size) == (3, 16)


@pytest.mark.parametrize("size, frames", [(1, 1), (10, 1), (11, 2), (333, 34)])
def test_shapes(codec, size, frames):
    codes_BTQ = codec.encode(waves(2, size))
    assert codes_BTQ.shape == (2, frames, 3) and codes_BTQ.dtype == jnp.int32
    wave_BW = codec.decode(codes_BTQ)
    assert wave_BW.shape == (2, frames * 10) and wave_BW.dtype == jnp.float32


def test_equals_the_networks_without_padding(codec):
    wave_BW = waves(2, 330)
    weights = codec.weights
    x_BTD = Encoder(codec.config).apply({"params": weights["generator"]["encoder"]}, wave_BW)
    codes_BTQ = codec.config.quantizer.encode({}, weights["codebooks"], x_BTD)
    assert len(np.unique(codes_BTQ)) > 4
    np.testing.assert_array_equal(codec.encode(wave_BW), codes_BTQ)
    vectors_BTD = codec.config.quantizer.decode({}, weights["codebooks"], codes_BTQ)
    expected_BW = Decoder(codec.config).apply({"params": weights["generator"]["decoder"]}, vectors_BTD)
    np.testing.assert_allclose(codec.decode(codes_BTQ), expected_BW, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 17])
def test_chunks_decode_as_the_whole(codec, chunk):
    codes_BTQ = np.random.default_rng(1).integers(16, size=(2, 40, 3))
    state, pieces = None, []
    for start in range(0, 40, chunk):
        wave_BW, state = codec.decode_chunk(codes_BTQ[:, start : start + chunk], state)
        pieces.append(wave_BW)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), codec.decode(codes_BTQ), atol=1e-5)


@pytest.mark.parametrize("hops", [1, 3, 17])
def test_encoding_chunk_by_chunk_is_encoding_all(codec, hops):
    wave_BW = waves(2, 333)
    state, pieces = None, []
    for start in range(0, 333, 10 * hops):  # The last chunk ends within a frame.
        codes_BTQ, state = codec.encode_chunk(wave_BW[:, start : start + 10 * hops], state)
        pieces.append(codes_BTQ)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), codec.encode(wave_BW))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.float64, 1e-13)])
def test_frames_of_a_stream_are_those_of_the_whole(codec, float64, dtype, tolerance):
    """Before they are quantized; so codes can differ where two are equally near, to within the tolerance."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), codec.weights["generator"]["encoder"])
    wave_BW = jnp.asarray(waves(2, 340), dtype)
    whole_BTD = codec.config.encoder.apply({"params": params}, wave_BW)
    for hops in (1, 3, 17):
        state, pieces = {}, []
        for start in range(0, 340, 10 * hops):
            variables = {"params": params, STREAM: state}
            chunk_BW = wave_BW[:, start : start + 10 * hops]
            x_BTD, variables = codec.config.encoder.apply(variables, chunk_BW, mutable=[STREAM])
            state = variables[STREAM]
            pieces.append(x_BTD)
        assert pieces[0].dtype == dtype
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole_BTD, atol=tolerance)


def test_a_row_of_a_ragged_batch_is_that_recording_alone(codec):
    wave_BW, lengths_B = waves(3, 333), np.array([333, 104, 7])
    codes_BTQ = codec.encode(wave_BW, lengths_B)
    assert codes_BTQ.shape == (3, 34, 3)
    for row, length in enumerate(lengths_B):
        alone_BTQ = codec.encode(wave_BW[row : row + 1, :length])
        np.testing.assert_array_equal(codes_BTQ[row : row + 1, : alone_BTQ.shape[1]], alone_BTQ)


def test_fewer_levels_are_a_prefix(codec):
    wave_BW = waves(1, 100)
    codes_BTQ = codec.encode(wave_BW)
    np.testing.assert_array_equal(codec.encode(wave_BW, num_quantizers=2), codes_BTQ[..., :2])
    coarse_BW, full_BW = codec.decode(codes_BTQ[..., :2]), codec.decode(codes_BTQ)
    assert coarse_BW.shape == full_BW.shape and np.abs(coarse_BW - full_BW).max() > 1e-3


def test_few_lengths_are_compiled(codec):
    from audiolm_jax.codec.codec import _encode

    before = _encode._cache_size()
    for size in range(730, 800, 10):  # 73 to 79 frames.
        codec.encode(waves(1, size))
    assert _encode._cache_size() - before == 1


@pytest.mark.parametrize(
    "wave, lengths, levels, what",
    [
        (np.zeros(10, np.float32), None, None, "not floats"),
        (np.zeros((1, 10), np.int16), None, None, "not floats"),
        (np.array([[0.0] * 5, [0.0, np.nan, 0, 0, 0]], np.float32), None, None, "row 1"),
        (np.zeros((1, 10), np.float32), None, 0, "choose 1 … 3"),
        (np.zeros((1, 10), np.float32), None, 4, "choose 1 … 3"),
        (np.zeros((1, 10), np.float32), [11], None, "lengths from 11"),
        (np.zeros((1, 10), np.float32), [5, 5], None, "one integer a row"),
    ],
)
def test_encode_refuses(codec, wave, lengths, levels, what):
    with pytest.raises(UserError, match=what):
        codec.encode(wave, lengths, levels)


@pytest.mark.parametrize(
    "codes, what",
    [
        (np.zeros((1, 4), np.int32), "not integers"),
        (np.zeros((1, 4, 3), np.float32), "not integers"),
        (np.zeros((1, 4, 4), np.int32), "1 … 3 levels"),
        (np.full((1, 4, 3), 16), "0 … 15"),
        (np.full((1, 4, 3), -1), "0 … 15"),
    ],
)
def test_decode_refuses(codec, codes, what):
    with pytest.raises(UserError, match=what):
        codec.decode(codes)
