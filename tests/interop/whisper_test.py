"""Whisper's encoder against transformers', from safetensors and from CTranslate2's format: random weights."""

import struct

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel

import audiolm_jax
from audiolm_jax.errors import UserError
from audiolm_jax.interop.convert import convert
from audiolm_jax.parts import read_part
from tests.interop import ctranslate2_files, encoders, parity

SECONDS = 2
SMALL = dict(d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=20)
CONFIGS = {
    "two heads": SMALL,
    "relu": dict(
        d_model=12, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=40, num_mel_bins=128,
        activation_function="relu",
    ),
}  # fmt: skip


def random_model(seed: int = 0, kind=WhisperModel, **config):
    described = WhisperConfig(
        **{**SMALL, **config}, decoder_layers=1, decoder_attention_heads=1, decoder_ffn_dim=4, vocab_size=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_source_positions=50 * SECONDS,
    )  # fmt: skip
    return encoders.randomized(kind(described), seed)


def hidden_states(model, extractor):
    """[W] -> each of the original's hidden states [ceil(W / 320), D], of the clip filled up with silence."""

    def run(wave_W):
        features = extractor(wave_W, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            states = model.get_encoder()(features, output_hidden_states=True).hidden_states
        return [state[0, : -(-len(wave_W) // 320)].numpy() for state in states]

    return run


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request, tmp_path_factory):
    """(their hidden states, the folder of our part)."""
    folder, model = tmp_path_factory.mktemp("whisper"), random_model(**CONFIGS[request.param])
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins, chunk_length=SECONDS)
    model.save_pretrained(folder / "source")
    extractor.save_pretrained(folder / "source")
    convert(folder / "source", folder / "part")
    return hidden_states(model, extractor), folder / "part"


def test_rows_are_what_the_original_gives_for_each_clip(pair):
    theirs, part = pair
    tokenizer = audiolm_jax.load_semantic_tokenizer(part)
    assert (tokenizer.sample_rate, tokenizer.frame_rate) == (16_000, 50)
    assert tokenizer.encoder.window_seconds == SECONDS
    encoders.assert_rows_are_alone(tokenizer, theirs, [32_000, 31_681, 1, 320, 9_999, 400, 23_456], seed=1)


def test_layers_silence_and_windows(pair):
    theirs, part = pair
    tokenizer = audiolm_jax.load_semantic_tokenizer(part)
    last = tokenizer.num_layers
    long_W = encoders.clips([50_000], seed=2)[0]
    states = tokenizer.features_of_layers([long_W, np.zeros_like(long_W)], None, (last, 0))
    assert all(np.isfinite(state_BTD).all() and state_BTD.shape[1] == 157 for state_BTD in states)
    # The first window's 100 frames, but for the sixth at its end; the second begins 84 − 16 frames into the clip.
    first, second = theirs(long_W[:32_000]), theirs(long_W[68 * 320 :])
    for layer, state_BTD in zip((last, 0), states):
        whole_TD = np.concatenate([first[layer][:84], second[layer][16:]])
        parity.assert_features_close(state_BTD[0], whole_TD)


def test_a_whole_model_and_its_encoder_are_the_same_part(tmp_path):
    whole = random_model(kind=WhisperForConditionalGeneration)
    whole.save_pretrained(tmp_path / "whole")
    whole.model.save_pretrained(tmp_path / "bare")
    for name in ("whole", "bare"):
        convert(tmp_path / name, tmp_path / f"{name} part")
    assert read_part(tmp_path / "whole part").fingerprint() == read_part(tmp_path / "bare part").fingerprint()


def test_fit_kmeans_makes_it_a_tokenizer(tmp_path):
    random_model(encoder_layers=1).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "part")
    encoders.assert_becomes_a_tokenizer(tmp_path / "part", tmp_path, layer=1)


@pytest.mark.parametrize(
    "dtype, rest",
    [("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("int8", "float32"),
     ("int8", "float16"), ("int16", "float32")],
)  # fmt: skip
def test_ctranslate2s_weights_are_those_of_safetensors(tmp_path, dtype, rest):
    model = random_model(seed=3)
    original = model.encoder.layers[1].fc1.weight.detach().clone()
    variables = ctranslate2_files.encoder_variables(model, dtype, rest)
    # What is equal is stored once: one layer's norm here as another's, its matrix as something of the decoder's.
    model.encoder.layers[2].load_state_dict(model.encoder.layers[0].state_dict())
    aliases = {}
    for name in [name for name in variables if name.startswith("encoder/layer_2/") and not name.endswith("_scale")]:
        del variables[name]
        variables.pop(f"{name}_scale", None)
        aliases[name] = name.replace("layer_2", "layer_0")
    for name in ("encoder/layer_1/ffn/linear_0/weight", "encoder/layer_1/ffn/linear_0/weight_scale"):
        if name in variables:
            variables[name.replace("encoder", "decoder")] = variables.pop(name)
    aliases["encoder/layer_1/ffn/linear_0/weight"] = "decoder/layer_1/ffn/linear_0/weight"
    folder = ctranslate2_files.write(tmp_path / "ct2", ctranslate2_files.model_bin(variables, aliases))
    model.save_pretrained(tmp_path / "twin")
    for name in ("ct2", "twin"):
        convert(tmp_path / name, tmp_path / f"{name} part")
    part, twin = (read_part(tmp_path / f"{name} part") for name in ("ct2", "twin"))
    assert part.config.to_dict() == twin.config.to_dict()
    assert part.fingerprint() == twin.fingerprint()
    # The twin's are those that were quantized, no others.
    precision = {"float32": 0.0, "float16": 5e-4, "bfloat16": 4e-3, "int8": 5e-3, "int16": 6e-4}[dtype]
    kernel = part.weights["params"]["layers"]["wide"]["kernel"][1].T
    error = np.abs(kernel - original.numpy()).max() / np.abs(original.numpy()).max()
    assert error <= precision and (error > 0) == (dtype != "float32")
    assert folder.is_dir()


@pytest.fixture
def variables():
    return ctranslate2_files.encoder_variables(random_model(seed=4, encoder_layers=1), "int8", "float32")


def test_a_file_that_is_cut_short_is_refused_wherever_it_ends(tmp_path, variables):
    data = ctranslate2_files.model_bin(variables, {"decoder/projection/weight": "decoder/embeddings/weight"})
    source = ctranslate2_files.write(tmp_path / "source", data)
    for size in [*range(0, 300), *range(300, len(data), 101), len(data) - 1]:
        (source / "model.bin").write_bytes(data[:size])
        with pytest.raises(UserError, match="cut short|has .* bytes"):
            convert(source, tmp_path / "part")
    (source / "model.bin").write_bytes(data)
    convert(source, tmp_path / "part")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(version=5), "not a model of CTranslate2's version 6 .it begins with 5."),
        (dict(kind="TransformerSpec"), "not a WhisperSpec but a TransformerSpec"),
        (dict(aliases={"decoder/a": "decoder/b"}), "alias decoder/a of a variable that is missing, decoder/b"),
        (dict(remove="encoder/layer_0/ffn/linear_1/bias"), "layers.0.fc2.bias is missing"),
        (dict(remove="encoder/conv1/weight"), "not a Whisper's .*encoder/conv1/weight"),
        (dict(remove="encoder/conv2/weight_scale"), "encoder/conv2/weight is in whole numbers without a scale"),
        (dict(add={"encoder/layer_0/extra/bias": np.ones(2, np.float32)}), "layers.0.extra.bias belongs to no layer"),
        (dict(add={"encoder/layer_norm/beta": np.ones(3, np.float32)}), r"layer_norm.bias is \[3\], not \[16\]"),
        (dict(add={"encoder/conv2/weight_scale": np.ones(3, np.float32)}), r"scale of .*conv2/weight is \[3\]"),
        (dict(add={"encoder/layer_0/self_attention/linear_0/bias": np.ones(48, np.float32)}), "adds to keys"),
        (dict(add={"encoder/layer_0/self_attention/linear_0/bias": np.ones(47, np.float32)}), r"is \[47\]"),
        (dict(add={"encoder/num_heads": np.array(3, np.int16)}), "width 16 .* 3 heads"),
    ],
)
def test_refuses_other_ctranslate2_models_by_name(tmp_path, variables, change, message):
    variables.pop(change.pop("remove", None), None)
    variables.update(change.pop("add", {}))
    encoders.assert_refused(
        ctranslate2_files.write(tmp_path / "source", ctranslate2_files.model_bin(variables, **change)), message
    )


def test_refuses_damaged_ctranslate2_files(tmp_path, variables):
    whole = ctranslate2_files.model_bin(variables)
    name = ctranslate2_files.text("encoder/conv1/weight")
    shape_at = whole.index(name) + len(name) + 1
    huge = whole[:shape_at] + struct.pack("<3I", *[2**32 - 1] * 3) + whole[shape_at + 12 :]
    encoders.assert_refused(
        ctranslate2_files.write(tmp_path / "huge" / "source", huge), "encoder/conv1/weight has 960 bytes"
    )
    type_at = shape_at + 12
    encoders.assert_refused(
        ctranslate2_files.write(tmp_path / "type" / "source", whole[:type_at] + b"\x09" + whole[type_at + 1 :]),
        "of the unknown type 9",
    )
    encoders.assert_refused(
        ctranslate2_files.write(
            tmp_path / "name" / "source", whole.replace(b"encoder/conv1/weight\0", b"\xff" * 20 + b"\0")
        ),
        "a name that is no text",
    )
    encoders.assert_refused(
        ctranslate2_files.write(tmp_path / "long" / "source", whole + b"more"), "4 bytes after the end"
    )


def test_refuses_a_pickle_without_running_it(tmp_path):
    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "it ran"), "w"))

    torch.save(Runs(), tmp_path / "pickle")
    encoders.assert_refused(
        ctranslate2_files.write(tmp_path / "folder" / "source", (tmp_path / "pickle").read_bytes()),
        "not a model of CTranslate2's version 6",
    )
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (encoders.without("encoder.conv1.bias"), "tensor conv1.bias is missing"),
        (encoders.with_extra("encoder.layers.9.fc1.bias"), "tensor layers.9.fc1.bias belongs to no layer"),
        (encoders.with_config(encoder_attention_heads=3), "width 16 .* 3 heads"),
        (encoders.with_config(activation_function="quick_gelu"), "unknown activation.*quick_gelu"),
        (encoders.with_config(num_mel_bins=21), r"conv1.weight is \[16, 20, 3\], not \[16, 21, 3\]"),
        (encoders.with_preprocessor('{"hop_length": 320}'), "hop_length is 320, not 160"),
        (encoders.with_preprocessor("{"), "preprocessor_config.json is damaged"),
    ],
)
def test_refuses_other_models_by_name(tmp_path, damage, message):
    random_model(encoder_layers=1).save_pretrained(tmp_path / "source")
    damage(tmp_path / "source")
    encoders.assert_refused(tmp_path / "source", message)
