"""The encoder of Hugging Face's `WhisperModel`, or of CTranslate2's (faster-whisper), as a semantic encoder of ours.

The decoder is left behind.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from audiolm_jax.bundle import encoder_part
from audiolm_jax.errors import UserError
from audiolm_jax.interop import ctranslate2
from audiolm_jax.interop.huggingface import Tensors, activation_name, check_preprocessor, read_config
from audiolm_jax.interop.layers import convolution, dense, layer_norm, stacked
from audiolm_jax.parts import Part
from audiolm_jax.semantic.whisper import FFT_LENGTH, MEL_HOP, WhisperConfig

# What a config.json leaves out.
DEFAULTS = {
    "num_mel_bins": 80,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "activation_function": "gelu",
    "d_model": 384,
    "max_source_positions": 1500,
}

# CTranslate2's modules by Hugging Face's names.
MODULES = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": "self_attn/qkv_proj",
    "self_attention/linear_1": "self_attn/out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "position_encodings": "embed_positions",
}
ENDINGS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}
FUSED = "qkv_proj"
HEADS = 8  # Where it names no number of heads.


def part_from_huggingface(source: str | os.PathLike[str]) -> Part:
    """The encoder of a folder, be it of a `WhisperModel` or of a model around one.

    Raises:
      UserError: not an encoder of ours to convert, or weights that do not belong to its config.
    """
    config = {**DEFAULTS, **read_config(source)}
    check_preprocessor(
        source,
        sampling_rate=16_000,
        feature_size=config["num_mel_bins"],
        hop_length=MEL_HOP,
        n_fft=FFT_LENGTH,
        dither=0.0,
        do_normalize=False,
    )
    return _part(config, Tensors(source))


def part_from_ctranslate2(source: str | os.PathLike[str]) -> Part:
    """The encoder of a folder with CTranslate2's `model.bin`, whose weights tell all that there is to know.

    Raises:
      UserError: no such file, a damaged one, or one of another model.
    """
    variables = ctranslate2.read_model(source, "WhisperSpec", "encoder/")
    num_heads = variables.pop("encoder/num_heads", HEADS)
    shapes = {name: array.shape for name, array in variables.items()}
    try:
        width, num_mels, _ = shapes["encoder/conv1/weight"]
        mlp_dim, _ = shapes["encoder/layer_0/ffn/linear_0/weight"]
        num_positions, _ = shapes["encoder/position_encodings/encodings"]
    except (KeyError, ValueError) as error:
        what = f"encoder's variables are not a Whisper's ({error})"
        raise UserError(what, source, "convert the model anew") from error
    config = {
        **DEFAULTS,
        "num_mel_bins": num_mels,
        "encoder_layers": sum(name.endswith("/ffn/linear_0/weight") for name in shapes),
        "encoder_attention_heads": int(num_heads),
        "encoder_ffn_dim": mlp_dim,
        "d_model": width,
        "max_source_positions": num_positions,
    }
    return _part(config, Tensors(source, _renamed(variables, source)))


def _renamed(variables: Mapping[str, np.ndarray], source: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """CTranslate2's variables by Hugging Face's names, queries, keys and values apart."""
    renamed = {}
    for name, array in variables.items():
        module, _, ending = re.sub(r"/layer_(\d+)/", r"/layers/\1/", name).rpartition("/")
        for theirs, hugging_face in MODULES.items():
            module = module.replace(theirs, hugging_face)
        module, ending = module.replace("/", "."), ENDINGS.get(ending, ending)
        if module.endswith(FUSED):
            if len(array) % 3:
                raise UserError(f"variable {name} is {list(array.shape)}", source, "convert the model anew")
            arrays = dict(zip("qkv", np.split(array, 3), strict=True))
            if ending == "bias" and np.any(arrays.pop("k")):
                raise UserError(f"variable {name} adds to keys", source, "a Whisper's has zeros there")
            for letter, part in arrays.items():
                renamed[f"{module.removesuffix(FUSED)}{letter}_proj.{ending}"] = part
        else:
            renamed[f"{module}.{ending}"] = array
    return renamed


def _part(config: Mapping[str, Any], tensors: Tensors) -> Part:
    model = WhisperConfig(
        num_mels=config["num_mel_bins"],
        num_positions=config["max_source_positions"],
        embed_dim=config["d_model"],
        num_layers=config["encoder_layers"],
        num_heads=config["encoder_attention_heads"],
        mlp_dim=config["encoder_ffn_dim"],
        activation=activation_name(config["activation_function"]),
        default_layer=-(-2 * config["encoder_layers"] // 3),
    )
    width = model.embed_dim
    tensors.enter("model")
    tensors.enter("encoder")

    def block(module: str) -> dict[str, Any]:
        return {
            "attention_norm": layer_norm(tensors, f"{module}.self_attn_layer_norm", width),
            "query": dense(tensors, f"{module}.self_attn.q_proj", width, width),
            "key": dense(tensors, f"{module}.self_attn.k_proj", width, width, bias=False),
            "value": dense(tensors, f"{module}.self_attn.v_proj", width, width),
            "out": dense(tensors, f"{module}.self_attn.out_proj", width, width),
            "mlp_norm": layer_norm(tensors, f"{module}.final_layer_norm", width),
            "wide": dense(tensors, f"{module}.fc1", width, model.mlp_dim),
            "narrow": dense(tensors, f"{module}.fc2", model.mlp_dim, width),
        }

    params = {
        "front": {
            "wide": convolution(tensors, "conv1", 3, model.num_mels, width),
            "strided": convolution(tensors, "conv2", 3, width, width),
            "positions": tensors.take("embed_positions.weight", (model.num_positions, width)),
        },
        "layers": stacked([block(f"layers.{layer}") for layer in range(model.num_layers)]),
        "norm": layer_norm(tensors, "layer_norm", width),
    }
    tensors.check_all_used()
    return encoder_part("whisper", model, params)
