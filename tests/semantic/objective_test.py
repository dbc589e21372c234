import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from audiolm_jax.errors import UserError
from audiolm_jax.semantic import features
from audiolm_jax.semantic.objective import (
    contrastive_totals,
    entropy,
    gumbel_temperature,
    masked_totals,
    w2v_bert_objective,
)
from audiolm_jax.semantic.w2v_bert import Predictions


@pytest.fixture(scope="module")
def predictions():
    generator = np.random.default_rng(0)
    codebook_KG = generator.normal(size=(4, 6))
    codes_BT = generator.integers(4, size=(2, 7))
    return Predictions(
        context_BTG=jnp.float32(generator.normal(size=(2, 7, 6))),
        quantized_BTG=jnp.float32(codebook_KG[codes_BT]),
        selected_BT=jnp.asarray(codes_BT),
        targets_BT=jnp.asarray(generator.integers(4, size=(2, 7))),
        usage_K=jnp.full(4, 3.5),
        predicted_BTD=jnp.float32(generator.normal(size=(2, 7, 3))),
    )


@pytest.fixture(scope="module")
def compiled(objective):
    return jax.jit(objective.step), jax.jit(objective.eval_step)


def all_finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_contrastive_loss_is_a_loop_over_frames_and_distractors(predictions):
    spans_BT = np.array([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0]], bool)
    distractors_BTX = np.random.default_rng(1).integers(7, size=(2, 7, 5))
    ours = jax.jit(contrastive_totals)(predictions, jnp.asarray(spans_BT), jnp.asarray(distractors_BTX), 0.1)
    cosine = lambda a, b: a @ b / np.sqrt((a @ a) * (b @ b))
    context_BTG, quantized_BTG = np.asarray(predictions.context_BTG), np.asarray(predictions.quantized_BTG)
    codes_BT = np.asarray(predictions.selected_BT)
    losses, found = [], []
    for b, t in np.argwhere(spans_BT):
        similar_S = [cosine(context_BTG[b, t], quantized_G) / 0.1 for quantized_G in quantized_BTG[b]]
        others = [similar_S[s] for s in distractors_BTX[b, t] if codes_BT[b, s] != codes_BT[b, t]]
        if others:
            losses.append(np.log(np.sum(np.exp([similar_S[t], *others]))) - similar_S[t])
            found.append(similar_S[t] > max(others))
    assert losses
    assert float(ours["contrastive"][1]) == len(losses)
    np.testing.assert_allclose(ours["contrastive"][0], sum(losses), rtol=1e-4)
    assert ours["contrastive_accuracy"] == (sum(found), len(losses))


def test_a_collapsed_codebook_counts_for_nothing_in_the_contrastive_loss(predictions):
    collapsed = predictions.replace(selected_BT=jnp.zeros((2, 7), int))
    totals = contrastive_totals(collapsed, jnp.ones((2, 7), bool), jnp.zeros((2, 7, 5), int), 0.1)
    assert totals["contrastive"] == (0.0, 0)
    loss = lambda context: contrastive_totals(
        collapsed.replace(context_BTG=context), jnp.ones((2, 7), bool), jnp.zeros((2, 7, 5), int), 0.1
    )["contrastive"][0]
    assert all_finite(jax.grad(loss)(collapsed.context_BTG))


def test_masked_loss_is_cross_entropy_at_masked_frames(predictions):
    spans_BT = np.array([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0]], bool)
    logits_BTK = np.random.default_rng(2).normal(size=(2, 7, 4)).astype(np.float32)
    totals = masked_totals(jnp.asarray(logits_BTK), predictions.targets_BT, jnp.asarray(spans_BT))
    logits_MK, targets_M = logits_BTK[spans_BT], np.asarray(predictions.targets_BT)[spans_BT]
    losses_M = np.log(np.exp(logits_MK).sum(1)) - logits_MK[np.arange(7), targets_M]
    np.testing.assert_allclose(totals["masked"][0], losses_M.sum(), rtol=1e-5)
    assert totals["masked_accuracy"] == ((logits_MK.argmax(1) == targets_M).sum(), 7)
    np.testing.assert_array_equal(totals["target_histogram"][0], np.bincount(targets_M, minlength=4))


def test_entropy_and_its_gradient_are_finite_at_zero():
    np.testing.assert_allclose(entropy(jnp.full(8, 0.125)), np.log(8), rtol=1e-6)
    assert entropy(jnp.array([1.0, 0.0])) == 0.0
    assert all_finite(jax.grad(entropy)(jnp.array([1.0, 0.0])))


def test_gumbel_temperature_falls_to_its_floor(config):
    at = lambda step: float(gumbel_temperature(jnp.int32(step), config.loss))
    assert at(0) == 2.0
    np.testing.assert_allclose(at(100_000), 2.0 * 0.999995**100_000, rtol=1e-3)
    assert at(10_000_000) == 0.5


def test_training_lowers_the_loss_on_held_out_masks(objective, state, batch, compiled):
    step, eval_step = compiled
    state = objective.warm_start(state, [batch], jax.random.key(0))

    def held_out(state):
        total, count = eval_step(state, batch, jax.random.key(99))["loss"]
        return float(total / count)

    before = held_out(state)
    for i in range(40):
        state, metrics = step(state, batch, jax.random.fold_in(jax.random.key(1), i))
    assert int(state["step"]) == 40
    assert all_finite(metrics)
    assert held_out(state) < before - 0.5


def test_blocks_and_recomputing_change_no_gradient(config, state, batch):
    def updates(block_positions, remat):
        changed = config.copy_and_resolve_references()
        changed.model.update(block_positions=block_positions, remat=remat)
        after, metrics = jax.jit(w2v_bert_objective(changed, optax.sgd(1.0)).step)(state, batch, jax.random.key(3))
        return jax.tree.map(jnp.subtract, after["params"], state["params"]), metrics

    state = {**state, "opt_state": optax.sgd(1.0).init(state["params"])}
    whole, blocked = updates(0, "none"), updates(16, "full")
    assert optax.tree.norm(whole[0]) > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), whole, blocked)


def test_metrics_are_consistent(state, batch, compiled, config):
    _, metrics = compiled[0](state, batch, jax.random.key(0))
    weights = config.loss
    expected = (
        weights.contrastive_weight * metrics["contrastive"]
        + weights.masked_weight * metrics["masked"]
        + weights.diversity_weight * metrics["diversity"]
    )
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["diversity"], 1 - metrics["codebook_perplexity"] / 12, rtol=1e-5)
    assert 1.0 <= metrics["target_perplexity"] <= 12.0
    assert all(metric.shape == () for metric in metrics.values())


@pytest.mark.parametrize("lengths", [(0, 0, 0, 0), (1, 640, 641, 1), (32_000, 0, 1, 700)])
def test_silence_and_tiny_clips_leave_everything_finite(lengths, state, batch, compiled):
    for wave_BW in (np.zeros_like(batch["wave_BW"]), batch["wave_BW"]):
        clips = {**batch, "wave_BW": wave_BW, "lengths_B": np.array(lengths, np.int32)}
        new_state, metrics = compiled[0](state, clips, jax.random.key(0))
        assert all_finite(metrics)
        assert all_finite((new_state["params"], new_state["opt_state"]))
        assert all_finite(compiled[1](state, clips, jax.random.key(0)))


def test_evaluation_leaves_out_invalid_rows_and_padding(state, batch, compiled):
    _, eval_step = compiled
    key = jax.random.key(3)
    only_two = {**batch, "valid_B": np.array([1, 1, 0, 0], np.float32)}
    empty = {**batch, "lengths_B": batch["lengths_B"] * np.array([1, 1, 0, 0], np.int32)}
    exists_BW = np.arange(batch["wave_BW"].shape[1]) < empty["lengths_B"][:, None]
    clean = {**empty, "wave_BW": np.where(exists_BW, batch["wave_BW"], 0.0).astype(np.float32)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4),
        eval_step(state, only_two, key),
        eval_step(state, clean, key),
    )
    everything, two = eval_step(state, batch, key), eval_step(state, only_two, key)
    assert everything["masked"][1] > two["masked"][1] > 0


def test_evaluation_is_deterministic_and_adds_up(state, batch, compiled):
    _, eval_step = compiled
    first, again = (eval_step(state, batch, jax.random.key(5)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    histogram_K, count = first["target_histogram"]
    assert float(histogram_K.sum()) == float(count) == float(first["masked"][1])
    usage_K, frames = first["code_usage"]
    np.testing.assert_allclose(usage_K.sum(), frames, rtol=1e-4)
    assert frames == sum(features.num_frames(int(length), 16_000) for length in batch["lengths_B"])


def test_warm_start_fits_the_statistics_and_nothing_else(objective, state, batch):
    warmed = objective.warm_start(state, [batch], jax.random.key(0))
    expected = features.fit_statistics([batch], 16_000, 20)
    jax.tree.map(np.testing.assert_array_equal, warmed["statistics"], expected)
    rest = lambda state: {name: state[name] for name in ("step", "params", "opt_state")}
    jax.tree.map(np.testing.assert_array_equal, rest(warmed), rest(state))


def test_abstract_state_is_the_state(objective, state):
    abstract = nn.meta.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)
    assert shapes(abstract) == shapes(state)
    assert set(objective.weights(state)) == {"params", "statistics"}


@pytest.mark.parametrize("field, value", [("num_heads", 3), ("default_layer", 4), ("remat", "some")])
def test_fields_that_contradict_each_other_are_refused(field, value, config):
    wrong = config.copy_and_resolve_references()
    wrong.model[field] = value
    with pytest.raises(UserError, match=f"config.model.{field}={value}"):
        w2v_bert_objective(wrong, optax.adam(1e-3))
