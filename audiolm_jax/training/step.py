"""A config's train step on a mesh: the objective's own step, guarded against NaN, and its moving average.

A state here is the objective's (`Objective.init`) and beside it

  guard: how many steps were not taken because something was not finite: {"in_a_row", "total"}, int32;
  ema: the exponential moving average of `Objective.weights`, where `config.ema_decay` is above 0.

`compile` and the training loop share what is built here; no data is needed for it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from audiolm_jax import flops
from audiolm_jax.objective import Batch, Metrics, Objective, State
from audiolm_jax.training import registry, sharding


def initial_state(objective: Objective, ema_decay: float, key: jax.Array) -> State:
    """A fresh state, its leaves boxed with the names of their axes."""
    state = objective.init(key)
    state["guard"] = {"in_a_row": jnp.int32(0), "total": jnp.int32(0)}
    return with_average(objective, state) if ema_decay else state


def with_average(objective: Objective, state: State) -> State:
    """The state with a moving average that begins at its weights."""
    return {**state, "ema": jax.tree.map(jnp.copy, objective.weights(state))}


def inference_weights(objective: Objective, state: State) -> State:
    """What inference and evaluation use: the moving average where one is kept, else the weights themselves."""
    return state["ema"] if "ema" in state else objective.weights(state)


def guarded_step(
    objective: Objective, ema_decay: float, state: State, batch: Batch, key: jax.Array
) -> tuple[State, Metrics]:
    """One step; where any of its metrics is not finite, everything but the step number stays as it was.

    Args:
      objective: whose step.
      ema_decay: d in average ← d · average + (1 − d) · weights; 0 keeps none.
      state: see `initial_state`, unboxed.
      batch: of the objective.
      key: of the run; the step's own is derived from it and the step number.

    Returns:
      the new state, and the objective's metrics with `skipped_steps` (the total so far) and `skipped_in_a_row`.
    """
    before = {name: value for name, value in state.items() if name not in ("guard", "ema")}
    after, metrics = objective.step(before, batch, jax.random.fold_in(key, state["step"]))
    good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in metrics.values()]))
    new_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
    new_state["step"] = after["step"]
    in_a_row = jnp.where(good, 0, state["guard"]["in_a_row"] + 1)
    total = state["guard"]["total"] + jnp.where(good, 0, 1)
    new_state["guard"] = {"in_a_row": in_a_row, "total": total}
    if ema_decay:
        weights = objective.weights(new_state)
        new_state["ema"] = jax.tree.map(lambda old, new: _average(ema_decay, good, old, new), state["ema"], weights)
    return new_state, {**metrics, "skipped_steps": total, "skipped_in_a_row": in_a_row}


def _average(decay: float, good: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    if not jnp.issubdtype(new.dtype, jnp.floating):
        return new
    return jnp.where(good, decay * old + (1.0 - decay) * new, old)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a config compiles to on a mesh; used under `sharding.active(mesh)`.

    Attributes:
      objective: what is trained.
      abstract_state: shapes, types and shardings of the state.
      init: key -> state, sharded from the start.
      step: (state, batch, key) -> (state, metrics); the state is donated.
      eval_step: (state, batch, key) -> totals, by the moving average where one is kept.
    """

    objective: Objective
    abstract_state: State
    init: Callable[[jax.Array], State]
    step: Any
    eval_step: Any


def abstract_key() -> jax.ShapeDtypeStruct:
    """A random key's shape and type, made on no device."""
    return jax.eval_shape(lambda: jax.random.key(0))


def model_flops(config: ml_collections.ConfigDict) -> float:
    """FLOPs of the matrix products and convolutions of one step of the whole batch, forward and backward.

    What a program computes twice to save memory is not counted, nor what causality leaves out of attention. For a
    language model that is six times the parameters in matrix products times the tokens, and for attention twelve times
    layers, width, and pairs of a position with itself or one before it.
    """
    plain = config.copy_and_resolve_references()
    for name, plainest in {"remat": "none", "block_positions": 0, "attention": "xla"}.items():
        if name in plain.model:
            plain.model[name] = plainest
    if "accumulation_steps" in plain:
        plain.accumulation_steps = 1
    objective = registry.build_objective(plain)
    state = sharding.unbox(jax.eval_shape(objective.init, abstract_key()))
    batch = registry.abstract_batch(plain)
    traced = flops.traced_flops(objective.step, state, batch, abstract_key())
    if plain.objective not in registry.LANGUAGE_MODELS:
        return traced
    rows, length = batch["decoder_input_tokens"].shape
    pairs_left_out = rows * length * (length - 1) // 2
    return traced - 12 * plain.model.num_layers * plain.model.embed_dim * pairs_left_out


def build_program(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Program:
    """The jitted functions of a config on a mesh of real or described devices.

    Raises:
      UserError: fields that contradict each other or the mesh.
    """
    sharding.check_batch(config, mesh)
    objective = registry.build_objective(config)

    def init(key: jax.Array) -> State:
        return initial_state(objective, config.ema_decay, key)

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        return guarded_step(objective, config.ema_decay, state, batch, key)

    def eval_step(state: State, batch: Batch, key: jax.Array):
        return objective.eval_step({**state, **inference_weights(objective, state)}, batch, key)

    boxed = jax.eval_shape(init, abstract_key())
    places = sharding.state_shardings(boxed, mesh)
    abstract_state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), sharding.unbox(boxed), places
    )
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return Program(
        objective=objective,
        abstract_state=abstract_state,
        init=jax.jit(lambda key: sharding.unbox(init(key)), out_shardings=places),
        step=jax.jit(
            step, in_shardings=(places, rows, everywhere), out_shardings=(places, everywhere), donate_argnums=0
        ),
        eval_step=jax.jit(eval_step, in_shardings=(places, rows, everywhere), out_shardings=everywhere),
    )
