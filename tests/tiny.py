"""The smallest models and data of every kind, for tests of what connects them."""

import dataclasses
import pathlib

import jax
import numpy as np
import soundfile

from audiolm_jax import bundle
from audiolm_jax.config import classifier_config, language_model_config, soundstream_config, w2v_bert_config
from audiolm_jax.generate import AudioLM
from audiolm_jax.parts import Part, write_part
from audiolm_jax.training.registry import build_objective
from audiolm_jax.training.sharding import unbox

STAGES = ("semantic", "coarse", "fine")
CLUSTERS, CODES, LEVELS, COARSE_LEVELS = 8, 16, 3, 1

# Command-line overrides that make a shipped config of each objective small enough for a test.
OVERRIDES = {
    "soundstream": {
        "batch_size": 2, "crop_seconds": 0.2, "model.channels": 2, "model.strides": (16, 20), "model.embed_dim": 4,
        "model.num_quantizers": LEVELS,
        "model.codebook_size": CODES, "quantizer.kmeans_iterations": 2, "quantizer.kmeans_frames_per_code": 2,
        "discriminator.stft_channels": 2, "discriminator.waveform_channels": (2, 2, 2),
        "discriminator.start_step": 2,
    },
    "w2v_bert": {
        "batch_size": 2, "crop_seconds": 1.0, "model.embed_dim": 8, "model.mlp_dim": 8, "model.num_heads": 2,
        "model.subsampling_channels": 2,
        "model.default_layer": 1, "model.num_contrastive_layers": 1, "model.num_masked_layers": 1,
        "model.codebook_size": 8, "model.codebook_dim": 8, "loss.num_distractors": 4,
    },
    "classifier": {"batch_size": 2, "model.num_mels": 16, "model.channels": (2, 2, 4)},
    **{
        stage: {
            "batch_size": 2, "model.num_layers": 1, "model.num_heads": 2, "model.embed_dim": 16, "model.mlp_dim": 16,
            "model.dtype": "float32", "stage.num_clusters": CLUSTERS, "stage.codebook_size": CODES,
            "stage.num_quantizers": LEVELS, "stage.num_coarse_quantizers": COARSE_LEVELS,
            "stage.crop_seconds": {"semantic": 4.0, "coarse": 2.0, "fine": 1.0}[stage],
        }
        for stage in STAGES
    },
}  # fmt: skip


def config_of(objective: str, **fields):
    """The smallest config of an objective."""
    makers = {"soundstream": soundstream_config, "w2v_bert": w2v_bert_config, "classifier": classifier_config}
    config = makers[objective]() if objective in makers else language_model_config(objective)
    config.update_from_flattened_dict({**OVERRIDES[objective], **fields})
    config.input.update({"num_threads": 2, "prefetch_batches": 2})
    return config


def flags_of(objective: str) -> list[str]:
    """The same as command-line overrides."""
    return [f"--config.{name}={value}" for name, value in OVERRIDES[objective].items()]


def part_of(objective: str, seed: int = 0, settings=None, **fields) -> Part:
    """A part with random weights."""
    config = config_of(objective, **fields)
    built = build_objective(config)
    state = unbox(jax.jit(built.init)(jax.random.key(seed)))
    return Part(objective, config, jax.tree.map(np.asarray, built.weights(state)), settings or {})


def codec_part() -> Part:
    """A codec with random weights and codes."""
    codec = part_of("soundstream")
    codebooks = codec.weights["codebooks"]
    shape = codebooks["embedding"].shape
    codebooks["embedding"] = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return codec


def write_parts(folder: pathlib.Path, codec: Part | None = None) -> dict[str, str]:
    """Random parts that fit each other (and a codec of `LEVELS` of `CODES`, if given), as exported folders by role."""
    generator = np.random.default_rng(1)
    parts = {"codec": codec or codec_part()}
    encoder = part_of("w2v_bert")
    width = encoder.config.model.embed_dim
    clusters = {
        "mean": np.zeros(width, np.float32),
        "std": np.ones(width, np.float32),
        "centroids": generator.standard_normal((CLUSTERS, width)).astype(np.float32),
    }
    parts["semantic_tokenizer"] = Part(
        "semantic_tokenizer", encoder.config, {**encoder.weights, "clusters": clusters}, {"layer": 1}
    )
    tokens = {role: part.fingerprint() for role, part in parts.items()}
    for seed, stage in enumerate(STAGES):
        parts[stage] = part_of(stage, seed, {"tokens": {**tokens, "mean_run_length": 1.6}})
        params = parts[stage].weights["params"]
        params["head"] = params["head"] * 4
    parts["encoder"] = encoder
    for role, part in parts.items():
        (folder / role).mkdir(parents=True)
        write_part(folder / role, part)
    return {role: str(folder / role) for role in parts}


def write_bundle(folder: pathlib.Path, codec: Part | None = None) -> pathlib.Path:
    """A bundle of random parts, at `folder / "bundle"`."""
    paths = write_parts(folder / "parts", codec)
    bundle.write_bundle({role: paths[role] for role in ("codec", "semantic_tokenizer", *STAGES)}, folder / "bundle")
    return folder / "bundle"


def in_double_precision(model: AudioLM) -> AudioLM:
    """Its language models in float64, in which no token hangs on rounding."""
    stages = {
        name: dataclasses.replace(
            lm,
            config=dataclasses.replace(lm.config, dtype="float64"),
            params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), lm.params),
        )
        for name, lm in model.stages.items()
    }
    return dataclasses.replace(model, stages=stages)


def write_recordings(folder: pathlib.Path, seconds=(4.2, 3.5, 5.0, 2.0, 3.1, 4.4, 2.7, 3.9)) -> pathlib.Path:
    """Warbling tones of two "speakers" as FLAC and WAV at several rates."""
    for i, length in enumerate(seconds):
        rate = (16000, 22050, 48000)[i % 3]
        time = np.arange(int(rate * length)) / rate
        pitch = 120 * (1 + i % 2) * (1 + 0.3 * np.sin(2 * np.pi * (0.5 + 0.2 * i) * time))
        wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / rate) * (1 + np.sin(2 * np.pi * 3 * time)) / 2
        wave = wave + 0.01 * np.random.default_rng(i).standard_normal(len(time))
        path = folder / ("low", "high")[i % 2] / f"tone{i}.{'flac' if i % 4 else 'wav'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, rate)
    return folder
