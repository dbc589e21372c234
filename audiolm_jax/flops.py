"""FLOPs of matrix products and convolutions, counted from a traced program."""

import math
from typing import Any

import jax
import numpy as np
from jax.extend import core


def traced_flops(function, *arguments: Any) -> float:
    """FLOPs of a function's matrix products and convolutions: scans by their length, the costliest branch of a choice,
    what every device does for itself (`jax.shard_map`) as often as there are devices.

    Raises:
      ValueError: a loop whose length is not known beforehand.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _jaxpr_flops(jaxpr: core.Jaxpr) -> float:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> float:
    name, params = equation.primitive.name, equation.params
    inner = [_jaxpr_flops(jaxpr) for jaxpr in _inner_jaxprs(params)]
    match name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        case "conv_general_dilated":
            return _convolution_flops(equation)
        case "scan":
            return params["length"] * sum(inner)
        case "shard_map":
            return params["mesh"].size * sum(inner)  # Inside, shapes are those of one device.
        case "cond":
            return max(inner)
        case "while" if sum(inner):
            raise ValueError("a loop of unknown length")
        case _:
            return sum(inner)


def _inner_jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    values = [value for entry in params.values() for value in (entry if isinstance(entry, tuple | list) else [entry])]
    # From jax 0.11 on the two are one class.
    jaxprs = [value for value in values if isinstance(value, core.ClosedJaxpr | core.Jaxpr)]
    return [jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr for jaxpr in jaxprs]


def _convolution_flops(equation) -> float:
    params, (left, right) = equation.params, (variable.aval.shape for variable in equation.invars)
    layout = params["dimension_numbers"]
    batch, features = left[layout.lhs_spec[0]], right[layout.rhs_spec[1]]
    outputs = right[layout.rhs_spec[0]]
    places = math.prod(
        valid_places(left[i], right[k], equation.outvars[0].aval.shape[o], *window)
        for i, k, o, window in zip(
            layout.lhs_spec[2:],
            layout.rhs_spec[2:],
            layout.out_spec[2:],
            zip(
                params["window_strides"],
                (low for low, _ in params["padding"]),
                params["lhs_dilation"],
                params["rhs_dilation"],
            ),
        )
    )
    return 2.0 * batch / params["batch_group_count"] * features * outputs * places


def valid_places(
    size: int, taps: int, outputs: int, stride: int, before: int, input_dilation: int, tap_dilation: int
) -> int:
    """How many (output, tap) pairs of one axis of a convolution meet a sample of the input, rather than padding.

    Args:
      size, taps, outputs: lengths of input, kernel and output.
      stride: of the outputs.
      before: padding before the first sample.
      input_dilation, tap_dilation: spacing of samples and of taps.
    """
    place = np.arange(outputs)[:, None] * stride + np.arange(taps) * tap_dilation - before
    inside = (place >= 0) & (place < (size - 1) * input_dilation + 1) & (place % input_dilation == 0)
    return int(np.count_nonzero(inside))
