"""EnCodec's balancer: how hard each loss pulls at the waveform follows from its weight alone (arXiv 2210.13438 §3.4).

What a loss does to the decoder is its gradient for the decoded waveform. Here those gradients are rescaled, each to its
weight's share of a fixed total, so that the weights are shares and neither the scale of a loss nor how it changes
during the training shifts the balance.

Shape suffixes: B batch, W waveform samples.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The paper's β and R.
DECAY = 0.999
TOTAL_NORM = 1.0
TINY = 1e-30


class Balanced(NamedTuple):
    """What `balance` returns.

    Attributes:
      grad_BW: the balanced sum of the gradients.
      state: updated.
      shares: of each loss in the sum of the balanced gradients' norms. They are near the weights' shares, but for how
        far this batch is from the average.
    """

    grad_BW: jax.Array
    state: dict[str, Any]
    shares: dict[str, jax.Array]


def init(names: Iterable[str]) -> dict[str, Any]:
    """The state before the first step: discounted sums of each loss's gradient norms, and the counts of their terms."""
    zeros = dict.fromkeys(names, jnp.zeros((), jnp.float32))
    return {"norm_sum": zeros, "count": dict(zeros)}


def balance(state: Mapping[str, Any], gradients: Mapping[str, jax.Array], weights: Mapping[str, float]) -> Balanced:
    """Σ_i R · w_i / Σ_j w_j · g_i / <|g_i|>, the norm averaged over past steps.

    |g| is the sum over rows of the rows' norms: of a loss that is a mean over the batch, the mean norm that the rows'
    own losses have, whatever the batch size. A loss whose gradient is zero (the adversarial ones before their start)
    takes no share, and its average waits.

    Args:
      state: of `init`.
      gradients: of each loss for the waveform [B, W].
      weights: of at least these losses.
    """
    norms = {name: jnp.sum(jnp.sqrt(jnp.sum(jnp.square(grad_BW), axis=-1))) for name, grad_BW in gradients.items()}
    pulls = {name: norm != 0 for name, norm in norms.items()}
    total_weight = sum(weights[name] * pulls[name] for name in norms) + TINY
    new_state: dict[str, Any] = {"norm_sum": {}, "count": {}}
    scales = {}
    for name, norm in norms.items():
        norm_sum, count = state["norm_sum"][name], state["count"][name]
        norm_sum = new_state["norm_sum"][name] = jnp.where(pulls[name], DECAY * norm_sum + norm, norm_sum)
        count = new_state["count"][name] = jnp.where(pulls[name], DECAY * count + 1.0, count)
        share = TOTAL_NORM * weights[name] / total_weight
        scales[name] = jnp.where(pulls[name], share * count / norm_sum, 0.0)
    balanced = {name: scales[name] * norm for name, norm in norms.items()}
    all_norms = sum(balanced.values()) + TINY
    return Balanced(
        grad_BW=jnp.sum(jnp.stack([scales[name] * grad_BW for name, grad_BW in gradients.items()]), axis=0),
        state=new_state,
        shares={name: norm / all_norms for name, norm in balanced.items()},
    )
