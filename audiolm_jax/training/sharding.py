"""The device mesh, and the rules that map logical axis names to its axes."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from audiolm_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Parameters are cut by `fsdp` along the model width and by `tensor` along the wide axis of each
# product; activations by `data` and `fsdp` along the batch.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "embed_activation": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv": None,
    "vocab": "tensor",
    "layers": None,
    "buckets": None,
    "conv": None,
    "conv_in": None,
    "conv_out": "fsdp",
}
# Convolutions come in every width (the last one of a decoder has a single channel): where the mesh
# does not divide one, it stays whole.
WHOLE_IF_INDIVISIBLE = {"conv_out"}


def make_mesh(mesh: ml_collections.ConfigDict | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config's `mesh.data`, `mesh.fsdp`, `mesh.tensor`; one of them may be −1: all that remain.

    Devices of several TPU slices are laid out so that only the `data` axis (or, where that is not a multiple of the
    slices, `fsdp`) crosses the slower network between slices.

    Args:
      mesh: sizes by axis.
      devices: all there are by default; those of a topology description to compile for.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: mesh[axis] for axis in MESH_AXES}
    where = ", ".join(f"config.mesh.{axis}={size}" for axis, size in sizes.items())
    if any(size != -1 and size < 1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError("mesh axes must be 1 or more, and at most one of them -1", where, "change config.mesh")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh does not divide the {len(devices)} devices", where, "choose sizes whose product is their number"
        )
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=axis_types, devices=devices)
    crossing = next((axis for axis in ("data", "fsdp") if sizes[axis] % num_slices == 0), None)
    if crossing is None:
        raise UserError(f"mesh does not divide the {num_slices} slices", where, f"make data a multiple of {num_slices}")
    between = [num_slices if axis == crossing else 1 for axis in MESH_AXES]
    within = [size // count for size, count in zip(sizes.values(), between, strict=True)]
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, between, devices), MESH_AXES, axis_types=axis_types)


@contextlib.contextmanager
def active(mesh: Mesh) -> Iterator[None]:
    """Makes the mesh and the rules those that sharding constraints inside the models refer to."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(list(RULES.items())):
        yield


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh):
    """Raises a UserError where the mesh does not divide the batch, or each of its microbatches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    microbatches = config.get("accumulation_steps", 1)
    if microbatches < 1:
        raise UserError("must be 1 or more", f"config.accumulation_steps={microbatches}", "change it")
    if config.batch_size % (shards * microbatches):
        factors = f"mesh.data x mesh.fsdp = {shards}"
        factors += f" times accumulation_steps = {microbatches}" if microbatches > 1 else ""
        raise UserError(
            f"config.batch_size={config.batch_size} is not divided by {factors}",
            "config.batch_size",
            f"choose a multiple of {shards * microbatches}",
        )


def _partition_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        axis = RULES[name] if name is not None else None
        parts = math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
        if size % parts:
            if name not in WHOLE_IF_INDIVISIBLE:
                raise UserError(
                    f"mesh does not divide the axis '{name}' of length {size}",
                    f"config.mesh.{axis}={parts}",
                    f"choose a size that divides {size}",
                )
            axis = None
        axes.append(axis)
    return PartitionSpec(*axes)


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of an abstract, still boxed state; leaves without names are replicated.

    Raises:
      KeyError: a logical axis name without a rule.
      UserError: a mesh axis that does not divide its dimension.
    """

    def sharding(leaf):
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, _partition_spec(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(sharding, abstract_state, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def unbox(state: Any) -> Any:
    """The state without its axis names (`flax.linen.unbox` would constrain abstract leaves to the mesh)."""
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, state, is_leaf=is_box)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are cut along their first axis."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process feeds, ascending.

    They follow from the mesh: where the devices of two processes hold the same rows (tensor parallelism across
    hosts), both feed them.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in places.values() if index]))


def global_batch(batch: dict[str, np.ndarray], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch (`process_rows`) -> the global, sharded arrays."""
    place = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(place, array, (batch_size, *array.shape[1:]))
        for name, array in batch.items()
    }
