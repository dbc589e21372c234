"""The parts that make an AudioLM — codec, semantic tokenizer, language models — as folders.

A part's folder is a training workdir (its last checkpoint), one checkpoint `WORKDIR/checkpoints/STEP`,
or an exported folder: `config.json` and `model.safetensors`, perhaps with `training.safetensors`, what only further
training needs (a codec's discriminators). Nothing is ever pickled.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import flax.traverse_util
import jax
import ml_collections
import numpy as np
import safetensors.numpy
from etils import epath

from audiolm_jax import config as configs
from audiolm_jax import files
from audiolm_jax.errors import UserError
from audiolm_jax.objective import Objective, State
from audiolm_jax.training import checkpoint, registry, step
from audiolm_jax.training.sharding import unbox

FORMAT_VERSION = 2
CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE = "config.json", "model.safetensors", "training.safetensors"
ARCHITECTURE_FIELDS = ("objective", "model", "stage")


@dataclasses.dataclass(frozen=True)
class Part:
    """One trained model.

    Attributes:
      kind: the objective that trained it; "semantic_encoder" for an encoder of others, which none of ours trains;
        "semantic_tokenizer" for any encoder with k-means.
      config: its training config; of a "semantic_encoder" `model` alone.
      weights: nested dictionaries of NumPy arrays (`Objective.weights`; a tokenizer's `clusters` too).
      settings: what belongs to the part and is no array: a tokenizer's `layer`, a language model's
        `tokens` (metadata of the token dataset it was trained on).
      training: `Objective.optional_weights`, where they were saved and asked for; they decide nothing of what the part
        computes.
    """

    kind: str
    config: ml_collections.ConfigDict
    weights: State
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: State = dataclasses.field(default_factory=dict)

    def fingerprint(self) -> str:
        """Hash of everything that decides what the part computes."""
        architecture = {name: self.config[name] for name in ARCHITECTURE_FIELDS if name in self.config}
        plain = json.loads(ml_collections.ConfigDict(architecture).to_json())
        digest = hashlib.sha256(json.dumps([self.kind, plain, self.settings], sort_keys=True).encode())
        for name, array in sorted(_flatten(self.weights).items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:32]

    def weights_for(self, abstract_state: State, objective: Objective) -> State:
        """The weights that training can start from (`config.init_from`), checked by name and shape.

        With them come those of the `Objective.optional_weights` that the part has in these shapes.
        """
        wanted = objective.weights(abstract_state)
        ours = {name: self.weights.get(name, {}) for name in wanted}
        shapes = _shapes(wanted)
        for name, shape in {**{name: None for name in _flatten(ours)}, **shapes}.items():
            found = _flatten(ours).get(name)
            if found is None or found.shape != shape:
                has = "nothing" if found is None else found.shape
                raise UserError(
                    f"weights do not fit: {name} is {shape} in the model, {has} in the file",
                    "config.init_from",
                    "choose weights of the same architecture",
                )
        optional = {name: self.training.get(name, {}) for name in objective.optional_weights}
        fitting = {name: tree for name, tree in optional.items() if _shapes(tree) == _shapes(abstract_state[name])}
        return {**ours, **fitting}


def _flatten(weights: State) -> dict[str, np.ndarray]:
    return flax.traverse_util.flatten_dict(weights, sep="/")


def _shapes(weights: State) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in _flatten(weights).items()}


def read_part(path: str | os.PathLike[str], for_training: bool = False) -> Part:
    """Reads a part from any of its kinds of folder.

    Args:
      path: the folder.
      for_training: also what only further training needs.

    Raises:
      UserError: no such folder, not a part, an unknown version, or a damaged file.
    """
    folder = epath.Path(path)
    if not folder.is_dir():
        raise UserError("no such folder", path, "give a training workdir, a checkpoint or an exported part")
    if (folder / WEIGHTS_FILE).is_file():
        return _read_exported(folder, for_training)
    found = checkpoint.find_checkpoint(folder)
    if found is None:
        raise UserError("no model here", path, "give a training workdir with a checkpoint, or an exported part")
    return _read_checkpoint(found, for_training)


def _read_exported(folder: epath.Path, for_training: bool) -> Part:
    try:
        description = json.loads((folder / CONFIG_FILE).read_text())
        if description.get("format_version") != FORMAT_VERSION:
            version = description.get("format_version", "none: not ours")
            raise UserError(f"format version {version}", folder / CONFIG_FILE, "convert or export the part anew")
        config = configs.from_json(json.dumps(description["config"]))
        weights = _load(folder / WEIGHTS_FILE)
        _check_tensors(folder, weights, description["tensors"])
        training = _load(folder / TRAINING_FILE) if for_training and (folder / TRAINING_FILE).is_file() else {}
        return Part(description["kind"], config, weights, description["settings"], training)
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"part is damaged ({error})", folder, "export it anew") from error


def _check_tensors(folder: epath.Path, weights: State, wanted: dict[str, list[int]]):
    """Raises a UserError that names the first tensor which is not as the part was written."""
    found = {name: list(shape) for name, shape in _shapes(weights).items()}
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            if name not in found:
                problem = "is missing"
            else:
                problem = f"is {found[name]}, not {wanted[name]}" if name in wanted else "belongs to no layer"
            raise UserError(f"tensor {name} {problem}", folder / WEIGHTS_FILE, "convert or export the part anew")


def _load(path: epath.Path) -> State:
    return flax.traverse_util.unflatten_dict(safetensors.numpy.load(path.read_bytes()), sep="/")


def _read_checkpoint(folder: epath.Path, for_training: bool) -> Part:
    try:
        description = checkpoint.read_description(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint is damaged ({error})", folder, "use an earlier one") from error
    config = configs.from_json(json.dumps(description["config"]))
    objective = registry.build_objective(config)
    initial = functools.partial(step.initial_state, objective, config.ema_decay)
    abstract_state = unbox(jax.eval_shape(initial, jax.random.key(0)))
    weights = {"ema": abstract_state["ema"]} if config.ema_decay else objective.weights(abstract_state)
    optional = {name: abstract_state[name] for name in objective.optional_weights if for_training}
    restored = checkpoint.restore_weights(folder, abstract_state, {**weights, **optional})
    restored = jax.tree.map(np.asarray, restored)
    training = {name: restored.pop(name) for name in optional}
    settings = {"tokens": description["tokens"]} if description["tokens"] else {}
    return Part(config.objective, config, restored.get("ema", restored), settings, training)


def export(source: str | os.PathLike[str], output: str | os.PathLike[str]):
    """Writes a part, such as a training workdir's, to a new folder: safetensors with a JSON config.

    Raises:
      UserError: as `read_part`, or the output exists.
    """
    files.refuse_existing(output)
    part = read_part(source, for_training=True)
    with files.new_folder(output) as scratch:
        write_part(scratch, part)


def write_part(folder: pathlib.Path, part: Part):
    """Exports a part into an existing, empty folder."""
    description = {
        "format_version": FORMAT_VERSION,
        "kind": part.kind,
        "fingerprint": part.fingerprint(),
        "settings": part.settings,
        "tensors": {name: list(shape) for name, shape in _shapes(part.weights).items()},
        "config": part.config.to_dict(),
    }
    _save(folder / WEIGHTS_FILE, part.weights)
    if part.training:
        _save(folder / TRAINING_FILE, part.training)
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")


def _save(path: pathlib.Path, weights: State):
    contiguous = {name: np.ascontiguousarray(array) for name, array in _flatten(weights).items()}
    path.write_bytes(safetensors.numpy.save(contiguous))
