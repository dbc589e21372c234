"""The transform that accelerators run equals the one that the CPU runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import audio_utils

from audiolm_jax import spectral


@pytest.mark.parametrize(("samples", "num_points"), [(400, 512), (64, 64), (2048, 2048), (1, 2)])
def test_products_equal_the_fast_transform(samples, num_points):
    frames = np.random.default_rng(samples).standard_normal((2, 3, samples)).astype(np.float32)
    products = spectral.rfft_by_products(jnp.asarray(frames), num_points)
    np.testing.assert_allclose(products, np.fft.rfft(frames, num_points), atol=2e-4 * samples**0.5, rtol=1e-4)


def test_accelerators_get_products_and_the_cpu_a_fast_transform():
    transform = jax.jit(lambda wave_BW: jnp.abs(spectral.stft(wave_BW, 64, 16)))
    trace = transform.trace(jax.ShapeDtypeStruct((2, 256), jnp.float32))
    assert "fft" in trace.lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("tpu", "cuda"):
        text = trace.lower(lowering_platforms=(platform,)).as_text()
        assert "fft" not in text and "dot_general" in text


@pytest.mark.parametrize(
    ("style", "theirs"),
    [
        ("htk", {"mel_scale": "htk"}),
        ("kaldi", {"mel_scale": "kaldi", "triangularize_in_mel_space": True}),
        ("slaney", {"mel_scale": "slaney", "norm": "slaney"}),
    ],
)
def test_mel_filters_are_transformers(style, theirs):
    expected_FM = audio_utils.mel_filter_bank(257, 40, 20.0, 7_600.0, 16_000, **theirs)
    filters_FM = spectral.mel_filterbank(257, 40, 16_000, 20.0, 7_600.0, style)
    np.testing.assert_allclose(filters_FM, expected_FM, atol=1e-6 * expected_FM.max())
