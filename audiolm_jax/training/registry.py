"""Which objective and which input a config means."""

import jax
import jax.numpy as jnp
import ml_collections

from audiolm_jax.data.pipeline import AudioInput, TokenInput, read_recordings
from audiolm_jax.errors import UserError
from audiolm_jax.objective import Objective
from audiolm_jax.training.optimizer import make_optimizer

LANGUAGE_MODELS = ("semantic", "coarse", "fine")


def build_objective(config: ml_collections.ConfigDict) -> Objective:
    """The objective that `config.objective` names, with its optimisers.

    Raises:
      UserError: an unknown objective, or fields that contradict each other.
    """
    if (block := config.model.get("block_positions", 0)) < 0:
        raise UserError("must be 0 or more", f"config.model.block_positions={block}", "take 0 for no blocks")
    optimizer = make_optimizer(config.optimizer, config.num_train_steps)
    match config.objective:
        case "soundstream":
            from audiolm_jax.codec.objective import soundstream_objective

            discriminator_optimizer = make_optimizer(config.discriminator_optimizer, config.num_train_steps)
            return soundstream_objective(config, optimizer, discriminator_optimizer)
        case "w2v_bert":
            from audiolm_jax.semantic.objective import w2v_bert_objective

            return w2v_bert_objective(config, optimizer)
        case "classifier":
            from audiolm_jax.classifier.objective import classifier_objective

            return classifier_objective(config, optimizer)
        case name if name in LANGUAGE_MODELS:
            from audiolm_jax.lm.objective import language_model_objective

            _check_language_model(config)
            return language_model_objective(config, optimizer)
        case other:
            names = ", ".join(("soundstream", "w2v_bert", "classifier", *LANGUAGE_MODELS))
            raise UserError("unknown objective", f"config.objective={other}", f"use one of {names}")


def _check_language_model(config: ml_collections.ConfigDict):
    from audiolm_jax.lm.self_attention import IMPLEMENTATIONS
    from audiolm_jax.lm.transformer import REMAT_POLICIES

    model, stage = config.model, config.stage
    choices = {
        "position": ("relative_bias", "rotary"),
        "attention": IMPLEMENTATIONS,
        "remat": ("none", *REMAT_POLICIES),
    }
    for name, known in choices.items():
        if name in model and model[name] not in known:
            raise UserError(f"unknown {name}", f"config.model.{name}={model[name]}", f"use {', '.join(known)}")
    if model.get("unrolled_layers", 1) < 1:
        where = f"config.model.unrolled_layers={model.unrolled_layers}"
        raise UserError("must be 1 or more", where, "take 1 to compile one layer for all")
    if model.embed_dim % model.num_heads:
        raise UserError(
            f"config.model.num_heads={model.num_heads} does not divide embed_dim={model.embed_dim}",
            "config.model",
            "choose a number of heads that does",
        )
    if model.get("prefix_attention") and config.packing:
        raise UserError("several conditions in a row", "config.model.prefix_attention", "take --config.packing=False")
    if not 1 <= stage.num_coarse_quantizers <= stage.num_quantizers:
        raise UserError(
            f"config.stage.num_coarse_quantizers={stage.num_coarse_quantizers} of {stage.num_quantizers} levels",
            "config.stage",
            "choose 1 … num_quantizers",
        )
    if config.objective == "fine" and stage.num_coarse_quantizers == stage.num_quantizers:
        raise UserError("no fine levels are left", "config.stage.num_coarse_quantizers", "train no fine stage")


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with what it leaves to its data: the labels of a classifier.

    Raises:
      UserError: data that cannot be read, or that have fewer than two labels.
    """
    if config.objective != "classifier" or config.model.labels:
        return config
    found = sorted(
        {recording.class_label for recording in read_recordings(config) if recording.split == "train"} - {""}
    )
    if len(found) < 2:
        hint = "give a folder with one a speaker, or a manifest with `speaker` or `label`"
        raise UserError(f"recordings of {len(found)} labels", config.data_dir, hint)
    config = config.copy_and_resolve_references()
    config.model.labels = tuple(found)
    return config


def build_input(config: ml_collections.ConfigDict, report) -> AudioInput | TokenInput:
    """The training and held-out batches of `config.data_dir`.

    Args:
      config: of any objective.
      report: called with one line for each recording that is left out.
    """
    if config.objective in LANGUAGE_MODELS:
        from audiolm_jax.lm.objective import stage_from_config

        return TokenInput(config, stage_from_config(config))
    return AudioInput(config, report)


def abstract_batch(config: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a global training batch of `build_input`, without any data."""
    rows = config.batch_size
    if config.objective in LANGUAGE_MODELS:
        from audiolm_jax.lm.objective import stage_from_config

        shape = (rows, stage_from_config(config).sequence_length)
        types = {"decoder_input_tokens": jnp.int32, "decoder_target_tokens": jnp.int32}
        types["decoder_loss_weights"] = jnp.float32
        if config.packing:
            types["decoder_segment_ids"] = jnp.int32
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}
    samples = round(config.crop_seconds * config.model.sample_rate)
    batch = {
        "wave_BW": jax.ShapeDtypeStruct((rows, samples), jnp.float32),
        "lengths_B": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    if config.objective == "classifier":
        batch["labels_B"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return batch
