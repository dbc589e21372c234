"""EnCodec against Hugging Face's."""

import functools

import numpy as np
import pytest
import torch
from transformers import EncodecConfig, EncodecModel

import audiolm_jax
from audiolm_jax.codec.codec import Codec
from audiolm_jax.errors import UserError
from audiolm_jax.interop import load_encodec_48khz
from audiolm_jax.interop.encodec import part_from_huggingface
from tests.interop import parity

TINY = {
    "sampling_rate": 24_000, "hidden_size": 8, "num_filters": 4, "upsampling_ratios": [3, 2], "codebook_size": 32,
    "target_bandwidths": [20.0, 60.0],
}  # fmt: skip
# 3 levels of 32 codes at 4 kHz.
VARIANTS = {
    "as published": {},
    "centred": {
        "use_causal_conv": False, "pad_mode": "replicate", "num_lstm_layers": 1, "use_conv_shortcut": False,
        "num_residual_layers": 2, "residual_kernel_size": 5,
    },
    "normalised": {"norm_type": "time_group_norm", "use_causal_conv": False, "compress": 1},
    "zeros, cut on both sides": {
        "pad_mode": "constant", "trim_right_ratio": 0.4, "kernel_size": 5, "last_kernel_size": 3,
        "dilation_growth_rate": 3, "num_residual_layers": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """A model of theirs, and the same as a codec of ours."""
    torch.manual_seed(len(request.param))
    theirs = parity.randomized(EncodecModel(EncodecConfig(**TINY, **VARIANTS[request.param])))
    # Of weight normalisation every other variant is saved in the older spelling.
    folder = parity.save(theirs, tmp_path_factory.mktemp("encodec"), old_spelling=request.param != "as published")
    part = part_from_huggingface(folder)
    return theirs, Codec.from_weights(part.config, part.weights)


@torch.no_grad()
def features_of(theirs, wave_BW):
    return theirs.encoder(torch.tensor(wave_BW)[:, None]).transpose(1, 2).numpy()


@torch.no_grad()
def codes_of(theirs, wave_BW, bandwidth=60.0):
    return theirs.encode(torch.tensor(wave_BW)[:, None], bandwidth=bandwidth).audio_codes[0].transpose(1, 2).numpy()


@torch.no_grad()
def wave_of(theirs, codes_BTQ):
    return theirs.decode(torch.tensor(codes_BTQ).transpose(1, 2)[None], [None]).audio_values[:, 0].numpy()


def test_features_are_theirs_each_row_as_that_recording_alone(pair):
    theirs, codec = pair
    parity.assert_rows_are_alone(codec, functools.partial(features_of, theirs), np.array([151, 132, 100, 7, 1]))


@pytest.mark.parametrize("batch, size", [(2, 24), (2, 1), (1, 151)])
def test_codes_and_waveforms_are_theirs(pair, batch, size):
    theirs, codec = pair
    wave_BW = parity.waves(batch, size)
    codes_BTQ = codes_of(theirs, wave_BW)
    embedding_QND = codec.weights["codebooks"]["embedding"]
    parity.assert_codes_equal(codec.encode(wave_BW), codes_BTQ, features_of(theirs, wave_BW), embedding_QND)
    expected_BW = wave_of(theirs, codes_BTQ)
    np.testing.assert_allclose(codec.decode(codes_BTQ), expected_BW, rtol=0, atol=1e-4)
    assert np.abs(expected_BW).max() > 0.01


def test_a_bandwidth_is_a_number_of_levels(pair):
    theirs, codec = pair
    wave_BW = parity.waves(1, 151, seed=1)
    codes_BTQ = codes_of(theirs, wave_BW, 20.0)
    assert codes_BTQ.shape[2] == 1
    np.testing.assert_array_equal(codec.encode(wave_BW)[..., :1], codes_BTQ)


def test_it_does_not_stream(pair):
    with pytest.raises(UserError, match="give whole recordings"):
        pair[1].encode_chunk(parity.waves(1, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_load(dtype, tmp_path):
    theirs = parity.randomized(EncodecModel(EncodecConfig(**TINY))).to(dtype)
    part = part_from_huggingface(parity.save(theirs, tmp_path))
    wave_BW = parity.waves(1, 24)
    codec = Codec.from_weights(part.config, part.weights)
    parity.assert_features_close(codec.features(wave_BW), features_of(theirs.float(), wave_BW))


STEREO = {
    "sampling_rate": 400, "audio_channels": 2, "normalize": True, "chunk_length_s": 0.25, "overlap": 0.1,
    "hidden_size": 8, "num_filters": 4, "upsampling_ratios": [2, 2], "codebook_size": 16, "use_causal_conv": False,
    "norm_type": "time_group_norm", "target_bandwidths": [0.8, 1.6],
}  # fmt: skip


# Chunks of 100 samples, one every 90.
@pytest.mark.parametrize("batch, size, bandwidth", [(2, 100, None), (1, 237, 1.6), (2, 33, 0.8)])
def test_chunked_stereo_is_theirs(batch, size, bandwidth, tmp_path):
    theirs = parity.randomized(EncodecModel(EncodecConfig(**STEREO)))
    codec = load_encodec_48khz(parity.save(theirs, tmp_path))
    wave_BCW = np.random.default_rng(size).standard_normal((batch, 2, size)).astype(np.float32)
    with torch.no_grad():
        coded = theirs.encode(torch.tensor(wave_BCW), bandwidth=bandwidth)
        expected_BCW = theirs.decode(
            coded.audio_codes, coded.audio_scales, last_frame_pad_length=coded.last_frame_pad_length
        ).audio_values.numpy()
    chunks = codec.encode(wave_BCW, bandwidth)
    codes_UBTQ = coded.audio_codes.permute(0, 1, 3, 2).numpy()
    np.testing.assert_array_equal(chunks.codes_UBTQ[:, :, : codes_UBTQ.shape[2]], codes_UBTQ)
    assert codes_UBTQ.shape[3] == (4 if bandwidth == 1.6 else 2)
    np.testing.assert_allclose(chunks.scales_UB, np.stack(coded.audio_scales)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(codec.decode(chunks), expected_BCW, rtol=0, atol=1e-4)


def test_chunked_stereo_refuses(tmp_path):
    codec = load_encodec_48khz(parity.save(parity.randomized(EncodecModel(EncodecConfig(**STEREO))), tmp_path))
    stereo_BCW = np.zeros((1, 2, 50), np.float32)
    for wave_BCW, bandwidth, what in (
        (stereo_BCW[:, :1], None, "not .batch, 2, samples."),
        (stereo_BCW.astype(int), None, "not finite floats"),
        (stereo_BCW * np.nan, None, "not finite floats"),
        (stereo_BCW, 3.0, "use one of 0.8, 1.6"),
    ):
        with pytest.raises(UserError, match=what):
            codec.encode(wave_BCW, bandwidth)
    with pytest.raises(UserError, match="load_encodec_48khz"):
        part_from_huggingface(tmp_path)
    with pytest.raises(UserError, match="convert"):
        audiolm_jax.load_codec(tmp_path)
