"""Run in a process of its own with 8 CPU devices: the interpreted kernel on meshes; prints how far from one device."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from audiolm_jax.lm import self_attention
from audiolm_jax.lm.flash_attention import flash_attention
from audiolm_jax.training import sharding

MESHES = {"data": (8, 1, 1), "tensor": (1, 1, 8), "combined": (2, 2, 2)}


def main():
    generator = np.random.default_rng(0)
    q_BTNH, k_BTNH, v_BTNH, grad_BTNH = jnp.asarray(generator.standard_normal((4, 8, 21, 8, 8)), jnp.float32)
    table_RN = jnp.asarray(generator.standard_normal((8, 8)), jnp.float32)
    segments_BT = jnp.asarray(np.sort(generator.integers(0, 3, (8, 21))))
    self_attention._device_kind = lambda: "TPU v4"
    self_attention.flash_attention = functools.partial(flash_attention, block=8, interpret=True)
    attend = functools.partial(
        self_attention.self_attention, implementation="fused", max_distance=12, block_positions=0
    )

    @jax.jit
    def both(q_BTNH, k_BTNH, v_BTNH, table_RN, segments_BT, grad_BTNH):
        function = lambda q, k, v, table: attend(q * 0.3, k, v, table, segments_BT, None)
        out_BTNH, pull_back = jax.vjp(function, q_BTNH, k_BTNH, v_BTNH, table_RN)
        return out_BTNH, *pull_back(grad_BTNH)

    arrays = (q_BTNH, k_BTNH, v_BTNH, table_RN, segments_BT, grad_BTNH)
    single, distances = both(*arrays), {}
    for name, shape in MESHES.items():
        sizes = ml_collections.ConfigDict(dict(zip(sharding.MESH_AXES, shape, strict=True)))
        with sharding.active(sharding.make_mesh(sizes)):
            results = both(*arrays)
        differences = [np.abs(np.asarray(ours) - np.asarray(one)) for ours, one in zip(results, single, strict=True)]
        distances[name] = max(float(np.max(difference)) for difference in differences)
    print(json.dumps(distances))


if __name__ == "__main__":
    main()
