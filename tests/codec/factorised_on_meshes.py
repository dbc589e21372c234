"""Run in a process of its own with 8 CPU devices: trains snakes and factorised codes in float64 on one and on all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from audiolm_jax.training import sharding
from tests.codec.factorised_test import factorised_config
from tests.codec.objective_test import build, tones


def train(shape: dict[str, int]):
    """(losses, generator and codebooks before and after) of a few steps on a mesh."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
    config = factorised_config()
    config.batch_size = 8
    objective, state = build(config, optax.adam(3e-3))
    double = lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    state = jax.device_put(jax.tree.map(double, state), sharding.replicated(mesh))
    losses, before = [], jax.device_get(objective.weights(state))
    with sharding.active(mesh):
        step = jax.jit(objective.step)
        for seed in range(3):
            batch = {"wave_BW": tones(8, seed=seed).astype(np.float64), "lengths_B": np.int32([512, 300] * 4)}
            state, metrics = step(state, sharding.global_batch(batch, 8, mesh), jax.random.key(seed))
            losses.append(float(metrics["loss"]))
    return losses, before, jax.device_get(objective.weights(state))


def distance(one, other) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def main():
    single, before, reference = train({"data": 1, "fsdp": 1, "tensor": 1})
    shared, _, found = train({"data": 4, "fsdp": 2, "tensor": 1})
    results = {
        "single": {"losses": single, "moved": distance(before, reference)},
        "shared": {"losses": shared, "distance": distance(found, reference)},
    }
    print(json.dumps(results))


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
