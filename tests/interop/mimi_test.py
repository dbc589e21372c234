"""Mimi against Hugging Face's, and in chunks against itself at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MimiConfig, MimiModel

from audiolm_jax.codec.codec import Codec
from audiolm_jax.codec.mimi import window_attention
from audiolm_jax.errors import UserError
from audiolm_jax.interop.mimi import part_from_huggingface
from tests.interop import parity

TINY = {
    "hidden_size": 16, "num_filters": 4, "upsampling_ratios": [3, 2], "codebook_size": 32, "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8, "num_quantizers": 4, "upsample_groups": 16, "num_hidden_layers": 2,
    "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 5,
}  # fmt: skip
# 12 samples a frame, 6 a frame of the Transformer.
VARIANTS = {
    "as published": {},
    "codes as wide as frames": {
        "codebook_dim": 16, "vector_quantization_hidden_dimension": 16, "num_semantic_quantizers": 2,
        "upsample_groups": 4, "num_key_value_heads": 1, "head_dim": 6, "attention_bias": True, "hidden_act": "silu",
        "use_conv_shortcut": True, "num_residual_layers": 2, "sliding_window": 8, "pad_mode": "replicate",
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "centred": {"use_causal_conv": False, "pad_mode": "reflect", "sampling_rate": 12_000, "frame_rate": 500.0},
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """A model of theirs, and the same as a codec of ours."""
    torch.manual_seed(len(request.param))
    theirs = parity.randomized(MimiModel(MimiConfig(**{**TINY, **VARIANTS[request.param]})))
    with torch.no_grad():  # Waveforms of about the size of a recording's.
        last = theirs.decoder.decoder_seanet.layers[-1].conv
        last.weight *= 0.01
        last.bias *= 0.01
    part = part_from_huggingface(parity.save(theirs, tmp_path_factory.mktemp("mimi")))
    return theirs, Codec.from_weights(part.config, part.weights)


@torch.no_grad()
def features_of(theirs, wave_BW):
    return theirs.encoder(torch.tensor(wave_BW)[:, None]).latents.transpose(1, 2).numpy()


@torch.no_grad()
def codes_of(theirs, wave_BW, levels=None):
    coded = theirs.encode(torch.tensor(wave_BW)[:, None], num_quantizers=levels)
    return coded.audio_codes.transpose(1, 2).numpy()


@torch.no_grad()
def wave_of(theirs, codes_BTQ):
    return theirs.decode(torch.tensor(codes_BTQ).transpose(1, 2)).audio_values[:, 0].numpy()


def test_features_are_theirs_each_row_as_that_recording_alone(pair):
    theirs, codec = pair
    parity.assert_rows_are_alone(codec, functools.partial(features_of, theirs), np.array([389, 312, 100, 7, 1]))


@pytest.mark.parametrize("batch, size", [(2, 24), (2, 1), (1, 389)])
def test_codes_and_waveforms_are_theirs(pair, batch, size):
    theirs, codec = pair
    wave_BW = parity.waves(batch, size)
    x_BTD, codes_BTQ, found_BTQ = features_of(theirs, wave_BW), codes_of(theirs, wave_BW), codec.encode(wave_BW)
    projections = codec.weights["generator"].get("quantizer", {})
    embedding_QND = codec.weights["codebooks"]["embedding"]
    semantic = codec.config.num_semantic_quantizers
    for half, levels in (("semantic", slice(0, semantic)), ("acoustic", slice(semantic, None))):
        x_BTV = x_BTD @ np.asarray(projections[half]["input"]) if projections else x_BTD
        parity.assert_codes_equal(found_BTQ[..., levels], codes_BTQ[..., levels], x_BTV, embedding_QND[levels])
    expected_BW = wave_of(theirs, codes_BTQ)
    np.testing.assert_allclose(codec.decode(codes_BTQ), expected_BW, rtol=0, atol=1e-4)
    assert np.abs(expected_BW).max() > 0.01


def test_fewer_levels_are_theirs(pair):
    theirs, codec = pair
    wave_BW = parity.waves(1, 100)
    codes_BTQ = codes_of(theirs, wave_BW, 2)
    np.testing.assert_array_equal(codec.encode(wave_BW, num_quantizers=2), codes_BTQ)
    np.testing.assert_allclose(codec.decode(codes_BTQ), wave_of(theirs, codes_BTQ), rtol=0, atol=1e-4)


# 51 frames, ten windows of the attention; or less than that, with a last chunk that ends within a frame.
@pytest.mark.parametrize("hops, size", [(1, 12 * 51), (3, 12 * 51), (17, 12 * 51 - 7)])
def test_chunk_by_chunk_is_all_at_once(pair, hops, size):
    if not pair[1].config.streams:
        pytest.skip("looks ahead")
    parity.assert_streams_as_offline(pair[1], parity.waves(2, size), hops, atol=1e-5)


def test_in_double_precision_chunks_differ_in_the_last_digits_only(pair, float64):
    if not pair[1].config.streams:
        pytest.skip("looks ahead")
    wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), pair[1].weights)
    codec = dataclasses.replace(pair[1], weights=wide)
    parity.assert_streams_as_offline(codec, parity.waves(1, 12 * 18), 3, atol=1e-12)


def test_where_a_frame_looks_ahead_it_does_not_stream(pair):
    assert pair[1].config.streams == pair[1].config.causal
    if not pair[1].config.causal:
        with pytest.raises(UserError, match="give whole recordings"):
            pair[1].encode_chunk(parity.waves(1, 12))


def test_a_window_is_what_a_mask_over_all_frames_leaves():
    rng = np.random.default_rng(0)
    frames, window, theta = 23, 4, 50.0
    q_BTNH, k_BTNH, v_BTNH = (rng.standard_normal((2, frames, 3, 6)) for _ in range(3))
    turn = np.exp(1j * np.arange(frames)[:, None] * theta ** (-np.arange(3) / 3))[:, None]
    as_complex = lambda x_BTNH: (x_BTNH[..., :3] + 1j * x_BTNH[..., 3:]) * turn
    logits_BNTS = np.einsum("BTNH,BSNH->BNTS", as_complex(q_BTNH), as_complex(k_BTNH).conj()).real / 6**0.5
    distance_TS = np.arange(frames)[:, None] - np.arange(frames)
    weights_BNTS = np.exp(logits_BNTS) * ((distance_TS >= 0) & (distance_TS < window))
    weights_BNTS /= weights_BNTS.sum(axis=-1, keepdims=True)
    expected_BTNH = np.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH)
    found_BTNH = jax.jit(window_attention, static_argnums=(3, 4))(q_BTNH, k_BTNH, v_BTNH, window, theta)
    np.testing.assert_allclose(found_BTNH, expected_BTNH, atol=1e-5)
