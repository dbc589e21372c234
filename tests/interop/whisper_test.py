"""Whisper's encoder against transformers', from safetensors and from CTranslate2's format: random weights."""

import jax
import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel

import audiolm_jax
from audiolm_jax import spectral
from audiolm_jax.interop.convert import convert
from audiolm_jax.semantic import whisper
from tests.interop import encoders, parity

SECONDS = 2
CONFIGS = {
    "two heads": dict(d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=20),
    "relu": dict(
        d_model=12, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=40, num_mel_bins=128,
        activation_function="relu",
    ),
}  # fmt: skip


def save(folder, config: dict, seed: int = 0, kind=WhisperModel):
    """(their model, its feature extractor), saved."""
    described = WhisperConfig(
        **config, decoder_layers=1, decoder_attention_heads=1, decoder_ffn_dim=4, vocab_size=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_source_positions=50 * SECONDS,
    )  # fmt: skip
    model = encoders.randomized(kind(described), seed)
    extractor = WhisperFeatureExtractor(feature_size=described.num_mel_bins, chunk_length=SECONDS)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model, extractor


def hidden_states(model, extractor):
    """[W] -> each of its hidden states [ceil(W / 320), D], of the clip filled up with silence."""

    def run(wave_W):
        features = extractor(wave_W, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            states = model.get_encoder()(features, output_hidden_states=True).hidden_states
        return [state[0, : -(-len(wave_W) // 320)].numpy() for state in states]

    return run


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    theirs = save(folder / "source", CONFIGS[request.param])
    convert(folder / "source", folder / "converted")
    return *theirs, audiolm_jax.load_semantic_tokenizer(folder / "converted")


def test_rows_are_what_the_original_gives_for_each_clip(pair):
    model, extractor, tokenizer = pair
    assert (tokenizer.sample_rate, tokenizer.frame_rate) == (16_000, 50)
    lengths = [32_000, 31_681, 1, 320, 9_999, 400, 23_456]
    encoders.assert_rows_are_alone(tokenizer, hidden_states(model, extractor), lengths, seed=1)
