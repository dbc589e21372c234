"""Whisper as CTranslate2 stores it: a `model.bin` written as its format says, independently of what reads it."""

import pathlib
import struct

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it.
import numpy as np
import torch

TYPES = ["float32", "int8", "int16", "int32", "float16", "bfloat16"]


def text(value: str) -> bytes:
    return struct.pack("<H", len(value.encode()) + 1) + value.encode() + b"\0"


def variable(name: str, array: np.ndarray) -> bytes:
    header = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
    return text(name) + header + struct.pack("<BI", TYPES.index(str(array.dtype)), array.nbytes) + array.tobytes()


def model_bin(variables: dict, aliases: dict | None = None, kind: str = "WhisperSpec", version: int = 6) -> bytes:
    """The file's bytes; `aliases` are names of variables by those that stand for them."""
    parts = [struct.pack("<I", version), text(kind), struct.pack("<II", 3, len(variables))]
    parts += [variable(name, variables[name]) for name in sorted(variables)]
    parts += [struct.pack("<I", len(aliases or {}))]
    parts += [text(alias) + text(name) for alias, name in (aliases or {}).items()]
    return b"".join(parts)


def quantized(matrix: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers and the scale that divides them: 127 for the largest of each row in 8 bits, 1024 of all in 16."""
    if dtype == "int16":
        scale = np.float32(2**10 / np.abs(matrix).max())
        return np.rint(matrix * scale).astype(np.int16), scale
    scale = (127.0 / np.abs(matrix.reshape(len(matrix), -1)).max(axis=1)).astype(np.float32)
    return np.rint(matrix * scale.reshape(-1, *[1] * (matrix.ndim - 1))).astype(np.int8), scale


def encoder_variables(model, dtype: str, rest: str) -> dict[str, np.ndarray]:
    """The encoder of a Hugging Face `WhisperModel` by CTranslate2's names.

    Args:
      model: whose weights become those that the variables stand for.
      dtype: of matrices and kernels.
      rest: of biases, norms and positions.
    """
    encoder, variables = model.get_encoder(), {}

    def store(name: str, tensors: list[torch.Tensor], matrices: bool):
        joined = torch.cat([tensor.detach() for tensor in tensors])
        if matrices and dtype.startswith("int"):
            numbers, scale = quantized(joined.numpy(), dtype)
            variables[name], variables[f"{name}_scale"] = numbers, np.asarray(scale)
            divisor = torch.from_numpy(np.asarray(scale)).reshape(-1, *[1] * (joined.ndim - 1))
            meant = torch.from_numpy(numbers.astype(np.float32)) / divisor
        else:
            kept = joined.to(getattr(torch, dtype if matrices else rest))
            meant = kept.float()
            variables[name] = meant.numpy().astype(
                ml_dtypes.bfloat16 if kept.dtype == torch.bfloat16 else kept.numpy().dtype
            )
        for tensor, part in zip(tensors, meant.split([len(tensor) for tensor in tensors])):
            tensor.data.copy_(part)

    def linear(name: str, *modules):
        store(f"encoder/{name}/weight", [module.weight for module in modules], matrices=True)
        width = len(modules[0].weight)
        biases = [torch.zeros(width) if module.bias is None else module.bias for module in modules]
        store(f"encoder/{name}/bias", biases, matrices=False)

    def norm(name: str, module):
        store(f"encoder/{name}/gamma", [module.weight], matrices=False)
        store(f"encoder/{name}/beta", [module.bias], matrices=False)

    for name in ("conv1", "conv2"):
        linear(name, getattr(encoder, name))
    store("encoder/position_encodings/encodings", [encoder.embed_positions.weight], matrices=False)
    norm("layer_norm", encoder.layer_norm)
    for number, layer in enumerate(encoder.layers):
        attention = layer.self_attn
        norm(f"layer_{number}/self_attention/layer_norm", layer.self_attn_layer_norm)
        linear(f"layer_{number}/self_attention/linear_0", attention.q_proj, attention.k_proj, attention.v_proj)
        linear(f"layer_{number}/self_attention/linear_1", attention.out_proj)
        norm(f"layer_{number}/ffn/layer_norm", layer.final_layer_norm)
        linear(f"layer_{number}/ffn/linear_0", layer.fc1)
        linear(f"layer_{number}/ffn/linear_1", layer.fc2)
    variables["encoder/num_heads"] = np.array(model.config.encoder_attention_heads, np.int16)
    return variables | {"decoder/embeddings/weight": np.ones((3, 2), np.float16)}


def write(folder: pathlib.Path, data: bytes) -> pathlib.Path:
    """A folder as converters make it."""
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(data)
    (folder / "config.json").write_text('{"lang_ids": [1]}')
    (folder / "vocabulary.txt").write_text("a\nb\n")
    return folder
