"""Arrays out of the pickles that joblib and scikit-learn write, without running anything of them.

The opcodes are read one by one (the standard library's `pickletools` takes them apart) and build plain values:
numbers, texts, lists, dictionaries. What a pickle would call becomes a `Call`, which says so and calls nothing; and a
pickle that names anything beyond what scikit-learn's k-means is made of is refused before that. joblib writes the bytes
of an array right behind the opcodes of its wrapper, and may compress the whole file.
"""

import bz2
import gzip
import io
import lzma
import math
import os
import pathlib
import pickletools
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from audiolm_jax.errors import UserError

COMPRESSIONS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x78": zlib.decompress,
    b"\x1f\x8b": gzip.decompress,
    b"BZ": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
    b"\x5d\x00": lzma.decompress,
}
LZ4 = b"\x04\x22\x4d\x18"


class Name(NamedTuple):
    """Something that a pickle imports; it is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Call:
    """What a pickle would make by calling something.

    Attributes:
      function: the `Name` of what would be called.
      arguments: with what.
      state: what it would be told to remember afterwards; an object's attributes.
    """

    def __init__(self, function: Any, arguments: Any):
        self.function, self.arguments = function, arguments
        self.state: Any = None


K_MEANS = {
    Name(module, name)
    for module in ("sklearn.cluster._kmeans", "sklearn.cluster.k_means_")
    for name in ("KMeans", "MiniBatchKMeans")
}
WRAPPER = Name("joblib.numpy_pickle", "NumpyArrayWrapper")
DTYPE = Name("numpy", "dtype")
RECONSTRUCT = {Name(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
FROM_BUFFER = {Name(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
NEW_OBJECT = {Name(module, "_reconstructor") for module in ("copyreg", "copy_reg")}
ENCODE = Name("_codecs", "encode")
# These are never looked at; a fitted k-means may hold its random state.
HARMLESS = {
    Name("numpy", "ndarray"),
    *(Name(module, "object") for module in ("builtins", "__builtin__")),
    *(Name(f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
    *(Name("numpy.random._pickle", f"__{name}_ctor") for name in ("randomstate", "bit_generator")),
    Name("numpy.random", "__RandomState_ctor"),
    Name("numpy.random._mt19937", "MT19937"),
}
ALLOWED = {*K_MEANS, WRAPPER, DTYPE, *RECONSTRUCT, *FROM_BUFFER, *NEW_OBJECT, ENCODE, *HARMLESS}

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_DICT": dict}
LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)


def read(path: str | os.PathLike[str]) -> Any:
    """What a file holds: plain values, arrays, and `Call`s instead of objects (`array_of` reads those of arrays).

    Raises:
      UserError: a file that is no pickle, is damaged, or would import anything but k-means and arrays.
    """
    data = pathlib.Path(path).read_bytes()
    if data.startswith(LZ4):
        raise UserError("compressed by lz4", path, "dump it anew with compress=False, or save the centroids as .npy")
    try:
        for magic, decompress in COMPRESSIONS.items():
            if data.startswith(magic):
                data = decompress(data)
        return _Reader(io.BytesIO(data), path).value()
    except UserError:
        raise
    except Exception as error:  # Whatever the bytes lead to.
        raise UserError(
            f"not a pickle, or damaged ({error})", path, "dump it anew, or save the centroids as .npy"
        ) from error


def array_of(value: Any) -> np.ndarray:
    """The array that an array or the `Call` of one stands for.

    Raises:
      ValueError: it is none, or not one of plain numbers.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, Call) and value.function in RECONSTRUCT:
        _, shape, dtype, is_fortran, data = value.state
        return _array(_bytes(data), dtype, shape, "F" if is_fortran else "C")
    if isinstance(value, Call) and value.function in FROM_BUFFER:
        data, dtype, shape, order = value.arguments
        return _array(data, dtype, shape, order)
    raise ValueError("no array of numbers")


def _array(data: bytes, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return np.frombuffer(data, _dtype(dtype)).reshape(shape, order=order)


def _dtype(call: Any) -> np.dtype:
    """Of numbers, from the call that makes it: the kind and size, and a state that begins with (3, byte order)."""
    if not (isinstance(call, Call) and call.function == DTYPE and re.fullmatch("[biuf][1248]", str(call.arguments[0]))):
        raise ValueError("an array of something else than numbers")
    order: Any = call.state[1] if call.state else "="
    return np.dtype(str(call.arguments[0])).newbyteorder(order)


def _bytes(data: Any) -> bytes:
    """Of an array; before protocol 3, a text that each byte is a character of."""
    if isinstance(data, Call) and data.function == ENCODE:
        data = data.arguments[0]
    return data.encode("latin-1") if isinstance(data, str) else bytes(data)


class _Reader:
    """A stack machine as a pickle wants it, that only stacks."""

    def __init__(self, stream: BinaryIO, path: str | os.PathLike[str]):
        self._stream, self._path = stream, path
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def value(self) -> Any:
        """Reads to the end and returns what is left."""
        for opcode, argument, _ in pickletools.genops(self._stream):
            self._step(opcode.name, argument)
        (value,) = self._stack
        return value

    def _step(self, name: str, argument: Any):
        stack = self._stack
        if name in ("PROTO", "FRAME", "STOP"):
            return
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "POP":
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(self._imported(*(argument.split(" ") if argument else self._pop(2))))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self._called(*self._pop(2)))
        elif name == "BUILD":
            self._build(stack.pop())
        else:
            self._collect(name)

    def _collect(self, name: str):
        """Opcodes that put values into collections."""
        stack = self._stack
        if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._pop(int(name[-1]))))
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            items = self._pop_to_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name == "DICT":
            stack.append(dict(_pairs(self._pop_to_mark())))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
            stack[-1].update(_pairs(items))
        else:
            raise ValueError(f"opcode {name}")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("nothing left on the stack")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _imported(self, module: str, name: str) -> Name:
        found = Name(module, name)
        if found not in ALLOWED:
            hint = "it may run any code: save the centroids as .npy where you trust it"
            raise UserError(f"the pickle asks for {found}", self._path, hint)
        return found

    def _called(self, function: Any, arguments: Any) -> Call:
        if function in NEW_OBJECT:
            return Call(arguments[0], ())
        return Call(function, arguments)

    def _build(self, state: Any):
        call = self._stack[-1]
        if not isinstance(call, Call):
            raise ValueError("a state without an object")
        call.state = state
        if call.function == WRAPPER:
            self._stack[-1] = self._wrapped_array(state)

    def _wrapped_array(self, state: dict[str, Any]) -> np.ndarray:
        """The array whose bytes follow: perhaps a number of bytes to skip, so that they are aligned, and those."""
        dtype, shape = _dtype(state["dtype"]), tuple(state["shape"])
        if state.get("numpy_array_alignment_bytes") is not None:
            (skipped,) = self._stream.read(1)
            self._stream.read(skipped)
        data = self._stream.read(dtype.itemsize * math.prod(shape))
        return _array(data, state["dtype"], shape, state["order"])


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)
