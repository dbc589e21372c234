"""Public models with random weights, and how closely a codec of ours must follow them."""

import json
import pathlib

import numpy as np
import safetensors.torch
import torch

from audiolm_jax.codec.codec import Codec


def randomized(model):
    """The model with the buffers and scales random that would otherwise start as constants."""
    ranges = {"embed": (-1, 1), "embed_sum": (-1, 1), "cluster_size": (1, 2), "cluster_usage": (0.5, 2)}
    with torch.no_grad():
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            if name.split(".")[-1] in ranges:
                tensor.uniform_(*ranges[name.split(".")[-1]])
            elif "layer_scale" in name:
                tensor.uniform_(0.2, 0.5)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def save(model, folder: pathlib.Path, old_spelling: bool = False) -> pathlib.Path:
    """The model's folder; in the older of PyTorch's two spellings of weight normalisation, if wished."""
    model.save_pretrained(folder)
    if old_spelling:
        rewrite(
            folder,
            lambda tensors: {
                name.replace("parametrizations.weight.original0", "weight_g").replace(
                    "parametrizations.weight.original1", "weight_v"
                ): tensor
                for name, tensor in tensors.items()
            },
        )
    return folder


def rewrite(folder: pathlib.Path, change):
    """Replaces a folder's tensors by what `change` makes of them."""
    path = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)


def set_config(folder: pathlib.Path, **fields):
    """Changes fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def waves(batch: int, size: int, seed: int = 0) -> np.ndarray:
    """Noise."""
    return np.random.default_rng([batch, size, seed]).standard_normal((batch, size)).astype(np.float32)


def assert_features_close(found, expected):
    """Within 1e-4 of the largest."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def assert_rows_are_alone(codec: Codec, features_of, lengths_B: np.ndarray):
    """Features of each row of a ragged batch are what the original gives for that recording alone.

    Args:
      codec: ours.
      features_of: [1, W] -> the original's [1, T, D].
      lengths_B: of the rows.
    """
    wave_BW = waves(len(lengths_B), int(lengths_B.max()))
    x_BTD = codec.features(wave_BW, lengths_B)
    for row, length in enumerate(lengths_B):
        alone_BTD = features_of(wave_BW[row : row + 1, :length])
        assert_features_close(x_BTD[row : row + 1, : alone_BTD.shape[1]], alone_BTD)


def assert_codes_equal(found_BTQ, expected_BTQ, x_BTD, embedding_QND):
    """Fewer than one code in a thousand differs, each at a tie: two codes as near as rounding can tell.

    Args:
      found_BTQ, expected_BTQ: codes.
      x_BTD: what the first level quantizes.
      embedding_QND: codebooks.
    """
    found_BTQ, expected_BTQ = np.asarray(found_BTQ), np.asarray(expected_BTQ)
    assert found_BTQ.shape == expected_BTQ.shape
    margins = margins_of(np.asarray(x_BTD, np.float64), np.asarray(embedding_QND, np.float64), expected_BTQ)
    different = found_BTQ != expected_BTQ
    # Levels after a tie quantize another rest.
    first = different & (np.cumsum(different, axis=-1) == 1)
    print(f"{different.sum()} of {different.size} codes differ; smallest margin {margins.min():.1e}")
    assert different.mean() < 1e-3 and np.all(margins[first] < 1e-5)


def margins_of(x_BTD: np.ndarray, embedding_QND: np.ndarray, codes_BTQ: np.ndarray) -> np.ndarray:
    """By how much the second nearest code is farther than the nearest, of its distance: [B, T, Q]."""
    margins = []
    for level in range(codes_BTQ.shape[-1]):
        distances = np.sort(np.linalg.norm(x_BTD[:, :, None] - embedding_QND[level], axis=-1), axis=-1)
        margins.append((distances[..., 1] - distances[..., 0]) / distances[..., 1])
        x_BTD = x_BTD - embedding_QND[level][codes_BTQ[..., level]]
    return np.stack(margins, axis=-1)


def assert_streams_as_offline(codec: Codec, wave_BW: np.ndarray, hops: int, atol: float):
    """Chunks of so many hops give the codes and the waveform of all at once; the last one may end anywhere."""
    codes_BTQ = np.asarray(codec.encode(wave_BW))
    size, state, pieces = hops * codec.hop_length, None, []
    for start in range(0, wave_BW.shape[1], size):
        chunk_BTQ, state = codec.encode_chunk(wave_BW[:, start : start + size], state)
        pieces.append(chunk_BTQ)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), codes_BTQ)
    state, pieces = None, []
    for start in range(0, codes_BTQ.shape[1], hops):
        chunk_BW, state = codec.decode_chunk(codes_BTQ[:, start : start + hops], state)
        pieces.append(chunk_BW)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), codec.decode(codes_BTQ), atol=atol)
