"""Public models of other libraries."""

from audiolm_jax.interop.encodec import load_encodec_48khz

__all__ = ["load_encodec_48khz"]
