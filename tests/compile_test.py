"""Train steps compiled for TPU slices that are not there."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

pytest.importorskip("libtpu")

from audiolm_jax import compile as aot
from audiolm_jax import hlo
from audiolm_jax.errors import UserError
from audiolm_jax.training import registry, sharding
from audiolm_jax.training.step import abstract_key, build_program
from tests import tiny

SIZES = {
    "model.num_layers": 3, "model.num_heads": 4, "model.embed_dim": 256, "model.mlp_dim": 1024,
    "model.dropout_rate": 0.0, "model.dtype": "bfloat16", "stage.codebook_size": 128, "stage.crop_seconds": 2.0,
    "batch_size": 8,
}  # fmt: skip


def compile_small(topology="v5e:2x2", **fields):
    config = tiny.config_of("coarse", **{**SIZES, **fields})
    return config, aot.compile_config(config, topology)


def test_report_of_a_small_config():
    config, report = compile_small(**{"model.block_positions": 0, "model.remat": "none"})
    assert report["fits"] and report["reason"] == "" and report["num_devices"] == 4
    assert report["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    # Six times the parameters times the tokens, and attention: every layer of the scan counts.
    in_products = 3 * (4 * 256**2 + 2 * 256 * 1024) + 256 * 256
    length = 2 * 25 + 2 * 50 + 2
    by_formula = (6 * in_products + 12 * 3 * (length + 1) / 2 * 256) * 8 * length
    assert report["flops_per_device"] * 4 == pytest.approx(by_formula, rel=0.1)
    assert report["model_flops"] == pytest.approx(by_formula, rel=0.02)
    # Parameters are gathered for the passes and gradients scattered: some times the bytes that the other devices hold.
    others = 2 * report["parameters"] * 3 / 4
    assert 2 * others < report["collective_bytes_per_device"] < 8 * others
    assert report["state_bytes_per_device"] < report["peak_bytes_per_device"] < report["memory_bytes_per_device"]
    assert report["step_seconds"] == max(report["floor_seconds"].values())
    assert 0 < report["utilization"] < 1
    json.dumps(report)


def test_data_parallel_sends_each_gradient_once_round_the_ring():
    fields = {"mesh.data": 4, "mesh.fsdp": 1, "model.dtype": "float32"}
    _, report = compile_small(**fields)
    # Nothing else: not the gradient of the position bias, which is summed to one number a bucket first.
    expected = 2 * 4 * report["parameters"] * 3 / 4
    assert report["collective_bytes_per_device"] == pytest.approx(expected, rel=0.02)


def test_recomputation_costs_flops_and_saves_memory():
    sizes = {"model.num_layers": 6, "batch_size": 32}
    _, kept = compile_small(**sizes, **{"model.block_positions": 0, "model.remat": "none"})
    _, full = compile_small(**sizes, **{"model.block_positions": 0, "model.remat": "full"})
    assert 1.2 < full["flops_per_device"] / kept["flops_per_device"] < 1.4
    assert full["peak_bytes_per_device"] < kept["peak_bytes_per_device"]
    assert full["model_flops"] == kept["model_flops"]


@pytest.mark.parametrize(("topology", "form"), [("v4:2x2x1", "model.prefix_attention"), ("v6e:2x2", "packing")])
def test_fused_attention_is_one_kernel_in_each_pass_and_no_array_of_logits(topology, form):
    sizes = {"model.remat": "minimal", "model.block_positions": 0, "stage.crop_seconds": 3.0, form: True}
    texts = {}
    for attention in ("fused", "xla"):
        config = tiny.config_of("coarse", **{**SIZES, **sizes, "model.attention": attention})
        mesh = sharding.make_mesh(config.mesh, aot.slice_devices(topology, 1))
        with sharding.active(mesh):
            program = build_program(config, mesh)
            batch = registry.abstract_batch(config)
            compiled = program.step.lower(program.abstract_state, batch, abstract_key()).compile()
        texts[attention] = compiled.as_text()
    length = batch["decoder_input_tokens"].shape[1]
    logits = f",{length},{length}]"
    # Attention's output is kept: recomputing a layer for its backward pass does not attend again.
    kernels = re.findall(r"%(\w+_kernel)\S* = ", texts["fused"])
    assert sorted(kernels) == ["backward_kernel", "forward_kernel"] and logits not in texts["fused"]
    assert logits in texts["xla"]


def test_a_chip_is_one_device_on_v4():
    _, report = compile_small("v4:2x2x1")
    assert report["num_devices"] == 4


def test_rounds_of_loops_and_kernels_count():
    devices = aot.slice_devices("v5e:2x2", 1)
    place = NamedSharding(sharding.make_mesh(tiny.config_of("coarse").mesh, devices[:1]), PartitionSpec())

    def double(x):
        return pl.pallas_call(
            lambda x_ref, y_ref: y_ref.__setitem__(..., 2 * x_ref[...]),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            cost_estimate=pl.CostEstimate(flops=1000, bytes_accessed=10, transcendentals=0),
        )(x)

    def program(x, y):
        return jax.lax.fori_loop(0, 5, lambda _, a: double(jnp.tanh(a @ y)), x)

    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=place)
    text = jax.jit(program).lower(shape, shape).compile().as_text()
    assert hlo.program_cost(text).flops == 5 * (2 * 256**3 + 1000)


def test_config_that_does_not_fit_says_which_term_and_what_to_change():
    activations = {"batch_size": 65536, "model.remat": "none", "model.block_positions": 0}
    _, report = compile_small(**activations)
    assert report["fits"] is False and report["flops_per_device"] is None
    assert report["peak_bytes_per_device"] > report["memory_bytes_per_device"]
    assert (
        "too large: activations" in report["reason"] and "raise --config.accumulation_steps from 1" in report["reason"]
    )
    state = {"model.embed_dim": 16384, "model.mlp_dim": 65536, "mesh.data": 4, "mesh.fsdp": 1}
    _, report = compile_small(**state)
    assert report["fits"] is False
    assert "too large: training state and gradients" in report["reason"] and "--config.mesh.fsdp=-1" in report["reason"]


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e:3x3", "v5e", "nonsense", "v4:2x2x4x4"])
def test_unknown_topology(topology):
    with pytest.raises(UserError, match=f"--topology={topology}"):
        compile_small(topology)


def test_command(tmp_path):
    flags = [f"--config.{name}={value}" for name, value in SIZES.items() if not name.startswith("stage.codebook")]
    command = [sys.executable, "-m", "audiolm_jax", "compile", "--config=coarse_tiny", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}

    def run(*arguments):
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600, env=environment)

    done = run("--topology=v5e:2x2", f"--output={tmp_path}/new/report.json")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["fits"] and done.stdout.startswith("fits: ")
    for arguments, message in (
        (["--topology=v5e:5x5"], "error: unknown topology"),
        (["--topology=v5e:2x2", "--config.mesh.tensor=3"], "error: mesh does not divide the 4 devices"),
        (["--topology=v5e:2x2", "--config.batch_size=6"], "error: config.batch_size=6 is not divided by"),
        (["--topology=v5e:2x2", "--num_slices=0"], "error: must be 1 or more: --num_slices=0"),
        (["--topology=v4:2x2x2", "--config.mesh.tensor=8"], "error: mesh does not divide the axis 'heads' of length 4"),
    ):
        failed = run(*arguments, f"--output={tmp_path}/bad.json")
        assert failed.returncode == 2
        assert failed.stderr.strip().splitlines()[-1].startswith(message)
        assert "Traceback" not in failed.stderr and not (tmp_path / "bad.json").exists()


def test_several_slices_are_crossed_by_the_data_axis():
    _, report = compile_small("v5e:2x2", **{"mesh.data": 2, "mesh.fsdp": -1})
    config = tiny.config_of("coarse", **{**SIZES, "mesh.data": 2, "mesh.fsdp": -1, "batch_size": 16})
    twice = aot.compile_config(config, "v5e:2x2", 2)
    assert report["num_devices"] == 4 and twice["num_devices"] == 8
    assert twice["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert twice["flops_per_device"] == pytest.approx(report["flops_per_device"], rel=0.05)
    np.testing.assert_allclose(twice["model_flops"], 2 * report["model_flops"])
    mesh = sharding.make_mesh(
        ml_collections.ConfigDict({"data": 2, "fsdp": -1, "tensor": 1}), aot.slice_devices("v5e:2x2", 2)
    )
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    np.testing.assert_array_equal(slices, np.broadcast_to([[[0]], [[1]]], slices.shape))
