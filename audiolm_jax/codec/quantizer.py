"""Residual vector quantization over an explicit codebook state.

SoundStream (arXiv 2107.03312 §III-C): every level quantizes what the levels before it left over. Codebooks follow
their frames by exponential moving averages (van den Oord et al., arXiv 1711.00937, appendix A), codes that nobody
uses are replaced, and quantizer dropout makes one model serve every bitrate.

Codebooks are {"embedding": [Q, N, D], "cluster_size": [Q, N], "embedding_sum": [Q, N, D]}: the codes' vectors, and the
moving averages of frames per step and of their sum. Only `embedding` is needed to encode and decode.

Another quantizer is another class with the methods of `ResidualQuantizer`; what it learns by gradients are its
`parameters`, of which this one has none.

Shape suffixes: B batch, T frames, M all frames of the batch, Q levels, N codes of a level, D dimensions.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from audiolm_jax import kmeans

Codebooks = dict[str, jax.Array]
Parameters = dict[str, Any]


class Quantized(NamedTuple):
    """What `quantize` returns.

    Attributes:
      vectors_BTD: quantized frames; their gradient is passed to the input as it is (straight through).
      commitment: mean squared distance of a level's input from its code, averaged over levels; codes that are learned
        by gradients add what draws them to their inputs.
      codebooks: updated.
      perplexity_Q: exp(entropy) of the codes' average usage; N where all are used alike.
      dead_Q: codes that hardly any frame uses; those of moving averages were replaced in this step.
    """

    vectors_BTD: jax.Array
    commitment: jax.Array
    codebooks: Codebooks
    perplexity_Q: jax.Array
    dead_Q: jax.Array


@dataclasses.dataclass(frozen=True)
class QuantizerTraining:
    """How a quantizer is trained: fields of a config's `quantizer`.

    Attributes:
      decay: of the moving averages.
      dead_code_threshold, dead_code_share: see `update`.
      dropout: quantize each example with its first n ~ U{1..Q} levels instead of all.
    """

    decay: float
    dead_code_threshold: float
    dead_code_share: float
    dropout: bool

    def draw_levels(self, key: jax.Array, batch: int, num_levels: int) -> jax.Array:
        """With how many levels each example is quantized, int32 [B]."""
        if self.dropout:
            return jax.random.randint(key, (batch,), 1, num_levels + 1, jnp.int32)
        return jnp.full(batch, num_levels, jnp.int32)

    def is_dead(self, cluster_size_N: jax.Array, num_frames: jax.Array) -> jax.Array:
        """Which codes of a level are hardly used, by their average usage and the frames that reach the level."""
        average_usage = num_frames / len(cluster_size_N)
        return cluster_size_N < jnp.minimum(self.dead_code_threshold, self.dead_code_share * average_usage)


@dataclasses.dataclass(frozen=True)
class ResidualQuantizer:
    """SoundStream's quantizer.

    Attributes:
      num_quantizers: Q.
      codebook_size: N.
      embed_dim: D.
    """

    num_quantizers: int
    codebook_size: int
    embed_dim: int

    def init(self, key: jax.Array) -> tuple[Parameters, Codebooks]:
        """No parameters, and standard normal codebooks of the right shapes, to be replaced by `fit`'s."""
        shape = (self.num_quantizers, self.codebook_size, self.embed_dim)
        embedding_QND = jax.random.normal(key, shape, jnp.float32)
        cluster_size_QN = jnp.ones(shape[:2], jnp.float32)
        return {}, {"embedding": embedding_QND, "cluster_size": cluster_size_QN, "embedding_sum": embedding_QND}

    def encode(
        self, parameters: Parameters, codebooks: Codebooks, x_BTD: jax.Array, num_quantizers: int | None = None
    ) -> jax.Array:
        """Codes of the first `num_quantizers` levels (all by default): int32 [B, T, Q]."""
        del parameters

        def level(residual_BTD, embedding_ND):
            codes_BT, vectors_BTD = _nearest(residual_BTD, embedding_ND)
            return residual_BTD - vectors_BTD, codes_BT

        codes_QBT = jax.lax.scan(level, x_BTD, codebooks["embedding"][:num_quantizers])[1]
        return jnp.moveaxis(codes_QBT, 0, -1)

    def decode(self, parameters: Parameters, codebooks: Codebooks, codes_BTQ: jax.Array) -> jax.Array:
        """Sum of the codes' vectors over the levels given, which may be fewer than the codebooks': [B, T, D]."""
        del parameters
        num_levels = codes_BTQ.shape[-1]
        embedding_QND = codebooks["embedding"][:num_levels]

        def level(total_BTD, codes_and_embedding):
            codes_BT, embedding_ND = codes_and_embedding
            return total_BTD + embedding_ND[codes_BT], None

        zeros_BTD = jnp.zeros((*codes_BTQ.shape[:2], embedding_QND.shape[-1]), embedding_QND.dtype)
        return jax.lax.scan(level, zeros_BTD, (jnp.moveaxis(codes_BTQ, -1, 0), embedding_QND))[0]

    def train(
        self,
        parameters: Parameters,
        codebooks: Codebooks,
        x_BTD: jax.Array,
        key: jax.Array,
        settings: QuantizerTraining,
        mask_BT: jax.Array | None = None,
    ) -> Quantized:
        """Quantizes a training batch and updates the codebooks (arXiv 2107.03312 §III-C).

        All sums run over the whole batch, so that under `jax.jit` a batch sharded over a mesh gives the same codebooks
        as the same batch on one device.

        Args:
          parameters, codebooks: the state.
          x_BTD: the encoder's frames.
          key: for dropout and for the replacement of dead codes.
          settings: of the training.
          mask_BT: True for real frames; padded ones are quantized too but count nowhere.
        """
        del parameters
        batch, num_levels = x_BTD.shape[0], codebooks["embedding"].shape[0]
        dropout_key, update_key = jax.random.split(key)
        levels_B = settings.draw_levels(dropout_key, batch, num_levels)
        if mask_BT is None:
            mask_BT = jnp.ones(x_BTD.shape[:2], bool)

        def level(residual_BTD, inputs):
            book, index, level_key = inputs
            codes_BT, vectors_BTD = _nearest(residual_BTD, book["embedding"])
            used_B11 = (index < levels_B)[:, None, None]
            weights_BT = (mask_BT & used_B11[..., 0]).astype(x_BTD.dtype)
            error_BT = jnp.mean(jnp.square(residual_BTD - vectors_BTD), axis=-1)
            commitment = jnp.sum(error_BT * weights_BT) / jnp.maximum(jnp.sum(weights_BT), 1.0)
            new_book, dead = update(
                book,
                jax.lax.stop_gradient(residual_BTD).reshape(-1, x_BTD.shape[-1]),
                codes_BT.reshape(-1),
                weights_BT.reshape(-1),
                level_key,
                settings,
            )
            residual_BTD = jnp.where(used_B11, residual_BTD - vectors_BTD, residual_BTD)
            return residual_BTD, (commitment, new_book, perplexity(new_book["cluster_size"]), dead)

        inputs = (codebooks, jnp.arange(num_levels), jax.random.split(update_key, num_levels))
        residual_BTD, (commitment_Q, new_codebooks, perplexity_Q, dead_Q) = jax.lax.scan(level, x_BTD, inputs)
        vectors_BTD = x_BTD - jax.lax.stop_gradient(residual_BTD)
        return Quantized(vectors_BTD, jnp.mean(commitment_Q), new_codebooks, perplexity_Q, dead_Q)

    def fit(
        self,
        parameters: Parameters,
        codebooks: Codebooks,
        x_MD: jax.Array,
        key: jax.Array,
        num_iterations: int,
        frames_per_step: float,
    ) -> tuple[Parameters, Codebooks]:
        """Codebooks from k-means, level by level on what the levels before leave of the frames.

        Args:
          parameters, codebooks: of `init`.
          x_MD: frames, at least about ten times as many as codes.
          key: of the seeding.
          num_iterations: Lloyd iterations a level.
          frames_per_step: frames of one training batch, the scale of `cluster_size`.
        """
        del codebooks

        def level(x_MD, level_key):
            embedding_ND, _ = kmeans.fit(level_key, x_MD, self.codebook_size, num_iterations)
            codes_M = kmeans.nearest(x_MD, embedding_ND)
            share_N = jnp.zeros(self.codebook_size, x_MD.dtype).at[codes_M].add(1.0 / x_MD.shape[0])
            cluster_size_N = share_N * frames_per_step
            book = {
                "embedding": embedding_ND,
                "cluster_size": cluster_size_N,
                "embedding_sum": embedding_ND * cluster_size_N[:, None],
            }
            return x_MD - embedding_ND[codes_M], book

        return parameters, jax.lax.scan(level, x_MD, jax.random.split(key, self.num_quantizers))[1]


def _nearest(x_BTD: jax.Array, embedding_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes int32 [B, T] and their vectors [B, T, D]; neither passes a gradient on."""
    x_MD = jax.lax.stop_gradient(x_BTD).reshape(-1, x_BTD.shape[-1])
    codes_BT = kmeans.nearest(x_MD, embedding_ND).reshape(x_BTD.shape[:-1])
    return codes_BT, jax.lax.stop_gradient(embedding_ND)[codes_BT]


def update(
    book: Codebooks,
    x_MD: jax.Array,
    codes_M: jax.Array,
    weights_M: jax.Array,
    key: jax.Array,
    settings: QuantizerTraining,
) -> tuple[Codebooks, jax.Array]:
    """One moving-average step of one level's codebook, and the replacement of its dead codes.

    A code is dead once its average usage falls below min(`dead_code_threshold`, `dead_code_share` · F / N), F being
    the frames that reach the level in this batch: the paper's threshold of 2 presumes thousands of them. Its place
    goes to a random one of these frames, which starts with the average usage F / N.

    Args:
      book: {"embedding": [N, D], "cluster_size": [N], "embedding_sum": [N, D]}.
      x_MD: the level's inputs.
      codes_M: the codes they were given.
      weights_M: 1.0 for a frame that reaches this level, 0.0 for one that does not.
      key: draws the replacements.
      settings: of the training.

    Returns:
      the new book and the number of codes replaced, int32.
    """
    num_codes = book["cluster_size"].shape[0]
    assigned_MN = jax.nn.one_hot(codes_M, num_codes, dtype=x_MD.dtype) * weights_M[:, None]
    sums_ND = jnp.matmul(assigned_MN.T, x_MD, precision=jax.lax.Precision.HIGHEST)
    cluster_size_N = settings.decay * book["cluster_size"] + (1.0 - settings.decay) * jnp.sum(assigned_MN, axis=0)
    embedding_sum_ND = settings.decay * book["embedding_sum"] + (1.0 - settings.decay) * sums_ND

    num_frames = jnp.sum(weights_M)
    average_usage = num_frames / num_codes
    dead_N = settings.is_dead(cluster_size_N, num_frames)
    replacements_ND = x_MD[_draw(key, weights_M, num_codes)]
    cluster_size_N = jnp.where(dead_N, average_usage, cluster_size_N)
    embedding_sum_ND = jnp.where(dead_N[:, None], replacements_ND * average_usage, embedding_sum_ND)
    new_book = {
        "embedding": embedding_sum_ND / jnp.maximum(cluster_size_N, 1e-12)[:, None],
        "cluster_size": cluster_size_N,
        "embedding_sum": embedding_sum_ND,
    }
    return new_book, jnp.sum(dead_N, dtype=jnp.int32)


def _draw(key: jax.Array, weights_M: jax.Array, count: int) -> jax.Array:
    """`count` indices of frames of weight 1, uniformly with replacement; any index where there is none."""
    rank_M = jnp.cumsum(weights_M.astype(jnp.int32))
    chosen = jax.random.randint(key, (count,), 1, jnp.maximum(rank_M[-1], 1) + 1, jnp.int32)
    return jnp.minimum(jnp.searchsorted(rank_M, chosen), len(rank_M) - 1)


def fill_masked(key: jax.Array, x_MD: jax.Array, mask_M: jax.Array) -> jax.Array:
    """`x_MD` with the rows outside the mask replaced by random rows inside it."""
    indices_M = _draw(key, mask_M, x_MD.shape[0])
    return jnp.where(mask_M[:, None], x_MD, x_MD[indices_M])


def perplexity(cluster_size_N: jax.Array) -> jax.Array:
    """exp of the entropy of how often the codes are used, between 1 and N."""
    share_N = cluster_size_N / jnp.maximum(jnp.sum(cluster_size_N), 1e-12)
    return jnp.exp(-jnp.sum(share_N * jnp.log(jnp.maximum(share_N, 1e-12))))
