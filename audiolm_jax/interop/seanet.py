"""Weights of SEANet's convolutions, as Hugging Face's EnCodec and Mimi lay them out: `PREFIX.layers.N`.

N counts the layers in the order in which they are applied, activations included.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax.codec import seanet
from audiolm_jax.codec.seanet import SeanetConfig
from audiolm_jax.interop.huggingface import Tensors

Weights = dict[str, Any]
ACTIVATION = None


def config_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `SeanetConfig` that both families' `config.json` give, under the same names."""
    return {
        "sample_rate": config["sampling_rate"],
        "audio_channels": config["audio_channels"],
        "channels": config["num_filters"],
        "strides": tuple(reversed(config["upsampling_ratios"])),
        "embed_dim": config["hidden_size"],
        "codebook_size": config["codebook_size"],
        "kernel_size": config["kernel_size"],
        "last_kernel_size": config["last_kernel_size"],
        "residual_kernel_size": config["residual_kernel_size"],
        "num_residual_layers": config["num_residual_layers"],
        "dilation_growth": config["dilation_growth_rate"],
        "compress": config["compress"],
        "conv_shortcut": config["use_conv_shortcut"],
        "causal": config["use_causal_conv"],
        "pad_mode": config["pad_mode"],
        "trim_right_ratio": config["trim_right_ratio"],
    }


def encoder_weights(tensors: Tensors, prefix: str, config: SeanetConfig) -> Weights:
    """Parameters of `seanet.Encoder`."""
    order: list[str | None] = ["first"]
    for block in range(len(config.strides)):
        order += [f"unit_{block}_{unit}" for unit in range(config.num_residual_layers)]
        order += [ACTIVATION, f"down_{block}"]
    order += ["lstm"] if config.num_lstm_layers else []
    order += [ACTIVATION, "last"]
    return _layers(tensors, prefix, order, shapes_of(seanet.Encoder(config), (1, 1, config.audio_channels)))


def decoder_weights(tensors: Tensors, prefix: str, config: SeanetConfig) -> Weights:
    """Parameters of `seanet.Decoder`."""
    order: list[str | None] = ["first"]
    order += ["lstm"] if config.num_lstm_layers else []
    for block in reversed(range(len(config.strides))):
        order += [ACTIVATION, f"up_{block}"]
        order += [f"unit_{block}_{unit}" for unit in range(config.num_residual_layers)]
    order += [ACTIVATION, "last"]
    return _layers(tensors, prefix, order, shapes_of(seanet.Decoder(config), (1, 1, config.embed_dim)))


def shapes_of(module: nn.Module, shape: tuple[int, ...]) -> Any:
    """The parameters of a module with inputs of that shape, as shapes only."""
    return nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape)))["params"]


def convolution(tensors: Tensors, name: str, shapes: Any, transpose: bool = False) -> Weights:
    """Parameters of `seanet.Conv` or, transposed, of `seanet.ConvTranspose`, and of their normalisation."""
    taps, width, features = shapes["kernel"].shape
    if transpose:
        kernel_kIO = tensors.weight(f"{name}.conv", (width, features, taps)).transpose(2, 0, 1)
    else:
        kernel_kIO = tensors.weight(f"{name}.conv", (features, width, taps)).transpose(2, 1, 0)
    weights: Weights = {"kernel": np.ascontiguousarray(kernel_kIO)}
    if "bias" in shapes:
        weights["bias"] = tensors.take(f"{name}.conv.bias", shapes["bias"].shape)
    if "norm" in shapes:
        weights["norm"] = {
            "scale": tensors.take(f"{name}.norm.weight", shapes["norm"]["scale"].shape),
            "bias": tensors.take(f"{name}.norm.bias", shapes["norm"]["bias"].shape),
        }
    return weights


def _layers(tensors: Tensors, prefix: str, order: list[str | None], shapes: Any) -> Weights:
    weights: Weights = {}
    for index, layer in enumerate(order):
        if layer is None:
            continue
        name, kind = f"{prefix}.layers.{index}", layer.split("_")[0]
        if kind == "unit":
            weights[layer] = _residual_unit(tensors, name, shapes[layer])
        elif kind == "lstm":
            weights[layer] = _lstm(tensors, name, shapes[layer])
        else:
            weights[layer] = convolution(tensors, name, shapes[layer], transpose=kind == "up")
    return weights


def _residual_unit(tensors: Tensors, name: str, shapes: Any) -> Weights:
    names = {"dilated": "block.1", "mix": "block.3", "shortcut": "shortcut"}
    return {ours: convolution(tensors, f"{name}.{names[ours]}", shapes[ours]) for ours in shapes}


def _lstm(tensors: Tensors, name: str, shapes: Any) -> Weights:
    """PyTorch keeps two biases for each gate, of which only the sum counts."""
    width, gates = shapes["layer_0"]["kernel"].shape

    def layer(number: int) -> Weights:
        into, back = (tensors.take(f"{name}.lstm.weight_{kind}_l{number}", (gates, width)).T for kind in ("ih", "hh"))
        biases = [tensors.take(f"{name}.lstm.bias_{kind}_l{number}", (gates,)) for kind in ("ih", "hh")]
        return {
            "kernel": np.ascontiguousarray(back),
            "input": {"kernel": np.ascontiguousarray(into), "bias": biases[0] + biases[1]},
        }

    return {f"layer_{number}": layer(number) for number in range(len(shapes))}
