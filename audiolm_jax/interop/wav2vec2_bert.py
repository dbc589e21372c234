"""Hugging Face's `Wav2Vec2BertModel` (w2v-BERT 2.0) as a semantic encoder of ours.

What comes behind the last block, adapters and heads, is left behind.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from audiolm_jax.bundle import encoder_part
from audiolm_jax.errors import UserError
from audiolm_jax.interop.huggingface import Tensors, activation_name, check_preprocessor, read_config
from audiolm_jax.interop.layers import dense, layer_norm, stacked
from audiolm_jax.parts import Part
from audiolm_jax.semantic.wav2vec2_bert import SAMPLE_RATE, STACKED, Wav2Vec2BertConfig

# What a config.json leaves out.
DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feature_projection_input_dim": 160,
    "hidden_act": "swish",
    "layer_norm_eps": 1e-5,
    "position_embeddings_type": "relative_key",
    "rotary_embedding_base": 10_000,
    "left_max_position_embeddings": 64,
    "right_max_position_embeddings": 8,
    "conv_depthwise_kernel_size": 31,
}


def part_from_huggingface(source: str | os.PathLike[str]) -> Part:
    """The encoder of a folder, be it of a `Wav2Vec2BertModel` or of a model around one.

    Raises:
      UserError: not an encoder of ours to convert, or weights that do not belong to its config.
    """
    model = _model({**DEFAULTS, **read_config(source)}, source)
    check_preprocessor(source, sampling_rate=SAMPLE_RATE, num_mel_bins=model.num_mels, stride=STACKED)
    tensors = Tensors(source)
    tensors.enter("wav2vec2_bert")
    tensors.ignore("masked_spec_embed")
    for module in ("adapter", "intermediate_ffn"):
        tensors.ignore_module(module)
    width = STACKED * model.num_mels
    params = {
        "front": {
            "norm": layer_norm(tensors, "feature_projection.layer_norm", width),
            "projection": dense(tensors, "feature_projection.projection", width, model.embed_dim),
        },
        "layers": stacked([_block(tensors, f"encoder.layers.{layer}", model) for layer in range(model.num_layers)]),
    }
    tensors.check_all_used()
    return encoder_part("wav2vec2_bert", model, params)


def _model(config: Mapping[str, Any], source: str | os.PathLike[str]) -> Wav2Vec2BertConfig:
    num_mels, rest = divmod(config["feature_projection_input_dim"], STACKED)
    if rest:
        what = f"feature_projection_input_dim {config['feature_projection_input_dim']} is not two filterbank frames"
        raise UserError(what, source, "mend config.json")
    return Wav2Vec2BertConfig(
        num_mels=num_mels,
        embed_dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        activation=activation_name(config["hidden_act"]),
        norm_epsilon=config["layer_norm_eps"],
        conv_kernel=config["conv_depthwise_kernel_size"],
        positions=config["position_embeddings_type"] or "none",
        max_left=config["left_max_position_embeddings"],
        max_right=config["right_max_position_embeddings"],
        rotary_base=config["rotary_embedding_base"],
        # Layer 17 of the public model's 24 is what MaskGCT made tokens of (arXiv 2409.00750 §3.2).
        default_layer=-(-17 * config["num_hidden_layers"] // 24),
    )


def _block(tensors: Tensors, module: str, model: Wav2Vec2BertConfig) -> dict[str, Any]:
    width = model.embed_dim
    norm = lambda name: layer_norm(tensors, f"{module}.{name}", width)

    def feed_forward(name: str) -> dict[str, Any]:
        return {
            "wide": dense(tensors, f"{module}.{name}.intermediate_dense", width, model.mlp_dim),
            "narrow": dense(tensors, f"{module}.{name}.output_dense", model.mlp_dim, width),
        }

    return {
        "first_mlp_norm": norm("ffn1_layer_norm"),
        "first_mlp": feed_forward("ffn1"),
        "attention_norm": norm("self_attn_layer_norm"),
        "attention": _attention(tensors, f"{module}.self_attn", model),
        "convolution_norm": norm("conv_module.layer_norm"),
        "convolution": _convolution(tensors, f"{module}.conv_module", model),
        "last_mlp_norm": norm("ffn2_layer_norm"),
        "last_mlp": feed_forward("ffn2"),
        "final_norm": norm("final_layer_norm"),
    }


def _attention(tensors: Tensors, module: str, model: Wav2Vec2BertConfig) -> dict[str, Any]:
    width, head_dim = model.embed_dim, model.embed_dim // model.num_heads
    names = {"query": "linear_q", "key": "linear_k", "value": "linear_v", "out": "linear_out"}
    params: dict[str, Any] = {ours: dense(tensors, f"{module}.{name}", width, width) for ours, name in names.items()}
    if model.positions == "relative_key":
        distances = model.max_left + 1 + model.max_right
        params["distances"] = tensors.take(f"{module}.distance_embedding.weight", (distances, head_dim))
    if model.positions == "relative":
        kernel_DD = dense(tensors, f"{module}.linear_pos", width, width, bias=False)["kernel"]
        # Sines and cosines take turns in their codes; in ours all sines come first.
        params["position"] = {"kernel": np.concatenate([kernel_DD[::2], kernel_DD[1::2]])}
        params["content_bias"] = tensors.take(f"{module}.pos_bias_u", (model.num_heads, head_dim))
        params["position_bias"] = tensors.take(f"{module}.pos_bias_v", (model.num_heads, head_dim))
    return params


def _convolution(tensors: Tensors, module: str, model: Wav2Vec2BertConfig) -> dict[str, Any]:
    width = model.embed_dim
    into_OI = tensors.take(f"{module}.pointwise_conv1.weight", (2 * width, width, 1))[..., 0]
    depthwise_DK = tensors.take(f"{module}.depthwise_conv.weight", (width, 1, model.conv_kernel))[:, 0]
    out_OI = tensors.take(f"{module}.pointwise_conv2.weight", (width, width, 1))[..., 0]
    return {
        "value": {"kernel": np.ascontiguousarray(into_OI[:width].T)},
        "gate": {"kernel": np.ascontiguousarray(into_OI[width:].T)},
        "depthwise": np.ascontiguousarray(depthwise_DK.T),
        "norm": layer_norm(tensors, f"{module}.depthwise_layer_norm", width),
        "out": {"kernel": np.ascontiguousarray(out_OI.T)},
    }
