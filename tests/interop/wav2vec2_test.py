"""HuBERT, wav2vec 2.0 and WavLM against transformers: random weights of several sizes, theirs read as ours."""

import functools
import json

import numpy as np
import pytest
import torch
import transformers
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

import audiolm_jax
from audiolm_jax import commands
from audiolm_jax.errors import UserError
from audiolm_jax.interop.convert import convert
from audiolm_jax.interop.wav2vec2 import part_from_huggingface
from audiolm_jax.parts import read_part
from audiolm_jax.semantic.encoder import build_encoder
from audiolm_jax.semantic.wav2vec2 import distance_buckets
from tests import tiny
from tests.interop import parity

SIZES = {
    "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 20,
    "conv_dim": (6, 10, 8), "conv_kernel": (5, 3, 2), "conv_stride": (3, 2, 1), "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
HOP, SHORTEST = 6, 17
# One frame; as many samples as just make two; a multiple of the hop; two samples more.
LENGTHS_B = np.array([SHORTEST, SHORTEST + HOP, 30 * HOP, 30 * HOP + 2])
MODELS = {"hubert": transformers.HubertModel, "wav2vec2": transformers.Wav2Vec2Model, "wavlm": transformers.WavLMModel}
LAYER_NORMED = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
# (model_type, fields of its config, spelling of weight normalisation, does the feature extractor normalise)
VARIANTS = {
    "hubert": ("hubert", {}, "new", True),
    "hubert large": ("hubert", {**LAYER_NORMED, "layer_norm_eps": 1e-3}, "old", True),
    "hubert with batch norm": ("hubert", {"conv_pos_batch_norm": True, "feat_proj_layer_norm": False}, "none", False),
    "wav2vec2": ("wav2vec2", {"conv_bias": True, "num_conv_pos_embeddings": 5, "hidden_act": "gelu_new"}, "old", None),
    "wav2vec2 large": (
        "wav2vec2",
        {**LAYER_NORMED, "conv_bias": False, "hidden_act": "relu"},
        "new",
        True,
    ),
    "wavlm": ("wavlm", {"num_buckets": 12, "max_bucket_distance": 24}, "new", False),
    "wavlm large": ("wavlm", {**LAYER_NORMED, "num_buckets": 10, "max_bucket_distance": 9}, "old", True),
}


def random_model(model_class, fields):
    """A model in which every parameter counts."""
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SIZES, **fields})).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or "original0" in name or "gru_rel_pos_const" in name:
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
            elif "rel_attn_embed" in name:
                tensor.normal_()
            else:
                tensor.normal_(std=0.3 if tensor.ndim == 1 else 1.5 * tensor[0].numel() ** -0.5)
    return model


def random_waves(lengths_B=LENGTHS_B):
    """Quiet noise beside zero, which normalisation changes much."""
    return 0.1 * parity.waves(len(lengths_B), int(max(lengths_B))) + 0.05


def states_of(model, do_normalize, wave_W) -> list[np.ndarray]:
    """Their hidden states [1, T, D] of one clip, from samples on."""
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize)
    values = extractor(wave_W, sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        return [state.numpy() for state in model(values, output_hidden_states=True).hidden_states]


@functools.cache
def converted(folder, variant: str):
    """(their model, whether clips are normalised, our tokenizer) of the same weights."""
    kind, fields, spelling, do_normalize = VARIANTS[variant]
    model = random_model(MODELS[kind], fields)
    source = parity.save(model, folder / variant, old_spelling=spelling == "old")
    if do_normalize is not None:
        transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize).save_pretrained(source)
    convert(source, folder / f"our {variant}")
    return model, do_normalize is not False, audiolm_jax.load_semantic_tokenizer(folder / f"our {variant}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("wav2vec2")


@pytest.fixture(params=list(VARIANTS))
def pair(request, folder):
    return converted(folder, request.param)


def test_every_row_of_every_layer_is_theirs_of_that_clip_alone(pair):
    model, do_normalize, tokenizer = pair
    wave_BW, lengths_B = np.concatenate([random_waves(), np.zeros((1, LENGTHS_B[-1]))]), [*LENGTHS_B, 100]
    states = tokenizer.features_of_layers(wave_BW, lengths_B, range(4))
    for row, length in enumerate(lengths_B):
        expected = states_of(model, do_normalize, wave_BW[row, :length])
        assert len(expected) == 4
        for found_BTD, expected_1TD in zip(states, expected):
            frames = int(tokenizer.num_frames(length))
            assert frames == model._get_feat_extract_output_lengths(torch.tensor(length)) == expected_1TD.shape[1]
            parity.assert_features_close(found_BTD[row : row + 1, :frames], expected_1TD)
            assert not found_BTD[row, frames:].any()
    assert (tokenizer.sample_rate, tokenizer.encoder.hop_length, tokenizer.num_layers) == (16_000, HOP, 3)


def test_what_stands_behind_a_row_does_not_count(pair):
    """The encoder itself, which the tokenizer only gives zeros there."""
    tokenizer = pair[2]
    wave_BW = random_waves()
    mask_BW = np.arange(wave_BW.shape[1]) < LENGTHS_B[:, None]
    of = lambda wave_BW: tokenizer.encoder.hidden_states(tokenizer.weights, wave_BW, LENGTHS_B, (3,))[0]
    zeros_BTD, noise_BTD = of(np.where(mask_BW, wave_BW, 0.0)), of(np.where(mask_BW, wave_BW, np.nan))
    assert np.isfinite(noise_BTD).all()
    for row, frames in enumerate(tokenizer.num_frames(LENGTHS_B)):
        np.testing.assert_allclose(noise_BTD[row, :frames], zeros_BTD[row, :frames], atol=1e-5)


def test_the_published_sizes_are_frames_of_20_ms(tmp_path):
    part = part_from_huggingface(parity.save(random_model(transformers.HubertModel, {}), tmp_path / "source"))
    assert part.config.model.default_layer == 1
    sizes = {"conv_channels": (8,) * 7, "conv_kernels": (10, 3, 3, 3, 3, 2, 2), "conv_strides": (5, 2, 2, 2, 2, 2, 2)}
    encoder = build_encoder({**part.config.model, **sizes})
    assert encoder.hop_length == 320 and [encoder.num_frames(length) for length in (399, 400)] == [0, 1]
    theirs = transformers.HubertModel(transformers.HubertConfig(num_hidden_layers=0))
    lengths = np.arange(0, 2000, 7)
    expected = theirs._get_feat_extract_output_lengths(torch.tensor(lengths)).numpy()
    np.testing.assert_array_equal(encoder.num_frames(lengths), np.maximum(expected, 0))


@pytest.mark.parametrize("num_buckets, max_distance", [(320, 800), (12, 24), (64, 256)])
def test_distances_fall_into_the_buckets_of_wavlm(num_buckets, max_distance):
    """Also where a logarithm is a whole number but for its rounding."""
    attention = WavLMAttention(4, 2, num_buckets=num_buckets, max_distance=max_distance)
    distances = np.arange(-2000, 2001)
    expected = attention._relative_positions_bucket(torch.tensor(distances)).numpy()
    np.testing.assert_array_equal(distance_buckets(distances, num_buckets, max_distance), expected)


@pytest.mark.parametrize(
    "model_class, base, fields",
    [
        (transformers.Wav2Vec2ForPreTraining, "wav2vec2", {"add_adapter": True, "output_hidden_size": 12}),
        (transformers.HubertForCTC, "hubert", {"conv_pos_batch_norm": True}),
        (transformers.WavLMForXVector, "wavlm", {"num_buckets": 8}),
    ],
)
def test_heads_quantizers_and_adapters_behind_the_blocks_are_left_out(tmp_path, model_class, base, fields):
    model = random_model(model_class, fields)
    whole = part_from_huggingface(parity.save(model, tmp_path / "whole"))
    inner = part_from_huggingface(parity.save(getattr(model, base), tmp_path / "inner"))
    assert whole.fingerprint() == inner.fingerprint()


def remove(folder):
    name = "encoder.layers.1.attention.k_proj.bias"
    parity.rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != name})


def add(folder):
    parity.rewrite(folder, lambda tensors: {**tensors, "encoder.layers.3.layer_norm.bias": torch.zeros(12)})


def reshape(folder):
    name = "encoder.pos_conv_embed.conv.parametrizations.weight.original0"
    parity.rewrite(folder, lambda tensors: {**tensors, name: torch.ones(12, 1, 1)})


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove, "encoder.layers.1.attention.k_proj.bias is missing"),
        (add, "encoder.layers.3.layer_norm.bias belongs to no layer"),
        (reshape, r"original0 is \[12, 1, 1\], not \[1, 1, 6\]"),
        (pickle, "weights are a pickle .pytorch_model.bin."),
        (lambda folder: (folder / "preprocessor_config.json").write_text("[1]"), "preprocessor_config.json is damaged"),
        (functools.partial(parity.set_config, adapter_attn_dim=4), "attention adapters of width 4"),
        (functools.partial(parity.set_config, feat_extract_norm="batch"), "unknown conv_norm: batch"),
        (functools.partial(parity.set_config, hidden_act="tanh"), "unknown activation: tanh"),
        (functools.partial(parity.set_config, conv_stride=[3, 2]), "convolutions do not match"),
        (functools.partial(parity.set_config, num_attention_heads=5), "cannot be shared out to 5 heads"),
        (functools.partial(parity.set_config, num_hidden_layers=2), "encoder.layers.2.* belongs to no layer"),
    ],
)
def test_refuses_by_name_and_leaves_nothing_behind(tmp_path, damage, message):
    source = parity.save(random_model(transformers.HubertModel, {}), tmp_path / "source")
    damage(source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_processor_file_says_too_whether_clips_are_normalised(tmp_path):
    source = parity.save(random_model(transformers.HubertModel, {}), tmp_path / "source")
    description = {"feature_extractor": {"do_normalize": False, "sampling_rate": 8000}}
    (source / "processor_config.json").write_text(json.dumps(description))
    model = part_from_huggingface(source).config.model
    assert (model.normalize_wave, model.sample_rate) == (False, 8000)


def test_clips_and_layers_that_there_are_not_are_refused(folder):
    tokenizer = converted(folder, "hubert")[2]
    with pytest.raises(UserError, match="a clip of 16 samples has no frame: row 1"):
        tokenizer.features(random_waves(), [SHORTEST, SHORTEST - 1, 0, 0])
    with pytest.raises(UserError, match="no such layer: layer 4; choose 0 to 3"):
        tokenizer.features(random_waves(), LENGTHS_B, 4)
    assert tokenizer.features(np.zeros((2, SHORTEST - 1)), [0, 0]).shape == (2, 0, 12)


def test_tokens_come_from_fit_kmeans_and_are_the_same_in_any_company(folder, tmp_path):
    converted(folder, "wavlm")
    recordings = tiny.write_recordings(tmp_path / "recordings", (0.03, 0.04, 0.05))
    output = tmp_path / "tokenizer"
    encoder = str(folder / "our wavlm")
    commands.fit_kmeans(commands.FitKmeansOptions(
        encoder=encoder, layers=[2], input_path=str(recordings), num_clusters=[5], output=str(output)
    ))  # fmt: skip
    tokenizer = audiolm_jax.load_semantic_tokenizer(output)
    assert tokenizer.vocab_size == 5 and read_part(output).settings == {"layer": 2}
    wave_BW = random_waves()
    z_BT = tokenizer.encode(wave_BW, LENGTHS_B)
    assert len(np.unique(z_BT[3])) > 1
    x_BTD = tokenizer.features(wave_BW, LENGTHS_B, layer=2)
    clusters = {name: np.asarray(value) for name, value in tokenizer.clusters.items()}
    distances_BTK = np.linalg.norm(
        ((x_BTD - clusters["mean"]) / clusters["std"])[:, :, None] - clusters["centroids"], axis=-1
    )
    longer_BW = np.pad(wave_BW, [(0, 0), (0, 300 * HOP)])
    for row, length in enumerate(LENGTHS_B):
        frames = tokenizer.num_frames(length)
        np.testing.assert_array_equal(z_BT[row, :frames], distances_BTK[row, :frames].argmin(-1))
        alone_BT = tokenizer.encode(wave_BW[row : row + 1, :length])
        padded_BT = tokenizer.encode(longer_BW[[row, 3]], [length, longer_BW.shape[1]])
        np.testing.assert_array_equal(alone_BT[0], z_BT[row, :frames])
        np.testing.assert_array_equal(padded_BT[0, :frames], z_BT[row, :frames])
