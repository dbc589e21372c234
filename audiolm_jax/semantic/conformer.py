"""Conformer blocks with Transformer-XL relative positions (arXiv 2005.08100, 1901.02860), for ragged batches.

A block is half a feed-forward, self-attention, a convolution, half a feed-forward and a LayerNorm.
The convolution's batch norm is a LayerNorm here: it has no statistics for padding to leak into, and
training equals inference. Whatever looks sideways (attention, convolution) is masked, so that each
row of a batch equals that clip alone.

Shape suffixes: B batch, T queries, S keys, R relative distances, N heads, H head width, D model,
F feed-forward, K kernel.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax.partitioning import gathered

REMAT_POLICIES = {
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """What a stack of blocks must be told.

    Attributes:
      embed_dim, num_heads, mlp_dim: D, N (a divisor of D) and F.
      conv_kernel: frames that the depthwise convolution covers, centred.
      dropout_rate: on the output of every residual branch.
      dtype: computation's type; parameters, LayerNorm statistics and softmax stay float32.
      remat: "none", "minimal" (keep matrix products) or "full" (keep block inputs only).
      block_positions: for how many frames at a time the logits of attention and of the codes exist, to be computed
        anew in the backward pass (with remat "full"; the other policies keep copies of every part's inputs); 0: for
        all, and they are kept.
    """

    embed_dim: int
    num_heads: int
    mlp_dim: int
    conv_kernel: int
    dropout_rate: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    block_positions: int = 0


def dense(config: ConformerConfig, features: int, axes: tuple[str | None, str | None], name: str | None = None):
    """A linear layer whose 2-D kernel carries the logical axes `axes`."""

    def product(x: jax.Array, kernel: jax.Array, *arguments, **settings) -> jax.Array:
        return jax.lax.dot_general(x, gathered(kernel, axes), *arguments, **settings)

    return nn.Dense(
        features,
        dtype=config.dtype,
        dot_general=product,
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=name,
    )


def layer_norm(config: ConformerConfig, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm over the last axis, statistics in float32."""
    return nn.LayerNorm(
        dtype=config.dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
        name=name,
    )


def sinusoids(num_frames: int, embed_dim: int) -> np.ndarray:
    """Sinusoidal codes [R, D] of the distances query − key = T − 1, T − 2 … −(T − 1); R = 2T − 1."""
    distance_R = np.arange(num_frames - 1, -num_frames, -1, dtype=np.float64)
    rates = 10_000.0 ** (-np.arange(0, embed_dim, 2, dtype=np.float64) / embed_dim)
    angles = distance_R[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)[:, :embed_dim].astype(np.float32)


def relative_shift(logits_BNTR: jax.Array, num_keys: int) -> jax.Array:
    """Logits by distance -> logits by key: out[…, t, s] = in[…, t, T − 1 − t + s] (1901.02860, appendix B)."""
    *leading, num_queries, num_distances = logits_BNTR.shape
    padded = jnp.pad(logits_BNTR, [(0, 0)] * (len(leading) + 1) + [(1, 0)])
    shifted = padded.reshape(*leading, num_distances + 1, num_queries)[..., 1:, :]
    return shifted.reshape(*leading, num_queries, num_distances)[..., :num_keys]


class RelativeAttention(nn.Module):
    """Multi-head self-attention with content and position terms (1901.02860 §3.3)."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions_RD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Mixes frames.

        Args:
          x_BTD: inputs.
          positions_RD: `sinusoids`.
          mask_BT: True where a frame exists; no query sees the others.

        Returns:
          [B, T, D]; rows without any frame hold finite numbers of no meaning.
        """
        config = self.config
        num_heads, head_dim = config.num_heads, config.embed_dim // config.num_heads
        project = lambda name, x: dense(config, config.embed_dim, ("embed", "heads"), name)(x).reshape(
            *x.shape[:-1], num_heads, head_dim
        )
        q_BTNH, k_BSNH, v_BSNH = (project(name, x_BTD) for name in ("query", "key", "value"))
        r_RNH = project("position", positions_RD.astype(config.dtype))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("heads", "kv"))
        content_NH = self.param("content_bias", bias_init, (num_heads, head_dim)).astype(config.dtype)
        position_NH = self.param("position_bias", bias_init, (num_heads, head_dim)).astype(config.dtype)

        num_frames = x_BTD.shape[1]
        size = config.block_positions or num_frames
        block = jax.checkpoint(attend) if config.block_positions else attend
        mixed: list[jax.Array] = []
        for start in range(0, num_frames, size):
            stop = min(start + size, num_frames)
            # Distances of these queries to all keys: stop − 1 … start − T + 1.
            near_RNH = r_RNH[num_frames - stop : 2 * num_frames - 1 - start]
            q_block_BTNH = q_BTNH[:, start:stop]
            if mixed:
                # One block after the other, in both directions: the compiler would hold the logits of several.
                q_block_BTNH, mixed[-1] = jax.lax.optimization_barrier((q_block_BTNH, mixed[-1]))
            content_BTNH, position_BTNH = q_block_BTNH + content_NH, q_block_BTNH + position_NH
            mixed.append(block(content_BTNH, position_BTNH, k_BSNH, v_BSNH, near_RNH, mask_BT))
        mixed_BTNH = jnp.concatenate(mixed, axis=1)
        return dense(config, config.embed_dim, ("heads", "embed"), "out")(mixed_BTNH.reshape(x_BTD.shape))


def attend(content_BTNH, position_BTNH, k_BSNH, v_BSNH, r_RNH, mask_BS) -> jax.Array:
    """Softmax attention by content and position of consecutive queries over all keys.

    Args:
      content_BTNH, position_BTNH: queries, each with the bias of its term.
      k_BSNH, v_BSNH: keys and values.
      r_RNH: codes of the distances that occur, the largest first; R = T + S − 1.
      mask_BS: keys that exist.

    Returns:
      [B, T, N, H] in v's type.
    """
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    content_BNTS = product("BTNH,BSNH->BNTS", content_BTNH, k_BSNH)
    position_BNTR = product("BTNH,RNH->BNTR", position_BTNH, r_RNH)
    shifted_BNTS = relative_shift(position_BNTR, k_BSNH.shape[1])
    logits_BNTS = (content_BNTS + shifted_BNTS) * content_BTNH.shape[-1] ** -0.5
    logits_BNTS = jnp.where(mask_BS[:, None, None, :], logits_BNTS, jnp.finfo(jnp.float32).min)
    weights_BNTS = jax.nn.softmax(logits_BNTS, axis=-1).astype(v_BSNH.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)


class FeedForward(nn.Module):
    """Swish feed-forward."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        hidden_BTF = nn.swish(dense(config, config.mlp_dim, ("embed", "mlp"), "wide")(x_BTD))
        hidden_BTF = nn.with_logical_constraint(hidden_BTF, ("batch", "length", "mlp"))
        return dense(config, config.embed_dim, ("mlp", "embed"), "narrow")(hidden_BTF)


class Convolution(nn.Module):
    """Gated pointwise, depthwise over time, LayerNorm, swish, pointwise (2005.08100 §2.2)."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        config = self.config
        value_BTD = dense(config, config.embed_dim, ("embed", "mlp"), "value")(x_BTD)
        gate_BTD = dense(config, config.embed_dim, ("embed", "mlp"), "gate")(x_BTD)
        x_BTD = jnp.where(mask_BT[..., None], value_BTD * nn.sigmoid(gate_BTD), 0.0)
        init = nn.with_logical_partitioning(nn.initializers.normal(config.conv_kernel**-0.5), ("conv", "embed"))
        kernel_KD = self.param("depthwise", init, (config.conv_kernel, config.embed_dim)).astype(config.dtype)
        x_BTD = nn.swish(layer_norm(config, "norm")(depthwise_convolution(x_BTD, kernel_KD)))
        return dense(config, config.embed_dim, ("mlp", "embed"), "out")(x_BTD)


def depthwise_convolution(x_BTD: jax.Array, kernel_KD: jax.Array, causal: bool = False) -> jax.Array:
    """Convolution of each channel over time, zeros outside: K shifted products, which every backend fuses.

    Centred, or causal: the kernel's last tap is on the frame itself.
    """
    kernel, num_frames = kernel_KD.shape[0], x_BTD.shape[1]
    before = kernel - 1 if causal else (kernel - 1) // 2
    padded_BTD = jnp.pad(x_BTD, ((0, 0), (before, kernel - 1 - before), (0, 0)))
    return functools.reduce(jnp.add, [padded_BTD[:, k : k + num_frames] * kernel_KD[k] for k in range(kernel)])


class Block(nn.Module):
    """One Conformer block."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x_BTD, positions_RD, mask_BT, deterministic):
        """See `RelativeAttention` for the arguments; returns ([B, T, D], None), as `nn.scan` wants it."""
        config = self.config
        dropout = functools.partial(nn.Dropout(config.dropout_rate), deterministic=deterministic)
        x_BTD += 0.5 * dropout(FeedForward(config, name="first_mlp")(layer_norm(config, "first_mlp_norm")(x_BTD)))
        normed_BTD = layer_norm(config, "attention_norm")(x_BTD)
        x_BTD += dropout(RelativeAttention(config, name="attention")(normed_BTD, positions_RD, mask_BT))
        normed_BTD = layer_norm(config, "convolution_norm")(x_BTD)
        x_BTD += dropout(Convolution(config, name="convolution")(normed_BTD, mask_BT))
        x_BTD += 0.5 * dropout(FeedForward(config, name="last_mlp")(layer_norm(config, "last_mlp_norm")(x_BTD)))
        x_BTD = layer_norm(config, "final_norm")(x_BTD)
        return nn.with_logical_constraint(x_BTD, ("batch", "length", "embed_activation")), None


class ConformerStack(nn.Module):
    """`num_layers` blocks whose parameters are stacked along `layers`; the first n of them are a stack of n."""

    config: ConformerConfig
    num_layers: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array, deterministic: bool = True) -> jax.Array:
        """Runs every block.

        Args:
          x_BTD: inputs.
          mask_BT: True where a frame exists.
          deterministic: False applies dropout, with the "dropout" key.

        Returns:
          [B, T, D].
        """
        config = self.config
        if self.num_layers == 0:
            return x_BTD
        block = Block
        if config.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False, static_argnums=(4,))
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, name="layers")
        positions_RD = jnp.asarray(sinusoids(x_BTD.shape[1], config.embed_dim))
        return layers(x_BTD, positions_RD, mask_BT, deterministic)[0]
