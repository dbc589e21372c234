"""Mimi: SEANet's convolutions, a causal Transformer on both sides, and one semantic level beside the residual ones.

Défossez et al., "Moshi: a speech-text foundation model for real-time dialogue" (arXiv 2410.00037 §3.3). The Transformer
sees a window of frames, at rotary positions (Su et al., arXiv 2104.09864); a last strided convolution halves the rate.

Shape suffixes: B batch, W waveform samples, T frames (of any rate), P frames before them, S keys, N heads, H head
width, D embedding, Q levels.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from audiolm_jax.activations import activation_of
from audiolm_jax.codec import seanet
from audiolm_jax.codec.quantizer import Codebooks, Parameters, Quantized, QuantizerTraining, ResidualQuantizer
from audiolm_jax.codec.soundstream import STREAM, remember
from audiolm_jax.rotary import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class MimiConfig(seanet.SeanetConfig):
    """Architecture of the codec: the fields of a config's `model`; those of `SeanetConfig` and the following.

    Attributes:
      frame_stride: of the convolution between Transformer and quantizer.
      upsample_groups: of its counterpart's channels.
      num_semantic_quantizers: of the levels, those that quantize the frames apart from the others.
      codebook_dim: width of a code.
      project_codes: whether frames are mapped to that width, and codes back; where it is D, they need not be.
      num_layers, num_heads, num_key_value_heads, head_dim, mlp_dim: of each Transformer.
      attention_window: frames that a frame sees, itself included.
      attention_bias: the attention's projections have biases.
      activation: of the feed-forward units, one of `activations.ACTIVATIONS`.
      norm_epsilon: added to variances.
      rope_theta: longest wave length of the rotary positions, divided by 2π.
    """

    frame_stride: int
    upsample_groups: int
    num_semantic_quantizers: int
    codebook_dim: int
    project_codes: bool
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    mlp_dim: int
    attention_window: int
    attention_bias: bool
    activation: str
    norm_epsilon: float
    rope_theta: float

    def __post_init__(self):
        super().__post_init__()
        activation_of(self.activation)

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.strides) * self.frame_stride

    @property
    def encoder(self) -> "Encoder":
        """Waveforms to frame vectors."""
        return Encoder(self)

    @property
    def decoder(self) -> "Decoder":
        """Frame vectors to waveforms."""
        return Decoder(self)

    @property
    def quantizer(self) -> "SplitQuantizer":
        """Frame vectors to codes and back."""
        return SplitQuantizer(
            num_quantizers=self.num_quantizers,
            num_semantic_quantizers=self.num_semantic_quantizers,
            codebook_size=self.codebook_size,
            codebook_dim=self.codebook_dim,
            embed_dim=self.embed_dim,
            project_codes=self.project_codes,
        )

    @property
    def streams(self) -> bool:
        """Whether encoder and decoder take a recording chunk by chunk: not where a frame looks ahead."""
        return self.causal and self.pad_mode != "reflect" and self.trim_right_ratio == 1.0

    @property
    def reach(self) -> None:
        """A decoded sample depends on all frames: each layer of the Transformer sees a window before the last one's."""
        return None


class Encoder(nn.Module):
    """Waveform [B, W] -> frame vectors [B, ceil(W / hop), D]; `lengths_B`: samples of each row."""

    config: MimiConfig

    @nn.compact
    def __call__(self, wave_BW: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
        config = self.config
        lengths_B = seanet.all_of(wave_BW) if lengths_B is None else lengths_B
        x_BTD = seanet.Encoder(config, name="seanet")(wave_BW, lengths_B)
        x_BTD = Transformer(config, name="transformer")(x_BTD)
        down = seanet.Conv(
            config,
            config.embed_dim,
            2 * config.frame_stride,
            config.frame_stride,
            use_bias=False,
            pad_mode="replicate",
            name="down",
        )
        return down(x_BTD, -(-lengths_B // math.prod(config.strides)))


class Decoder(nn.Module):
    """Frame vectors [B, T, D] -> waveform [B, T · hop]; `lengths_B`: frames of each row."""

    config: MimiConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
        config = self.config
        lengths_B = seanet.all_of(x_BTD) if lengths_B is None else lengths_B
        up = seanet.ConvTranspose(
            config, config.embed_dim, config.frame_stride, config.upsample_groups, use_bias=False, name="up"
        )
        x_BTD = Transformer(config, name="transformer")(up(x_BTD, lengths_B))
        return seanet.Decoder(config, name="seanet")(x_BTD, lengths_B * config.frame_stride)


class Transformer(nn.Module):
    """Causal layers over [B, T, D]: a frame depends on none after it, so rows need no lengths."""

    config: MimiConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        for layer in range(self.config.num_layers):
            x_BTD = Layer(self.config, name=f"layer_{layer}")(x_BTD)
        return x_BTD


class Layer(nn.Module):
    """Attention and feed-forward units, each normalised before and scaled by dimension after."""

    config: MimiConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        norm = functools.partial(nn.LayerNorm, epsilon=config.norm_epsilon)
        dense = functools.partial(nn.Dense, config.embed_dim, use_bias=False)
        y_BTD = Attention(config, name="attention")(norm(name="attention_norm")(x_BTD))
        x_BTD = x_BTD + Scale(name="attention_scale")(y_BTD)
        y_BTF = nn.Dense(config.mlp_dim, use_bias=False, name="wide")(norm(name="mlp_norm")(x_BTD))
        y_BTD = dense(name="narrow")(activation_of(config.activation)(y_BTF))
        return x_BTD + Scale(name="mlp_scale")(y_BTD)


class Scale(nn.Module):
    """A learnt factor for each dimension."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD * self.param("scale", nn.initializers.ones, x_BTD.shape[-1:], jnp.float32)


class Attention(nn.Module):
    """Each frame attends to itself and the `attention_window` - 1 frames before it.

    Where the collection `STREAM` is mutable, the frames continue those of the call before.
    """

    config: MimiConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config, (batch, frames, _) = self.config, x_BTD.shape
        dense = functools.partial(nn.Dense, use_bias=config.attention_bias)
        heads = lambda name, count: dense(count * config.head_dim, name=name)(x_BTD).reshape(
            batch, frames, count, config.head_dim
        )
        q_BTNH = heads("query", config.num_heads)
        k_BTNH, v_BTNH = heads("key", config.num_key_value_heads), heads("value", config.num_key_value_heads)
        y_BTNH = window_attention(
            q_BTNH, k_BTNH, v_BTNH, config.attention_window, config.rope_theta, *self._past(k_BTNH, v_BTNH)
        )
        return dense(config.embed_dim, name="output")(y_BTNH.reshape(batch, frames, -1))

    def _past(self, k_BTNH: jax.Array, v_BTNH: jax.Array) -> tuple:
        """Keys, values and number of the frames before these; nothing where nothing streams."""
        size = self.config.attention_window - 1
        past_k_BPNH, past_v_BPNH = remember(self, k_BTNH, size, "keys"), remember(self, v_BTNH, size, "values")
        if past_k_BPNH is None:
            return ()
        num_past = self.get_variable(STREAM, "count", jnp.zeros((), jnp.int32))
        self.put_variable(STREAM, "count", jnp.minimum(num_past + k_BTNH.shape[1], size))
        return past_k_BPNH, past_v_BPNH, num_past


def window_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    window: int,
    theta: float,
    past_k_BPNH: jax.Array | None = None,
    past_v_BPNH: jax.Array | None = None,
    num_past: jax.Array | int = 0,
) -> jax.Array:
    """Causal attention over a window, in blocks of it: time and memory grow with T · window, not with T · T.

    Rotary positions count from the first key that a block sees: attention depends on differences only, so the numbers
    stay small however long a stream is.

    Args:
      q_BTNH: queries.
      k_BTNH, v_BTNH: keys and values, whose heads each serve N / their number of the queries'.
      window: frames that a frame sees, itself included.
      theta: of the rotary positions.
      past_k_BPNH, past_v_BPNH: those of the window - 1 frames before.
      num_past: how many of these there are, at the end.

    Returns:
      [B, T, N, H].
    """
    batch, frames, num_heads, head_dim = q_BTNH.shape
    past, block = window - 1, min(frames, window)
    if past_k_BPNH is None:
        past_k_BPNH = past_v_BPNH = jnp.zeros((batch, past, *k_BTNH.shape[2:]), k_BTNH.dtype)
    positions_T, positions_S = past + jnp.arange(block), jnp.arange(past + block)
    distance_TS = positions_T[:, None] - positions_S
    seen_TS = (distance_TS >= 0) & (distance_TS < window)
    for_queries = lambda x_BSNH: jnp.repeat(x_BSNH, num_heads // x_BSNH.shape[2], axis=2)

    def attend(state, qkv):
        past_k_BPNH, past_v_BPNH, num_past = state
        q_BTNH, k_BTNH, v_BTNH = qkv
        k_BSNH = jnp.concatenate([past_k_BPNH, k_BTNH], axis=1)
        v_BSNH = jnp.concatenate([past_v_BPNH, v_BTNH], axis=1)
        turned_BTNH = rotate(q_BTNH, positions_T, theta)
        turned_BSNH = for_queries(rotate(k_BSNH, positions_S, theta))
        logits_BNTS = jnp.einsum("BTNH,BSNH->BNTS", turned_BTNH, turned_BSNH) * head_dim**-0.5
        logits_BNTS = jnp.where(seen_TS & (positions_S >= past - num_past), logits_BNTS, -jnp.inf)
        y_BTNH = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(logits_BNTS, axis=-1), for_queries(v_BSNH))
        return (k_BSNH[:, block:], v_BSNH[:, block:], jnp.minimum(num_past + block, past)), y_BTNH

    def blocks(x_BTNH):
        padded_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, -frames % block), (0, 0), (0, 0)))
        return jnp.moveaxis(padded_BTNH.reshape(batch, -1, block, *x_BTNH.shape[2:]), 1, 0)

    state = (past_k_BPNH, past_v_BPNH, jnp.asarray(num_past, jnp.int32))
    y_UBTNH = jax.lax.scan(attend, state, (blocks(q_BTNH), blocks(k_BTNH), blocks(v_BTNH)))[1]
    return jnp.moveaxis(y_UBTNH, 0, 1).reshape(batch, -1, num_heads, head_dim)[:, :frames]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitQuantizer:
    """Semantic levels and acoustic ones side by side: both quantize the frames, each in a projection of its own.

    Their sum is what is decoded. A method does what `ResidualQuantizer`'s does. The codebooks are stacked as there, the
    semantic ones first; parameters are {"semantic", "acoustic"}, each {"input": [D, V], "output": [V, D]}, none where
    codes are as wide as frames.

    Attributes:
      num_quantizers: Q, of both kinds.
      num_semantic_quantizers: the first of them.
      codebook_size: N.
      codebook_dim: V.
      embed_dim: D.
      project_codes: whether frames are mapped to V dimensions, and codes back.
    """

    num_quantizers: int
    num_semantic_quantizers: int
    codebook_size: int
    codebook_dim: int
    embed_dim: int
    project_codes: bool

    @property
    def _halves(self) -> Mapping[str, tuple[ResidualQuantizer, slice]]:
        """Both quantizers and their levels."""
        semantic = self.num_semantic_quantizers
        build = lambda levels: ResidualQuantizer(levels, self.codebook_size, self.codebook_dim)
        return {
            "semantic": (build(semantic), slice(0, semantic)),
            "acoustic": (build(self.num_quantizers - semantic), slice(semantic, self.num_quantizers)),
        }

    def init(self, key: jax.Array) -> tuple[Parameters, Codebooks]:
        """Random projections and codebooks."""
        codebook_key, key = jax.random.split(key)
        whole = ResidualQuantizer(self.num_quantizers, self.codebook_size, self.codebook_dim)
        shapes = {"input": (self.embed_dim, self.codebook_dim), "output": (self.codebook_dim, self.embed_dim)}
        keys = iter(jax.random.split(key, 4))
        normal = lambda shape: jax.random.normal(next(keys), shape, jnp.float32) * shape[0] ** -0.5
        projections = {
            half: {name: normal(shape) for name, shape in shapes.items()} for half in self._halves if self.project_codes
        }
        return projections, whole.init(codebook_key)[1]

    def encode(
        self, parameters: Parameters, codebooks: Codebooks, x_BTD: jax.Array, num_quantizers: int | None = None
    ) -> jax.Array:
        """Codes of the first `num_quantizers` levels, all by default: int32 [B, T, Q]."""
        wanted = self.num_quantizers if num_quantizers is None else num_quantizers
        codes = []
        for half, (residual, levels) in self._halves.items():
            if count := max(0, min(levels.stop, wanted) - levels.start):
                x_BTV = self._project(parameters, half, "input", x_BTD)
                codes.append(residual.encode({}, _levels(codebooks, levels), x_BTV, count))
        return jnp.concatenate(codes, axis=-1)

    def decode(self, parameters: Parameters, codebooks: Codebooks, codes_BTQ: jax.Array) -> jax.Array:
        """Sum of what both kinds of codes stand for: [B, T, D]."""
        vectors = []
        for half, (residual, levels) in self._halves.items():
            if codes_BTQ.shape[-1] > levels.start:
                x_BTV = residual.decode({}, _levels(codebooks, levels), codes_BTQ[..., levels])
                vectors.append(self._project(parameters, half, "output", x_BTV))
        return functools.reduce(jnp.add, vectors)

    def train(
        self,
        parameters: Parameters,
        codebooks: Codebooks,
        x_BTD: jax.Array,
        key: jax.Array,
        settings: QuantizerTraining,
        mask_BT: jax.Array | None = None,
    ) -> Quantized:
        """Quantizes a training batch and updates the codebooks; dropout leaves the semantic levels alone."""
        vectors, results, shares = [], [], []
        for half, (residual, levels) in self._halves.items():
            key, half_key = jax.random.split(key)
            own = dataclasses.replace(settings, dropout=settings.dropout and half == "acoustic")
            x_BTV = self._project(parameters, half, "input", x_BTD)
            result = residual.train({}, _levels(codebooks, levels), x_BTV, half_key, own, mask_BT)
            vectors.append(self._project(parameters, half, "output", result.vectors_BTD))
            results.append(result)
            shares.append(residual.num_quantizers / self.num_quantizers)
        join = lambda *leaves: jnp.concatenate(leaves)
        return Quantized(
            vectors_BTD=functools.reduce(jnp.add, vectors),
            commitment=functools.reduce(jnp.add, [share * one.commitment for share, one in zip(shares, results)]),
            codebooks=jax.tree.map(join, *[one.codebooks for one in results]),
            perplexity_Q=join(*[one.perplexity_Q for one in results]),
            dead_Q=join(*[one.dead_Q for one in results]),
        )

    def fit(
        self,
        parameters: Parameters,
        codebooks: Codebooks,
        x_MD: jax.Array,
        key: jax.Array,
        num_iterations: int,
        frames_per_step: float,
    ) -> tuple[Parameters, Codebooks]:
        """Codebooks of both kinds from k-means on the projected frames."""
        books = []
        for half, (residual, levels) in self._halves.items():
            key, half_key = jax.random.split(key)
            x_MV = self._project(parameters, half, "input", x_MD)
            book = residual.fit({}, _levels(codebooks, levels), x_MV, half_key, num_iterations, frames_per_step)[1]
            books.append(book)
        return parameters, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *books)

    def _project(self, parameters: Parameters, half: str, name: str, x: jax.Array) -> jax.Array:
        return x @ parameters[half][name] if self.project_codes else x


def _levels(codebooks: Codebooks, levels: slice) -> Codebooks:
    return jax.tree.map(lambda leaf: leaf[levels], codebooks)
