"""Run in a process of its own with 8 CPU devices: trains one config on several meshes and prints what came out."""

import json
import sys

import jax
import numpy as np

from audiolm_jax.training import sharding
from audiolm_jax.training.step import build_program
from tests import tiny
from tests.training.step_test import batch_of

MESHES = {
    "single": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "combined": (2, 2, 2),
}  # fmt: skip
STEPS = 20


def config_of(optimizer: str):
    """Sizes that eight divides; a little of everything that a step can do."""
    fields = {"num_heads": 8, "embed_dim": 32, "mlp_dim": 64, "num_layers": 2, "dropout_rate": 0.1, "remat": "minimal"}
    config = tiny.config_of(
        "coarse", batch_size=16, ema_decay=0.9, accumulation_steps=2, **{f"model.{k}": v for k, v in fields.items()}
    )
    config.optimizer.update({"name": optimizer, "learning_rate": 3e-3, "warmup_steps": 2})
    return config


def train(config, shape):
    """(losses, parameters, fraction of the parameters' bytes that one device holds) after STEPS steps."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: int(np.prod(shape))])
    with sharding.active(mesh):
        program = build_program(config, mesh)
        state, losses = program.init(jax.random.key(0)), []
        for seed in range(STEPS):
            batch = sharding.global_batch(batch_of(config, seed), config.batch_size, mesh)
            state, metrics = program.step(state, batch, jax.random.key(1))
            losses.append(float(metrics["loss"]))
        leaves = jax.tree.leaves(state["params"])
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)
        return losses, jax.device_get({"params": state["params"], "ema": state["ema"]}), held


def main(optimizer: str):
    results = {}
    reference: dict = {}
    for name, shape in MESHES.items():
        config = config_of(optimizer)
        config.mesh.update(dict(zip(sharding.MESH_AXES, shape, strict=True)))
        losses, params, held = train(config, shape)
        reference = reference or params
        distance = np.sqrt(sum(np.sum((a - b) ** 2.0) for a, b in zip(*map(jax.tree.leaves, (params, reference)))))
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(reference)))
        results[name] = {"losses": losses, "relative_distance": float(distance / norm), "held": held}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
