"""Loading parts as models, and the bundle: all parts of one AudioLM in a self-contained folder.

BUNDLE/audiolm.json               format version; config and fingerprint of each part
BUNDLE/{codec,semantic_tokenizer,semantic,coarse,fine,detector}/   exported parts

Where the coarse stage predicts every level there is no fine part, and where it needs no semantic tokens (the baseline
of the paper's piano experiment) there is no semantic part and no semantic tokenizer. A detector of what the others
generate is there on request.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections
from jax.sharding import Mesh

from audiolm_jax import files
from audiolm_jax.classifier.classifier import Classifier
from audiolm_jax.codec.codec import Codec
from audiolm_jax.errors import UserError
from audiolm_jax.generate import AudioLM
from audiolm_jax.lm.decode import LanguageModel
from audiolm_jax.lm.objective import stage_from_config, transformer_from_config
from audiolm_jax.parts import Part, read_part, write_part
from audiolm_jax.semantic.tokenizer import SemanticTokenizer

ENCODERS = ("w2v_bert", "semantic_encoder")  # Kinds of parts that become a semantic tokenizer by k-means.
WEIGHTS = ("float32", "bfloat16", "int8")
FORMAT_VERSION = 1
FILE = "audiolm.json"
KINDS = {
    "codec": ("soundstream",),
    "semantic_tokenizer": ("semantic_tokenizer",),
    "semantic": ("semantic",),
    "coarse": ("coarse",),
    "fine": ("fine",),
    "detector": ("classifier",),
}


def load_codec(path: str | pathlib.Path) -> Codec:
    """Loads a codec from a training workdir, a checkpoint or an exported folder."""
    return _codec(_read("codec", path))


def load_semantic_tokenizer(path: str | pathlib.Path) -> SemanticTokenizer:
    """Loads a semantic tokenizer; an encoder without k-means loads too, and gives `features` only."""
    part = read_part(path)
    if part.kind not in (*ENCODERS, *KINDS["semantic_tokenizer"]):
        raise UserError(f"not a semantic tokenizer but a {part.kind}", path, "give an encoder or a fitted tokenizer")
    return tokenizer_from_part(part)


def load_classifier(path: str | os.PathLike[str]) -> Classifier:
    """Loads a classifier (of speakers, or a detector), or the detector of a bundle."""
    part = read_classifier(path)
    return Classifier.from_weights(part.config, part.weights)


def read_classifier(path: str | os.PathLike[str]) -> Part:
    """A classifier, or the detector of a bundle.

    Raises:
      UserError: as `read_part`, a bundle without a detector, or another kind of part.
    """
    folder = pathlib.Path(path)
    if (folder / FILE).is_file():
        folder = folder / "detector"
        if not folder.is_dir():
            raise UserError("bundle without a detector", path, "add one by `audiolm bundle --detector=DIR`")
    part = read_part(folder)
    if part.kind != "classifier":
        raise UserError(f"not a classifier but a {part.kind}", path, "give one that `audiolm train` made")
    return part


def read_encoder(path: str | os.PathLike[str]) -> Part:
    """The encoder of a folder, without the clusters that it may have.

    Raises:
      UserError: as `read_part`, or the part is no encoder.
    """
    part = read_part(path)
    if part.kind not in (*ENCODERS, *KINDS["semantic_tokenizer"]):
        raise UserError(f"not a semantic encoder but a {part.kind}", path, "give a w2v-BERT or a converted encoder")
    return dataclasses.replace(part, weights={name: part.weights[name] for name in part.weights if name != "clusters"})


def encoder_part(architecture: str, model: Any, params: Any) -> Part:
    """A public encoder.

    Args:
      architecture: its name in `semantic.encoder.ENCODERS`.
      model: its config, a dataclass.
      params: its parameters, NumPy arrays.
    """
    config = ml_collections.ConfigDict({"model": {"architecture": architecture, **dataclasses.asdict(model)}})
    return Part("semantic_encoder", config, {"params": params})


def with_clusters(encoder: Part, clusters: Mapping[str, Any]) -> Part:
    """A semantic tokenizer of an encoder and {"layer": int, "mean": [D], "std": [D], "centroids": [K, D]}."""
    arrays = {name: clusters[name] for name in ("mean", "std", "centroids")}
    weights = {**encoder.weights, "clusters": arrays}
    return Part("semantic_tokenizer", encoder.config, weights, {"layer": clusters["layer"]})


def tokenizer_from_part(part: Part) -> SemanticTokenizer:
    """A part that is an encoder, with or without k-means, as a tokenizer."""
    weights = dict(part.weights)
    clusters = weights.pop("clusters", None)
    if clusters is not None:
        clusters = {**clusters, "layer": part.settings["layer"]}
    return SemanticTokenizer.from_weights(part.config, weights, clusters)


def load_bundle(path: str | pathlib.Path, weights: str | None = None, mesh: Mesh | None = None) -> AudioLM:
    """Loads a bundle.

    Args:
      path: the folder that `write_bundle` made.
      weights: what the language models keep in memory and read in each step of decoding: "float32", "bfloat16" (which
        computes in it, too), or "int8" (8 bits and a scale for each output; computes in the type that the model was
        trained in). That type by default.
      mesh: decode the language models on its devices (see `audiolm_jax.make_mesh`), the rows of a batch shared
        out by its axes data and fsdp, the heads by tensor. One device by default, and always for the tokenizers.

    Raises:
      UserError: not a bundle, a part that is missing, changed, or does not fit the others (by name), unknown weights,
        a mesh that does not divide a language model.
    """
    if weights not in (None, *WEIGHTS):
        raise UserError("unknown weights", weights, f"use one of {', '.join(WEIGHTS)}")
    folder = pathlib.Path(path)
    fingerprints = {role: fingerprint for role, (fingerprint, _) in describe(path).items()}
    parts = {}
    for role in fingerprints:
        if not (folder / role).is_dir():
            raise UserError(f"bundle lacks its part {role}", folder / role, "bundle the parts anew")
        parts[role] = _read(role, folder / role)
        if parts[role].fingerprint() != fingerprints[role]:
            raise UserError(f"{role} is not the part that was bundled", folder / role, "bundle the parts anew")
    check_fit(parts, path)
    stages = {}
    for role in ("semantic", "coarse", "fine"):
        if role in parts:
            config = parts[role].config
            transformer = transformer_from_config(config)
            if weights in ("float32", "bfloat16"):
                transformer = dataclasses.replace(transformer, dtype=weights)
            params = parts[role].weights["params"]
            stages[role] = LanguageModel(stage_from_config(config), transformer, params, weights == "int8", mesh)
    return AudioLM(
        codec=_codec(parts["codec"]),
        tokenizer=tokenizer_from_part(parts["semantic_tokenizer"]) if "semantic_tokenizer" in parts else None,
        stages=stages,
        mean_run_length=parts["semantic"].settings["tokens"]["mean_run_length"] if "semantic" in parts else 1.0,
        fingerprints=fingerprints,
    )


def describe(path: str | pathlib.Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Fingerprint and configuration of a bundle's parts by role, as it says; raises a UserError where it is none."""
    file = pathlib.Path(path) / FILE
    if not file.is_file():
        raise UserError("not a bundle", path, "make one with `audiolm bundle`")
    try:
        description = json.loads(file.read_text())
        if description["format_version"] != FORMAT_VERSION:
            raise UserError(f"format version {description['format_version']}", file, "bundle the parts anew")
        return {role: (entry["fingerprint"], entry["config"]) for role, entry in description["parts"].items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError("bundle is damaged", file, "bundle the parts anew") from error


def write_bundle(sources: dict[str, str | None], output: str | pathlib.Path):
    """Copies parts into one folder that needs nothing else.

    Args:
      sources: folder of each part by role; None for one that is not needed.
      output: a new folder.

    Raises:
      UserError: a part of the wrong kind, one that is missing or does not fit, an output that exists.
    """
    files.refuse_existing(output)
    parts = {role: _read(role, path) for role, path in sources.items() if path is not None}
    check_fit(parts, output)
    description = {
        "format_version": FORMAT_VERSION,
        "parts": {
            role: {"kind": part.kind, "fingerprint": part.fingerprint(), "config": part.config.to_dict()}
            for role, part in parts.items()
        },
    }
    with files.new_folder(output) as scratch:
        for role, part in parts.items():
            (scratch / role).mkdir()
            write_part(scratch / role, part)
        (scratch / FILE).write_text(json.dumps(description, indent=2) + "\n")


def check_fit(parts: dict[str, Part], where: str | pathlib.Path):
    """Raises a UserError that names the first part which is missing or does not fit the others."""
    for role in ("codec", "coarse"):
        _need(parts, role, where)
    coarse = parts["coarse"].config.stage
    semantic_roles = ("semantic_tokenizer", "semantic")
    has_semantic = coarse.get("semantic_condition", True) or any(role in parts for role in semantic_roles)
    for role in semantic_roles if has_semantic else ():
        _need(parts, role, where)
    if "fine" not in parts and coarse.num_coarse_quantizers < coarse.num_quantizers:
        levels = f"the coarse stage predicts {coarse.num_coarse_quantizers} of {coarse.num_quantizers} levels"
        raise UserError(f"part fine is missing: {levels}", where, "give --fine=DIR")
    codec = _codec(parts["codec"])
    facts = {
        "codebook_size": codec.codebook_size,
        "num_quantizers": codec.num_quantizers,
        "acoustic_rate": codec.frame_rate,
    }
    if has_semantic:
        tokenizer = tokenizer_from_part(parts["semantic_tokenizer"])
        facts |= {"num_clusters": tokenizer.vocab_size, "semantic_rate": tokenizer.frame_rate}
        if codec.sample_rate != tokenizer.sample_rate:
            rates = f"{tokenizer.sample_rate} Hz, the codec's {codec.sample_rate} Hz"
            raise UserError(
                f"semantic_tokenizer does not fit: its sample rate is {rates}", where, "use parts of one rate"
            )
    tokenizers = [role for role in ("codec", "semantic_tokenizer") if role in parts]
    fingerprints = {role: parts[role].fingerprint() for role in tokenizers}
    for role in ("semantic", "coarse", "fine"):
        if role not in parts:
            continue
        stage, tokens = parts[role].config.stage, parts[role].settings.get("tokens", {})
        for name, value in facts.items():
            if stage[name] != value:
                mismatch = f"its {name} is {stage[name]}, not {value}"
                raise UserError(f"{role} does not fit: {mismatch}", where, "use parts of one run")
        for tokenizer_role, fingerprint in fingerprints.items():
            if tokens.get(tokenizer_role) != fingerprint:
                raise UserError(
                    f"{role} does not fit: it was trained on tokens of another {tokenizer_role}",
                    where,
                    "use the parts that made its tokens",
                )
    if "fine" in parts and parts["fine"].config.stage.num_coarse_quantizers != coarse.num_coarse_quantizers:
        mismatch = "its num_coarse_quantizers is not the coarse stage's"
        raise UserError(f"fine does not fit: {mismatch}", where, "use parts of one run")


def _need(parts: dict[str, Part], role: str, where: str | pathlib.Path):
    if role not in parts:
        raise UserError(f"part {role} is missing", where, f"give --{role}=DIR")


def _read(role: str, path: str | pathlib.Path) -> Part:
    part = read_part(path)
    if part.kind not in KINDS[role]:
        hint = "run `audiolm fit-kmeans` first" if part.kind in ENCODERS else f"give a {' or '.join(KINDS[role])}"
        raise UserError(f"{role} is not a {role} but a {part.kind}", path, hint)
    return part


def _codec(part: Part) -> Codec:
    return Codec.from_weights(part.config, part.weights)
