"""`convolve`'s own gradients against JAX's, and the single-draw initialisation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.codec.convolution import convolve, initialize


@pytest.mark.parametrize(
    "x_shape, kernel_shape, strides, padding, groups, dilations",
    [
        ((2, 101, 8), (41, 8, 6), (4,), "SAME", 1, None),
        ((2, 101, 8), (41, 2, 12), (4,), "SAME", 4, None),
        ((2, 7, 4), (15, 2, 8), (1,), "SAME", 2, None),
        ((2, 7, 9, 3), (4, 4, 3, 5), (2, 2), "SAME", 1, None),
        ((2, 8, 10, 3), (1, 1, 3, 5), (2, 2), "SAME", 1, None),
        ((2, 7, 9, 3), (1, 9, 3, 5), (1, 1), "VALID", 1, None),
        ((2, 11, 10, 3), (3, 9, 3, 5), (1, 2), "SAME", 1, (4, 1)),
        ((2, 30, 9, 4), (3, 4, 2, 6), (2, 3), "SAME", 2, (3, 2)),
    ],
)
def test_gradients_equal_jaxs_own(x_shape, kernel_shape, strides, padding, groups, dilations):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], kernel_shape)
    layout = ("NWC", "WIO", "NWC") if len(strides) == 1 else ("NHWC", "HWIO", "NHWC")

    def reference(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, rhs_dilation=dilations, dimension_numbers=layout, feature_group_count=groups
        )

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(function, x, kernel):
        value, pull_back = jax.vjp(function, x, kernel)
        return value, *pull_back(jax.random.normal(keys[2], value.shape))

    ours = value_and_gradients(lambda x, kernel: convolve(x, kernel, strides, padding, groups, dilations), x, kernel)
    for own, jaxs in zip(ours, value_and_gradients(reference, x, kernel), strict=True):
        np.testing.assert_allclose(own, jaxs, rtol=1e-4, atol=1e-4)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, "conv_in", "conv_out"))
        kernel = self.param("kernel", kernel_init, (5, 20, 300), jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (300,), jnp.float32)
        return (x @ kernel[0]) * scale + self.param("bias", nn.initializers.zeros, (300,), jnp.float32)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Layer(name="first")(x) + Layer(name="second")(x)


def test_initialize_draws_what_init_would():
    inputs = jnp.zeros((1, 20))
    boxed = initialize(Stack(), jax.random.key(0), inputs)
    by_init = Stack().init(jax.random.key(0), inputs)["params"]
    assert nn.get_partition_spec(boxed) == nn.get_partition_spec(by_init)
    params, reference = nn.meta.unbox(boxed), nn.meta.unbox(by_init)
    for name in ("first", "second"):
        kernel, other = np.asarray(params[name]["kernel"]), np.asarray(reference[name]["kernel"])
        assert abs(kernel.mean()) < 0.002
        assert kernel.std() == pytest.approx(other.std(), rel=0.02)
        np.testing.assert_array_equal(params[name]["scale"], 1.0)
        np.testing.assert_array_equal(params[name]["bias"], 0.0)
    assert not np.array_equal(params["first"]["kernel"], params["second"]["kernel"])
