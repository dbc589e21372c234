"""Run in a process of its own with 8 CPU devices: trains one config on several meshes and prints what came out."""

import json
import sys

import jax
import numpy as np

from audiolm_jax.training import sharding
from audiolm_jax.training.step import build_program, model_flops
from tests import tiny
from tests.training.step_test import batch_of

MESHES = {
    "single": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "combined": (2, 2, 2),
}  # fmt: skip


def w2v_bert_config():
    """Sizes that eight divides."""
    fields = {"embed_dim": 32, "mlp_dim": 64, "num_heads": 8, "subsampling_channels": 8, "codebook_size": 16}
    config = tiny.config_of("w2v_bert", batch_size=16, **{f"model.{name}": value for name, value in fields.items()})
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 2})
    config.model.dtype = "float32"
    return config


def classifier_config():
    """Channels that eight divides, and that it does not."""
    return tiny.config_of("classifier", batch_size=16, **{"model.channels": (8, 12, 16), "model.labels": ("a", "b")})


def labelled_waves_of(config, seed):
    """Random waves of ragged lengths with random labels."""
    labels_B = np.random.default_rng(seed).integers(2, size=config.batch_size).astype(np.int32)
    return {**waves_of(config, seed), "labels_B": labels_B}


def waves_of(config, seed):
    """Random waves of ragged lengths."""
    generator = np.random.default_rng(seed)
    size = round(config.crop_seconds * config.model.sample_rate)
    lengths_B = generator.integers(size // 2, size + 1, config.batch_size).astype(np.int32)
    wave_BW = 0.1 * generator.standard_normal((config.batch_size, size)).astype(np.float32)
    return {"wave_BW": np.where(np.arange(size) < lengths_B[:, None], wave_BW, 0.0), "lengths_B": lengths_B}


def language_model_config(optimizer: str):
    """Sizes that eight divides; a little of everything that a step can do."""
    fields = {"num_heads": 8, "embed_dim": 32, "mlp_dim": 64, "num_layers": 2, "dropout_rate": 0.1, "remat": "minimal"}
    config = tiny.config_of(
        "coarse", batch_size=16, ema_decay=0.9, accumulation_steps=2, **{f"model.{k}": v for k, v in fields.items()}
    )
    config.optimizer.update({"name": optimizer, "learning_rate": 3e-3, "warmup_steps": 2})
    return config


def train(config, make_batch, shape, num_steps):
    """(losses, weights, fraction of the weights' bytes that one device holds, model FLOPs) of some steps."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: int(np.prod(shape))])
    with sharding.active(mesh):
        program = build_program(config, mesh)
        state, losses = program.init(jax.random.key(0)), []
        for seed in range(num_steps):
            batch = sharding.global_batch(make_batch(config, seed), config.batch_size, mesh)
            state, metrics = program.step(state, batch, jax.random.key(1))
            losses.append(float(metrics["loss"]))
        weights = program.objective.weights(state)
        leaves = jax.tree.leaves(weights)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)
        return losses, jax.device_get({**weights, "ema": state.get("ema", {})}), held, model_flops(config)


def main(what: str):
    """Args: an optimiser, for a language model, or w2v_bert, or classifier."""
    make_batch = {"w2v_bert": waves_of, "classifier": labelled_waves_of}.get(what, batch_of)
    make_config = {"w2v_bert": w2v_bert_config, "classifier": classifier_config}.get(what)
    results = {}
    reference: dict = {}
    for name, shape in MESHES.items():
        config = make_config() if make_config else language_model_config(what)
        config.mesh.update(dict(zip(sharding.MESH_AXES, shape, strict=True)))
        losses, weights, held, flops = train(config, make_batch, shape, num_steps=20)
        reference = reference or weights
        distance = np.sqrt(sum(np.sum((a - b) ** 2.0) for a, b in zip(*map(jax.tree.leaves, (weights, reference)))))
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(reference)))
        results[name] = {
            "losses": losses, "relative_distance": float(distance / norm), "held": held, "model_flops": flops,
        }  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
