"""Configs: the fields of every objective with the papers' values, and how a recipe file is read.

A recipe is a file `configs/NAME.py` with `get_config()`; it calls one of the functions below and
changes a few fields. Nothing here imports JAX, so `audiolm --help` stays quick.
"""

import ast
import difflib
import importlib.util
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags

from audiolm_jax.errors import UserError

Kind = TypeVar("Kind")


def _common(objective: str) -> ml_collections.ConfigDict:
    """Fields of every objective.

    `keep_checkpoints` latest and `keep_best_checkpoints` best ones (by `eval_loss`) stay on disk; `ema_decay` above 0
    keeps a moving average of the weights, which evaluation, export and generation then use; `max_skipped_steps` in a
    row whose loss or gradient is not finite end the run; `profile` traces `num_steps` steps from `start_step` on.
    """
    config = ml_collections.ConfigDict()
    config.objective = objective
    config.seed = 0
    config.num_train_steps = 1_000_000
    config.batch_size = 256
    config.data_dir = ""
    config.init_from = ""
    config.log_every_steps = 100
    config.eval_every_steps = 5_000
    config.max_eval_batches = -1
    config.checkpoint_every_steps = 5_000
    config.keep_checkpoints = 3
    config.keep_best_checkpoints = 1
    config.ema_decay = 0.0
    config.max_skipped_steps = 20
    config.profile = ml_collections.ConfigDict({"start_step": 0, "num_steps": 0})
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.input = ml_collections.ConfigDict({"num_threads": 16, "prefetch_batches": 16})
    return config


def _optimizer(**fields) -> ml_collections.ConfigDict:
    """`name`: "adamw" or "adafactor"; `schedule`: "constant", "rsqrt" or "cosine", after `warmup_steps` of warm-up."""
    optimizer = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_steps": 0,
        "beta1": 0.9,
        "beta2": 0.999,
        "decay_rate": 0.8,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
    }
    return ml_collections.ConfigDict({**optimizer, **fields})


def soundstream_config() -> ml_collections.ConfigDict:
    """SoundStream as in AudioLM: 16 kHz, 50 Hz frames, 12 levels of 1024 codes (arXiv 2107.03312, 2209.03143 §4.1).

    The papers leave the optimiser, the embedding's width and the length of a crop open. EnCodec's options (arXiv
    2210.13438 §3.4) are off: `discriminator.multi_stft_windows`, of which each adds a discriminator as wide as
    `stft_channels`, and `loss.balancer`, with which the four `loss.*_weight` are shares in the gradient for the
    waveform, whatever the losses' scales (EnCodec: adversarial 3, feature 3, reconstruction 1, waveform 0.1).
    """
    config = _common("soundstream")
    config.batch_size = 128
    config.crop_seconds = 2.0
    config.model = ml_collections.ConfigDict(
        {
            "sample_rate": 16_000,
            "channels": 32,
            "strides": (2, 4, 5, 8),
            "embed_dim": 64,
            "num_quantizers": 12,
            "codebook_size": 1024,
            "snake": False,
            "codebook_dim": 0,
        }
    )
    config.quantizer = ml_collections.ConfigDict(
        {
            "decay": 0.99,
            "dead_code_threshold": 2.0,
            "dead_code_share": 0.1,
            "commitment_weight": 1.0,
            "dropout": True,
            "kmeans_iterations": 20,
            "kmeans_frames_per_code": 10,
        }
    )
    config.discriminator = ml_collections.ConfigDict(
        {
            "waveform_channels": (16, 64, 256, 1024, 1024, 1024),
            "waveform_scales": 3,
            "waveform_group_width": 4,
            "stft_channels": 32,
            "stft_window": 1024,
            "stft_hop": 256,
            "multi_stft_windows": (),
            "start_step": 0,
        }
    )
    config.loss = ml_collections.ConfigDict(
        {
            "adversarial_weight": 1.0,
            "feature_weight": 100.0,
            "reconstruction_weight": 1.0,
            "waveform_weight": 0.0,
            "balancer": False,
            "num_mels": 64,
            "min_log2_window": 6,
            "max_log2_window": 11,
        }
    )
    config.optimizer = _optimizer(learning_rate=1e-4, beta1=0.5, beta2=0.9)
    config.discriminator_optimizer = _optimizer(learning_rate=1e-4, beta1=0.5, beta2=0.9)
    return config


def tiny_soundstream_config() -> ml_collections.ConfigDict:
    """A SoundStream that two CPU cores train in about six minutes on ten minutes of speech.

    Beside its size it differs from the paper's in what two thousand steps need: a higher learning rate, codebooks that
    forget sooner, a strong waveform term in the loss, discriminators that join at the end and have no channel groups.
    """
    config = soundstream_config()
    config.num_train_steps = 2000
    config.batch_size = 4
    config.crop_seconds = 0.5
    config.log_every_steps = 50
    config.eval_every_steps = 500
    config.max_eval_batches = 32
    config.checkpoint_every_steps = 500
    config.model.update({"channels": 8, "embed_dim": 32, "num_quantizers": 6, "codebook_size": 32})
    config.quantizer.update({"decay": 0.98, "commitment_weight": 10.0, "kmeans_iterations": 10})
    config.discriminator.update(
        {
            "waveform_channels": (4, 16, 32, 64, 64, 64),
            "waveform_group_width": 64,
            "stft_channels": 4,
            "stft_window": 512,
            "stft_hop": 256,
            "start_step": 1700,
        }
    )
    config.loss.waveform_weight = 1000.0
    config.optimizer.update(
        {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 20, "beta1": 0.8, "beta2": 0.99}
    )
    config.discriminator_optimizer.update({"learning_rate": 2e-4, "beta1": 0.8, "beta2": 0.99})
    config.input.update({"num_threads": 2, "prefetch_batches": 4})
    return config


def w2v_bert_config() -> ml_collections.ConfigDict:
    """w2v-BERT XL: 12 contrastive + 12 masked-prediction Conformer blocks, 0.6 B parameters (arXiv 2108.06209).

    `bucket_seconds` are lengths below `crop_seconds`: shorter recordings are trained on in batches of their own.
    """
    config = _common("w2v_bert")
    config.num_train_steps = 400_000
    config.batch_size = 2048
    config.crop_seconds = 30.0
    config.bucket_seconds = ()
    config.model = ml_collections.ConfigDict(
        {
            "sample_rate": 16_000,
            "num_mels": 80,
            "subsampling_channels": 128,
            "embed_dim": 1024,
            "mlp_dim": 4096,
            "num_heads": 8,
            "conv_kernel": 5,
            "num_contrastive_layers": 12,
            "num_masked_layers": 12,
            "dropout_rate": 0.1,
            "codebook_size": 1024,
            "codebook_dim": 1024,
            "noise_scale": 0.1,
            "default_layer": 19,
            "dtype": "bfloat16",
            "remat": "full",
            "block_positions": 64,
        }
    )
    config.mesh.update({"data": 1, "fsdp": -1})
    config.statistics_batches = 8
    config.masking = ml_collections.ConfigDict({"start_probability": 0.065, "span": 10})
    config.loss = ml_collections.ConfigDict(
        {
            "contrastive_weight": 1.0,
            "masked_weight": 1.0,
            "diversity_weight": 0.1,
            "num_distractors": 100,
            "contrastive_temperature": 0.1,
            "gumbel_start": 2.0,
            "gumbel_end": 0.5,
            "gumbel_decay": 0.999995,
        }
    )
    config.optimizer = _optimizer(learning_rate=2e-3, schedule="rsqrt", warmup_steps=25_000, beta2=0.98, clip_norm=1.0)
    return config


def tiny_w2v_bert_config() -> ml_collections.ConfigDict:
    """A w2v-BERT that two CPU cores train in about two minutes on ten minutes of audio.

    Beside its size it differs from XL in what a few hundred steps need: spans of 200 ms rather than 400 ms, a stronger
    diversity loss, a Gumbel temperature that reaches its floor within 50 steps, no dropout.
    """
    config = w2v_bert_config()
    config.num_train_steps = 700
    config.batch_size = 8
    config.crop_seconds = 4.0
    config.log_every_steps = 20
    config.eval_every_steps = 200
    config.checkpoint_every_steps = 200
    config.model.update(
        {
            "subsampling_channels": 16,
            "embed_dim": 128,
            "mlp_dim": 256,
            "num_heads": 4,
            "num_contrastive_layers": 2,
            "num_masked_layers": 2,
            "dropout_rate": 0.0,
            "codebook_size": 64,
            "codebook_dim": 64,
            "default_layer": 3,
            "dtype": "float32",
            "remat": "none",
            "block_positions": 0,
        }
    )
    config.mesh.update({"data": -1, "fsdp": 1})
    config.masking.update({"start_probability": 0.1, "span": 5})
    config.loss.update({"diversity_weight": 0.4, "num_distractors": 20, "gumbel_start": 0.8, "gumbel_decay": 0.99})
    config.optimizer.update({"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 40})
    config.input.update({"num_threads": 2, "prefetch_batches": 2})
    return config


def language_model_config(stage: str) -> ml_collections.ConfigDict:
    """One stage of AudioLM: 12 layers, width 1024, batch 256, 1 M steps (arXiv 2209.03143 §4.1).

    A mixture takes the place of `data_dir`: token datasets of the same tokenizers (`mixture.data_dirs`) and of how many
    examples of each there are to the others' (`mixture.rates`; with `packing`, rows).

    Args:
      stage: "semantic", "coarse" or "fine".
    """
    config = _common(stage)
    config.mixture = ml_collections.ConfigDict({"data_dirs": (), "rates": ()})
    config.stage = ml_collections.ConfigDict(
        {
            "num_clusters": 1024,
            "codebook_size": 1024,
            "num_quantizers": 12,
            "num_coarse_quantizers": 4,
            "semantic_rate": 25,
            "acoustic_rate": 50,
            "deduplicate": True,
            "semantic_condition": True,
            "crop_seconds": {"semantic": 30.0, "coarse": 10.0, "fine": 3.0}[stage],
        }
    )
    config.model = ml_collections.ConfigDict(
        {
            "num_layers": 12,
            "num_heads": 16,
            "embed_dim": 1024,
            "mlp_dim": 4096,
            "gated_mlp": False,
            "dropout_rate": 0.1,
            "position": "relative_bias",
            "num_buckets": 32,
            "max_distance": 128,
            "prefix_attention": False,
            "attention": "fused",
            "block_positions": 256,
            "dtype": "bfloat16",
            "remat": "minimal",
            "unrolled_layers": 1,
        }
    )
    # Parameters, optimiser and averages cut over all devices: what lets the batch of 256 into 16 GB chips.
    config.mesh.update({"data": 1, "fsdp": -1})
    config.packing = False
    config.accumulation_steps = 1
    config.z_loss = 1e-4
    config.optimizer = _optimizer(
        learning_rate=3e-4, schedule="cosine", warmup_steps=10_000, beta2=0.98, weight_decay=0.01, clip_norm=1.0
    )
    return config


def tiny_language_model_config(stage: str) -> ml_collections.ConfigDict:
    """A stage over the tokens of `soundstream_tiny` and 64 clusters of `w2v_bert_tiny`: minutes on two CPU cores."""
    config = language_model_config(stage)
    config.num_train_steps = 250
    config.batch_size = 4
    config.log_every_steps = 10
    config.eval_every_steps = 50
    config.checkpoint_every_steps = 100
    config.stage.update(
        {
            "num_clusters": 64,
            "codebook_size": 32,
            "num_quantizers": 6,
            "num_coarse_quantizers": 2,
            "crop_seconds": {"semantic": 10.0, "coarse": 5.0, "fine": 1.5}[stage],
        }
    )
    config.model.update(
        {
            "num_layers": 2,
            "num_heads": 4,
            "embed_dim": 128,
            "mlp_dim": 512,
            "dtype": "float32",
            "dropout_rate": 0.2,
            "remat": "none",
        }
    )
    config.mesh.update({"data": -1, "fsdp": 1})
    config.optimizer.update({"learning_rate": 1.5e-3, "warmup_steps": 30})
    config.input.update({"num_threads": 2, "prefetch_batches": 2})
    return config


def classifier_config() -> ml_collections.ConfigDict:
    """The paper's network for telling speakers, or real from generated speech: 3.5 M parameters (arXiv 2209.03143 §4).

    `model.labels` are what is told apart; without any, those of the training recordings: their speakers, or what a
    manifest gives as `label`. `split_by` "speaker" takes the splits that the data have, by default by speaker;
    "recording" holds out `validation_share` of the recordings, whoever speaks and whatever the data say. The paper
    leaves the optimiser open.
    """
    config = _common("classifier")
    config.num_train_steps = 50_000
    config.crop_seconds = 1.0
    config.split_by = "recording"
    config.validation_share = 0.1
    config.statistics_batches = 8
    config.model = ml_collections.ConfigDict(
        {"sample_rate": 16_000, "num_mels": 64, "channels": (64, 128, 256, 256, 512, 512), "labels": ()}
    )
    config.optimizer = _optimizer(learning_rate=1e-3, schedule="cosine", warmup_steps=1_000, weight_decay=1e-4)
    return config


def tiny_classifier_config() -> ml_collections.ConfigDict:
    """An eighth of the channels: two CPU cores train it in about two minutes."""
    config = classifier_config()
    config.num_train_steps = 600
    config.batch_size = 32
    config.log_every_steps = 20
    config.eval_every_steps = 200
    config.checkpoint_every_steps = 200
    config.model.channels = (8, 16, 32, 32, 64, 64)
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 30})
    config.input.update({"num_threads": 2, "prefetch_batches": 4})
    return config


def shipped_folder(name: str) -> pathlib.Path:
    """`configs` or `samples`: inside an installed wheel, beside the package in a checkout."""
    package = pathlib.Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def shipped_configs() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in shipped_folder("configs").glob("*.py") if not path.stem.startswith("_"))


def load_config(file_or_name: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Reads a recipe and applies `--config.FIELD=VALUE` overrides.

    Args:
      file_or_name: the name of a shipped recipe, or a path: a recipe file, a saved `config.json`, or the folder of a
        part or run that has one.
      overrides: flags as given on the command line; nested fields by dots.

    Raises:
      UserError: no such recipe, a recipe that does not run, an unknown field or a mistyped value.
    """
    path = pathlib.Path(file_or_name)
    if file_or_name not in shipped_configs() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix not in (".py", ".json"):
        path = shipped_folder("configs") / f"{file_or_name}.py"
        if not path.is_file():
            close = difflib.get_close_matches(file_or_name, shipped_configs(), 1)
            hint = f"did you mean {close[0]}?" if close else f"choose a file or one of {', '.join(shipped_configs())}"
            raise UserError("unknown config", file_or_name, hint)
    if not path.is_file():
        raise UserError("config file not found", path, "give a recipe file or a shipped recipe's name")
    return _apply_overrides(_read_recipe(path), overrides)


def _read_recipe(path: pathlib.Path) -> ml_collections.ConfigDict:
    try:
        if path.suffix == ".json":
            description = json.loads(path.read_text())
            # An exported part's file says more than its config.
            return from_json(json.dumps(description["config"] if "format_version" in description else description))
        spec = importlib.util.spec_from_file_location(f"audiolm_recipe_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:  # A recipe is the user's code: whatever it raises is theirs to see.
        raise UserError(f"config cannot be read ({type(error).__name__}: {error})", path, "mend the recipe") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError("get_config() does not return a ConfigDict", path, "return an ml_collections.ConfigDict")
    return config


def _apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    known = flat(config)
    for override in overrides:
        name = override.lstrip("-").partition("=")[0].removeprefix("config.")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean config.{close[0]}?" if close else f"fields are {', '.join(known)}"
            raise UserError("unknown config field", f"config.{name}", hint)
        default = known[name]
        if isinstance(default, tuple) and default and "=" in override:
            _check_elements(name, default, override.partition("=")[2])
        if "=" not in override:
            raise UserError("config field without a value", f"config.{name}", f"write --config.{name}=VALUE")
        arguments = ["audiolm", f"--config.{name}={override.partition('=')[2]}"]
        values = flags.FlagValues()
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
            values(arguments)
        except (flags.Error, TypeError, ValueError) as error:
            wanted = type(known[name]).__name__
            raise UserError(
                f"value of the wrong type ({error})", f"config.{name}", f"give a value of type {wanted}"
            ) from error
    return config


def _check_elements(name: str, default: tuple, text: str):
    """Raises a UserError where the elements of a tuple are not of the default's type (the flags take any)."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = None
    kinds = {type(element) for element in default}
    if not isinstance(value, tuple | list) or {type(element) for element in value} - kinds:
        wanted = f"a tuple of {' or '.join(sorted(kind.__name__ for kind in kinds))}"
        raise UserError(f"value of the wrong type ({text})", f"config.{name}", f"give {wanted}, such as {default}")


def flat(config: ml_collections.ConfigDict) -> dict[str, object]:
    """Every leaf of a config by its dotted name, in order."""
    leaves: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            leaves.update({f"{name}.{inner}": leaf for inner, leaf in flat(value).items()})
        else:
            leaves[name] = value
    return leaves


def to_json(config: ml_collections.ConfigDict) -> str:
    """The resolved config as indented JSON, the form `from_json` reads back."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """Inverse of `to_json`; JSON's lists become the tuples that recipes use."""

    def tuples(value):
        if isinstance(value, list):
            return tuple(map(tuples, value))
        return {name: tuples(inner) for name, inner in value.items()} if isinstance(value, dict) else value

    return ml_collections.ConfigDict(tuples(json.loads(text)))


def build_kind(kinds: Mapping[str, Callable[..., Kind]], model: Mapping[str, Any], default: str) -> Kind:
    """What a config's `model` describes: the field `architecture` names the kind, the others are its arguments.

    Raises:
      UserError: an unknown architecture or unknown fields.
    """
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in dict(model).items()
    }
    kind = fields.pop("architecture", default)
    if kind not in kinds:
        hint = f"use one of {', '.join(kinds)}"
        raise UserError("unknown architecture", f"config.model.architecture={kind}", hint)
    try:
        return kinds[kind](**fields)
    except TypeError as error:
        raise UserError(f"fields of another architecture ({error})", "config.model", f"give those of {kind}") from error
