"""audiolm_jax: AudioLM in pure-functional JAX. The names below are imported when first used."""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "load_codec": "audiolm_jax.bundle",
    "load_semantic_tokenizer": "audiolm_jax.bundle",
    "load_bundle": "audiolm_jax.bundle",
    "load_classifier": "audiolm_jax.bundle",
    "AudioLM": "audiolm_jax.generate",
    "Generation": "audiolm_jax.generate",
    "Sampling": "audiolm_jax.lm.sampling",
    "UserError": "audiolm_jax.errors",
    "make_mesh": "audiolm_jax.training.sharding",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
    return __all__
