"""What the codec's networks share: a convolution whose gradients stay fast on a CPU inside `jax.lax.cond`, ELU, and
quick initial parameters.

Shape suffixes: B batch, T frames, C channels, O channels out, k taps; the dots stand for one or two spatial axes.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Of kernels that do not start at variance 1 / fan-in, by the name of their layer: "mix" ends a residual unit, which
# thus starts near the identity. At full scale a codec spends its first 250 steps on a plateau, deaf to phase.
INITIAL_SCALES = {"mix": 0.1}

LAYOUTS = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: str,
    groups: int = 1,
    dilations: tuple[int, ...] | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` in one or two dimensions, with gradients of its own.

    XLA's CPU compiler brings a convolution into the layout of its fast kernels at the top level of a program only.
    JAX's own gradients need that, so in a branch of a conditional they run twenty times slower; these are written in
    that layout to begin with.

    Args:
      x: [B, ..., C].
      kernel: [..., C / groups, O].
      strides: one a spatial axis.
      padding: "SAME" or "VALID".
      groups: of channels.
      dilations: of the kernel, one a spatial axis; none by default.

    Returns:
      [B, ..., O].
    """
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilations,
        dimension_numbers=LAYOUTS[x.ndim],
        feature_group_count=groups,
    )


def _forward(x, kernel, strides, padding, groups, dilations):
    return convolve(x, kernel, strides, padding, groups, dilations), (x, kernel)


def _backward(strides, padding, groups, dilations, saved, grad):
    x, kernel = saved
    spatial = x.ndim - 2
    taps, sizes = kernel.shape[:spatial], x.shape[1:-1]
    dilations = dilations or (1,) * spatial
    spans = [(k - 1) * dilation + 1 for k, dilation in zip(taps, dilations)]
    before = [low for low, _ in jax.lax.padtype_to_pads(sizes, spans, strides, padding)]
    # The output's extent on the input's grid.
    extents = [(size - 1) * stride + 1 for size, stride in zip(grad.shape[1:-1], strides)]
    conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=LAYOUTS[x.ndim])

    # For the input: the gradient, spread out by the strides, under the kernel turned round.
    grouped = jnp.flip(kernel, range(spatial)).reshape(*kernel.shape[:-1], groups, -1)
    turned = jnp.swapaxes(grouped, -3, -1).reshape(*taps, kernel.shape[-1] // groups, x.shape[-1])
    around = [(span - 1 - low, n + low - extent) for span, low, n, extent in zip(spans, before, sizes, extents)]
    x_grad = conv(
        grad,
        turned,
        (1,) * spatial,
        around,
        lhs_dilation=strides,
        rhs_dilation=dilations,
        feature_group_count=groups,
    )

    # For the kernel: the input under the gradient, batch and channels changing places.
    by_channel, by_example = jnp.swapaxes(x, 0, -1), jnp.moveaxis(grad, 0, -2)
    around = [(low, span - 1 + extent - n - low) for span, low, n, extent in zip(spans, before, sizes, extents)]
    kernel_grad = conv(by_channel, by_example, dilations, around, rhs_dilation=strides, batch_group_count=groups)
    return x_grad, jnp.moveaxis(kernel_grad, 0, -2)


convolve.defvjp(_forward, _backward)


def masked(x: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """`x` [B, T, ...] with zeros from each row's length on: what padding is to a convolution."""
    inside_BT = jnp.arange(x.shape[1]) < lengths_B[:, None]
    return jnp.where(inside_BT.reshape(*inside_BT.shape, *(1,) * (x.ndim - 2)), x, 0.0)


def elu(x: jax.Array) -> jax.Array:
    """x, but exp(x) − 1 below 0: half as long on a CPU as by expm1, and as exact as numbers near 1 are."""
    return jnp.maximum(x, 0) + (jnp.exp(jnp.minimum(x, 0)) - 1)


def parameters_of(
    module: nn.Module, x_BTC: jax.Array, kernel_size: int, features: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inputs of a one-dimensional convolution, its kernel [k, C, O] and its bias [O], all of one type.

    Args:
      module: whose parameters "kernel" and "bias" they are, called where it may declare them.
      x_BTC: inputs.
      kernel_size: k.
      features: O.
    """
    scale = INITIAL_SCALES.get(module.name or "", 1.0)
    normal = nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
    kernel_init = nn.with_logical_partitioning(normal, (None, "conv_in", "conv_out"))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
    kernel_kCO = module.param("kernel", kernel_init, (kernel_size, x_BTC.shape[-1], features), jnp.float32)
    bias_O = module.param("bias", bias_init, (features,), jnp.float32)
    return nn.dtypes.promote_dtype(x_BTC, kernel_kCO, bias_O)


def initialize(module: nn.Module, key: jax.Array, *inputs: jax.Array) -> Any:
    """Parameters of a module of convolutions, as its `init` would give them, from a single draw of random numbers.

    Compiling a draw takes a CPU up to a second, and a codec with its discriminators has a hundred kernels.

    Returns:
      the "params", boxed with their logical axis names: kernels normal with standard deviation fan-in^(-1/2)
      (times `INITIAL_SCALES`), scales and alphas 1, biases 0.
    """
    boxed = jax.eval_shape(module.init, key, *inputs)["params"]
    paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(boxed)
    names = [[entry.key for entry in path if hasattr(entry, "key")] for path, _ in paths_and_leaves]
    shapes = [leaf.shape for _, leaf in paths_and_leaves]
    sizes = [math.prod(shape) * (name[-1] == "kernel") for name, shape in zip(names, shapes)]
    offsets = [sum(sizes[:index]) for index in range(1, len(sizes))]
    draws = jnp.split(jax.random.normal(key, (sum(sizes),), jnp.float32), offsets)

    def leaf(name: list[str], shape: tuple[int, ...], draw: jax.Array) -> jax.Array:
        if name[-1] == "kernel":
            scale = INITIAL_SCALES.get(name[-2], 1.0) if len(name) > 1 else 1.0
            return draw.reshape(shape) * (scale * math.prod(shape[:-1]) ** -0.5)
        return jnp.full(shape, 1.0 if name[-1] in ("scale", "alpha") else 0.0, jnp.float32)

    return jax.tree.unflatten(structure, map(leaf, names, shapes, draws))
