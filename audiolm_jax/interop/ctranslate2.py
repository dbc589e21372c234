"""CTranslate2's `model.bin`, as `ctranslate2.specs.model_spec` of its Python package writes it.

Little-endian. A version (uint32), the model's kind (text), its revision (uint32); the number of variables (uint32) and
each one's name (text), rank (uint8), dimensions (uint32), type (uint8), number of bytes (uint32) and bytes; the number
of aliases (uint32) and each one's name and the variable's that it stands for. A text is a uint16, so many bytes of
UTF-8, the last of them zero. A variable in whole numbers has a companion `NAME_scale`, by which it is to be divided:
a number for each entry of the first axis, or one for all.

Nothing in such a file is executed, and whatever it says is checked against its size.
"""

import math
import os
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

from audiolm_jax.errors import UserError

FILE = "model.bin"
VERSION = 6
DTYPES = [np.dtype(kind) for kind in (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)]


def read_model(source: str | os.PathLike[str], kind: str, scope: str) -> dict[str, np.ndarray]:
    """Variables of a model, those in 8 or 16 bits as the float32 numbers that they stand for.

    Args:
      source: the model's folder.
      kind: of the model, e.g. "WhisperSpec".
      scope: how the names begin of the variables that are wanted.

    Raises:
      UserError: no such file, a damaged one, one of another version or kind.
    """
    reader = _Reader(pathlib.Path(source) / FILE)
    (version,) = reader.numbers("I")
    if version != VERSION:
        reader.refuse(f"not a model of CTranslate2's version {VERSION} (it begins with {version})")
    found = reader.text()
    if found != kind:
        reader.refuse(f"not a {kind} but a {found}")
    reader.numbers("I")  # Revisions differ in what decoders have.
    variables = dict(reader.variable() for _ in range(*reader.numbers("I")))
    for _ in range(*reader.numbers("I")):
        alias, name = reader.text(), reader.text()
        if name not in variables:
            reader.refuse(f"alias {alias} of a variable that is missing, {name},")
        variables[alias] = variables[name]
        if f"{name}_scale" in variables:
            variables[f"{alias}_scale"] = variables[f"{name}_scale"]
    reader.check_end()
    wanted = [name for name in variables if name.startswith(scope) and not name.endswith("_scale")]
    return {name: _values(variables[name], variables.get(f"{name}_scale"), name, reader) for name in wanted}


def _values(array: np.ndarray, scale: np.ndarray | None, name: str, reader: "_Reader") -> np.ndarray:
    if array.ndim == 0:  # A setting.
        return array
    if scale is None:
        if array.dtype.kind == "i":
            reader.refuse(f"variable {name} is in whole numbers without a scale")
        return array.astype(np.float32)
    if scale.shape not in ((), array.shape[:1]):
        reader.refuse(f"the scale of variable {name} is {list(scale.shape)}, the variable {list(array.shape)}")
    return array.astype(np.float32) / scale.astype(np.float32).reshape(scale.shape + (1,) * (array.ndim - scale.ndim))


class _Reader:
    """The file from its beginning on; whoever reads past its end learns that it is cut short."""

    def __init__(self, path: pathlib.Path):
        self._path, self._position = path, 0
        try:
            # Only the pages that are read of it come into memory.
            self._data: Any = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        except OSError as error:
            raise UserError(f"no {FILE} to read ({error.strerror})", path, "give a folder with such a file") from error

    def refuse(self, what: str):
        raise UserError(what, self._path, "give a Whisper that CTranslate2 converted, or download it anew")

    def numbers(self, layout: str) -> tuple[Any, ...]:
        layout = f"<{layout}"
        return struct.unpack_from(layout, self._data, self._advance(struct.calcsize(layout)))

    def text(self) -> str:
        (size,) = self.numbers("H")
        start = self._advance(size)
        try:
            return self._data[start : start + size].tobytes().removesuffix(b"\0").decode()
        except UnicodeDecodeError:
            self.refuse(f"a name that is no text, at byte {start},")
            raise

    def variable(self) -> tuple[str, np.ndarray]:
        """Name and values, as a view of the file."""
        name = self.text()
        (rank,) = self.numbers("B")
        shape = self.numbers(f"{rank}I")
        type_id, size = self.numbers("BI")
        if type_id >= len(DTYPES):
            self.refuse(f"variable {name} is of the unknown type {type_id}")
        dtype, count = DTYPES[type_id], math.prod(shape)
        if count * dtype.itemsize != size:
            self.refuse(f"variable {name} has {size} bytes, {list(shape)} of {dtype} {count * dtype.itemsize}")
        start = self._advance(size)
        return name, self._data[start : start + size].view(dtype).reshape(shape)

    def check_end(self):
        if self._position != len(self._data):
            self.refuse(f"{len(self._data) - self._position} bytes after the end of the model")

    def _advance(self, size: int) -> int:
        """Where the next so many bytes begin."""
        start = self._position
        if start + size > len(self._data):
            self.refuse(f"the file is cut short: it has {len(self._data)} bytes")
        self._position += size
        return start
