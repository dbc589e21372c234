"""The fused kernel, interpreted, against attention written out; and the ways to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from audiolm_jax.lm import attention, self_attention
from audiolm_jax.lm.flash_attention import flash_attention
from audiolm_jax.lm.transformer import Transformer, TransformerConfig
from tests.training.mesh_test import on_eight_devices

MAX_DISTANCE = 12
INTERPRETED = functools.partial(flash_attention, max_distance=MAX_DISTANCE, block=8, interpret=True)


def inputs_of(seed, length, num_heads, width, dtype=np.float32):
    """Queries, keys, values [2, T, N, H] and a bias table, as large as in a model."""
    generator = np.random.default_rng(seed)
    q_BTNH, k_BTNH, v_BTNH = generator.standard_normal((3, 2, length, num_heads, width)).astype(dtype)
    table_RN = generator.standard_normal((8, num_heads)).astype(dtype)
    return jnp.asarray(q_BTNH * dtype(width**-0.5)), jnp.asarray(k_BTNH), jnp.asarray(v_BTNH), jnp.asarray(table_RN)


def written_out(q_BTNH, k_BTNH, v_BTNH, table_RN, segment_ids_BT, prefix_B):
    position_T = np.arange(q_BTNH.shape[1])
    distance_TS = position_T[:, None] - position_T
    seen_BTS = jnp.asarray(distance_TS >= 0)[None]
    if prefix_B is not None:
        seen_BTS = seen_BTS | (position_T < prefix_B[:, None, None])
    if segment_ids_BT is not None:
        seen_BTS = seen_BTS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None])
    bias_1NTS = None
    if table_RN is not None:
        bucket_TS = attention.relative_position_bucket(jnp.asarray(distance_TS), len(table_RN), MAX_DISTANCE)
        bias_1NTS = table_RN[bucket_TS].transpose(2, 0, 1)[None]
    heads_first = [jnp.swapaxes(x_BTNH, 1, 2) for x_BTNH in (q_BTNH, k_BTNH, v_BTNH)]
    return jnp.swapaxes(attention.attend(*heads_first, bias_1NTS, seen_BTS), 1, 2)


def outputs_and_gradients(function, arrays, seed=1):
    """Of a random weighted sum of the outputs."""

    @jax.jit
    def both(*arrays):
        out_BTNH, pull_back = jax.vjp(function, *arrays)
        weights = np.random.default_rng(seed).standard_normal(out_BTNH.shape)
        return out_BTNH, *pull_back(jnp.asarray(weights, out_BTNH.dtype))

    return both(*arrays)


def assert_equal(function, reference, arrays, tolerance):
    """Outputs and gradients to within the tolerance, of 1 or of the largest number where that is larger."""
    for ours, expected in zip(*(outputs_and_gradients(f, arrays) for f in (function, reference)), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(expected))))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("length", [5, 16, 37])
@pytest.mark.parametrize(("num_heads", "width"), [(3, 8), (2, 64), (2, 128), (8, 32)])
@pytest.mark.parametrize(("packed", "prefix"), [(False, False), (True, False), (False, True), (True, True)])
def test_kernel_equals_attention_written_out(length, num_heads, width, packed, prefix):
    arrays = inputs_of([length, num_heads], length, num_heads, width)
    generator = np.random.default_rng([length, width, packed, prefix])
    segments_BT = jnp.asarray(np.sort(generator.integers(0, 3, (2, length)))) if packed else None
    prefix_B = jnp.asarray(generator.integers(0, length + 1, 2)) if prefix else None
    kernel = lambda q, k, v, table: INTERPRETED(q, k, v, table, segments_BT, prefix_B)
    reference = lambda q, k, v, table: written_out(q, k, v, table, segments_BT, prefix_B)
    assert_equal(kernel, reference, arrays, 1e-5)


@pytest.mark.parametrize("length", [16, 37])
def test_kernel_without_bias(length):
    arrays = inputs_of(length, length, 4, 8)[:3]
    kernel = lambda q, k, v: INTERPRETED(q, k, v, None, None, None)
    reference = lambda q, k, v: written_out(q, k, v, None, None, None)
    assert_equal(kernel, reference, arrays, 1e-5)


def test_kernel_in_double_precision_and_of_many_blocks(float64):
    """Tiles far from the diagonal, at and beyond `max_distance`."""
    arrays = inputs_of(0, 61, 2, 8, np.float64)
    kernel = lambda q, k, v, table: INTERPRETED(q, k, v, table, None, None)
    reference = lambda q, k, v, table: written_out(q, k, v, table, None, None)
    assert_equal(kernel, reference, arrays, 1e-13)


def test_kernel_in_bfloat16_is_as_near_as_the_reference():
    arrays = inputs_of(0, 37, 2, 64)
    narrow = [array.astype(jnp.bfloat16) for array in arrays[:3]] + [arrays[3]]
    kernel = lambda q, k, v, table: INTERPRETED(q, k, v, table, None, None)
    reference = lambda q, k, v, table: written_out(q, k, v, table, None, None)
    exact = outputs_and_gradients(reference, arrays)
    for ours, theirs, wanted in zip(*(outputs_and_gradients(f, narrow) for f in (kernel, reference)), exact):
        assert ours.dtype == theirs.dtype
        distance = lambda x, wanted=wanted: np.linalg.norm(np.asarray(x, np.float32) - np.asarray(wanted))
        # The kernel's backward pass starts from the rounded output, as FlashAttention's does.
        assert distance(ours) < 2 * distance(theirs)


def interpreted(monkeypatch):
    monkeypatch.setattr(self_attention, "_device_kind", lambda: "TPU v4")
    kernel = functools.partial(flash_attention, block=16, interpret=True)
    monkeypatch.setattr(self_attention, "flash_attention", kernel)


CONFIG = TransformerConfig(
    vocab_size=32, num_layers=2, num_heads=4, embed_dim=32, mlp_dim=64, num_buckets=8, max_distance=20,
    remat="minimal", attention="fused",
)  # fmt: skip


def gradients_of(config):
    generator = np.random.default_rng(0)
    tokens_BT = jnp.asarray(generator.integers(0, 32, (2, 41)))
    segments_BT = jnp.asarray(np.sort(generator.integers(0, 3, (2, 41))))
    params = Transformer(config).init(jax.random.key(0), tokens_BT)["params"]
    model = lambda params: Transformer(config).apply({"params": params}, tokens_BT, segment_ids_BT=segments_BT)
    return jax.grad(lambda params: jnp.sum(jnp.sin(model(params)))), params


def test_model_with_the_kernel_has_the_same_gradients(monkeypatch):
    gradient, params = gradients_of(CONFIG)
    expected = jax.jit(gradient)(params)
    interpreted(monkeypatch)
    gradient, params = gradients_of(CONFIG)
    for ours, reference in zip(*map(jax.tree.leaves, (jax.jit(gradient)(params), expected)), strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-4 * np.abs(reference).max())
    assert "41,41]" not in str(jax.make_jaxpr(gradient)(params))


def test_eight_devices_run_the_kernel_as_one_does():
    distances = on_eight_devices("tests.lm.flash_on_meshes")
    assert len(distances) == 3 and max(distances.values()) < 1e-5


def cuda_program(function, *arrays) -> str:
    """What XLA's CUDA compiler would be given."""
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("length", [64, 65])
def test_gpus_attend_by_cudnn_where_it_can(monkeypatch, length):
    monkeypatch.setattr(self_attention, "_device_kind", lambda: "NVIDIA H100")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    q_BTNH, k_BTNH, v_BTNH, table_RN = inputs_of(0, length, 2, 64)
    settings = {"implementation": "fused", "max_distance": MAX_DISTANCE, "block_positions": 0}

    def gradients(dtype, segments_BT):
        arrays = [array.astype(dtype) for array in (q_BTNH, k_BTNH, v_BTNH)] + [table_RN]
        attend = lambda q, k, v, table: self_attention.self_attention(q, k, v, table, segments_BT, None, **settings)
        return functools.partial(outputs_and_gradients, attend), arrays

    fused, arrays = gradients(jnp.bfloat16, None)
    text = cuda_program(lambda *arrays: fused(arrays), *arrays)
    even = length + length % 2
    assert "fmhaScaleBiasSoftmax(" in text and "fmhaScaleBiasSoftmaxBackward(" in text
    assert f"1x2x{even}x{even}xbf16" in text
    # Packed rows and single precision are XLA's.
    for dtype, segments_BT in ((jnp.bfloat16, jnp.zeros((2, length), jnp.int32)), (jnp.float32, None)):
        plain, arrays = gradients(dtype, segments_BT)
        assert "fmha" not in cuda_program(lambda *arrays, plain=plain: plain(arrays), *arrays)
