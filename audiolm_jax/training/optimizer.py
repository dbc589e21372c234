"""Optimisers and learning-rate schedules from a config's `optimizer` fields."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from audiolm_jax.errors import UserError


def make_schedule(optimizer: ml_collections.ConfigDict, num_train_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then `schedule`: "constant", "rsqrt" or "cosine" (to 0 at the last step)."""
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    match optimizer.schedule:
        case "constant":
            decay = optax.constant_schedule(peak)
        case "rsqrt":
            decay = lambda step: peak * jnp.sqrt(max(warmup, 1) / (jnp.maximum(step, 0) + max(warmup, 1)))
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, max(num_train_steps - warmup, 1))
        case other:
            raise UserError("unknown schedule", f"config.optimizer.schedule={other}", "use constant, rsqrt or cosine")
    if warmup == 0:
        return decay
    # Warm-up ends at the peak on step `warmup`, and its first update already moves.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, decay], [warmup])


def make_optimizer(optimizer: ml_collections.ConfigDict, num_train_steps: int) -> optax.GradientTransformation:
    """AdamW (Adam where `weight_decay` is 0) or Adafactor with the schedule, after clipping to `clip_norm` (0: none).

    Weight decay leaves parameters named "scale", "bias" or "alpha" alone.
    """

    def decayed(params):
        spared = ("scale", "bias", "alpha")
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(getattr(entry, "key", None) in spared for entry in path), params
        )

    schedule = make_schedule(optimizer, num_train_steps)
    match optimizer.name:
        case "adamw":
            rule = optax.adamw(
                schedule, b1=optimizer.beta1, b2=optimizer.beta2, weight_decay=optimizer.weight_decay, mask=decayed
            )
        case "adafactor":
            # No momentum: that is where the memory is saved.
            rule = _keep_axis_names(
                optax.adafactor(
                    schedule,
                    decay_rate=optimizer.decay_rate,
                    weight_decay_rate=optimizer.weight_decay or None,
                    weight_decay_mask=decayed,
                )
            )
        case other:
            raise UserError("unknown optimizer", f"config.optimizer.name={other}", "use adamw or adafactor")
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), rule) if optimizer.clip_norm else rule


def _keep_axis_names(adafactor: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adafactor whose initial state names the axes that its row and column statistics keep.

    optax averages a factored parameter over its largest axis for the rows and over the next for the columns, but
    leaves the box around each statistic with all the parameter's names.
    """

    def rename(largest: int, statistic, param):
        if not isinstance(param, nn.LogicallyPartitioned) or statistic.value.shape == param.value.shape:
            return statistic
        if statistic.value.size == 1:
            return statistic.value
        names = list(param.names)
        del names[np.argsort(param.value.shape)[-largest]]
        return statistic.replace(names=tuple(names))

    def init(params):
        def mend(state):
            if not isinstance(state, optax.FactoredState):
                return state
            is_box = lambda node: isinstance(node, nn.LogicallyPartitioned)
            renamed = lambda largest, tree: jax.tree.map(
                functools.partial(rename, largest), tree, params, is_leaf=is_box
            )
            return state._replace(v_row=renamed(1, state.v_row), v_col=renamed(2, state.v_col), v=renamed(1, state.v))

        return jax.tree.map(mend, adafactor.init(params), is_leaf=lambda node: isinstance(node, optax.FactoredState))

    return optax.GradientTransformation(init, adafactor.update)
