"""A stage's parameters as decoding reads them: what a step costs is, above all, reading these once.

Shape suffixes: M columns (rows of the batch times positions), D inputs, F outputs, N heads, H head width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from audiolm_jax.errors import UserError
from audiolm_jax.lm.stages import EOS, Stage
from audiolm_jax.lm.transformer import TransformerConfig

Weights = dict[str, Any]

HUGE_PAGE = 2**21

# What of a device mesh decoding uses: rows of the batch are cut by the first two axes, heads by the last.
ROW_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"


@functools.partial(jax.jit, static_argnames=("config", "stage", "int8"))
def decoder_weights(config: TransformerConfig, stage: Stage, params: dict[str, Any], int8: bool = False) -> Weights:
    """The parameters in the compute type, layers apart, matrices as [outputs, inputs].

    Products are then weight [F, D] · activations [D, M]: for a few columns a CPU reads each matrix once, row by row,
    which takes from half to three quarters of the time of activations [M, D] · weight [D, F]. Accelerators do not care.

    Args:
      config, stage: the stage's transformer.
      params: as trained, without axis names.
      int8: keep the layers' matrices and the output in 8 bits, with one scale for each output (the largest absolute
        weight is 127): a quarter of float32's bytes to read in a step, at some loss of accuracy.
    """
    dtype = config.dtype

    def matrix(weight: jax.Array) -> jax.Array | dict[str, jax.Array]:
        if not int8:
            return weight.astype(dtype)
        scale = jnp.maximum(jnp.max(jnp.abs(weight), axis=-1, keepdims=True), 1e-12) / 127
        return {"int8": jnp.round(weight / scale).astype(jnp.int8), "scale": scale.astype(dtype)}

    def layer_weights(layer: dict[str, Any]) -> Weights:
        heads, mlp = layer["attention"], layer["mlp"]
        # Rows ordered by head, so that heads can be shared out among devices.
        qkv_DN3H = jnp.stack([heads["query"], heads["key"], heads["value"]], axis=2)
        return {
            "attention_norm": layer["attention_norm"]["scale"],
            "qkv": matrix(qkv_DN3H.reshape(config.embed_dim, -1).T),
            "out": matrix(heads["out"].reshape(-1, config.embed_dim).T),
            "mlp_norm": layer["mlp_norm"]["scale"],
            **{name: matrix(weight.T) for name, weight in mlp.items()},
        }

    # What may follow in each level: its codes, and last the end token.
    head_VD, size = params["head"].T, stage.target.codebook_size
    starts = [stage.level_start(level) for level in range(stage.target.num_levels)]
    levels = [jnp.concatenate([head_VD[start : start + size], head_VD[EOS : EOS + 1]]) for start in starts]
    return {
        "embedding": params["embedding"]["embedding"].astype(dtype),
        "position_bias": params.get("position_bias"),
        "layers": [
            layer_weights(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])) for i in range(config.num_layers)
        ],
        "final_norm": params["final_norm"]["scale"],
        "levels": matrix(jnp.stack(levels)),
    }


def check_mesh(mesh: Mesh, config: TransformerConfig, name: str):
    """Raises a UserError where the weights of the stage of that name cannot be cut as `weight_shardings` does."""
    axes = (*ROW_AXES, HEAD_AXIS)
    if set(mesh.axis_names) != set(axes) or set(mesh.axis_types) != {AxisType.Auto}:
        found = ", ".join(f"{axis}: {kind.name}" for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True))
        wanted = f"a mesh for decoding has the axes {', '.join(axes)}, all Auto"
        raise UserError(wanted, f"mesh with {found}", "make it with audiolm_jax.make_mesh")
    parts = mesh.shape[HEAD_AXIS]
    for what, count in (("num_heads", config.num_heads), ("mlp_dim", config.mlp_dim)):
        if count % parts:
            problem = f"mesh does not divide {what}={count} of the {name} stage"
            raise UserError(problem, f"mesh axis {HEAD_AXIS}={parts}", f"choose a size that divides {count}")


def weight_shardings(mesh: Mesh, weights: Weights) -> Weights:
    """Where `decoder_weights` lie on a mesh: each device has whole heads and whole feed-forward units.

    Of the matrices into heads and units the outputs are cut, of those back the inputs, so that a layer needs two sums
    over devices. Embedding, norms and the output are small and lie on every device.
    """
    outputs, inputs, whole = PartitionSpec(HEAD_AXIS), PartitionSpec(None, HEAD_AXIS), PartitionSpec()
    cut = {"qkv": outputs, "wide": outputs, "gate": outputs, "out": inputs, "narrow": inputs, "position_bias": inputs}

    def place(path, leaf) -> NamedSharding:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        spec = next((cut[name] for name in names if name in cut), whole)
        # A scale of 8-bit weights belongs to an output.
        return NamedSharding(mesh, whole if spec == inputs and names[-1] == "scale" else spec)

    return jax.tree_util.tree_map_with_path(place, weights)


def sharded_weights(
    mesh: Mesh, config: TransformerConfig, stage: Stage, params: dict[str, Any], int8: bool = False
) -> Weights:
    """`decoder_weights` on a mesh, made where they lie."""
    make = lambda params: decoder_weights(config, stage, params, int8)
    return jax.jit(make, out_shardings=weight_shardings(mesh, jax.eval_shape(make, params)))(params)


def for_a_single_row(weights: Weights) -> Weights:
    """The same as a CPU multiplies a single column fastest.

    Matrices with more outputs than inputs are [inputs, outputs]; the output's levels are a list, so that a step reads
    its own where it lies.
    """
    is_int8 = lambda node: isinstance(node, dict) and "int8" in node

    def turned(node: Any) -> Any:
        wide = not is_int8(node) and node.ndim == 2 and node.shape[0] >= node.shape[1]
        return {"columns": node.T} if wide else node

    num_levels = len(jax.tree.leaves(weights["levels"])[0])
    levels = [jax.tree.map(lambda leaf, i=i: leaf[i], weights["levels"]) for i in range(num_levels)]
    turn = lambda tree: jax.tree.map(turned, tree, is_leaf=is_int8)
    return {**weights, "layers": turn(weights["layers"]), "levels": turn(levels)}


def product(weight: Any, x_DM: jax.Array, output_dtype: Any = None) -> jax.Array:
    """A weight, as one of the functions above gives it, times activations: [F, M]."""
    if not isinstance(weight, dict):
        return jnp.matmul(weight, x_DM, preferred_element_type=output_dtype)
    if "columns" in weight:
        return jnp.matmul(x_DM[:, 0], weight["columns"], preferred_element_type=output_dtype)[:, None]
    y_FM = jnp.matmul(weight["int8"].astype(x_DM.dtype), x_DM, preferred_element_type=output_dtype)
    return y_FM * weight["scale"].astype(y_FM.dtype)


def in_huge_pages(tree: Any) -> Any:
    """On a CPU, large arrays in memory of 2 MiB pages: read an eighth faster than in pages of 4 KiB.

    NumPy asks the system for such pages, XLA does not; and XLA takes an aligned NumPy array as it is.
    """
    if jax.default_backend() != "cpu":
        return tree

    def moved(leaf: jax.Array) -> jax.Array:
        if leaf.nbytes < HUGE_PAGE // 4 or len(leaf.devices()) > 1:
            return leaf
        memory = np.empty(leaf.nbytes + HUGE_PAGE, np.uint8)
        start = -memory.ctypes.data % HUGE_PAGE
        array = memory[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
        array[...] = leaf
        return jax.device_put(array)

    return jax.tree.map(moved, tree)
