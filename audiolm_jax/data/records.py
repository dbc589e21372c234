"""Bytes of a token record -> NumPy arrays; of a minute in 0.3 ms, where TFDS takes 3 for its Python integers.

A record is a serialized `tf.train.Example`. To the wire, packed integers and a string of bytes are the same thing, so
Protocol Buffers, told that they are bytes, hands them over whole, and NumPy takes them apart.
"""

import functools
from typing import Any

import numpy as np


def parse_record(data: bytes, num_quantizers: int) -> dict[str, Any]:
    """What TFDS's features (`token_dataset.features`) make of a record.

    Args:
      data: a serialized example.
      num_quantizers: Q, levels of the acoustic tokens.

    Returns:
      `id`, `speaker` (bytes), `semantic` (int32 [T_S]), `acoustic` (int32 [T_A, Q]), `num_samples` (int) and `is_end`
      (bool).

    Raises:
      ValueError: not such a record.
    """
    from google.protobuf.message import DecodeError

    try:
        entries = _example_class().FromString(data).features.feature
    except DecodeError as error:
        raise ValueError(str(error)) from error
    values = {entry.key: entry.value for entry in entries}

    def integers(name: str) -> np.ndarray:
        return unpack_varints(values[name].int64_list.value)

    try:
        return {
            "id": values["id"].bytes_list.value[0],
            "speaker": values["speaker"].bytes_list.value[0],
            "semantic": integers("semantic").astype(np.int32),
            "acoustic": integers("acoustic").astype(np.int32).reshape(-1, num_quantizers),
            "num_samples": int(integers("num_samples").item()),
            "is_end": bool(integers("is_end").item()),
        }
    except (KeyError, IndexError) as error:
        raise ValueError("a field is missing") from error


def unpack_varints(packed: bytes) -> np.ndarray:
    """Packed integers of Protocol Buffers -> int64 [N]: seven bits a byte, lowest first, the top bit where more follow.

    Raises:
      ValueError: the last integer is cut off, or one is longer than ten bytes.
    """
    bytes_B = np.frombuffer(packed, np.uint8)
    last_N = np.flatnonzero(bytes_B < 0x80)
    if len(bytes_B) and bytes_B[-1] >= 0x80:
        raise ValueError("an integer is cut off")
    values_N, more_N = bytes_B[last_N].astype(np.uint64), np.ones(len(last_N), bool)
    for place in range(1, 11):
        # Before the first integer the index wraps around, to the end of the last one, which is not one of these bytes.
        before_N = bytes_B.take(last_N - place, mode="wrap")
        more_N = more_N & (before_N >= 0x80)
        if not more_N.any():
            return values_N.view(np.int64)
        values_N = np.where(more_N, values_N << np.uint64(7) | (before_N & np.uint8(0x7F)), values_N)
    raise ValueError("an integer is longer than ten bytes")


@functools.cache
def _example_class() -> Any:
    """The class of `tf.train.Example`, but with `Int64List.value` as bytes, and the map of features as its entries."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    file = descriptor_pb2.FileDescriptorProto(name="audiolm_jax/record.proto", package="audiolm_jax", syntax="proto3")
    # Of each message the fields' names, numbers, and types: scalars, or messages of this file.
    messages: dict[str, list[tuple[str, int, int, int | str]]] = {
        "Example": [("features", 1, one, "Features")],
        "Features": [("feature", 1, many, "Entry")],
        "Entry": [("key", 1, one, field.TYPE_STRING), ("value", 2, one, "Feature")],
        "Feature": [("bytes_list", 1, one, "BytesList"), ("int64_list", 3, one, "Int64List")],
        "BytesList": [("value", 1, many, field.TYPE_BYTES)],
        "Int64List": [("value", 1, one, field.TYPE_BYTES)],
    }
    for message, fields in messages.items():
        described = file.message_type.add(name=message)
        for name, number, label, kind in fields:
            of_message = isinstance(kind, str)
            described.field.add(
                name=name, number=number, label=label,
                type=field.TYPE_MESSAGE if of_message else kind,
                type_name=f".audiolm_jax.{kind}" if of_message else None,
            )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("audiolm_jax.Example"))
