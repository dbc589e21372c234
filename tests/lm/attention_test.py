"""Blocked attention and the bias by distance against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.lm import attention


@pytest.mark.parametrize(("first", "num_queries", "num_keys"), [(0, 7, 7), (5, 3, 8), (4, 1, 9), (0, 1, 1), (6, 2, 4)])
def test_bias_is_the_table_s_entry_of_each_distance(first, num_queries, num_keys):
    table_RN = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
    bias_1NTS = attention.relative_position_bias(jnp.asarray(table_RN), first, num_queries, num_keys, 20)
    for query in range(num_queries):
        for key in range(num_keys):
            bucket = attention.relative_position_bucket(jnp.int32(first + query - key), 8, 20)
            np.testing.assert_array_equal(bias_1NTS[0, :, query, key], table_RN[bucket])


@pytest.mark.parametrize("length", [16, 17, 37])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_blocks_equal_the_whole(length, segments, prefix, float64):
    generator = np.random.default_rng(length)
    q_BTNH, k_BTNH, v_BTNH = jnp.asarray(generator.standard_normal((3, 2, length, 3, 8)))
    table_RN = jnp.asarray(generator.standard_normal((8, 3)))
    segments_BT = jnp.asarray(np.sort(generator.integers(0, 3, (2, length)))) if segments else None
    prefix_B = jnp.asarray(generator.integers(0, length + 1, 2)) if prefix else None

    def whole(q_BTNH, k_BTNH, v_BTNH, table_RN):
        position_T = np.arange(length)
        distance_TS = position_T[:, None] - position_T
        buckets_TS = attention.relative_position_bucket(jnp.asarray(distance_TS), 8, 20)
        bias_1NTS = table_RN[buckets_TS].transpose(2, 0, 1)[None]
        mask_BTS = jnp.asarray(distance_TS >= 0)[None]
        if prefix:
            mask_BTS = mask_BTS | (position_T < prefix_B[:, None, None])
        if segments:
            mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BT[:, None])
        heads_first = [jnp.swapaxes(x_BTNH, 1, 2) for x_BTNH in (q_BTNH, k_BTNH, v_BTNH)]
        return jnp.swapaxes(attention.attend(*heads_first, bias_1NTS, mask_BTS), 1, 2)

    def blocked(*arrays):
        return attention.causal_attention(*arrays, segments_BT, prefix_B, 20, 16)

    def unblocked(*arrays):
        return attention.causal_attention(*arrays, segments_BT, prefix_B, 20, 0)

    arrays = (q_BTNH, k_BTNH, v_BTNH, table_RN)
    gradient = lambda f: jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=range(4))(*arrays)
    for ours in (blocked, unblocked):
        np.testing.assert_allclose(ours(*arrays), whole(*arrays), atol=1e-12)
        for grad, expected in zip(gradient(ours), gradient(whole), strict=True):
            np.testing.assert_allclose(grad, expected, atol=1e-10)
    if prefix:
        return
    # Each block's products are with the keys that it can see, no more.
    shapes = str(jax.make_jaxpr(blocked)(*arrays))
    assert f"2,3,{min(length, 16)},{min(length, 16)}]" in shapes
    assert f"2,3,{length},{length}]" not in shapes or length <= 16
