"""Residual quantization with factorised, l2-normalised codes: DAC's (Kumar et al., arXiv 2306.06546 §3.1).

Every level projects what the levels before it left over to a few dimensions, takes the code in the nearest direction
there, and projects it back. Projections and codes are learned by gradients; quantizer dropout and the masks are those
of `ResidualQuantizer`, whose methods this one has.

Parameters are {"in": {"kernel": [Q, D, P], "bias": [Q, P]}, "codes": [Q, N, P], "out": {"kernel": [Q, P, D], "bias":
[Q, D]}}; codebooks hold the moving average of frames per step of each code, {"cluster_size": [Q, N]}, which tells of
the codes' usage and nothing else.

Shape suffixes: B batch, T frames, M all frames of the batch, Q levels, N codes of a level, D dimensions, P dimensions
of a code.
"""

import dataclasses

import jax
import jax.numpy as jnp

from audiolm_jax import kmeans
from audiolm_jax.codec.quantizer import Codebooks, Parameters, Quantized, QuantizerTraining, perplexity

# DAC weighs the codes' way to the frames 1, the frames' way to the codes (the commitment) 0.25.
CODEBOOK_TO_COMMITMENT = 4.0


@dataclasses.dataclass(frozen=True)
class FactorisedQuantizer:
    """DAC's quantizer.

    Attributes:
      num_quantizers: Q.
      codebook_size: N.
      embed_dim: D.
      codebook_dim: P.
    """

    num_quantizers: int
    codebook_size: int
    embed_dim: int
    codebook_dim: int

    def init(self, key: jax.Array) -> tuple[Parameters, Codebooks]:
        """Random projections that keep the frames' scale, and standard normal codes, none of them used so far."""
        levels, wide, narrow = self.num_quantizers, self.embed_dim, self.codebook_dim
        in_key, code_key, out_key = jax.random.split(key, 3)
        parameters = {
            "in": {
                "kernel": jax.random.normal(in_key, (levels, wide, narrow), jnp.float32) * wide**-0.5,
                "bias": jnp.zeros((levels, narrow), jnp.float32),
            },
            "codes": jax.random.normal(code_key, (levels, self.codebook_size, narrow), jnp.float32),
            "out": {
                "kernel": jax.random.normal(out_key, (levels, narrow, wide), jnp.float32) * narrow**-0.5,
                "bias": jnp.zeros((levels, wide), jnp.float32),
            },
        }
        return parameters, {"cluster_size": jnp.zeros((levels, self.codebook_size), jnp.float32)}

    def encode(
        self, parameters: Parameters, codebooks: Codebooks, x_BTD: jax.Array, num_quantizers: int | None = None
    ) -> jax.Array:
        """Codes of the first `num_quantizers` levels (all by default): int32 [B, T, Q]."""
        del codebooks

        def level(residual_BTD, layer):
            codes_BT = _nearest(_project(residual_BTD, layer["in"]), layer["codes"])
            return residual_BTD - _project(layer["codes"][codes_BT], layer["out"]), codes_BT

        chosen = jax.tree.map(lambda leaf: leaf[:num_quantizers], parameters)
        return jnp.moveaxis(jax.lax.scan(level, x_BTD, chosen)[1], 0, -1)

    def decode(self, parameters: Parameters, codebooks: Codebooks, codes_BTQ: jax.Array) -> jax.Array:
        """Sum of the codes' vectors over the levels given, which may be fewer than there are: [B, T, D]."""
        del codebooks

        def level(total_BTD, codes_and_layer):
            codes_BT, layer = codes_and_layer
            return total_BTD + _project(layer["codes"][codes_BT], layer["out"]), None

        chosen = jax.tree.map(lambda leaf: leaf[: codes_BTQ.shape[-1]], parameters)
        zeros_BTD = jnp.zeros((*codes_BTQ.shape[:2], self.embed_dim), parameters["codes"].dtype)
        return jax.lax.scan(level, zeros_BTD, (jnp.moveaxis(codes_BTQ, -1, 0), chosen))[0]

    def train(
        self,
        parameters: Parameters,
        codebooks: Codebooks,
        x_BTD: jax.Array,
        key: jax.Array,
        settings: QuantizerTraining,
        mask_BT: jax.Array | None = None,
    ) -> Quantized:
        """Quantizes a training batch and counts the codes' usage; arguments as `ResidualQuantizer.train`.

        The loss in `Quantized.commitment` is, averaged over levels, the mean squared distance of projected frames from
        their codes: once as the frames' loss and `CODEBOOK_TO_COMMITMENT` times as the codes'. Straight through goes
        the gradient past the choice of a code only: it reaches both projections, and by the levels' residuals all
        projections before. Codes without use stay: what they mean is for the gradient to find.
        """
        num_levels = self.num_quantizers
        levels_B = settings.draw_levels(key, x_BTD.shape[0], num_levels)
        if mask_BT is None:
            mask_BT = jnp.ones(x_BTD.shape[:2], bool)

        def level(residual_BTD, inputs):
            layer, cluster_size_N, index = inputs
            used_B11 = (index < levels_B)[:, None, None]
            weights_BT = (mask_BT & used_B11[..., 0]).astype(x_BTD.dtype)
            num_frames = jnp.sum(weights_BT)

            z_BTP = _project(residual_BTD, layer["in"])
            codes_BT = _nearest(z_BTP, layer["codes"])
            vectors_BTP = layer["codes"][codes_BT]
            of_frames_BTP = jnp.square(z_BTP - jax.lax.stop_gradient(vectors_BTP))
            of_codes_BTP = jnp.square(jax.lax.stop_gradient(z_BTP) - vectors_BTP)
            loss_BT = jnp.mean(of_frames_BTP + CODEBOOK_TO_COMMITMENT * of_codes_BTP, axis=-1)
            loss = jnp.sum(loss_BT * weights_BT) / jnp.maximum(num_frames, 1.0)

            straight_BTP = z_BTP + jax.lax.stop_gradient(vectors_BTP - z_BTP)
            residual_BTD = jnp.where(used_B11, residual_BTD - _project(straight_BTP, layer["out"]), residual_BTD)
            counts_N = _count(codes_BT, weights_BT, self.codebook_size)
            cluster_size_N = settings.decay * cluster_size_N + (1.0 - settings.decay) * counts_N
            dead = jnp.sum(settings.is_dead(cluster_size_N, num_frames), dtype=jnp.int32)
            return residual_BTD, (loss, cluster_size_N, perplexity(cluster_size_N), dead)

        inputs = (parameters, codebooks["cluster_size"], jnp.arange(num_levels))
        residual_BTD, (loss_Q, cluster_size_QN, perplexity_Q, dead_Q) = jax.lax.scan(level, x_BTD, inputs)
        codebooks = {"cluster_size": cluster_size_QN}
        return Quantized(x_BTD - residual_BTD, jnp.mean(loss_Q), codebooks, perplexity_Q, dead_Q)

    def fit(
        self,
        parameters: Parameters,
        codebooks: Codebooks,
        x_MD: jax.Array,
        key: jax.Array,
        num_iterations: int,
        frames_per_step: float,
    ) -> tuple[Parameters, Codebooks]:
        """The parameters as they are, and how often their codes are used for these frames.

        Normalised codes of few dimensions are there to do without k-means (arXiv 2306.06546 §3.1); and codes fitted to
        a random projection of untrained frames would be out of place once the gradient has moved both.

        Args:
          parameters, codebooks: of `init`.
          x_MD: frames.
          key, num_iterations: as `ResidualQuantizer.fit`; not used.
          frames_per_step: frames of one training batch, the scale of `cluster_size`.
        """
        del key, num_iterations
        codes_MQ = self.encode(parameters, codebooks, x_MD[None])[0]
        share_M = jnp.full(len(x_MD), frames_per_step / len(x_MD), x_MD.dtype)
        count = lambda codes_M: _count(codes_M, share_M, self.codebook_size)
        return parameters, {"cluster_size": jax.vmap(count, in_axes=1)(codes_MQ)}


def _project(x: jax.Array, layer: Parameters) -> jax.Array:
    return jnp.matmul(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST) + layer["bias"]


def _nearest(z_BTP: jax.Array, codes_NP: jax.Array) -> jax.Array:
    """Codes int32 [B, T] in the directions nearest to those of `z_BTP`."""
    directions_MP = _normalise(jax.lax.stop_gradient(z_BTP)).reshape(-1, z_BTP.shape[-1])
    return kmeans.nearest(directions_MP, _normalise(jax.lax.stop_gradient(codes_NP))).reshape(z_BTP.shape[:-1])


def _normalise(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _count(codes: jax.Array, weights: jax.Array, num_codes: int) -> jax.Array:
    """The weights of each code's frames, added up: [N]."""
    return jnp.zeros(num_codes, weights.dtype).at[codes.reshape(-1)].add(weights.reshape(-1))
