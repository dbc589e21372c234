"""Hugging Face models as parts of ours: one module of this package for each family, named as its `model_type`."""

import importlib
import os

from audiolm_jax import files
from audiolm_jax.errors import UserError
from audiolm_jax.interop.huggingface import read_config
from audiolm_jax.parts import write_part

FAMILIES = ("dac", "encodec", "mimi")


def convert(source: str | os.PathLike[str], output: str | os.PathLike[str]):
    """Writes the model of a Hugging Face folder to a new folder, as a part that every command takes.

    Raises:
      UserError: an output that exists, a source that is no such folder, of an unknown family, or damaged.
    """
    files.refuse_existing(output)
    family = read_config(source)["model_type"]
    if family not in FAMILIES:
        raise UserError(f"unknown model_type {family}", source, f"these can be converted: {', '.join(FAMILIES)}")
    part = importlib.import_module(f"audiolm_jax.interop.{family}").part_from_huggingface(source)
    with files.new_folder(output) as scratch:
        write_part(scratch, part)
