"""Folders of Hugging Face models: `config.json` and `model.safetensors`, or several of those with an index.

Nothing of theirs is imported or executed, and weights in pickles are refused.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from audiolm_jax.errors import UserError

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# What weights come in; whole numbers are counters, which nobody takes.
DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}


def activation(name: str) -> str:
    """Our name of a `hidden_act`."""
    return ACTIVATIONS.get(name, name)


def read_config(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The model's `config.json`.

    Raises:
      UserError: no such folder, or no model in it.
    """
    path = pathlib.Path(source) / "config.json"
    if not pathlib.Path(source).is_dir():
        raise UserError("no such folder", source, "give the folder of a Hugging Face model")
    if not path.is_file():
        raise UserError(
            "no config.json", source, "give the folder of a Hugging Face model, as save_pretrained makes it"
        )
    config = _read_object(path)
    if "model_type" not in config:
        raise UserError("config.json names no model_type", path, "give the folder of a Hugging Face model")
    return config


def check_preprocessor(source: str | os.PathLike[str], **expected: Any):
    """Checks what a model's `preprocessor_config.json`, if it has one, says of its features.

    Raises:
      UserError: other values than those expected, of which any may be left out; or a damaged file.
    """
    path = pathlib.Path(source) / "preprocessor_config.json"
    if not path.is_file():
        return
    found = _read_object(path)
    for name, value in expected.items():
        if found.get(name, value) != value:
            raise UserError(f"{name} is {found[name]}, not {value}", path, "such features are not ours to make")


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
        return value
    except ValueError as error:
        raise UserError(f"{path.name} is damaged ({error})", path, "download or save the model anew") from error


class Tensors:
    """The weights of a model, taken one by one; what is missing or left over is named.

    Args:
      source: the model's folder.
      arrays: its weights by name; by default those of its safetensors.

    Raises:
      UserError: no safetensors there, or damaged ones.
    """

    def __init__(self, source: str | os.PathLike[str], arrays: Mapping[str, np.ndarray] | None = None):
        self._source = pathlib.Path(source)
        self._arrays = self._read() if arrays is None else dict(arrays)

    def _read(self) -> dict[str, np.ndarray]:
        arrays = {}
        for path in self._files():
            try:
                entries = safetensors.deserialize(path.read_bytes())
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"weights are damaged ({error})", path, "download or save the model anew") from error
            for name, entry in entries:
                if entry["dtype"] not in DTYPES:
                    hint = f"save the model in one of {', '.join(DTYPES)}"
                    raise UserError(f"tensor {name} is of type {entry['dtype']}", path, hint)
                arrays[name] = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return arrays

    def _files(self) -> list[pathlib.Path]:
        if (self._source / INDEX_FILE).is_file():
            try:
                names = set(json.loads((self._source / INDEX_FILE).read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                where = self._source / INDEX_FILE
                raise UserError(f"index is damaged ({error})", where, "download or save the model anew") from error
            return [self._source / name for name in sorted(names)]
        if (self._source / WEIGHTS_FILE).is_file():
            return [self._source / WEIGHTS_FILE]
        pickles = [
            path.name for path in self._source.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")
        ]
        if pickles:
            hint = "save the model as safetensors: a pickle can run any code"
            raise UserError(f"weights are a pickle ({pickles[0]})", self._source, hint)
        raise UserError(f"no {WEIGHTS_FILE}", self._source, "give a folder with the model's weights as safetensors")

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor of that name as float32; it must have the shape, and counts as used."""
        if name not in self._arrays:
            raise UserError(f"tensor {name} is missing", self._source, "the weights do not belong to this config.json")
        array = self._arrays.pop(name)
        if array.shape != shape:
            problem = f"tensor {name} is {list(array.shape)}, not {list(shape)}"
            raise UserError(problem, self._source, "the weights do not belong to this config.json")
        return np.asarray(array, np.float32)

    def weight(self, module: str, shape: tuple[int, ...]) -> np.ndarray:
        """`MODULE.weight`, or the product of its weight normalisation, in either of PyTorch's spellings.

        Normalised is each entry of the first axis: weight = scale · direction / |direction|.
        """
        for scale, direction in (
            (f"{module}.parametrizations.weight.original0", f"{module}.parametrizations.weight.original1"),
            (f"{module}.weight_g", f"{module}.weight_v"),
        ):
            if direction in self._arrays:
                scales = self.take(scale, (shape[0],) + (1,) * (len(shape) - 1)).astype(np.float64)
                directions = self.take(direction, shape).astype(np.float64)
                norms = np.sqrt(np.sum(np.square(directions), axis=tuple(range(1, len(shape))), keepdims=True))
                return (scales * directions / norms).astype(np.float32)
        return self.take(f"{module}.weight", shape)

    def ignore(self, *endings: str):
        """Drops what is not needed: tensors whose names end so."""
        self._arrays = {name: array for name, array in self._arrays.items() if not name.endswith(endings)}

    def keep(self, *beginnings: str):
        """Drops the parts that are not needed: tensors whose names begin otherwise."""
        self._arrays = {name: array for name, array in self._arrays.items() if name.startswith(beginnings)}

    def check_all_used(self):
        """Raises a UserError that names a tensor which nobody took."""
        if self._arrays:
            name, others = min(self._arrays), len(self._arrays) - 1
            more = f" and {others} more" if others else ""
            raise UserError(
                f"tensor {name}{more} belongs to no layer",
                self._source,
                "the weights do not belong to this config.json",
            )
