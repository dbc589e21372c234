"""Mimi's quantizer in training: both of its halves are SoundStream's, each in a projection of the frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.codec.mimi import SplitQuantizer
from audiolm_jax.codec.quantizer import QuantizerTraining

QUANTIZER = SplitQuantizer(
    num_quantizers=3, num_semantic_quantizers=1, codebook_size=8, codebook_dim=3, embed_dim=5, project_codes=True
)
TRAINING = QuantizerTraining(decay=0.9, dead_code_threshold=0.0, dead_code_share=0.0, dropout=False)


@pytest.fixture(scope="module")
def state():
    """(parameters, codebooks, frames)."""
    parameters, codebooks = QUANTIZER.init(jax.random.key(0))
    return parameters, codebooks, jax.random.normal(jax.random.key(1), (2, 20, 5))


def numpy_halves(parameters, codebooks, x_BTD):
    """Quantized vectors, and codes level by level, in plain NumPy."""
    embedding_QND, total_BTD, codes = np.asarray(codebooks["embedding"]), 0, []
    for half, levels in (("semantic", [0]), ("acoustic", [1, 2])):
        rest_BTV = np.asarray(x_BTD) @ np.asarray(parameters[half]["input"])
        sum_BTV = 0
        for level in levels:
            codes.append(np.linalg.norm(rest_BTV[:, :, None] - embedding_QND[level], axis=-1).argmin(axis=-1))
            vectors_BTV = embedding_QND[level][codes[-1]]
            rest_BTV, sum_BTV = rest_BTV - vectors_BTV, sum_BTV + vectors_BTV
        total_BTD = total_BTD + sum_BTV @ np.asarray(parameters[half]["output"])
    return total_BTD, np.stack(codes, axis=-1)


def test_a_training_step_quantizes_each_half_and_counts_its_codes(state):
    parameters, codebooks, x_BTD = state
    expected_BTD, codes_BTQ = numpy_halves(parameters, codebooks, x_BTD)
    np.testing.assert_array_equal(QUANTIZER.encode(parameters, codebooks, x_BTD), codes_BTQ)
    np.testing.assert_allclose(QUANTIZER.decode(parameters, codebooks, codes_BTQ), expected_BTD, atol=1e-5)
    quantized = jax.jit(QUANTIZER.train, static_argnums=4)(parameters, codebooks, x_BTD, jax.random.key(2), TRAINING)
    np.testing.assert_allclose(quantized.vectors_BTD, expected_BTD, atol=1e-5)
    counts_QN = np.stack([np.bincount(codes_BTQ[..., level].ravel(), minlength=8) for level in range(3)])
    np.testing.assert_allclose(quantized.codebooks["cluster_size"], 0.9 + 0.1 * counts_QN, rtol=1e-5)
    assert quantized.perplexity_Q.shape == quantized.dead_Q.shape == (3,)


def test_gradients_reach_frames_and_projections_straight_through(state):
    parameters, codebooks, x_BTD = state
    weights_BTD = jax.random.normal(jax.random.key(3), x_BTD.shape)

    def loss(parameters, x_BTD):
        quantized = QUANTIZER.train(parameters, codebooks, x_BTD, jax.random.key(2), TRAINING)
        return jnp.sum(quantized.vectors_BTD * weights_BTD)

    to_parameters, to_x_BTD = jax.jit(jax.grad(loss, (0, 1)))(parameters, x_BTD)
    through_DD = sum(np.asarray(half["input"]) @ np.asarray(half["output"]) for half in parameters.values())
    np.testing.assert_allclose(to_x_BTD, np.asarray(weights_BTD) @ through_DD.T, rtol=1e-4, atol=1e-4)
    back_BTV = np.asarray(weights_BTD) @ np.asarray(parameters["acoustic"]["output"]).T
    expected_DV = np.einsum("BTD,BTV->DV", x_BTD, back_BTV)
    np.testing.assert_allclose(to_parameters["acoustic"]["input"], expected_DV, rtol=1e-4, atol=1e-4)


def test_fitted_codebooks_are_those_of_each_half(state):
    parameters, codebooks, _ = state
    # As many frames as codes, told apart by both projections: k-means' clusters are the frames themselves.
    x_MD = 10.0 * jax.random.normal(jax.random.key(4), (8, 5))
    fitted = QUANTIZER.fit(parameters, codebooks, x_MD, jax.random.key(5), 3, frames_per_step=8.0)[1]
    for half, level in (("semantic", 0), ("acoustic", 1)):
        expected_NV = np.asarray(x_MD @ parameters[half]["input"])
        distances_NN = np.linalg.norm(np.asarray(fitted["embedding"][level])[:, None] - expected_NV, axis=-1)
        np.testing.assert_allclose(distances_NN.min(axis=0), 0, atol=1e-4)
