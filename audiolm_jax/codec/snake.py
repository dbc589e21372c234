"""The snake activation, with which a network more easily repeats what it has heard.

Ziyin et al. (arXiv 2006.08195); in a codec: Kumar et al., DAC (arXiv 2306.06546 §3.1).

Shape suffixes: B batch, T frames, C channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Snake(nn.Module):
    """x + sin²(alpha · x) / alpha, with an alpha learned for each channel, at first 1."""

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        alpha_init = nn.with_logical_partitioning(nn.initializers.ones, ("conv_out",))
        alpha_C = self.param("alpha", alpha_init, x_BTC.shape[-1:], jnp.float32)
        x_BTC, alpha_C = nn.dtypes.promote_dtype(x_BTC, alpha_C)
        return x_BTC + jnp.square(jnp.sin(alpha_C * x_BTC)) / (alpha_C + 1e-9)
