"""How one token is drawn from logits: temperature, top-k and nucleus (top-p) sampling."""

import dataclasses

import jax
import jax.numpy as jnp

from audiolm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings of one stage.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches p; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError("temperature out of range", self.temperature, "give 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError("top_k out of range", self.top_k, "give 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise UserError("top_p out of range", self.top_p, "give more than 0, at most 1 (all)")

    @property
    def traced(self) -> dict[str, float]:
        """The arguments of `sample` that a compiled program takes as they come; which of them there are is fixed."""
        if self.temperature == 0:
            return {}
        nucleus = {"top_p": float(self.top_p)} if self.top_p < 1 else {}
        return {"temperature": float(self.temperature), **nucleus}


def filter_logits(logits_BV: jax.Array, top_k: int, top_p: jax.Array | float | None) -> jax.Array:
    """Sets the logits outside of the top-k and of the nucleus to −inf; the most likely always stays."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    if top_k:
        threshold_B1 = sorted_BV[:, min(top_k, logits_BV.shape[-1]) - 1, None]
        logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
        sorted_BV = jnp.where(sorted_BV < threshold_B1, -jnp.inf, sorted_BV)
    if top_p is not None:
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        threshold_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
    return logits_BV


def sample(
    keys_B: jax.Array,
    logits_BV: jax.Array,
    top_k: int = 0,
    temperature: jax.Array | float | None = None,
    top_p: jax.Array | float | None = None,
) -> jax.Array:
    """Draws one token a row, each row with its own key, so that a row does not depend on its company.

    Args:
      keys_B: typed PRNG keys.
      logits_BV: −inf where a token is not allowed.
      top_k: see `Sampling`.
      temperature: above 0 (may be traced); None is greedy.
      top_p: see `Sampling` (may be traced); None keeps all.

    Returns:
      int32 [B].
    """
    if temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(logits_BV / temperature, top_k, top_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
