"""w2v-BERT 2.0 against transformers' model and feature extractor: random weights of several configurations."""

import jax
import numpy as np
import pytest
import torch
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertForCTC, Wav2Vec2BertModel

import audiolm_jax
from audiolm_jax.errors import UserError
from audiolm_jax.interop.convert import convert
from audiolm_jax.semantic import wav2vec2_bert
from tests.interop import encoders, parity

SMALL = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_depthwise_kernel_size=5,
    vocab_size=7,
)  # fmt: skip
CONFIGS = {
    "relative_key": dict(
        num_hidden_layers=3, left_max_position_embeddings=7, right_max_position_embeddings=3, add_adapter=True,
        use_intermediate_ffn_before_adapter=True,
    ),
    "longer codes than clips": dict(position_embeddings_type="relative_key", conv_depthwise_kernel_size=31),
    "relative": dict(
        position_embeddings_type="relative", hidden_act="gelu", layer_norm_eps=1e-3, feature_projection_input_dim=80
    ),
    "rotary": dict(position_embeddings_type="rotary", hidden_act="relu", rotary_embedding_base=50),
    "none": dict(position_embeddings_type=None, hidden_act="gelu_new"),
}  # fmt: skip
# A second; an odd number of filterbank frames; the shortest; lengths that are no multiples of anything.
LENGTHS = [16_000, 15_919, 15_760, 560, 719, 720, 7_777]


def random_model(seed: int = 0, kind=Wav2Vec2BertModel, **config):
    return encoders.randomized(kind(Wav2Vec2BertConfig(**{**SMALL, **config})), seed)


def extractor_of(model) -> SeamlessM4TFeatureExtractor:
    num_mels = model.config.feature_projection_input_dim // 2
    return SeamlessM4TFeatureExtractor(feature_size=num_mels, num_mel_bins=num_mels)


def hidden_states(model, extractor):
    """[W] -> each of the original's hidden states [T, D] of a clip."""

    def run(wave_W):
        features = extractor(wave_W, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            states = model(**features, output_hidden_states=True).hidden_states
        return [state[0, : features.attention_mask.sum()].numpy() for state in states]

    return run


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request, tmp_path_factory):
    """(their hidden states, the folder of our part)."""
    folder, model = tmp_path_factory.mktemp("wav2vec2_bert"), random_model(**CONFIGS[request.param])
    model.save_pretrained(folder / "source")
    extractor_of(model).save_pretrained(folder / "source")
    convert(folder / "source", folder / "part")
    return hidden_states(model, extractor_of(model)), folder / "part"


def test_rows_are_what_the_original_gives_for_each_clip(pair, monkeypatch):
    theirs, part = pair
    monkeypatch.setattr(wav2vec2_bert, "ATTENTION_PAIRS", 3 * 50**2)  # Rows three by three, and one.
    tokenizer = audiolm_jax.load_semantic_tokenizer(part)
    assert (tokenizer.sample_rate, tokenizer.frame_rate) == (16_000, 50)
    encoders.assert_rows_are_alone(tokenizer, theirs, LENGTHS, seed=1)


def test_a_model_with_a_head_is_its_encoder(tmp_path):
    model = random_model(kind=Wav2Vec2BertForCTC, num_hidden_layers=1, add_adapter=True)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "part")
    tokenizer = audiolm_jax.load_semantic_tokenizer(tmp_path / "part")
    wave_W = encoders.clips([9_000], seed=3)[0]
    states = tokenizer.features_of_layers(wave_W[None], None, (1, 0))
    expected = hidden_states(model.wav2vec2_bert, extractor_of(model))(wave_W)
    for found_BTD, expected_TD in zip(states, (expected[1], expected[0])):
        parity.assert_features_close(found_BTD[0], expected_TD)
    assert np.isfinite(tokenizer.features(np.zeros((1, 9_000)))).all()
    with pytest.raises(UserError, match="a clip of 559 samples has no frame"):
        tokenizer.features(np.zeros((1, 559)))


def test_fit_kmeans_makes_it_a_tokenizer(tmp_path):
    random_model(num_hidden_layers=1).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "part")
    encoders.assert_becomes_a_tokenizer(tmp_path / "part", tmp_path, layer=1)


def test_features_are_the_extractors():
    """Amplitudes of each frame's bands within float32 rounding of its loudest; a ragged batch's normalisation."""
    waves = encoders.clips(LENGTHS, seed=5)
    wave_BW = np.stack([np.pad(wave, (0, max(LENGTHS) - len(wave))) for wave in waves])
    mel_BTM = wav2vec2_bert.filterbank(wave_BW, 80)
    counts_B = wav2vec2_bert.num_filterbank_frames(np.array(LENGTHS))
    normed_BTM = wav2vec2_bert.normalize(mel_BTM, np.arange(mel_BTM.shape[1]) < counts_B[:, None])
    extractor = SeamlessM4TFeatureExtractor()
    for raw_TM, normed_TM, wave, count in zip(np.asarray(mel_BTM), np.asarray(normed_BTM), waves, counts_B):
        theirs = extractor(wave, sampling_rate=16_000, do_normalize_per_mel_bins=False, return_tensors="np")
        size = 2 * int(theirs.attention_mask.sum())
        expected_TM = np.exp(theirs.input_features.reshape(-1, 80)[:size].astype(np.float64) / 2)
        error_TM = np.abs(np.exp(raw_TM[:size].astype(np.float64) / 2) - expected_TM)
        assert np.all(error_TM < 2e-6 * expected_TM.max(axis=1, keepdims=True))
        alone_TM = raw_TM[:count].astype(np.float64)
        normal_TM = (alone_TM - alone_TM.mean(0)) / np.sqrt(alone_TM.var(0, ddof=1) + 1e-7)
        np.testing.assert_allclose(normed_TM[:size], normal_TM[:size], atol=2e-5)
        theirs = extractor(wave, sampling_rate=16_000, return_tensors="np")
        assert np.mean(np.abs(normed_TM[:size] - theirs.input_features.reshape(-1, 80)[:size])) < 1e-4


def test_what_never_changes_is_zero():
    mel_BTM = np.full((2, 1_000, 3), np.log(2.0**-23), np.float32)
    mask_BT = np.arange(1_000) < np.array([[999], [1]])
    np.testing.assert_array_equal(jax.jit(wav2vec2_bert.normalize)(mel_BTM, mask_BT), 0.0)


@pytest.mark.parametrize(
    "damage, message",
    [
        (encoders.without("encoder.layers.0.ffn1.output_dense.bias"), "ffn1.output_dense.bias is missing"),
        (encoders.with_extra("encoder.layers.0.extra"), "encoder.layers.0.extra belongs to no layer"),
        (encoders.with_config(position_embeddings_type="alibi"), "unknown kind of positions.*alibi"),
        (encoders.with_config(hidden_act="mish"), "unknown activation.*mish"),
        (encoders.with_config(num_attention_heads=3), "width 16 .* 3 heads"),
        (encoders.with_config(feature_projection_input_dim=161), "161 is not two filterbank frames"),
        (
            encoders.with_config(left_max_position_embeddings=9),
            r"distance_embedding.weight is \[73, 8\], not \[18, 8\]",
        ),
        (encoders.with_preprocessor('{"stride": 3}'), "stride is 3, not 2"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "weights are a pickle"),
    ],
)
def test_refuses_other_models_by_name(tmp_path, damage, message):
    random_model(num_hidden_layers=1).save_pretrained(tmp_path / "source")
    damage(tmp_path / "source")
    encoders.assert_refused(tmp_path / "source", message)
