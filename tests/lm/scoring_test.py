"""Log-likelihoods by the cached pass: the plain sum of log-softmax, whatever the batch, the block and the mesh."""

import numpy as np
import pytest

from audiolm_jax.lm import scoring
from audiolm_jax.lm.decode import LanguageModel
from tests.lm.decode_test import STAGES, model_of
from tests.lm.likelihoods import ARCHITECTURES, plain_losses, sequences_of
from tests.training.devices import on_eight_devices


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stage", STAGES[:3], ids=lambda stage: stage.name)
def test_equal_the_plain_sum_of_log_softmax(stage, architecture, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK_POSITIONS", 16)
    config, params = model_of(stage, **ARCHITECTURES[architecture])
    sequences = sequences_of(stage, np.random.default_rng().integers(1000))
    found = scoring.next_token_losses(LanguageModel(stage, config, params), sequences)
    for losses_T, tokens in zip(found, sequences, strict=True):
        plain_T = plain_losses(config, params, tokens)
        np.testing.assert_allclose(losses_T, plain_T, atol=1e-5)
        np.testing.assert_allclose(losses_T.astype(float).sum(), plain_T.sum(), rtol=1e-5)
    assert np.std([losses_T.mean() for losses_T in found]) > 0.01


def test_rows_do_not_depend_on_their_company(monkeypatch, float64):
    # Batches of three rows at most.
    monkeypatch.setattr(scoring, "BATCH_POSITIONS", 192)
    config, params = model_of(STAGES[0], dtype="float64")
    lm, sequences = LanguageModel(STAGES[0], config, params), sequences_of(STAGES[0], 5)
    together = scoring.next_token_losses(lm, sequences)
    for losses_T, tokens in zip(together, sequences, strict=True):
        (alone_T,) = scoring.next_token_losses(lm, [tokens])
        np.testing.assert_allclose(losses_T, alone_T, atol=1e-12)
        np.testing.assert_allclose(losses_T, plain_losses(config, params, tokens), atol=1e-9)
    twice = scoring.next_token_losses(lm, [sequences[1], *sequences, sequences[1]])
    assert twice[0].tobytes() == twice[2].tobytes() == twice[-1].tobytes()
    assert scoring.next_token_losses(lm, []) == []


@pytest.mark.slow
def test_eight_devices_find_the_plain_sum():
    seed = int(np.random.default_rng().integers(1000))
    results = on_eight_devices("tests.lm.likelihoods", str(seed))
    for stage in STAGES[:3]:
        config, params = model_of(stage, **ARCHITECTURES["relative_bias"])
        plain = [plain_losses(config, params, tokens) for tokens in sequences_of(stage, seed)]
        assert len(results[stage.name]) == 3
        for shape, found in results[stage.name].items():
            for losses_T, plain_T in zip(found, plain, strict=True):
                np.testing.assert_allclose(losses_T, plain_T, atol=1e-5, err_msg=f"{stage.name} {shape}")
