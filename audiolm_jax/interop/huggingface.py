"""Folders of Hugging Face models: `config.json` and `model.safetensors`, or several of those with an index.

Nothing of theirs is imported or executed, and weights in pickles are refused.
"""

import json
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from audiolm_jax.errors import UserError

# Their names of our `activations`, where the two differ.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# What weights come in; whole numbers are counters, which nobody takes.
DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}


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
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"config.json is damaged ({error})", path, "download or save the model anew") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError("config.json names no model_type", path, "give the folder of a Hugging Face model")
    return config


def read_preprocessor(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What the model's folder says of its feature extractor, empty where it says nothing.

    That is `preprocessor_config.json`, or the feature extractor's part of `processor_config.json`.

    Raises:
      UserError: a damaged file.
    """
    for name, pick in (
        ("preprocessor_config.json", lambda found: found),
        ("processor_config.json", lambda found: found.get("feature_extractor", {})),
    ):
        path = pathlib.Path(source) / name
        if path.is_file():
            try:
                return dict(pick(json.loads(path.read_text())))
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{name} is damaged ({error})", path, "download or save the model anew") from error
    return {}


def activation_name(theirs: str) -> str:
    """Our name of a function that a `config.json` names."""
    return ACTIVATIONS.get(theirs, theirs)


class Tensors:
    """The weights of a model, taken one by one; what is missing or left over is named.

    Args:
      source: the model's folder.

    Raises:
      UserError: no safetensors there, or damaged ones.
    """

    def __init__(self, source: str | os.PathLike[str]):
        self._source = pathlib.Path(source)
        self._arrays: dict[str, np.ndarray] = {}
        for path in self._files():
            try:
                entries = safetensors.deserialize(path.read_bytes())
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"weights are damaged ({error})", path, "download or save the model anew") from error
            for name, entry in entries:
                if entry["dtype"] not in DTYPES:
                    hint = f"save the model in one of {', '.join(DTYPES)}"
                    raise UserError(f"tensor {name} is of type {entry['dtype']}", path, hint)
                self._arrays[name] = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])

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

    def weight(self, module: str, shape: tuple[int, ...], axis: int = 0) -> np.ndarray:
        """`MODULE.weight`, or the product of its weight normalisation, in either of PyTorch's spellings.

        Normalised is each entry of `axis`: weight = scale · direction / |direction|.
        """
        others = tuple(other for other in range(len(shape)) if other != axis)
        for scale, direction in (
            (f"{module}.parametrizations.weight.original0", f"{module}.parametrizations.weight.original1"),
            (f"{module}.weight_g", f"{module}.weight_v"),
        ):
            if direction in self._arrays:
                scale_shape = tuple(1 if other in others else size for other, size in enumerate(shape))
                scales = self.take(scale, scale_shape).astype(np.float64)
                directions = self.take(direction, shape).astype(np.float64)
                norms = np.sqrt(np.sum(np.square(directions), axis=others, keepdims=True))
                return (scales * directions / norms).astype(np.float32)
        return self.take(f"{module}.weight", shape)

    def enter(self, module: str):
        """Names tensors as that module does, if it is there, and drops what lies beside it: a larger model's heads."""
        prefix = f"{module}."
        inner = {name.removeprefix(prefix): array for name, array in self._arrays.items() if name.startswith(prefix)}
        self._arrays = inner or self._arrays

    def ignore(self, *endings: str):
        """Drops what is not needed: tensors whose names end so."""
        self._arrays = {name: array for name, array in self._arrays.items() if not name.endswith(endings)}

    def ignore_module(self, module: str):
        """Drops all tensors of a module."""
        self._arrays = {name: array for name, array in self._arrays.items() if not name.startswith(f"{module}.")}

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
