"""Ahead-of-time compilation of a config's train step for a TPU slice, without a TPU: does it fit, how fast is it?"""

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies

from audiolm_jax import accelerators, hlo
from audiolm_jax.accelerators import GIB, Accelerator
from audiolm_jax.errors import UserError
from audiolm_jax.training import registry, sharding
from audiolm_jax.training.step import Program, abstract_key, build_program, model_flops

# What libtpu would look up on a TPU's host, and its leave to be loaded by several processes.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# Chips of these hold two cores that programs see as one device, if asked to.
MEGACORE = ("v4", "v5p")
WORTH_CUTTING = 2**20


def compile_config(config: ml_collections.ConfigDict, topology: str, num_slices: int = 1) -> dict[str, Any]:
    """Compiles a config's train step for a TPU slice and says what it needs there.

    Args:
      config: a recipe's; its mesh is laid over the slice's chips.
      topology: generation and shape in chips, such as "v4:2x2x4" or "v5e:16x16".
      num_slices: so many of them, joined by the data-centre network.

    Returns:
      a report that JSON can hold. Bytes are those of one device (a chip), FLOPs those of matrix products, convolutions
      and kernels, with every round of a loop; None where the compiler refused and left nothing to count.

        fits, reason: whether the compiler found room for it, and if not, what is too large and what to change.
        num_devices, mesh, parameters: devices, their arrangement, and how many numbers the model's weights have.
        peak_bytes_per_device, memory_bytes_per_device: needed (None where the compiler did not say), and there.
        state_bytes_per_device: of it, parameters, optimiser and averages between steps.
        flops_per_device, traffic_bytes_per_device, collective_bytes_per_device: done by one device in one step.
        model_flops: of the whole step by its definition; see `training.step.model_flops`.
        whole_on_every_device: names of parameters of a megabyte or more that no mesh axis cuts, though `mesh.fsdp` or
          `mesh.tensor` is above 1.
        floor_seconds: {"compute", "memory", "network"}: the least time that each would take at its peak. What crosses
          the network between slices is counted as if it went over a chip's own links, which are much faster.
        step_seconds: the longest of them. utilization: model FLOPs over what the devices can do in that time.
        compile_seconds: what the compiler took.

    Raises:
      UserError: no libtpu, an unknown topology, a mesh that does not fit it, or a config that contradicts itself.
    """
    devices = slice_devices(topology, num_slices)
    accelerator = accelerators.of_device(devices[0].device_kind)
    if accelerator is None:
        raise UserError(f"nothing is known of {devices[0].device_kind}", topology, "choose v4, v5e, v5p or v6e")
    mesh = sharding.make_mesh(config.mesh, devices)
    with sharding.active(mesh):
        program = build_program(config, mesh)
        lowered = program.step.lower(program.abstract_state, registry.abstract_batch(config), abstract_key())
        start = time.monotonic()
        compiled, refusal = _compile(lowered)
        seconds = time.monotonic() - start
    needs = _StateNeeds.of(config, program, mesh)
    report = {
        "objective": config.objective,
        "topology": topology,
        "num_slices": num_slices,
        "num_devices": len(devices),
        "mesh": dict(mesh.shape),
        "parameters": needs.parameters,
        "memory_bytes_per_device": accelerator.memory_bytes,
        "state_bytes_per_device": needs.state_bytes,
        "model_flops": model_flops(config),
        "whole_on_every_device": needs.whole if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 else [],
        "compile_seconds": seconds,
    }
    if compiled is None:
        return {**report, **_refused(refusal, needs, accelerator, mesh)}
    return {**report, **_measured(compiled, accelerator, report)}


def slice_devices(topology: str, num_slices: int) -> list[jax.Device]:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    generation = topology.partition(":")[0]
    settings: dict[str, Any] = {"chip_config_name": "megacore"} if generation in MEGACORE else {}
    if num_slices > 1:
        settings["num_slices"] = num_slices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings).devices
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        if "libtpu" in str(error) or "not known" in str(error) or "plugin" in str(error):
            raise UserError(f"no TPU compiler ({error})", "libtpu", "pip install 'audiolm_jax[tpu]'") from error
        raise UserError(
            f"unknown topology ({error})",
            f"--topology={topology}",
            "give one such as v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4",
        ) from error


def _compile(lowered) -> tuple[jax.stages.Compiled | None, str]:
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None, str(error)
        raise


def _measured(compiled: jax.stages.Compiled, accelerator: Accelerator, report: dict[str, Any]) -> dict[str, Any]:
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None  # Both are what TPU executables have.
    cost = hlo.program_cost(text)
    floors = {
        "compute": cost.flops / accelerator.peak_flops,
        "memory": cost.memory_bytes / accelerator.memory_bandwidth,
        "network": cost.collective_bytes / accelerator.link_bandwidth,
    }
    step_seconds = max(floors.values())
    return {
        "fits": True,
        "reason": "",
        "peak_bytes_per_device": memory.peak_memory_in_bytes,
        "flops_per_device": cost.flops,
        "traffic_bytes_per_device": cost.memory_bytes,
        "collective_bytes_per_device": cost.collective_bytes,
        "floor_seconds": floors,
        "step_seconds": step_seconds,
        "utilization": report["model_flops"] / (step_seconds * accelerator.peak_flops * report["num_devices"]),
    }


@dataclasses.dataclass(frozen=True)
class _StateNeeds:
    """What a step holds whatever the compiler makes of it: bytes of one device.

    Attributes:
      parameters: numbers of the model's weights, of all devices together.
      state_bytes: parameters, optimiser and averages.
      gradient_bytes: of the parameters, while a step runs.
      batch_bytes: of the input.
      whole: names of large parameters that no mesh axis cuts.
      rows, microbatches: of the batch, and how many parts of it are computed one after the other.
    """

    parameters: int
    state_bytes: int
    gradient_bytes: int
    batch_bytes: int
    whole: list[str]
    rows: int
    microbatches: int

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, program: Program, mesh: jax.sharding.Mesh) -> "_StateNeeds":
        held = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        named = jax.tree_util.tree_leaves_with_path(program.objective.weights(program.abstract_state))
        batch, shards = registry.abstract_batch(config), mesh.shape["data"] * mesh.shape["fsdp"]
        return cls(
            parameters=sum(leaf.size for _, leaf in named),
            state_bytes=sum(map(held, jax.tree.leaves(program.abstract_state))),
            gradient_bytes=sum(held(leaf) for _, leaf in named),
            batch_bytes=sum(leaf.size * leaf.dtype.itemsize // shards for leaf in batch.values()),
            whole=[
                jax.tree_util.keystr(path, simple=True, separator="/")
                for path, leaf in named
                if leaf.size * leaf.dtype.itemsize >= WORTH_CUTTING and leaf.sharding.is_fully_replicated
            ],
            rows=config.batch_size,
            microbatches=config.get("accumulation_steps", config.batch_size),
        )


def _refused(refusal: str, needs: _StateNeeds, accelerator: Accelerator, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What the compiler said, which term is too large, and what to change."""
    units = {"K": 2**10, "M": 2**20, "G": GIB}
    figures = [float(number) * units[unit] for number, unit in re.findall(r"(\d+\.?\d*)([KMG])\b", refusal)]
    needed = max(figures, default=None)
    fixed = needs.state_bytes + needs.gradient_bytes
    gib = lambda size: f"{size / GIB:.1f} GiB"
    if fixed > accelerator.memory_bytes / 2:
        term = f"training state and gradients ({gib(fixed)} a device)"
        advice = "take --config.optimizer.name=adafactor, or more devices"
        if mesh.shape["data"] > 1:
            advice = f"cut them over all devices by --config.mesh.data=1 --config.mesh.fsdp=-1, {advice}"
    else:
        term = f"activations (all but the {gib(fixed + needs.batch_bytes)} of state, gradients and batch)"
        advice = "try --config.model.remat=full, a smaller --config.batch_size, or more devices"
        if mesh.shape["data"] * mesh.shape["fsdp"] * needs.microbatches < needs.rows:
            advice = f"raise --config.accumulation_steps from {needs.microbatches}, {advice}"
    total = f"{gib(needed)} of " if needed else "more than "
    return {
        "fits": False,
        "reason": f"needs {total}{gib(accelerator.memory_bytes)} a device; too large: {term}; {advice}",
        "compiler_message": refusal.splitlines()[0],
        "peak_bytes_per_device": needed and int(needed),
        "flops_per_device": None,
        "traffic_bytes_per_device": None,
        "collective_bytes_per_device": None,
        "floor_seconds": None,
        "step_seconds": None,
        "utilization": None,
    }
