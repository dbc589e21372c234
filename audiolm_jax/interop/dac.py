"""Hugging Face's `DacModel` (DAC at 16, 24 and 44.1 kHz, or any other sizes) as a part of ours.

Shape suffixes: I and O channels in and out, k kernel taps.
"""

import os
from typing import Any

import ml_collections
import numpy as np

from audiolm_jax.codec.dac import DacConfig
from audiolm_jax.codec.soundstream import DILATIONS
from audiolm_jax.config import soundstream_config
from audiolm_jax.errors import UserError
from audiolm_jax.interop.huggingface import Tensors, read_config
from audiolm_jax.parts import Part

# What a config.json leaves out has these values.
DEFAULTS = {
    "encoder_hidden_size": 64,
    "downsampling_ratios": [2, 4, 8, 8],
    "decoder_hidden_size": 1536,
    "n_codebooks": 9,
    "codebook_size": 1024,
    "codebook_dim": 8,
    "sampling_rate": 16_000,
}


def part_from_huggingface(source: str | os.PathLike[str]) -> Part:
    """Reads a folder that `DacModel.save_pretrained` wrote.

    Returns:
      a codec whose config can be trained on.

    Raises:
      UserError: no such model there, or weights that do not belong to it.
    """
    description = read_config(source)
    if description["model_type"] != "dac":
        raise UserError(f"not a DAC but a {description['model_type']}", source, "give the folder of a DacModel")
    model = _config({**DEFAULTS, **description})
    tensors = Tensors(source)
    generator = {"encoder": _encoder(tensors, model), "decoder": _decoder(tensors, model)}
    generator["quantizer"] = _quantizer(tensors, model)
    tensors.check_all_used()
    config = soundstream_config()
    config.model = ml_collections.ConfigDict({"architecture": "dac", **vars(model)})
    # How often the codes are used shows in training only.
    codebooks = {"cluster_size": np.zeros((model.num_quantizers, model.codebook_size), np.float32)}
    return Part("soundstream", config, {"generator": generator, "codebooks": codebooks})


def _config(fields: dict[str, Any]) -> DacConfig:
    strides = tuple(fields["downsampling_ratios"])
    return DacConfig(
        sample_rate=fields["sampling_rate"],
        channels=fields["encoder_hidden_size"],
        strides=strides,
        decoder_channels=fields["decoder_hidden_size"],
        decoder_strides=tuple(fields.get("upsampling_ratios", strides[::-1])),
        embed_dim=fields.get("hidden_size", fields["encoder_hidden_size"] * 2 ** len(strides)),
        num_quantizers=fields["n_codebooks"],
        codebook_size=fields["codebook_size"],
        codebook_dim=fields["codebook_dim"],
    )


def _conv(tensors: Tensors, module: str, kernel_size: int, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    kernel_OIk = tensors.weight(module, (outputs, inputs, kernel_size))
    return {"kernel": kernel_OIk.transpose(2, 1, 0), "bias": tensors.take(f"{module}.bias", (outputs,))}


def _up_conv(tensors: Tensors, module: str, stride: int, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    kernel_IOk = tensors.weight(module, (inputs, outputs, 2 * stride))
    return {"kernel": kernel_IOk.transpose(2, 0, 1), "bias": tensors.take(f"{module}.bias", (outputs,))}


def _snake(tensors: Tensors, module: str, channels: int) -> dict[str, np.ndarray]:
    return {"alpha": tensors.take(f"{module}.alpha", (1, channels, 1)).reshape(channels)}


def _units(tensors: Tensors, block: int, module: str, channels: int) -> dict[str, Any]:
    return {
        f"unit_{block}_{unit}": {
            "dilated_snake": _snake(tensors, f"{module}.res_unit{unit + 1}.snake1", channels),
            "dilated": _conv(tensors, f"{module}.res_unit{unit + 1}.conv1", 7, channels, channels),
            "mix_snake": _snake(tensors, f"{module}.res_unit{unit + 1}.snake2", channels),
            "mix": _conv(tensors, f"{module}.res_unit{unit + 1}.conv2", 1, channels, channels),
        }
        for unit in range(len(DILATIONS))
    }


def _encoder(tensors: Tensors, model: DacConfig) -> dict[str, Any]:
    params = {"first": _conv(tensors, "encoder.conv1", 7, 1, model.channels)}
    channels = model.channels
    for block, stride in enumerate(model.strides):
        module = f"encoder.block.{block}"
        params |= _units(tensors, block, module, channels)
        params[f"down_{block}_snake"] = _snake(tensors, f"{module}.snake1", channels)
        params[f"down_{block}"] = _conv(tensors, f"{module}.conv1", 2 * stride, channels, 2 * channels)
        channels *= 2
    params["last_snake"] = _snake(tensors, "encoder.snake1", channels)
    params["last"] = _conv(tensors, "encoder.conv2", 3, channels, model.embed_dim)
    return params


def _decoder(tensors: Tensors, model: DacConfig) -> dict[str, Any]:
    params = {"first": _conv(tensors, "decoder.conv1", 7, model.embed_dim, model.decoder_channels)}
    channels = model.decoder_channels
    for block, stride in enumerate(model.decoder_strides):
        module = f"decoder.block.{block}"
        params[f"up_{block}_snake"] = _snake(tensors, f"{module}.snake1", channels)
        params[f"up_{block}"] = _up_conv(tensors, f"{module}.conv_t1", stride, channels, channels // 2)
        channels //= 2
        params |= _units(tensors, block, module, channels)
    params["last_snake"] = _snake(tensors, "decoder.snake1", channels)
    params["last"] = _conv(tensors, "decoder.conv2", 7, channels, 1)
    return params


def _quantizer(tensors: Tensors, model: DacConfig) -> dict[str, Any]:
    wide, narrow, levels = model.embed_dim, model.codebook_dim, range(model.num_quantizers)
    modules = [f"quantizer.quantizers.{level}" for level in levels]

    def projection(name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        layers = [_conv(tensors, f"{module}.{name}", 1, inputs, outputs) for module in modules]
        kernel_QIO = np.stack([layer["kernel"][0] for layer in layers])
        return {"kernel": kernel_QIO, "bias": np.stack([layer["bias"] for layer in layers])}

    codes = [tensors.take(f"{module}.codebook.weight", (model.codebook_size, narrow)) for module in modules]
    return {
        "in": projection("in_proj", wide, narrow),
        "codes": np.stack(codes),
        "out": projection("out_proj", narrow, wide),
    }
