"""Run in a process of its own with 8 CPU devices: decodes on several meshes and prints what came out."""

import collections
import contextlib
import json
import math
import pathlib
import sys
import tempfile

import jax
import jax.monitoring
import numpy as np
from jax.sharding import NamedSharding

import audiolm_jax
from audiolm_jax import bundle, cli, hlo
from audiolm_jax.compile import slice_devices
from audiolm_jax.lm import decode
from audiolm_jax.lm.decode import LanguageModel, decode_stage
from audiolm_jax.lm.sampling import Sampling
from audiolm_jax.training import sharding
from tests import tiny
from tests.lm.decode_test import STAGES, model_of, prefix_of

MESHES = {"single": None, "data": (8, 1, 1), "tensor": (1, 1, 4), "combined": (2, 2, 2)}
SIZES = {"num_heads": 4, "mlp_dim": 64}
ROTARY = {"position": "rotary", "gated_mlp": True}
# Fields of the transformer and of the language model; the seed of each row's prefix; frames; sampling.
CASES = {
    # The cache grows beyond its first 128 slots, and no row ends with another.
    "different prefixes": ({}, {}, (3, 9, 6, 4, 7), (60, 51, 58, 60, 40), Sampling(0.0)),
    "shared prefixes": (ROTARY, {"int8": True}, (5, 5, 5, 8, 8, 8), 12, Sampling(1.0)),
    "one prefix": ({"gated_mlp": True}, {}, (7, 7, 7), 12, Sampling(0.9, top_k=6, top_p=0.95)),
    "one row": (ROTARY, {"int8": True}, (6,), 12, Sampling(1.0)),
}  # fmt: skip


def mesh_of(shape, devices=None):
    devices = jax.devices() if devices is None else devices
    return sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape, strict=True)), devices[: math.prod(shape)])


@contextlib.contextmanager
def compilations():
    """The programs compiled inside."""
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listener)


def held(tree) -> float:
    """The share of a tree's bytes that one device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)


def request_of(case: str):
    """(arguments of LanguageModel, arguments of decode_stage) but for the mesh, in double precision."""
    fields, wanted, seeds, frames, sampling = CASES[case]
    stage = STAGES[1]
    config, params = model_of(stage, dtype="float64", **SIZES, **fields)
    prefixes = [prefix_of(stage, seed, seed) for seed in seeds]
    frames = list(np.broadcast_to(frames, len(seeds)))
    keys_B = jax.random.split(jax.random.key(5), len(seeds))
    may_end = [row % 2 == 1 for row in range(len(seeds))]
    return (stage, config, params), wanted, (prefixes, frames, may_end, keys_B, sampling)


def decoded(case: str, shape) -> dict:
    """Codes, last hidden states, what one device holds of the weights and the cache, and how often programs compile."""
    model, wanted, request = request_of(case)
    lm = LanguageModel(*model, **wanted, mesh=shape and mesh_of(shape))
    last, programs = {}, collections.Counter()
    original = decode._sample_tokens

    def watched(*arguments):
        given = held(arguments[-1]["cache"])
        with compilations() as compiled:
            state, codes_BS = original(*arguments)
        last.update(state, held_cache=max(given, held(state["cache"])))
        programs[decode.cache_slots(state["cache"])] += len(compiled)
        return state, codes_BS

    decode._sample_tokens = watched
    codes, ended = decode_stage(lm, *request)
    hidden_DB = np.asarray(last["hidden_DB"])[:, : len(codes)]
    with compilations() as compiled:
        again, _ = decode_stage(lm, *request)
    if len(programs) > 1:
        # The larger cache, once grown into, serves prefixes that need it from the start.
        long = [prefix_of(lm.stage, 140, seed) for seed in range(len(codes))]
        decode_stage(lm, long, [4] * len(codes), *request[2:])
    decode._sample_tokens = original
    return {
        "codes": [codes_TQ.tolist() for codes_TQ in codes],
        "again": [codes_TQ.tolist() for codes_TQ in again],
        "ended": ended,
        "hidden": hidden_DB.tolist(),
        "held_layers": held(lm.weights["layers"]),
        "held_cache": last["held_cache"],
        "batch": last["hidden_DB"].shape[1],
        "compiled_again": len(compiled),
        "programs": programs,
    }


def step_of(shape, num_rows: int, platform: str) -> dict:
    """What a step does besides computing: its collectives as [opcode, elements], and elements of the cache copied."""
    stage = STAGES[1]
    dtype = {"cpu": "float32", "tpu": "bfloat16"}[platform]
    config, params = model_of(stage, dtype=dtype, num_heads=8, embed_dim=64, mlp_dim=128)
    lm = LanguageModel(stage, config, params, mesh=mesh_of(shape))
    keys_B = jax.random.split(jax.random.key(5), num_rows)
    prefixes = [prefix_of(stage, 3 + row, row) for row in range(num_rows)]
    _, rows, state = decode._start(lm, prefixes, np.full(num_rows, 90), np.ones(num_rows, bool), keys_B)
    mesh = mesh_of(shape, slice_devices("v5e:2x4", 1)) if platform == "tpu" else lm.mesh
    abstract = lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec)
    )
    arguments = jax.tree.map(abstract, (lm.weights, rows, state))
    compiled = decode._sample_tokens.lower(config, stage, 0, {"temperature": 0.8}, *arguments).compile()
    module = hlo._Module(compiled.as_text())
    inside = [
        instruction
        for name, computation in module.computations.items()
        for instruction in computation.values()
        if name != module.entry
    ]
    elements = lambda instruction: max(math.prod(array.shape) for array in instruction.arrays)
    leaf = state["cache"][0]["k"]
    part = math.prod(leaf.sharding.shard_shape(leaf.shape))
    return {
        "collectives": [
            [instruction.opcode, elements(instruction)]
            for instruction in inside
            if instruction.opcode.removesuffix("-start") in hlo.COLLECTIVES
        ],
        "copied": [elements(i) for i in inside if i.opcode.startswith("copy") and elements(i) >= part // 2],
    }


def generated(shape, folder: pathlib.Path) -> dict:
    """A continuation of two prompts in double precision."""
    model = audiolm_jax.load_bundle(folder, mesh=shape and mesh_of(shape))
    prompt_BW = np.random.default_rng(0).uniform(-0.3, 0.3, (2, 20000)).astype(np.float32)
    out = tiny.in_double_precision(model).generate(prompt_BW, seconds=3.0, num_samples=2, seed=3)
    return {
        "mesh": [lm.mesh and list(lm.mesh.devices.shape) for lm in model.stages.values()],
        "acoustic": out.acoustic_BTQ.tolist(),
        "wave": out.wave_BW[:, ::50].tolist(),
        "lengths": out.lengths_B.tolist(),
    }


def from_the_command_line(folder: pathlib.Path) -> list[int]:
    """The shape of the mesh that the command gives to the bundle."""
    seen = []
    original = bundle.load_bundle

    def watched(path, weights, mesh):
        seen.append(mesh.devices.shape)
        return original(path, weights, mesh)

    bundle.load_bundle = watched
    arguments = ["--mode=unconditional", "--seconds=0.2", "--num_samples=3", "--mesh_data=2", "--mesh_tensor=2"]
    with contextlib.suppress(SystemExit):
        cli.main(["generate", f"--bundle={folder}", f"--output={folder.parent / 'out'}", *arguments])
    assert len(list((folder.parent / "out").glob("*.wav"))) == 3
    bundle.load_bundle = original
    return list(seen[0])


def main(what: str, *arguments: str):
    if what == "decode":
        results = {name: decoded(arguments[0], shape) for name, shape in MESHES.items()}
    elif what == "step":
        shapes = {"data": ((8, 1, 1), 8), "tensor": ((1, 1, 4), 1), "one head": ((1, 1, 8), 1)}
        shapes = {"combined": ((2, 2, 2), 8), **(shapes if arguments[0] == "tpu" else {})}
        results = {name: step_of(*shape, arguments[0]) for name, shape in shapes.items()}
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = tiny.write_bundle(pathlib.Path(folder))
            results = {str(shape): generated(shape, path) for shape in (None, (2, 1, 2), (2, 2, 2))}
            results["command"] = from_the_command_line(path)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
