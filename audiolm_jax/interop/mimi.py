"""Hugging Face's `MimiModel` as a codec of ours."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from audiolm_jax.codec.mimi import Decoder, Encoder, MimiConfig
from audiolm_jax.config import soundstream_config
from audiolm_jax.errors import UserError
from audiolm_jax.interop import seanet
from audiolm_jax.interop.huggingface import Tensors, activation_name, read_config
from audiolm_jax.parts import Part

# What a config.json leaves out.
DEFAULTS = {
    "sampling_rate": 24_000,
    "audio_channels": 1,
    "hidden_size": 512,
    "num_filters": 64,
    "num_residual_layers": 1,
    "upsampling_ratios": (8, 6, 5, 4),
    "kernel_size": 7,
    "last_kernel_size": 3,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "use_causal_conv": True,
    "pad_mode": "constant",
    "compress": 2,
    "trim_right_ratio": 1.0,
    "codebook_size": 2048,
    "codebook_dim": 256,
    "num_quantizers": 32,
    "use_conv_shortcut": False,
    "vector_quantization_hidden_dimension": 256,
    "num_semantic_quantizers": 1,
    "upsample_groups": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "rope_parameters": None,
    "rope_theta": 10_000.0,
    "frame_rate": None,
    "_frame_rate": None,
    "sliding_window": 250,
    "attention_bias": False,
}
# A code is the sum of its frames divided by their number, or by this where they are fewer.
SMALLEST_USAGE = np.float32(1e-5)


def part_from_huggingface(source: str | os.PathLike[str]) -> Part:
    """The model of a folder as a part that `load_codec` and fine-tuning take.

    Raises:
      UserError: not a Mimi of ours to convert, or weights that do not belong to its config.
    """
    model = _model({**DEFAULTS, **read_config(source)}, source)
    tensors = Tensors(source)
    tensors.ignore(".codebook.initialized")
    shapes = {
        "encoder": seanet.shapes_of(Encoder(model), (1, model.hop_length)),
        "decoder": seanet.shapes_of(Decoder(model), (1, 1, model.embed_dim)),
    }
    weights: dict[str, Any] = {
        "encoder": {
            "seanet": seanet.encoder_weights(tensors, "encoder", model),
            "transformer": _transformer(tensors, "encoder_transformer", shapes["encoder"]["transformer"]),
            "down": seanet.convolution(tensors, "downsample", shapes["encoder"]["down"]),
        },
        "decoder": {
            "up": seanet.convolution(tensors, "upsample", shapes["decoder"]["up"], transpose=True),
            "transformer": _transformer(tensors, "decoder_transformer", shapes["decoder"]["transformer"]),
            "seanet": seanet.decoder_weights(tensors, "decoder", model),
        },
    }
    parameters, codebooks = _quantizer(tensors, model)
    if parameters:
        weights["quantizer"] = parameters
    tensors.check_all_used()
    training = soundstream_config()
    training.model = {"architecture": "mimi", **dataclasses.asdict(model)}
    return Part("soundstream", training, {"generator": weights, "codebooks": codebooks})


def _model(config: Mapping[str, Any], source: str | os.PathLike[str]) -> MimiConfig:
    if config["audio_channels"] != 1:
        raise UserError(f"a Mimi of {config['audio_channels']} channels", source, "only mono ones can be converted")
    rope = config["rope_parameters"] or {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"rotary positions of type {rope['rope_type']}", source, "only default ones can be converted")
    hop = math.prod(config["upsampling_ratios"])
    inner_rate = math.ceil(config["sampling_rate"] / hop)
    # Published with one name, saved anew with the other; where it is missing, the rate is halved.
    frame_rate = config["frame_rate"] or config["_frame_rate"] or config["sampling_rate"] / (2 * hop)
    frame_stride = int(inner_rate / frame_rate)
    if frame_stride < 2:
        raise UserError("frames are as many as the Transformer's", source, "a Mimi halves their rate: mend config.json")
    width, codebook_dim = config["vector_quantization_hidden_dimension"], config["codebook_dim"]
    if width != codebook_dim:
        problem = f"codebook_dim {codebook_dim} is not vector_quantization_hidden_dimension {width}"
        raise UserError(problem, source, "mend config.json")
    return MimiConfig(
        **seanet.config_fields(config),
        num_quantizers=config["num_quantizers"],
        frame_stride=frame_stride,
        upsample_groups=config["upsample_groups"],
        num_semantic_quantizers=config["num_semantic_quantizers"],
        codebook_dim=codebook_dim,
        project_codes=width != config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"] or config["hidden_size"] // config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        attention_window=config["sliding_window"],
        attention_bias=config["attention_bias"],
        activation=activation_name(config["hidden_act"]),
        norm_epsilon=config["norm_eps"],
        rope_theta=rope["rope_theta"],
    )


def _transformer(tensors: Tensors, prefix: str, shapes: Any) -> dict[str, Any]:
    """Parameters of `mimi.Transformer`; `shapes` are theirs."""

    def dense(name: str, shapes: Any) -> dict[str, np.ndarray]:
        inputs, outputs = shapes["kernel"].shape
        weights = {"kernel": np.ascontiguousarray(tensors.take(f"{name}.weight", (outputs, inputs)).T)}
        return weights | ({"bias": tensors.take(f"{name}.bias", (outputs,))} if "bias" in shapes else {})

    def layer(name: str, shapes: Any) -> dict[str, Any]:
        attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
        norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        scales = {"attention_scale": "self_attn_layer_scale", "mlp_scale": "mlp_layer_scale"}
        take = lambda theirs: tensors.take(f"{name}.{theirs}", shapes["mlp_scale"]["scale"].shape)
        return {
            "attention": {
                ours: dense(f"{name}.self_attn.{theirs}", shapes["attention"][ours])
                for ours, theirs in attention.items()
            },
            "wide": dense(f"{name}.mlp.fc1", shapes["wide"]),
            "narrow": dense(f"{name}.mlp.fc2", shapes["narrow"]),
            **{ours: {"scale": take(f"{norm}.weight"), "bias": take(f"{norm}.bias")} for ours, norm in norms.items()},
            **{ours: {"scale": take(f"{scale}.scale")} for ours, scale in scales.items()},
        }

    numbers = range(len(shapes))
    return {f"layer_{number}": layer(f"{prefix}.layers.{number}", shapes[f"layer_{number}"]) for number in numbers}


def _quantizer(tensors: Tensors, model: MimiConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Parameters and codebooks of `mimi.SplitQuantizer`."""
    parameters, sums, usages = {}, [], []
    semantic = model.num_semantic_quantizers
    for half, levels in (("semantic", semantic), ("acoustic", model.num_quantizers - semantic)):
        name = f"quantizer.{half}_residual_vector_quantizer"
        for level in range(levels):
            book = f"{name}.layers.{level}.codebook"
            sums.append(tensors.take(f"{book}.embed_sum", (model.codebook_size, model.codebook_dim)))
            usages.append(tensors.take(f"{book}.cluster_usage", (model.codebook_size,)))
        if model.project_codes:
            into = tensors.take(f"{name}.input_proj.weight", (model.codebook_dim, model.embed_dim, 1))[..., 0].T
            back = tensors.take(f"{name}.output_proj.weight", (model.embed_dim, model.codebook_dim, 1))[..., 0].T
            parameters[half] = {"input": np.ascontiguousarray(into), "output": np.ascontiguousarray(back)}
    sum_QND, cluster_size_QN = np.stack(sums), np.stack(usages)
    embedding_QND = sum_QND / np.maximum(cluster_size_QN, SMALLEST_USAGE)[..., None]
    return parameters, {"embedding": embedding_QND, "cluster_size": cluster_size_QN, "embedding_sum": sum_QND}
