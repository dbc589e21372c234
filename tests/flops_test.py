"""FLOPs counted from traced programs against formulas and against XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax import flops
from audiolm_jax.config import load_config
from audiolm_jax.lm.objective import stage_from_config, transformer_from_config
from audiolm_jax.lm.transformer import Transformer
from audiolm_jax.training.step import model_flops


def xla_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_as_xla_counts_them(strides, padding, groups):
    x, kernel = jnp.ones((3, 13, 17, 4)), jnp.ones((3, 5, 4 // groups, 6))
    dimensions = ("NHWC", "HWIO", "NHWC")

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, (1, 1), (2, 1), dimensions, feature_group_count=groups
        )

    assert flops.traced_flops(convolve, x, kernel) == xla_flops(convolve, x, kernel)
    transposed = lambda x, kernel: jax.lax.conv_transpose(x, kernel, strides, padding, dimension_numbers=dimensions)
    if groups == 1:
        assert flops.traced_flops(transposed, x, kernel) == xla_flops(transposed, x, kernel)


def test_loops_count_as_often_as_they_run_and_choices_by_the_costliest_branch():
    x = jnp.ones((8, 16, 16))
    product = lambda a: a @ a

    def scanned(x):
        return jax.lax.scan(lambda carry, a: (carry + product(a), None), x[0], x)[0]

    assert flops.traced_flops(scanned, x) == 8 * 2 * 16**3
    choice = lambda x: jax.lax.cond(x[0, 0, 0] > 0, lambda a: product(product(a)), lambda a: a, x[0])
    assert flops.traced_flops(choice, x) == 2 * 2 * 16**3
    with pytest.raises(ValueError, match="unknown length"):
        flops.traced_flops(lambda a: jax.lax.while_loop(lambda b: b[0, 0] < 9, product, a), x[0])


@pytest.mark.parametrize("name", ["semantic_librilight", "coarse_librilight", "fine_librilight", "coarse_piano"])
def test_model_flops_of_a_language_model_by_the_formula(name):
    config = load_config(name)
    model, length = transformer_from_config(config), stage_from_config(config).sequence_length
    params = jax.eval_shape(Transformer(model).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    in_products = sum(leaf.size for leaf in jax.tree.leaves(params["layers"])) + params["head"].value.size
    attention = 12 * model.num_layers * (length + 1) / 2 * model.embed_dim
    expected = (6 * in_products + attention) * config.batch_size * length
    np.testing.assert_allclose(model_flops(config), expected, rtol=2e-3)
    # Neither memory-saving nor the cutting of the batch changes what the model is.
    config.update({"accumulation_steps": 4, "ema_decay": 0.9})
    config.model.update({"remat": "full", "block_positions": 64, "attention": "xla"})
    np.testing.assert_allclose(model_flops(config), expected, rtol=2e-3)
