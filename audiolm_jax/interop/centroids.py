"""Centroids that others fitted on an encoder's layer, as a semantic tokenizer of ours.

Shape suffixes: K clusters, D model.
"""

import os
import pathlib
import zipfile

import numpy as np

from audiolm_jax import bundle
from audiolm_jax.errors import UserError
from audiolm_jax.interop import pickles
from audiolm_jax.parts import Part

NPY, ZIP = b"\x93NUMPY", b"PK"
NAMES = ("cluster_centers_", "centroids")


def tokenizer_with_centroids(source: str | os.PathLike[str], encoder: str | os.PathLike[str], layer: int) -> Part:
    """An encoder with existing centroids; frames are not normalised before they are compared with them.

    Args:
      source: file of the centroids, see `read_centroids`.
      encoder: folder of a part that is an encoder; clusters of its own are left out.
      layer: hidden state that the centroids are of.

    Raises:
      UserError: as `read_centroids`; no encoder, no such layer, or centroids of another width.
    """
    part = bundle.read_encoder(encoder)
    centroids_KD = read_centroids(source)
    tokenizer = bundle.tokenizer_from_part(part)
    second_BW = np.zeros((1, tokenizer.sample_rate), np.float32)
    width = tokenizer.features(second_BW, layer=layer).shape[-1]
    if centroids_KD.shape[1] != width:
        problem = f"centroids are {centroids_KD.shape[1]} wide, the encoder's frames {width}"
        raise UserError(problem, source, "give the encoder that they were fitted on")
    as_they_are = {"mean": np.zeros(width, np.float32), "std": np.ones(width, np.float32)}
    return bundle.with_clusters(part, {"layer": layer, **as_they_are, "centroids": centroids_KD})


def read_centroids(source: str | os.PathLike[str]) -> np.ndarray:
    """Centroids [K, D], float32, of a file.

    Args:
      source: an array as .npy, or as .npz under a name of `NAMES` or alone; or what joblib or pickle dumped of
        scikit-learn's `KMeans` or `MiniBatchKMeans` (as textless-lib and slamkit use them), or of the array. Nothing
        of a pickle is run, see `pickles`.

    Raises:
      UserError: no such file, none of these, or not a matrix of finite numbers.
    """
    path = pathlib.Path(source)
    if not path.is_file():
        raise UserError("no such file", source, "give a .npy or .npz, or a k-means that joblib dumped")
    with path.open("rb") as stream:
        magic = stream.read(len(NPY))
    array = _numpy(path) if magic.startswith((NPY, ZIP)) else _pickled(path)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "iuf":
        problem = f"centroids are {list(array.shape)} of type {array.dtype}"
        raise UserError(problem, source, "give one row of numbers a cluster")
    centroids_KD = array.astype(np.float32)
    if not np.isfinite(centroids_KD).all():
        raise UserError("centroids are not finite", source, "fit them anew")
    return centroids_KD


def _numpy(path: pathlib.Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = [name for name in NAMES if name in loaded.files] or loaded.files
            if len(names) != 1:
                hint = f"save one of them, or name it {' or '.join(NAMES)}"
                raise UserError(f"arrays {', '.join(names) or 'are none'}", path, hint)
            return np.asarray(loaded[names[0]])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"no array of numbers ({error})", path, "save the centroids as .npy") from error


def _pickled(path: pathlib.Path) -> np.ndarray:
    value = pickles.read(path)
    if isinstance(value, pickles.Call) and value.function in pickles.K_MEANS:
        if not (isinstance(value.state, dict) and "cluster_centers_" in value.state):
            raise UserError("k-means that was not fitted", path, "fit it, or give another")
        value = value.state["cluster_centers_"]
    try:
        return pickles.array_of(value)
    except (ValueError, TypeError) as error:
        raise UserError(f"neither k-means nor an array ({error})", path, "save the centroids as .npy") from error
