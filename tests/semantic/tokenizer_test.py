import dataclasses

import numpy as np
import pytest

from audiolm_jax.errors import UserError
from audiolm_jax.semantic import tokenizer as tokenizers
from audiolm_jax.semantic.kmeans import fit_clusters
from audiolm_jax.semantic.tokenizer import SemanticTokenizer


@pytest.fixture(scope="module")
def encoder(config, objective, state, batch):
    return SemanticTokenizer.from_weights(config, objective.weights(objective.warm_start(state, [batch], None)))


@pytest.fixture(scope="module")
def tokenizer(config, encoder, batch):
    clusters = fit_clusters(encoder, [(batch["wave_BW"], batch["lengths_B"])], 6, seed=0, layer=2)
    return SemanticTokenizer.from_weights(config, encoder.weights, clusters)


def test_rates_and_sizes(encoder, tokenizer, batch):
    assert (tokenizer.sample_rate, tokenizer.frame_rate, tokenizer.vocab_size) == (16_000, 25, 6)
    z_BT = tokenizer.encode(batch["wave_BW"])
    assert z_BT.shape == (4, 50) and z_BT.dtype == np.int32
    assert set(np.unique(z_BT)) <= set(range(6)) and len(np.unique(z_BT)) > 1
    assert encoder.features(batch["wave_BW"][:, :31_361]).shape == (4, 50, 16)
    assert encoder.features(batch["wave_BW"][:, :0]).shape == (4, 0, 16)


def test_each_row_is_that_clip_alone(tokenizer, batch):
    garbage_BW = np.where(np.arange(32_000) < batch["lengths_B"][:, None], batch["wave_BW"], np.nan)
    together_BTD = tokenizer.features(garbage_BW, batch["lengths_B"])
    tokens_BT = tokenizer.encode(garbage_BW, batch["lengths_B"])
    for b in (1, 3):
        length = batch["lengths_B"][b]
        frames = -(-int(length) // 640)
        alone_BTD = tokenizer.features(batch["wave_BW"][b : b + 1, :length])
        assert alone_BTD.shape[1] == frames
        np.testing.assert_allclose(together_BTD[b, :frames], alone_BTD[0], atol=1e-5)
        np.testing.assert_array_equal(together_BTD[b, frames:], 0.0)
        np.testing.assert_array_equal(tokens_BT[b, :frames], tokenizer.encode(batch["wave_BW"][b : b + 1, :length])[0])
        np.testing.assert_array_equal(tokens_BT[b, frames:], 0)


def test_tokens_are_the_nearest_normalised_centroids(tokenizer, batch):
    x_BTD = tokenizer.features(batch["wave_BW"], layer=2)
    clusters = {name: np.asarray(value) for name, value in tokenizer.clusters.items()}
    normed_BTD = (x_BTD - clusters["mean"]) / clusters["std"]
    expected_BT = np.square(normed_BTD[:, :, None] - clusters["centroids"]).sum(-1).argmin(-1)
    np.testing.assert_array_equal(tokenizer.encode(batch["wave_BW"]), expected_BT)


def test_layer_is_the_clusters_then_the_configs(encoder, tokenizer, batch):
    at = lambda layer: encoder.features(batch["wave_BW"], layer=layer)
    assert not np.allclose(at(2), at(3))
    np.testing.assert_array_equal(encoder.features(batch["wave_BW"]), at(2))
    np.testing.assert_array_equal(tokenizer.features(batch["wave_BW"]), at(2))
    for layer in (-1, 4):
        with pytest.raises(UserError, match="no such layer"):
            at(layer)


def test_clusters_of_another_width_are_refused(config, encoder):
    clusters = {"layer": 2, "mean": np.zeros(15), "std": np.ones(15), "centroids": np.zeros((6, 15))}
    tokenizer = SemanticTokenizer.from_weights(config, encoder.weights, clusters)
    with pytest.raises(UserError, match=r"do not fit an encoder of width 16: .*centroids \[6, 15\]"):
        tokenizer.encode(np.zeros((1, 10_240)))


def test_an_encoder_without_clusters_says_what_to_run(encoder, batch):
    with pytest.raises(UserError, match="audiolm fit-kmeans"):
        encoder.encode(batch["wave_BW"])
    with pytest.raises(UserError, match="audiolm fit-kmeans"):
        _ = encoder.vocab_size


def test_bad_waves_are_refused(tokenizer, batch):
    wave_BW = batch["wave_BW"].copy()
    wave_BW[1, 77] = np.inf
    with pytest.raises(UserError, match="row 1, sample 77"):
        tokenizer.encode(wave_BW)
    assert tokenizer.encode(wave_BW, [32_000, 77, 0, 0]).shape == (4, 50)
    with pytest.raises(UserError, match="lengths do not fit"):
        tokenizer.encode(wave_BW[:1], [32_001])
    with pytest.raises(UserError, match="not \\[B, W\\]"):
        tokenizer.encode(wave_BW[0])


def test_silence_has_features(encoder):
    assert np.isfinite(encoder.features(np.zeros((1, 9_999)))).all()


def test_few_lengths_are_compiled(encoder):
    sizes = [tokenizers.bucket(frames) for frames in range(1, 2000)]
    assert all(frames <= size for frames, size in zip(range(1, 2000), sizes))
    assert all(size < 1.5 * frames for frames, size in zip(range(17, 2000), sizes[16:]))
    assert len(set(sizes)) == 15
    before = tokenizers._features._cache_size()
    for num_samples in (10_241, 11_000, 15_000, 15_360):
        encoder.features(np.zeros((3, num_samples)))
    assert tokenizers._features._cache_size() == before + 1


def test_long_clips_are_the_middles_of_windows(tokenizer, batch):
    """A window is 1 s, 25 frames, of which 4 on either side are context: it keeps 17."""
    encoder = dataclasses.replace(tokenizer.encoder, window_seconds=1.02)
    long = dataclasses.replace(tokenizer, encoder=encoder)
    wave_BW = np.concatenate([batch["wave_BW"][:2], batch["wave_BW"][:2, ::-1]], axis=1)
    lengths_B = [59_000, 16_640]
    x_BTD, z_BT = long.features(wave_BW, lengths_B), long.encode(wave_BW, lengths_B)
    assert x_BTD.shape == (2, 100, 16)
    alone = lambda row, start, stop: tokenizer.features(wave_BW[row : row + 1, 640 * start : stop])[0]
    pieces = [alone(0, 0, 16_000)[:21]]
    pieces += [alone(0, start, 640 * (start + 25))[4:21] for start in (17, 34, 51)]
    pieces += [alone(0, 68, 59_000)[4:]]
    np.testing.assert_allclose(x_BTD[0, :93], np.concatenate(pieces), atol=1e-5)
    np.testing.assert_allclose(
        x_BTD[1, :26], np.concatenate([alone(1, 0, 16_000)[:21], alone(1, 17, 16_640)[4:]]), atol=1e-5
    )
    assert not x_BTD[0, 93:].any() and not x_BTD[1, 26:].any()
    # Nothing depends on company, padding or how many windows run at once.
    np.testing.assert_array_equal(z_BT[0, :93], long.encode(wave_BW[:1, :59_000])[0])
    one_pass_T = tokenizer.encode(wave_BW[:1, :59_000])[0]
    assert np.mean(one_pass_T == z_BT[0, :93]) > 0.5


def test_several_layers_come_from_one_pass(encoder, batch):
    third_BTD, first_BTD = encoder.features_of_layers(batch["wave_BW"], batch["lengths_B"], (3, 1))
    np.testing.assert_allclose(third_BTD, encoder.features(batch["wave_BW"], batch["lengths_B"], 3), atol=1e-5)
    np.testing.assert_allclose(first_BTD, encoder.features(batch["wave_BW"], batch["lengths_B"], 1), atol=1e-5)
