"""Layers of PyTorch as parameters of ours.

Shape suffixes: I and O channels in and out, k kernel taps.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from audiolm_jax.interop.huggingface import Tensors


def dense(tensors: Tensors, module: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, np.ndarray]:
    """A `Linear` as a `Dense`."""
    params = {"kernel": np.ascontiguousarray(tensors.take(f"{module}.weight", (outputs, inputs)).T)}
    return params | ({"bias": tensors.take(f"{module}.bias", (outputs,))} if bias else {})


def layer_norm(tensors: Tensors, module: str, width: int) -> dict[str, np.ndarray]:
    """A `LayerNorm`."""
    return {"scale": tensors.take(f"{module}.weight", (width,)), "bias": tensors.take(f"{module}.bias", (width,))}


def convolution(tensors: Tensors, module: str, kernel_size: int, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    """A `Conv1d` as a `Conv`."""
    kernel_OIk = tensors.take(f"{module}.weight", (outputs, inputs, kernel_size))
    return {
        "kernel": np.ascontiguousarray(kernel_OIk.transpose(2, 1, 0)),
        "bias": tensors.take(f"{module}.bias", (outputs,)),
    }


def stacked(blocks: Sequence[Any]) -> Any:
    """Parameters of blocks that are alike, along a new first axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
