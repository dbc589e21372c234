"""Public models as parts of ours: one module of this package for each family."""

import importlib
import json
import os
import pathlib

from etils import epath

from audiolm_jax import files
from audiolm_jax.errors import UserError
from audiolm_jax.interop import ctranslate2, whisper
from audiolm_jax.interop.centroids import tokenizer_with_centroids
from audiolm_jax.interop.huggingface import WEIGHTS_FILE, read_config
from audiolm_jax.parts import Part, export, write_part
from audiolm_jax.training.checkpoint import find_checkpoint

# The module that reads a folder, by its config.json's `model_type`.
FAMILIES = {
    "dac": "dac",
    "encodec": "encodec",
    "hubert": "wav2vec2",
    "mimi": "mimi",
    "wav2vec2": "wav2vec2",
    "wav2vec2-bert": "wav2vec2_bert",
    "wavlm": "wav2vec2",
    "whisper": "whisper",
}


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    encoder: str | os.PathLike[str] | None = None,
    layer: int | None = None,
):
    """Writes a model to a new folder, as a part that every command takes: safetensors with a JSON config.

    Args:
      source: folder of a Hugging Face model, of a Whisper in CTranslate2's format, or of a part of ours, such as a
        training run; or file of centroids.
      output: the new folder.
      encoder, layer: folder of the encoder that centroids belong to, and which of its hidden states.

    Raises:
      UserError: an output that exists, a source that is no such folder, of an unknown family, or damaged; for
        centroids as `tokenizer_with_centroids`.
    """
    files.refuse_existing(output)
    if (encoder is None) != (layer is None):
        raise UserError("centroids need both --encoder and --layer", source, "give the other one, too")
    if encoder is not None and layer is not None:
        part = tokenizer_with_centroids(source, encoder, layer)
    elif _is_ours(source):
        export(source, output)
        return
    else:
        part = _public_part(source)
    with files.new_folder(output) as scratch:
        write_part(scratch, part)


def _public_part(source: str | os.PathLike[str]) -> Part:
    if (pathlib.Path(source) / ctranslate2.FILE).is_file() and not (pathlib.Path(source) / WEIGHTS_FILE).is_file():
        return whisper.part_from_ctranslate2(source)
    family = read_config(source)["model_type"]
    if family not in FAMILIES:
        raise UserError(f"unknown model_type {family}", source, f"these can be converted: {', '.join(FAMILIES)}")
    return importlib.import_module(f"audiolm_jax.interop.{FAMILIES[family]}").part_from_huggingface(source)


def _is_ours(source: str | os.PathLike[str]) -> bool:
    """Whether it is a training run, a checkpoint or an exported part."""
    try:
        description = json.loads((pathlib.Path(source) / "config.json").read_text())
    except (OSError, ValueError):
        return find_checkpoint(epath.Path(source)) is not None
    return isinstance(description, dict) and not {"format_version", "objective"}.isdisjoint(description)
