"""Optimisers and learning-rate schedules from a config's `optimizer` fields."""

import jax
import jax.numpy as jnp
import ml_collections
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
    """AdamW (Adam where `weight_decay` is 0) with the schedule, after clipping to `clip_norm` (0: none).

    Weight decay leaves parameters named "scale" or "bias" alone.
    """

    def decayed(path, _):
        return not any(getattr(entry, "key", None) in ("scale", "bias") for entry in path)

    adamw = optax.adamw(
        make_schedule(optimizer, num_train_steps),
        b1=optimizer.beta1,
        b2=optimizer.beta2,
        weight_decay=optimizer.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(decayed, params),
    )
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw) if optimizer.clip_norm else adamw
