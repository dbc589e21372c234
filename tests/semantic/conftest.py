"""A w2v-BERT small enough to compile in seconds."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from audiolm_jax.config import w2v_bert_config
from audiolm_jax.semantic.objective import w2v_bert_objective


@pytest.fixture(scope="session")
def config():
    config = w2v_bert_config()
    config.model.update(
        num_mels=20, subsampling_channels=4, embed_dim=16, mlp_dim=24, num_heads=2, num_contrastive_layers=1,
        num_masked_layers=2, codebook_size=12, codebook_dim=8, default_layer=2, dtype="float32", remat="none",
    )  # fmt: skip
    config.loss.num_distractors = 5
    return config


@pytest.fixture(scope="session")
def objective(config):
    return w2v_bert_objective(config, optax.adam(3e-3))


@pytest.fixture(scope="session")
def state(objective):
    return nn.meta.unbox(jax.jit(objective.init)(jax.random.key(0)))


@pytest.fixture(scope="session")
def batch():
    """Four noisy chirps of 2 s to a single frame; they go on behind each row's length."""
    generator = np.random.default_rng(0)
    seconds_W = np.arange(32_000) / 16_000
    pitch_B = np.array([200.0, 300.0, 450.0, 700.0])[:, None]
    wave_BW = 0.3 * np.sin(2 * np.pi * pitch_B * seconds_W * (1 + seconds_W)) * np.sin(9 * seconds_W)
    wave_BW = wave_BW + 0.01 * generator.normal(size=wave_BW.shape)
    lengths_B = np.array([32_000, 21_111, 9_000, 300], np.int32)
    return {
        "wave_BW": wave_BW.astype(np.float32),
        "lengths_B": lengths_B,
        "valid_B": np.array([1, 1, 1, 1], np.float32),
    }
