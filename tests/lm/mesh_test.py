"""Decoding on eight devices is decoding on one, and no cache ever crosses from device to device."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from audiolm_jax.errors import UserError
from audiolm_jax.lm.decode import LanguageModel
from audiolm_jax.lm.weights import decoder_weights, weight_shardings
from audiolm_jax.training.sharding import MESH_AXES
from tests.lm.decode_test import STAGES, model_of
from tests.training.devices import on_eight_devices

# The rows decoded, by mesh; what one device holds of the cache follows.
BATCHES = {
    "different prefixes": {"single": 6, "data": 8, "tensor": 6, "combined": 8},
    "shared prefixes": {"single": 6, "data": 8, "tensor": 6, "combined": 8},
    "one prefix": {"single": 3, "data": 8, "tensor": 3, "combined": 4},
    "one row": {"single": 1, "data": 1, "tensor": 1, "combined": 1},
}
ROWS_CUT, HEADS_CUT = {"data": 8, "tensor": 1, "combined": 4}, {"data": 1, "tensor": 4, "combined": 2}


@pytest.mark.slow
@pytest.mark.parametrize("case", BATCHES)
def test_eight_devices_decode_what_one_does(case):
    results = on_eight_devices("tests.lm.meshes", "decode", case, JAX_ENABLE_X64="1")
    assert {name: result["batch"] for name, result in results.items()} == BATCHES[case]
    single = results.pop("single")
    assert len(np.unique(np.concatenate(single["codes"]))) > 3
    for name, result in results.items():
        assert result["codes"] == single["codes"] == result["again"], name
        assert result["ended"] == single["ended"], name
        np.testing.assert_allclose(result["hidden"], single["hidden"], atol=1e-9, err_msg=name)
        assert result["held_cache"] == 1 / HEADS_CUT[name] / (1 if case == "one row" else ROWS_CUT[name]), name
        assert result["held_layers"] < 1 / HEADS_CUT[name] + 0.1, name
        assert result["compiled_again"] == 0, name
        assert result["programs"] == ({"128": 1, "256": 1} if case == "different prefixes" else {"128": 1}), name


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_step_sums_twice_a_layer_over_devices_and_moves_no_cache(platform):
    if platform == "tpu":
        pytest.importorskip("libtpu")
    results = on_eight_devices("tests.lm.meshes", "step", platform)
    for name, step in results.items():
        sums = [size for opcode, size in step["collectives"] if opcode.startswith("all-reduce")]
        assert len(sums) == len(step["collectives"]), (name, step)
        # Of the two layers' sums each has a number for every dimension and row of its own; then whether all are done.
        rows = 2 if name == "combined" else 1
        expected = ([] if name == "data" else [64 * rows] * 4) + ([1] if name in ("data", "combined") else [])
        assert sorted(sums) == sorted(expected), (name, step)
        assert step["copied"] == [], (name, step)


@pytest.mark.slow
def test_generation_on_a_mesh_is_generation_on_one_device():
    results = on_eight_devices("tests.lm.meshes", "generate", JAX_ENABLE_X64="1")
    assert results.pop("command") == [2, 1, 2]
    single = results.pop("None")
    assert single["mesh"] == [None] * 3
    for name, result in results.items():
        assert [str(tuple(shape)) for shape in result["mesh"]] == [name] * 3
        assert result["acoustic"] == single["acoustic"] and result["lengths"] == single["lengths"]
        np.testing.assert_array_equal(result["wave"], single["wave"])


@pytest.mark.parametrize("int8", [False, True])
def test_golden_specs_of_the_weights(int8):
    config, params = model_of(STAGES[1], gated_mlp=True)
    weights = jax.eval_shape(lambda params: decoder_weights(config, STAGES[1], params, int8), params)
    mesh = AbstractMesh((2, 2, 2), MESH_AXES)
    specs = jax.tree.map(lambda place: place.spec, weight_shardings(mesh, weights))
    outputs, inputs, whole = PartitionSpec("tensor"), PartitionSpec(None, "tensor"), PartitionSpec()
    matrix = lambda spec, scale: {"int8": spec, "scale": scale} if int8 else spec
    layer = {
        "attention_norm": whole,
        "qkv": matrix(outputs, outputs),
        "out": matrix(inputs, whole),
        "mlp_norm": whole,
        "wide": matrix(outputs, outputs),
        "gate": matrix(outputs, outputs),
        "narrow": matrix(inputs, whole),
    }
    assert specs == {
        "embedding": whole,
        "position_bias": inputs,
        "layers": [layer] * 2,
        "final_norm": whole,
        "levels": matrix(whole, whole),
    }


@pytest.mark.parametrize(
    ("fields", "named"), [({"num_heads": 4}, "num_heads=4"), ({"num_heads": 6, "embed_dim": 24}, "mlp_dim=32")]
)
def test_mesh_that_does_not_divide_the_model(fields, named):
    config, params = model_of(STAGES[1])
    config = dataclasses.replace(config, **fields)
    mesh = AbstractMesh((2, 1, 3), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with pytest.raises(UserError, match=f"mesh does not divide {named} of the coarse stage: mesh axis tensor=3; "):
        LanguageModel(STAGES[1], config, params, mesh=mesh)


@pytest.mark.parametrize("axes", [("data", "tensor"), MESH_AXES])
def test_mesh_of_other_axes_is_refused(axes):
    config, params = model_of(STAGES[1])
    mesh = jax.make_mesh((1,) * len(axes), axes, axis_types=(jax.sharding.AxisType.Explicit,) * len(axes))
    with pytest.raises(UserError, match="axes data, fsdp, tensor, all Auto: mesh with data: Explicit.*make_mesh"):
        LanguageModel(STAGES[1], config, params, mesh=mesh)
