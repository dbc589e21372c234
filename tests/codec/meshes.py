"""Run in a process of its own with 8 CPU devices: trains a codec on one and on all, and prints how far they differ.

Argument: "float64" for twenty steps in double precision, "float32" for the first step's losses and gradients.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from audiolm_jax.codec.architecture import build_architecture, encode
from audiolm_jax.training import sharding
from audiolm_jax.training.step import build_program
from tests.codec.objective_test import small_config
from tests.training.meshes import waves_of

MESHES = {"one": (1, 1, 1), "all": (2, 2, 2)}


def config_of(balancer: bool):
    """Every part of the training: codes that die, discriminators of all kinds that join at the third step."""
    config = small_config(start_step=2, waveform_scales=1, multi_stft_windows=(64,))
    config.batch_size = 8
    config.ema_decay = 0.9
    config.quantizer.dead_code_share = 0.5
    config.loss.balancer = balancer
    for optimizer in (config.optimizer, config.discriminator_optimizer):
        optimizer.learning_rate = 1e-3
    return config


def train(config, shape, dtype, num_steps: int):
    """(metrics, codes) of each step, gradients of both sides after the last, weights, fraction that a device holds."""
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape)), jax.devices()[: int(np.prod(shape))])
    model = build_architecture(config.model)
    with sharding.active(mesh):
        program = build_program(config, mesh)
        is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
        typed = lambda state: jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, state)
        places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
        state = jax.jit(typed, out_shardings=places)(program.init(jax.random.key(0)))
        codes_of = jax.jit(lambda state, batch: encode(model, state, batch["wave_BW"], batch["lengths_B"]))
        history, codes = [], []
        for seed in range(num_steps):
            batch = {name: array.astype(dtype if array.dtype == np.float32 else array.dtype)
                     for name, array in waves_of(config, seed).items()}  # fmt: skip
            batch = sharding.global_batch(batch, config.batch_size, mesh)
            codes.append(np.asarray(codes_of(state, batch)))
            state, metrics = program.step(state, batch, jax.random.key(1))
            history.append({name: float(value) for name, value in metrics.items()})
        moments = [optax.tree_utils.tree_get(state[f"{side}_opt"], "mu") for side in ("generator", "discriminator")]
        weights = {**program.objective.weights(state), "ema": state["ema"], "discriminator": state["discriminator"]}
        leaves = jax.tree.leaves(weights)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)
        return history, codes, *jax.device_get((moments, weights)), held


def distance(a, b) -> float:
    """The largest difference of two trees' leaves, relative to the leaf's largest entry.

    Leaves that are next to nothing beside the others (a gradient of rounding errors) count by a thousandth of those.
    """
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    sizes = [np.max(np.abs(leaf)) for leaf in leaves_b]
    sizes = np.maximum(sizes, 1e-3 * max(sizes))
    return float(max(np.max(np.abs(x - y)) / size for x, y, size in zip(leaves_a, leaves_b, sizes, strict=True)))


def main(precision: str):
    results = {}
    for balancer in {"float64": (False, True), "float32": (True,)}[precision]:
        config = config_of(balancer)
        if precision == "float32":
            config.discriminator.start_step = 0
        num_steps = {"float64": 20, "float32": 1}[precision]
        one, all_eight = (train(config, shape, precision, num_steps) for shape in MESHES.values())
        history, codes, moments, weights, _ = one
        others, other_codes, other_moments, other_weights, held = all_eight
        differences = {
            name: max(abs(a[name] - b[name]) / max(abs(a[name]), 1e-3) for a, b in zip(history, others, strict=True))
            for name in history[0]
        }
        results[f"balancer={balancer}"] = {
            "metrics": max(value for name, value in differences.items() if not name.endswith("gradient_norm")),
            "gradient_norms": max(value for name, value in differences.items() if name.endswith("gradient_norm")),
            "gradients": distance(other_moments, moments),
            "codebooks": distance(other_weights["codebooks"], weights["codebooks"]),
            "weights": distance(other_weights, weights),
            "codes_that_differ": int(sum(np.sum(a != b) for a, b in zip(codes, other_codes, strict=True))),
            "replaced": sum(value for row in history for name, value in row.items() if name.startswith("dead_codes")),
            "skipped": history[-1]["skipped_steps"],
            "reconstruction": [row["reconstruction"] for row in history],
            "discriminator": history[-1]["discriminator"],
            "held": held,
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
