"""One step's surroundings: microbatches, moving average, guard."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from audiolm_jax.accelerators import Accelerator
from audiolm_jax.errors import UserError
from audiolm_jax.lm.objective import stage_from_config, token_losses, transformer_from_config
from audiolm_jax.lm.transformer import Transformer
from audiolm_jax.parts import read_part
from audiolm_jax.training import loop, sharding
from audiolm_jax.training.checkpoint import find_checkpoint
from audiolm_jax.training.metrics import read_metrics
from audiolm_jax.training.registry import abstract_batch
from audiolm_jax.training.step import build_program, model_flops
from tests import tiny
from tests.data.pipeline_test import METADATA
from tests.training import tokens


def batch_of(config, seed=0):
    """Random tokens with ragged loss weights."""
    generator = np.random.default_rng(seed)
    stage = stage_from_config(config)
    shape = (config.batch_size, stage.sequence_length)
    lengths = generator.integers(3, shape[1], shape[0])
    return {
        "decoder_input_tokens": generator.integers(0, stage.vocab_size, shape).astype(np.int32),
        "decoder_target_tokens": generator.integers(0, stage.vocab_size, shape).astype(np.int32),
        "decoder_loss_weights": (np.arange(shape[1]) < lengths[:, None]).astype(np.float32),
    }


def run_steps(config, batches):
    """(state, metrics) after each batch."""
    mesh = sharding.make_mesh(config.mesh)
    with sharding.active(mesh):
        program = build_program(config, mesh)
        state, history = program.init(jax.random.key(config.seed)), []
        for batch in batches:
            batch = sharding.global_batch(batch, config.batch_size, mesh)
            state, metrics = program.step(state, batch, jax.random.key(1))
            history.append(jax.device_get((state, metrics)))
    return history


def config_of(**fields):
    return tiny.config_of("coarse", **{"batch_size": 8, "model.dropout_rate": 0.0, **fields})


def assert_trees_close(actual, expected, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), actual, expected)


@pytest.mark.parametrize("count", [2, 8])
def test_microbatches_equal_one_batch(count):
    batches = [batch_of(config_of(), seed) for seed in range(3)]
    whole = run_steps(config_of(), batches)
    parts = run_steps(config_of(accumulation_steps=count), batches)
    for (state, metrics), (other_state, other_metrics) in zip(whole, parts, strict=True):
        assert_trees_close(other_metrics, metrics, 2e-5)
        assert_trees_close(other_state["params"], state["params"], 2e-5)


def test_microbatches_draw_their_own_dropout():
    config = config_of(**{"model.dropout_rate": 0.5, "accumulation_steps": 2, "batch_size": 2})
    same = {name: np.repeat(array[:1], 2, axis=0) for name, array in batch_of(config).items()}
    twice = run_steps(config, [same])[0][1]["loss"]
    config.batch_size, config.accumulation_steps = 1, 1
    once = run_steps(config, [{name: array[:1] for name, array in same.items()}])[0][1]["loss"]
    assert abs(twice - once) > 1e-4


def test_moving_average_by_its_formula():
    batches = [batch_of(config_of(), seed) for seed in range(4)]
    config = config_of(ema_decay=0.75)
    mesh = sharding.make_mesh(config.mesh)
    with sharding.active(mesh):
        expected = jax.device_get(build_program(config, mesh).init(jax.random.key(config.seed))["params"])
    for state, _ in run_steps(config, batches):
        expected = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, expected, state["params"])
        assert_trees_close(state["ema"]["params"], expected, 1e-6)
    assert "ema" not in run_steps(config_of(), batches[:1])[0][0]


def test_poisoned_batch_leaves_the_last_good_state():
    good = [batch_of(config_of(), seed) for seed in range(4)]
    poisoned = {**good[0], "decoder_loss_weights": np.full_like(good[0]["decoder_loss_weights"], np.nan)}
    config = config_of(ema_decay=0.5)
    (before, _), (after, metrics), (later, more) = run_steps(config, [good[0], poisoned, good[1]])
    assert not np.isfinite(metrics["loss"])
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, after[name], before[name])
    assert after["step"] == before["step"] + 1
    assert metrics["skipped_steps"] == metrics["skipped_in_a_row"] == 1
    # The run goes on from there.
    assert np.isfinite(more["loss"]) and more["skipped_steps"] == 1 and more["skipped_in_a_row"] == 0
    assert np.any(later["params"]["head"] != before["params"]["head"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tokens.write(tmp_path_factory.mktemp("data") / "tokens", METADATA))


def train_config(data, **fields):
    steps = {"num_train_steps": 6, "log_every_steps": 1, "eval_every_steps": 3, "checkpoint_every_steps": 3}
    return tiny.config_of("semantic", **{"data_dir": data, **steps, **fields})


def poison(monkeypatch, bad_steps):
    """Makes the loop see NaN in these steps' batches."""
    original, step = sharding.global_batch, [0]

    def global_batch(batch, batch_size, mesh):
        if "valid_B" not in batch:
            step[0] += 1
            if step[0] in bad_steps:
                batch = {**batch, "decoder_loss_weights": batch["decoder_loss_weights"] * np.nan}
        return original(batch, batch_size, mesh)

    monkeypatch.setattr(sharding, "global_batch", global_batch)


def test_run_goes_on_after_a_poisoned_batch(data, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 4})
    assert loop.train(train_config(data), tmp_path) == 0
    rows = read_metrics(tmp_path)
    assert [row["loss"] is None for row in rows] == [False, True, False, True, False, False]
    assert rows[-1]["skipped_steps"] == 2 and np.isfinite(rows[-1]["eval_loss"])


def test_run_that_stays_poisoned_ends_with_the_last_good_state_saved(data, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(3, 100)))
    with pytest.raises(loop.Diverged, match="4 steps in a row were not finite") as caught:
        loop.train(train_config(data, num_train_steps=50, max_skipped_steps=4), tmp_path)
    assert caught.value.status == 1
    weights = read_part(tmp_path).weights
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(weights))
    assert int(find_checkpoint(tmp_path).name) <= 8


def test_evaluation_and_export_use_the_moving_average(data, tmp_path):
    config = train_config(data, ema_decay=0.9)
    loop.train(config, tmp_path)
    exported = read_part(tmp_path).weights["params"]
    mesh = sharding.make_mesh(config.mesh)
    with sharding.active(mesh):
        program = build_program(config, mesh)
        with loop.Checkpoints(tmp_path, 1, 0) as checkpoints:
            state, _ = checkpoints.restore(6, program.abstract_state)
        jax.tree.map(np.testing.assert_array_equal, exported, jax.device_get(state["ema"]["params"]))
        assert np.any(np.asarray(state["params"]["head"]) != exported["head"])
        batch = {**batch_of(config), "valid_B": jnp.ones(config.batch_size)}
        total, count = program.eval_step(state, batch, jax.random.key(0))["loss"]
        averaged = {**state, "params": state["ema"]["params"]}
        del averaged["ema"]
        expected, _ = program.objective.eval_step(averaged, batch, jax.random.key(0))["loss"]
    assert float(total / count) == pytest.approx(float(expected / count), rel=1e-6)


def test_the_best_checkpoint_is_kept_with_the_latest(data, tmp_path):
    config = train_config(data, num_train_steps=9, eval_every_steps=1, checkpoint_every_steps=1, keep_checkpoints=2)
    # A rate at which the loss only rises after the first steps.
    config.optimizer.update({"learning_rate": 3.0, "warmup_steps": 0, "schedule": "constant", "clip_norm": 0.0})
    loop.train(config, tmp_path)
    losses = {row["step"]: row["eval_loss"] for row in read_metrics(tmp_path)}
    best = min(losses, key=losses.get)
    assert best < 8
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {best, 8, 9}


def test_abstract_batch_is_what_the_input_makes(data, tmp_path):
    for objective, fields in (("semantic", {}), ("coarse", {"packing": True}), ("fine", {})):
        config = tiny.config_of(objective, data_dir=data, **fields)
        built = loop.registry.build_input(config, print)
        batch = next(built.training(np.arange(config.batch_size)))
        shapes = {name: (array.shape, array.dtype) for name, array in batch.items()}
        assert shapes == {name: (leaf.shape, leaf.dtype) for name, leaf in abstract_batch(config).items()}
    for objective in ("soundstream", "w2v_bert", "classifier"):
        recordings = str(tiny.write_recordings(tmp_path / objective))
        config = loop.registry.complete(tiny.config_of(objective, data_dir=recordings))
        batch = next(loop.registry.build_input(config, print).training(np.arange(config.batch_size)))
        shapes = {name: (array.shape, array.dtype) for name, array in batch.items()}
        assert shapes == {name: (leaf.shape, leaf.dtype) for name, leaf in abstract_batch(config).items()}


def test_z_loss_by_its_formula():
    logits_BTV = 3 * jax.random.normal(jax.random.key(0), (2, 5, 7))
    targets_BT = jnp.arange(10).reshape(2, 5) % 7
    loss_BT, z_loss_BT = token_losses(logits_BTV, targets_BT, 0.5)
    log_z_BT = np.log(np.sum(np.exp(np.float64(logits_BTV)), axis=-1))
    np.testing.assert_allclose(z_loss_BT, 0.5 * log_z_BT**2, rtol=1e-5)
    expected_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    np.testing.assert_allclose(loss_BT, expected_BT, rtol=1e-5)
    # It draws log Z to 0, and is not part of the reported loss.
    batches = [batch_of(config_of(), seed) for seed in range(8)]
    with_it, without = (run_steps(config_of(z_loss=z), batches) for z in (1.0, 0.0))
    assert with_it[0][1]["loss"] == pytest.approx(without[0][1]["loss"], rel=1e-6)
    assert with_it[0][1]["z_loss"] > 1 and without[0][1]["z_loss"] == 0
    assert np.any(with_it[1][0]["params"]["head"] != without[1][0]["params"]["head"])


def test_bfloat16_computes_and_float32_remembers():
    config = config_of(**{"model.dtype": "bfloat16"})
    config.optimizer.update({"learning_rate": 1e-6, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0})
    mesh = sharding.make_mesh(config.mesh)
    with sharding.active(mesh):
        before = jax.device_get(build_program(config, mesh).init(jax.random.key(config.seed)))
    (state, _), *_ = run_steps(config, [batch_of(config)])
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and all(leaf.dtype == np.float32 for leaf in floats)
    # Steps far below bfloat16's resolution are kept.
    moved = np.abs(state["params"]["head"] - before["params"]["head"])
    assert 0 < moved.max() < 2e-6
    # Every product of the model is of bfloat16 numbers.
    forward = jax.make_jaxpr(Transformer(transformer_from_config(config)).apply)
    traced = forward({"params": state["params"]}, batch_of(config)["decoder_input_tokens"])
    types = list(types_of_products(traced.jaxpr))
    assert len(types) == 6 + 2 + 1 and set(types) == {jnp.dtype("bfloat16")}


def types_of_products(jaxpr):
    """The operands' types of each matrix product of a traced program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            assert len({variable.aval.dtype for variable in equation.invars}) == 1
            yield equation.invars[0].aval.dtype
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from types_of_products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize(
    "objective", ["semantic", *(pytest.param(o, marks=pytest.mark.slow) for o in ("soundstream", "w2v_bert"))]
)
def test_init_from_starts_from_another_run_s_weights(objective, data, tmp_path, capsys):
    recordings = objective in ("soundstream", "w2v_bert")
    data = str(tiny.write_recordings(tmp_path / "recordings")) if recordings else data
    steps = {"num_train_steps": 3, "log_every_steps": 1, "eval_every_steps": 3, "checkpoint_every_steps": 3}
    config = tiny.config_of(objective, data_dir=data, **steps)
    assert loop.train(config, tmp_path / "first") == 0
    part = read_part(tmp_path / "first", for_training=True)
    first = part.weights
    still = tiny.config_of(objective, data_dir=data, init_from=str(tmp_path / "first"), **steps)
    for optimizer in (still.optimizer, still.get("discriminator_optimizer", still.optimizer)):
        optimizer.update({"learning_rate": 0.0, "weight_decay": 0.0, "warmup_steps": 0})
    still.num_train_steps = 1
    assert loop.train(still, tmp_path / "second") == 0
    second = read_part(tmp_path / "second", for_training=True)
    kept = {"params", "generator", "statistics"} & set(first)
    for name in kept:
        jax.tree.map(np.testing.assert_array_equal, second.weights[name], first[name])
    assert set(part.training) == ({"discriminator"} if objective == "soundstream" else set())
    jax.tree.map(np.testing.assert_array_equal, second.training, part.training)
    assert "starts afresh" not in capsys.readouterr().err
    fresh = tiny.config_of(objective, data_dir=data, **steps)
    fresh.num_train_steps, fresh.optimizer.learning_rate = 1, 0.0
    loop.train(fresh, tmp_path / "fresh")
    differs = jax.tree.map(lambda a, b: bool(np.any(a != b)), read_part(tmp_path / "fresh").weights, first)
    assert any(jax.tree.leaves(differs))
    other = tiny.config_of(objective, data_dir=data, init_from=str(tmp_path / "first"), **steps)
    other.model["channels" if objective == "soundstream" else "mlp_dim"] *= 2
    with pytest.raises(UserError, match="weights do not fit: .* in the model, .* in the file: config.init_from"):
        loop.train(other, tmp_path / "third")


def test_utilization_is_model_flops_over_the_devices_peak(data, tmp_path, monkeypatch):
    peak = 1e9
    monkeypatch.setattr(loop.accelerators, "of_device", lambda kind: Accelerator("x", kind, peak, 0, 0.0, 0.0))
    config = train_config(data)
    loop.train(config, tmp_path)
    for row in read_metrics(tmp_path):
        expected = model_flops(config) * row["steps_per_second"] / peak
        assert row["model_flops_utilization"] == pytest.approx(expected, rel=1e-6)
        assert 0 < row["goodput"] < 1 and row["seconds_compile"] > 0


def test_steps_are_over_before_anything_else_is_timed(data, tmp_path, monkeypatch):
    ready = []
    evaluate, save = loop._Run.evaluate, loop.Checkpoints.save

    def note(kind, state):
        ready.append((kind, all(leaf.is_ready() for leaf in jax.tree.leaves(state))))

    def noted_evaluate(self, state):
        note("evaluation", state)
        return evaluate(self, state)

    def noted_save(self, step, state, *arguments):
        note("checkpoint", state)
        return save(self, step, state, *arguments)

    monkeypatch.setattr(loop._Run, "evaluate", noted_evaluate)
    monkeypatch.setattr(loop.Checkpoints, "save", noted_save)
    # Evaluated first, or saved first.
    loop.train(train_config(data, eval_every_steps=2, log_every_steps=10), tmp_path)
    kinds = ("evaluation", "checkpoint", "evaluation", "evaluation", "checkpoint")
    assert ready == [(kind, True) for kind in kinds]


@pytest.mark.parametrize(("start", "count", "expected"), [(3, 2, 1), (5, 100, 1), (0, 0, 0)])
def test_profiler_window(data, tmp_path, start, count, expected):
    config = train_config(data)
    config.profile.update({"start_step": start, "num_steps": count})
    loop.train(config, tmp_path)
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == expected
