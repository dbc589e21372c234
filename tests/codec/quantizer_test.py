"""Residual vector quantization against plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.codec import quantizer

SETTINGS = quantizer.QuantizerTraining(decay=0.9, dead_code_threshold=2.0, dead_code_share=0.1, dropout=False)
RESIDUAL = quantizer.ResidualQuantizer(num_quantizers=3, codebook_size=8, embed_dim=5)


def random_books(num_levels=3, num_codes=8, dimensions=5, shrink=0.3, seed=0):
    _, books = quantizer.ResidualQuantizer(num_levels, num_codes, dimensions).init(jax.random.key(seed))
    scale_Q11 = shrink ** jnp.arange(num_levels)[:, None, None]
    return {**books, "embedding": books["embedding"] * scale_Q11, "embedding_sum": books["embedding_sum"] * scale_Q11}


def frames(batch=4, length=9, dimensions=5, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, length, dimensions)).astype(np.float32)


def encode_by_loops(embedding_QND, x_BTD):
    residual_BTD, codes = x_BTD.astype(np.float64), []
    for embedding_ND in np.asarray(embedding_QND, np.float64):
        distances_BTN = np.square(residual_BTD[..., None, :] - embedding_ND).sum(axis=-1)
        codes.append(distances_BTN.argmin(axis=-1))
        residual_BTD = residual_BTD - embedding_ND[codes[-1]]
    return np.stack(codes, axis=-1), residual_BTD


def test_encode_picks_the_nearest_code_of_each_residual():
    books, x_BTD = random_books(), frames()
    expected_BTQ, residual_BTD = encode_by_loops(books["embedding"], x_BTD)
    codes_BTQ = RESIDUAL.encode({}, books, x_BTD)
    assert codes_BTQ.dtype == jnp.int32
    np.testing.assert_array_equal(codes_BTQ, expected_BTQ)
    np.testing.assert_allclose(RESIDUAL.decode({}, books, codes_BTQ), x_BTD - residual_BTD, atol=1e-5)


def test_codes_survive_a_round_trip_where_levels_are_far_apart():
    books = random_books(shrink=0.01)
    codes_BTQ = np.random.default_rng(2).integers(0, 8, (2, 30, 3))
    np.testing.assert_array_equal(RESIDUAL.encode({}, books, RESIDUAL.decode({}, books, codes_BTQ)), codes_BTQ)


def test_fewer_levels_are_a_prefix():
    books, x_BTD = random_books(), frames()
    codes_BTQ = RESIDUAL.encode({}, books, x_BTD)
    np.testing.assert_array_equal(RESIDUAL.encode({}, books, x_BTD, 2), codes_BTQ[..., :2])
    embedding_QND = np.asarray(books["embedding"])
    by_hand_BTD = embedding_QND[0][codes_BTQ[..., 0]] + embedding_QND[1][codes_BTQ[..., 1]]
    np.testing.assert_allclose(RESIDUAL.decode({}, books, codes_BTQ[..., :2]), by_hand_BTD, atol=1e-6)


def test_quantize_agrees_with_encode_and_decode():
    books, x_BTD = random_books(), frames()
    found_BTD = RESIDUAL.train({}, books, x_BTD, jax.random.key(0), SETTINGS).vectors_BTD
    np.testing.assert_allclose(found_BTD, RESIDUAL.decode({}, books, RESIDUAL.encode({}, books, x_BTD)), atol=1e-5)


def test_gradient_passes_straight_through():
    books, x_BTD = random_books(), frames()
    weights_BTD = frames(seed=3)

    def weighted(x_BTD):
        return jnp.sum(RESIDUAL.train({}, books, x_BTD, jax.random.key(0), SETTINGS).vectors_BTD * weights_BTD)

    np.testing.assert_allclose(jax.grad(weighted)(x_BTD), weights_BTD, atol=1e-6)


def test_commitment_is_the_mean_squared_residual_and_pulls_towards_the_codes():
    books, x_BTD = random_books(num_levels=2), frames()
    commitment = lambda x_BTD: RESIDUAL.train({}, books, x_BTD, jax.random.key(0), SETTINGS).commitment
    _, first_BTD = encode_by_loops(books["embedding"][:1], x_BTD)
    _, second_BTD = encode_by_loops(books["embedding"], x_BTD)
    expected = (np.mean(first_BTD**2) + np.mean(second_BTD**2)) / 2
    value, grad_BTD = jax.value_and_grad(commitment)(x_BTD)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad_BTD, (first_BTD + second_BTD) / first_BTD.size, atol=1e-6)


def test_codebooks_follow_moving_averages():
    books, x_BTD = random_books(num_codes=4), frames(batch=8, length=20)
    books["cluster_size"] = books["cluster_size"] * 50.0  # Nothing is dead here.
    books["embedding_sum"] = books["embedding_sum"] * 50.0
    found = RESIDUAL.train({}, books, x_BTD, jax.random.key(0), SETTINGS)
    residual_MD = x_BTD.reshape(-1, 5).astype(np.float64)
    for level in range(3):
        embedding_ND = np.asarray(books["embedding"][level], np.float64)
        size_N = np.asarray(books["cluster_size"][level], np.float64) * 0.9
        sum_ND = np.asarray(books["embedding_sum"][level], np.float64) * 0.9
        codes_M = [int(np.argmin(np.square(row_D - embedding_ND).sum(axis=-1))) for row_D in residual_MD]
        for code, row_D in zip(codes_M, residual_MD):
            size_N[code] += 0.1
            sum_ND[code] += 0.1 * row_D
        np.testing.assert_allclose(found.codebooks["cluster_size"][level], size_N, rtol=1e-4)
        np.testing.assert_allclose(found.codebooks["embedding_sum"][level], sum_ND, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.codebooks["embedding"][level], sum_ND / size_N[:, None], rtol=1e-3, atol=1e-4)
        residual_MD = residual_MD - embedding_ND[codes_M]
    np.testing.assert_array_equal(found.dead_Q, 0)


def test_dead_codes_become_frames_of_the_batch():
    x_MD = frames().reshape(-1, 5)
    sizes_N = jnp.array([10.0, 0.01, 10.0, 0.01])
    book = {"embedding": jnp.full((4, 5), 100.0), "cluster_size": sizes_N, "embedding_sum": 100.0 * sizes_N[:, None]}
    weights_M = jnp.ones(len(x_MD)).at[:20].set(0.0)
    codes_M = jnp.zeros(len(x_MD), jnp.int32)
    new_book, dead = quantizer.update(book, x_MD, codes_M, weights_M, jax.random.key(0), SETTINGS)
    assert dead == 2
    for code in (1, 3):
        distances_M = np.abs(x_MD - new_book["embedding"][code]).max(axis=-1)
        assert distances_M.min() < 1e-5 and distances_M.argmin() >= 20  # One of the frames that reach the level.
        assert new_book["cluster_size"][code] == pytest.approx(16 / 4)
    np.testing.assert_allclose(new_book["embedding"][2], 100.0, rtol=1e-5)


@pytest.mark.parametrize("threshold, share, expected", [(2.0, 0.1, 1), (0.5, 0.1, 1), (0.1, 0.1, 0), (5.0, 1.0, 2)])
def test_dead_means_below_the_lesser_of_threshold_and_share(threshold, share, expected):
    # 36 frames for 4 codes: the average usage is 9, its tenth 0.9.
    x_MD, sizes_N = frames().reshape(-1, 5), jnp.array([20.0, 20.0, 4.0, 0.3]) / 0.9
    book = {"embedding": jnp.ones((4, 5)), "cluster_size": sizes_N, "embedding_sum": sizes_N[:, None] * jnp.ones(5)}
    codes_M, ones_M = jnp.zeros(36, jnp.int32), jnp.ones(36)
    settings = quantizer.QuantizerTraining(0.9, threshold, share, dropout=False)
    _, dead = quantizer.update(book, x_MD, codes_M, ones_M, jax.random.key(0), settings)
    assert dead == expected


def test_a_level_that_no_frame_reaches_keeps_its_codes():
    books = random_books(num_levels=1)
    book = jax.tree.map(lambda leaf: leaf[0], books)
    new_book, dead = quantizer.update(
        book, frames().reshape(-1, 5), jnp.zeros(36, jnp.int32), jnp.zeros(36), jax.random.key(0), SETTINGS
    )
    assert dead == 0
    np.testing.assert_allclose(new_book["embedding"], book["embedding"], rtol=1e-5)


def test_dropout_keeps_a_uniform_number_of_levels_per_example():
    books, x_BTD = random_books(), frames(batch=300, length=2)
    found = RESIDUAL.train({}, books, x_BTD, jax.random.key(0), dataclasses.replace(SETTINGS, dropout=True))
    codes_BTQ = RESIDUAL.encode({}, books, x_BTD)
    levels = [np.asarray(RESIDUAL.decode({}, books, codes_BTQ[..., :n])) for n in (1, 2, 3)]
    matches_NB = np.stack([np.abs(found.vectors_BTD - one).max(axis=(1, 2)) < 1e-5 for one in levels])
    np.testing.assert_array_equal(matches_NB.sum(axis=0), 1)
    counts_N = matches_NB.sum(axis=1)
    assert np.all(np.abs(counts_N - 100) < 35), counts_N
    # Level q learns from the frames that reach it.
    moved_Q = np.asarray(found.codebooks["cluster_size"]).sum(axis=1) - 0.9 * 8
    reached_Q = np.array([300, counts_N[1:].sum(), counts_N[2]]) * 2
    unreplaced_Q = np.asarray(found.dead_Q) == 0
    np.testing.assert_allclose(moved_Q[unreplaced_Q], 0.1 * reached_Q[unreplaced_Q], rtol=1e-3)


def test_padded_frames_count_nowhere():
    books, x_BTD = random_books(), frames(batch=2, length=8)
    ragged_BTD = x_BTD.copy()
    ragged_BTD[1, 5:] = 1e3
    mask_BT = np.ones((2, 8), bool)
    mask_BT[1, 5:] = False
    found = RESIDUAL.train({}, books, ragged_BTD, jax.random.key(0), SETTINGS, mask_BT)
    alone_BTD = ragged_BTD[mask_BT][None]
    expected = RESIDUAL.train({}, books, alone_BTD, jax.random.key(0), SETTINGS)
    assert found.commitment == pytest.approx(float(expected.commitment), rel=1e-5)
    for name in ("cluster_size", "embedding_sum", "embedding"):
        np.testing.assert_allclose(found.codebooks[name], expected.codebooks[name], rtol=1e-4, atol=1e-5)


def test_fill_masked_takes_rows_inside_the_mask():
    x_MD = jnp.arange(10.0)[:, None]
    mask_M = jnp.arange(10) < 3
    filled_M = np.asarray(quantizer.fill_masked(jax.random.key(0), x_MD, mask_M))[:, 0]
    np.testing.assert_array_equal(filled_M[:3], [0, 1, 2])
    assert set(filled_M[3:]) <= {0.0, 1.0, 2.0} and len(set(filled_M[3:])) > 1


def test_perplexity_counts_the_codes_in_use():
    assert quantizer.perplexity(jnp.array([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3.0, rel=1e-5)
    assert quantizer.perplexity(jnp.array([1.0, 0.0, 0.0])) == pytest.approx(1.0, rel=1e-5)


def test_fitted_codebooks_leave_less_at_every_level():
    x_MD = frames(batch=20, length=20).reshape(-1, 5)
    parameters, books = RESIDUAL.fit({}, {}, x_MD, jax.random.key(0), 10, frames_per_step=100.0)
    assert parameters == {}
    np.testing.assert_allclose(np.sum(books["cluster_size"], axis=1), 100.0, rtol=1e-4)
    errors = [np.mean(x_MD**2)]
    for level in (1, 2, 3):
        residual_BTD = encode_by_loops(books["embedding"][:level], x_MD[None])[1]
        errors.append(np.mean(residual_BTD**2))
        np.testing.assert_allclose(  # Codes are the means of their frames.
            books["embedding_sum"][level - 1],
            books["embedding"][level - 1] * books["cluster_size"][level - 1][:, None],
            rtol=1e-5,
        )
    assert all(after < 0.7 * before for before, after in zip(errors, errors[1:], strict=False)), errors
