"""Hugging Face's `HubertModel`, `Wav2Vec2Model` and `WavLMModel` as semantic encoders of ours.

Shape suffixes: I and O channels in and out, k kernel taps, N heads, H head width, R buckets.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from audiolm_jax.bundle import encoder_part
from audiolm_jax.errors import UserError
from audiolm_jax.interop.huggingface import Tensors, activation_name, read_config, read_preprocessor
from audiolm_jax.interop.layers import dense, layer_norm, stacked
from audiolm_jax.parts import Part
from audiolm_jax.semantic.wav2vec2 import CONV_EPSILON, Wav2Vec2Config

# What a config.json leaves out has these values, and what a preprocessor_config.json leaves out the last two.
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "feat_proj_layer_norm": True,
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "conv_dim": (512,) * 7,
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "conv_pos_batch_norm": False,
    "do_stable_layer_norm": False,
    "adapter_attn_dim": None,
    "num_buckets": 320,
    "max_bucket_distance": 800,
    "sampling_rate": 16_000,
    "do_normalize": True,
}
ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def part_from_huggingface(source: str | os.PathLike[str]) -> Part:
    """Reads a folder that `save_pretrained` of one of these models wrote, or of one with heads on top.

    Whether waveforms are normalised is `do_normalize` of the folder's feature extractor, which without a file of its
    own is `Wav2Vec2FeatureExtractor`'s default: they are. Heads, quantizers and what stands behind the last block are
    left out.

    Returns:
      a semantic encoder.

    Raises:
      UserError: no such model there, one with adapters between its blocks, or weights that do not belong to it.
    """
    extractor = read_preprocessor(source)
    fields = {**DEFAULTS, **read_config(source)}
    fields |= {name: extractor[name] for name in ("sampling_rate", "do_normalize") if name in extractor}
    if fields["adapter_attn_dim"] is not None:
        hint = "only models without attention adapters (adapter_attn_dim) can be converted"
        raise UserError(f"attention adapters of width {fields['adapter_attn_dim']}", source, hint)
    model = _model(fields)
    tensors = Tensors(source)
    tensors.enter(fields["model_type"])
    tensors.ignore("masked_spec_embed", ".num_batches_tracked")
    tensors.ignore_module("adapter")
    blocks = [_block(tensors, f"encoder.layers.{layer}", model) for layer in range(model.num_layers)]
    params: dict[str, Any] = {"front": _front(tensors, model), "blocks": stacked(blocks)}
    if model.num_buckets:
        name = "encoder.layers.0.attention.rel_attn_embed.weight"
        params["relative_positions"] = tensors.take(name, (model.num_buckets, model.num_heads))
    tensors.check_all_used()
    return encoder_part("wav2vec2", model, params)


def _model(fields: Mapping[str, Any]) -> Wav2Vec2Config:
    biased = fields["model_type"] == "wavlm"
    return Wav2Vec2Config(
        sample_rate=fields["sampling_rate"],
        normalize_wave=fields["do_normalize"],
        conv_channels=tuple(fields["conv_dim"]),
        conv_kernels=tuple(fields["conv_kernel"]),
        conv_strides=tuple(fields["conv_stride"]),
        conv_bias=fields["conv_bias"],
        conv_norm=fields["feat_extract_norm"],
        conv_activation=activation_name(fields["feat_extract_activation"]),
        projection_norm=fields["feat_proj_layer_norm"],
        position_kernel=fields["num_conv_pos_embeddings"],
        position_groups=fields["num_conv_pos_embedding_groups"],
        position_norm=fields["conv_pos_batch_norm"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        embed_dim=fields["hidden_size"],
        mlp_dim=fields["intermediate_size"],
        activation=activation_name(fields["hidden_act"]),
        pre_norm=fields["do_stable_layer_norm"],
        norm_epsilon=fields["layer_norm_eps"],
        num_buckets=fields["num_buckets"] if biased else 0,
        max_distance=fields["max_bucket_distance"] if biased else 0,
        # The middle: layer 6 of HuBERT base's 12 is what spoken language models started from (arXiv 2102.01192).
        default_layer=fields["num_hidden_layers"] // 2,
    )


def _batch_norm(tensors: Tensors, module: str, width: int) -> dict[str, np.ndarray]:
    """Batch norm by its running statistics is a scale and a shift."""
    affine = layer_norm(tensors, module, width)
    mean, variance = (tensors.take(f"{module}.running_{name}", (width,)).astype(np.float64) for name in ("mean", "var"))
    scale = affine["scale"] / np.sqrt(variance + CONV_EPSILON)
    return {"scale": scale.astype(np.float32), "bias": (affine["bias"] - mean * scale).astype(np.float32)}


def _front(tensors: Tensors, model: Wav2Vec2Config) -> dict[str, Any]:
    channels, width = model.conv_channels[-1], model.embed_dim
    params = {
        "convolutions": _convolutions(tensors, model),
        "projection": dense(tensors, "feature_projection.projection", channels, width),
        "positions": _positions(tensors, model),
    }
    if model.projection_norm:
        params["projection_norm"] = layer_norm(tensors, "feature_projection.layer_norm", channels)
    if model.position_norm:
        params["position_norm"] = _batch_norm(tensors, "encoder.pos_conv_embed.batch_norm", width)
    norm = layer_norm(tensors, "encoder.layer_norm", width)
    if not model.pre_norm:  # Where it is, this one stands behind the last block.
        params["input_norm"] = norm
    return params


def _convolutions(tensors: Tensors, model: Wav2Vec2Config) -> dict[str, Any]:
    params, inputs = {}, 1
    for index, (outputs, taps) in enumerate(zip(model.conv_channels, model.conv_kernels, strict=True)):
        module = f"feature_extractor.conv_layers.{index}"
        kernel_OIk = tensors.take(f"{module}.conv.weight", (outputs, inputs, taps))
        params[f"conv_{index}"] = {"kernel": kernel_OIk.transpose(2, 1, 0)}
        if model.conv_bias:
            params[f"conv_{index}"]["bias"] = tensors.take(f"{module}.conv.bias", (outputs,))
        if model.conv_norm == "layer" or index == 0:
            params[f"norm_{index}"] = layer_norm(tensors, f"{module}.layer_norm", outputs)
        inputs = outputs
    return params


def _positions(tensors: Tensors, model: Wav2Vec2Config) -> dict[str, np.ndarray]:
    """Weight normalisation is over all but the taps."""
    module, width = "encoder.pos_conv_embed.conv", model.embed_dim
    kernel_OIk = tensors.weight(module, (width, width // model.position_groups, model.position_kernel), axis=2)
    return {"kernel": kernel_OIk.transpose(2, 1, 0), "bias": tensors.take(f"{module}.bias", (width,))}


def _block(tensors: Tensors, module: str, model: Wav2Vec2Config) -> dict[str, Any]:
    width, hidden = model.embed_dim, model.mlp_dim
    attention = {
        ours: dense(tensors, f"{module}.attention.{theirs}", width, width) for ours, theirs in ATTENTION.items()
    }
    if model.num_buckets:
        attention |= _gate(tensors, f"{module}.attention", model)
    return {
        "attention": attention,
        "attention_norm": layer_norm(tensors, f"{module}.layer_norm", width),
        "wide": dense(tensors, f"{module}.feed_forward.intermediate_dense", width, hidden),
        "narrow": dense(tensors, f"{module}.feed_forward.output_dense", hidden, width),
        "mlp_norm": layer_norm(tensors, f"{module}.final_layer_norm", width),
    }


def _gate(tensors: Tensors, module: str, model: Wav2Vec2Config) -> dict[str, Any]:
    """Each of the two gates is the sum of four of the eight outputs that are stored."""
    stored = dense(tensors, f"{module}.gru_rel_pos_linear", model.embed_dim // model.num_heads, 8)
    halves = {name: array.reshape(*array.shape[:-1], 2, 4).sum(axis=-1) for name, array in stored.items()}
    scale_1N11 = tensors.take(f"{module}.gru_rel_pos_const", (1, model.num_heads, 1, 1))
    return {"gate": halves, "gate_scale": scale_1N11.reshape(-1)}
