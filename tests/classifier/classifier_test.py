"""A trained classifier: probabilities of windows of a second, each clip for itself."""

import jax
import numpy as np
import pytest

import audiolm_jax
from audiolm_jax import bundle
from audiolm_jax.classifier import classifier as module
from audiolm_jax.classifier.objective import classify
from audiolm_jax.errors import UserError
from audiolm_jax.parts import export, read_part, write_part
from tests import tiny

RATE = 16_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported detector with random weights that hang on what they hear."""
    path = tmp_path_factory.mktemp("detector")
    part = tiny.part_of("classifier", **{"model.labels": ("real", "generated")})
    part.weights["params"]["head"]["kernel"] = 20 * part.weights["params"]["head"]["kernel"]
    write_part(path, part)
    return path


@pytest.fixture(scope="module")
def detector(folder):
    return audiolm_jax.load_classifier(folder)


def noise(seconds: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    wave_W = generator.standard_normal(round(seconds * RATE)) * np.exp(generator.standard_normal())
    return (0.1 * np.convolve(wave_W, np.ones(1 + seed) / (1 + seed), "same")).astype(np.float32)


def test_means_of_windows_every_quarter_of_a_second(detector):
    wave_W = noise(2.1, 1)
    starts = (0, 4000, 8000, 12000, 16000)
    windows_NW = np.stack([wave_W[start : start + RATE] for start in starts])
    logits_NK, _ = classify(detector.config, detector.weights, windows_NW, np.full(5, RATE), False)
    exponents_NK = np.exp(np.asarray(logits_NK, np.float64))
    expected_K = np.mean(exponents_NK / exponents_NK.sum(axis=1, keepdims=True), axis=0)
    assert np.ptp(logits_NK, axis=0).max() > 1e-3
    np.testing.assert_allclose(detector.predict(wave_W[None])[0], expected_K, atol=1e-5)
    assert detector.labels == ("real", "generated") and detector.sample_rate == RATE


def test_a_row_of_a_batch_is_that_clip_alone(detector, monkeypatch):
    clips = [noise(seconds, seed) for seed, seconds in enumerate((0.01, 0.4, 1.0, 1.26, 3.3))]
    lengths_B = np.array([len(clip_W) for clip_W in clips])
    wave_BW = np.stack([np.pad(clip_W, (0, lengths_B.max() - len(clip_W)), constant_values=0.7) for clip_W in clips])
    monkeypatch.setattr(module, "BATCH_WINDOWS", 4)
    together_BK = detector.predict(wave_BW, lengths_B)
    for clip_W, row_K in zip(clips, together_BK, strict=True):
        np.testing.assert_allclose(detector.predict(clip_W[None])[0], row_K, atol=1e-5)
    np.testing.assert_allclose(together_BK.sum(axis=1), 1.0, atol=1e-5)
    assert np.ptp(together_BK[:, 0]) > 0.01
    assert detector.predict(np.zeros((0, 100), np.float32)).shape == (0, 2)


def test_refuses(detector, folder, bundle_folder, tmp_path):
    for arguments, message in (
        ((np.zeros(100, np.float32),), "waveforms are not floats"),
        ((np.full((1, 100), np.nan),), "NaN or infinity: row 0"),
        ((np.zeros((2, 100)), np.array([3, 0])), "clip without samples: row 1"),
        ((np.zeros((2, 100)), np.array([3, 101])), "lengths from 3 to 101"),
    ):
        with pytest.raises(UserError, match=message):
            detector.predict(*arguments)
    for path, message in (
        (bundle_folder / "codec", "not a classifier but a soundstream"),
        (bundle_folder, "bundle without a detector"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            audiolm_jax.load_classifier(path)


def test_export_and_bundle_carry_it(folder, detector, bundle_folder, tmp_path):
    export(folder, tmp_path / "exported")
    assert read_part(tmp_path / "exported").fingerprint() == read_part(folder).fingerprint()
    roles = ("codec", "semantic_tokenizer", *tiny.STAGES)
    bundle.write_bundle(
        {**{role: str(bundle_folder / role) for role in roles}, "detector": str(folder)}, tmp_path / "bundle"
    )
    assert set(audiolm_jax.load_bundle(tmp_path / "bundle").fingerprints) == {*roles, "detector"}
    again = audiolm_jax.load_classifier(tmp_path / "bundle")
    jax.tree.map(np.testing.assert_array_equal, again.weights, detector.weights)
    with pytest.raises(UserError, match="detector is not a detector but a coarse"):
        bundle.write_bundle(
            {**{role: str(bundle_folder / role) for role in roles}, "detector": str(bundle_folder / "coarse")},
            tmp_path / "other",
        )
