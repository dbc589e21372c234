"""The device mesh, and the rules that map logical axis names to its axes."""

import math
from typing import Any

import flax.linen as nn
import jax
import ml_collections
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


def make_mesh(mesh: ml_collections.ConfigDict) -> Mesh:
    """The mesh of a config's `mesh.data`, `mesh.fsdp`, `mesh.tensor`; one of them may be −1: all that remain."""
    sizes = {axis: mesh[axis] for axis in MESH_AXES}
    where = ", ".join(f"config.mesh.{axis}={size}" for axis, size in sizes.items())
    devices = jax.device_count()
    if any(size != -1 and size < 1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError("mesh axes must be 1 or more, and at most one of them -1", where, "change config.mesh")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"mesh does not divide the {devices} devices", where, "choose sizes whose product is their number"
        )
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


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


def global_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch (NumPy) -> the global, sharded arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
