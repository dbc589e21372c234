"""One decoder-only Transformer for every stage, with T5 relative position bias or rotary positions.

Pre-normalisation with RMSNorm, untied embeddings, no biases: the T5X decoder-only recipe that
AudioLM (arXiv 2209.03143 §4.1) builds on. Parameters carry logical axis names; layers are stacked
along `layers` by `nn.scan`; decoding has its own forward pass over a cache (`decode.forward_cached`).

Shape suffixes: B batch, T positions, D model, N heads, H head width, F feed-forward, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from audiolm_jax.lm import attention
from audiolm_jax.lm.self_attention import self_attention
from audiolm_jax.lm.stages import SEP
from audiolm_jax.partitioning import gathered
from audiolm_jax.rotary import rotate

# Segments [B, T] and prefix lengths [B].
Visible = tuple[jax.Array | None, jax.Array | None]

REMAT_POLICIES = {
    "minimal": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(attention.ATTENTION_OUTPUT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Architecture of one stage; the fields of a config's `model`, and the stage's vocabulary.

    Attributes:
      gated_mlp: T5 1.1's gated GELU (three matrices) instead of the plain GELU (two).
      position: "relative_bias" (T5's, one table for all layers) or "rotary".
      num_buckets, max_distance: of the relative position bias.
      prefix_attention: the condition's positions, up to the separator, see one another in both directions (a prefix
        language model, Raffel et al., 2020, §3.2.1); causal throughout otherwise.
      attention: "fused" (one kernel where the device has one) or "xla"; see `self_attention.self_attention`.
      block_positions: for how many positions at a time the logits of attention and of the vocabulary exist, to be
        computed anew in the backward pass; 0: for all, and they are kept.
      dtype: computation's type; parameters stay float32 (float64 under x64 with dtype "float64").
      remat: "none", "minimal" (keep the layers' matrix products and attention's output) or "full" (layer inputs only).
      unrolled_layers: how many layers are compiled one after the other, instead of one for all: a step that is some
        hundredths faster on a CPU, for a longer compilation.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    embed_dim: int
    mlp_dim: int
    gated_mlp: bool = False
    dropout_rate: float = 0.0
    position: str = "relative_bias"
    num_buckets: int = 32
    max_distance: int = 128
    prefix_attention: bool = False
    attention: str = "xla"
    block_positions: int = 0
    dtype: str = "float32"
    remat: str = "none"
    unrolled_layers: int = 1

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def param_dtype(self) -> Any:
        return jnp.promote_types(jnp.float32, self.dtype)


def condition_lengths(tokens_BT: jax.Array) -> jax.Array:
    """Positions of each row up to its separator, the condition and what stands around it: int32 [B], 0 without one."""
    is_separator_BT = tokens_BT == SEP
    found_B = jnp.any(is_separator_BT, axis=1)
    return jnp.where(found_B, jnp.argmax(is_separator_BT, axis=1) + 1, 0).astype(jnp.int32)


def _weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], scale: float) -> jax.Array:
    """A float32 master weight, normal with standard deviation `scale`, cast to the compute type."""
    config = module.config
    init = nn.with_logical_partitioning(nn.initializers.normal(scale), axes)
    return gathered(jnp.asarray(module.param(name, init, shape, config.param_dtype), config.dtype), axes)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (T5's LayerNorm), computed in float32 or wider."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale_D = self.param("scale", init, (x_BTD.shape[-1],), self.config.param_dtype)
        wide_BTD = x_BTD.astype(self.config.param_dtype)
        variance_BT1 = jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True)
        return (wide_BTD * jax.lax.rsqrt(variance_BT1 + 1e-6) * scale_D).astype(self.config.dtype)


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, table_RN: jax.Array | None, visible: Visible) -> jax.Array:
        """Outputs [B, T, D].

        Args:
          x_BTD: inputs.
          table_RN: of the relative position bias; None with rotary positions.
          visible: segments and prefixes, see `attention.causal_attention`.
        """
        config = self.config
        inner = (config.embed_dim, config.num_heads, config.head_dim)
        axes = ("embed", "heads", "kv")
        # T5 folds 1/sqrt(H) into the query's initialisation.
        query_scale = (config.embed_dim * config.head_dim) ** -0.5
        scale = config.embed_dim**-0.5
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, _weight(self, "query", inner, axes, query_scale))
        k_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, _weight(self, "key", inner, axes, scale))
        v_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, _weight(self, "value", inner, axes, scale))
        if config.position == "rotary":
            position_T = jnp.arange(x_BTD.shape[1])
            q_BTNH, k_BTNH = rotate(q_BTNH, position_T), rotate(k_BTNH, position_T)
        # When parameters are made, there is a single row: nothing to share.
        attend = attention.causal_attention
        if not self.is_initializing():
            attend = functools.partial(self_attention, implementation=config.attention)
        settings = (config.max_distance, config.block_positions)
        mixed_BTNH = attend(q_BTNH, k_BTNH, v_BTNH, table_RN, *visible, *settings)
        out_NHD = _weight(self, "out", (*inner[1:], config.embed_dim), ("heads", "kv", "embed"), scale)
        return jnp.einsum("BTNH,NHD->BTD", mixed_BTNH, out_NHD)


class FeedForward(nn.Module):
    """GELU feed-forward, plain or gated."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        widen = ((config.embed_dim, config.mlp_dim), ("embed", "mlp"), config.embed_dim**-0.5)
        hidden_BTF = jax.nn.gelu(x_BTD @ _weight(self, "wide", *widen))
        if config.gated_mlp:
            hidden_BTF = hidden_BTF * (x_BTD @ _weight(self, "gate", *widen))
        hidden_BTF = nn.with_logical_constraint(hidden_BTF, ("batch", "length", "mlp"))
        narrow = ((config.mlp_dim, config.embed_dim), ("mlp", "embed"), config.mlp_dim**-0.5)
        return hidden_BTF @ _weight(self, "narrow", *narrow)


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residual connections and dropout."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD, table_RN, visible, deterministic):
        """See `Attention` for the arguments; returns [B, T, D], and None as `nn.scan` wants it."""
        config = self.config
        dropout = functools.partial(nn.Dropout(config.dropout_rate, broadcast_dims=(-2,)), deterministic=deterministic)
        normed_BTD = RMSNorm(config, name="attention_norm")(x_BTD)
        x_BTD = x_BTD + dropout(Attention(config, name="attention")(normed_BTD, table_RN, visible))
        normed_BTD = RMSNorm(config, name="mlp_norm")(x_BTD)
        x_BTD = x_BTD + dropout(FeedForward(config, name="mlp")(normed_BTD))
        return nn.with_logical_constraint(x_BTD, ("batch", "length", "embed_activation")), None


class Transformer(nn.Module):
    """Tokens to next-token logits."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        block = Block
        if config.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False, static_argnums=(4,))
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=config.num_layers,
            unroll=config.unrolled_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        self.final_norm = RMSNorm(config)
        self.embedding = nn.Embed(
            config.vocab_size,
            config.embed_dim,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
        )
        if config.position == "relative_bias":
            bias_init = nn.with_logical_partitioning(
                nn.initializers.normal(config.embed_dim**-0.5), ("buckets", "heads")
            )
            shape = (config.num_buckets, config.num_heads)
            self.position_bias = self.param("position_bias", bias_init, shape, config.param_dtype)
        head_init = nn.with_logical_partitioning(nn.initializers.normal(config.embed_dim**-0.5), ("embed", "vocab"))
        self.head = self.param("head", head_init, (config.embed_dim, config.vocab_size), config.param_dtype)
        self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))

    def __call__(
        self, tokens_BT: jax.Array, deterministic: bool = True, segment_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, T, V] (float32 or wider) for the token after each position; see `hidden` for the arguments."""
        return self.logits(self.hidden(tokens_BT, deterministic, segment_ids_BT))

    def hidden(
        self, tokens_BT: jax.Array, deterministic: bool = True, segment_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """Final hidden states [B, T, D].

        Positions on the right that are padding need no mask: no earlier position sees them.

        Args:
          tokens_BT: int32 input tokens.
          deterministic: False applies dropout, with the "dropout" key.
          segment_ids_BT: where several sequences are packed into a row, which one each position belongs to. No
            position sees another segment; both kinds of positions know distances only, so none need be counted anew.
        """
        x_BTD = self.dropout(self.embedding(tokens_BT), deterministic=deterministic)
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "embed_activation"))
        prefix_B = condition_lengths(tokens_BT) if self.config.prefix_attention else None
        visible = (segment_ids_BT, prefix_B)
        x_BTD, _ = self.layers(x_BTD, getattr(self, "position_bias", None), visible, deterministic)
        return self.dropout(self.final_norm(x_BTD), deterministic=deterministic)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Final hidden states -> logits [B, T, V] (float32 or wider)."""
        config = self.config
        head_DV = gathered(self.head.astype(config.dtype), ("embed", "vocab"))
        logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, preferred_element_type=config.param_dtype)
        return nn.with_logical_constraint(logits_BTV, ("batch", "length", "vocab"))
