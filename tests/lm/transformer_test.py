"""The transformer against Hugging Face's T5 stack, and its invariances."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.lm.attention import relative_position_bucket
from audiolm_jax.lm.stages import NUM_SPECIAL, SEP
from audiolm_jax.lm.transformer import Block, RMSNorm, Transformer, TransformerConfig
from audiolm_jax.rotary import rotate

CONFIG = TransformerConfig(
    vocab_size=128, num_layers=3, num_heads=4, embed_dim=32, mlp_dim=48, num_buckets=8, max_distance=20
)


def init_params(config, seed=0):
    model = Transformer(config)
    return jax.tree.map(jnp.asarray, nn.unbox(model.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]))


def layers_of(params):
    num_layers = len(jax.tree.leaves(params["layers"])[0])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(num_layers)]


@pytest.mark.parametrize("gated", [False, True])
def test_equals_hugging_face_t5_stack(gated):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIG, gated_mlp=gated)
    params = init_params(config, 3)
    t5_config = transformers.T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=20, dropout_rate=0.0,
        feed_forward_proj="gated-gelu" if gated else "gelu_new", is_decoder=True, use_cache=False,
        is_encoder_decoder=False,
    )  # fmt: skip
    stack = t5.T5Stack(t5_config).eval()
    if hasattr(stack, "set_input_embeddings"):
        stack.set_input_embeddings(torch.nn.Embedding(128, 32))
    put = lambda parameter, array: parameter.data.copy_(torch.from_numpy(np.array(array)))
    put(stack.embed_tokens.weight, params["embedding"]["embedding"])
    put(stack.final_layer_norm.weight, params["final_norm"]["scale"])
    bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
    put(bias.weight, params["position_bias"])
    for block, layer in zip(stack.block, layers_of(params), strict=True):
        attention, feed_forward = block.layer[0], block.layer[-1]
        put(attention.layer_norm.weight, layer["attention_norm"]["scale"])
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            put(getattr(attention.SelfAttention, theirs).weight, layer["attention"][ours].reshape(32, 32).T)
        put(attention.SelfAttention.o.weight, layer["attention"]["out"].reshape(32, 32).T)
        put(feed_forward.layer_norm.weight, layer["mlp_norm"]["scale"])
        dense = feed_forward.DenseReluDense
        put(dense.wi_0.weight if gated else dense.wi.weight, layer["mlp"]["wide"].T)
        if gated:
            put(dense.wi_1.weight, layer["mlp"]["gate"].T)
        put(dense.wo.weight, layer["mlp"]["narrow"].T)
    tokens_BT = np.random.default_rng(1).integers(0, 128, (2, 50))
    with torch.no_grad():
        theirs_BTD = stack(input_ids=torch.from_numpy(tokens_BT)).last_hidden_state.numpy()
    ours_BTV = Transformer(config).apply({"params": params}, tokens_BT)
    np.testing.assert_allclose(ours_BTV, theirs_BTD @ np.asarray(params["head"]), atol=2e-5, rtol=2e-5)


def test_buckets_by_the_published_rule():
    distances = np.arange(-3, 400)
    buckets = np.asarray(relative_position_bucket(jnp.asarray(distances), 32, 128))
    expected = []
    for distance in np.maximum(distances, 0):
        if distance < 16:
            expected.append(distance)
        else:
            expected.append(min(31, 16 + int(np.float32(np.log(distance / 16) / np.log(8) * 16) + 1e-6)))
    np.testing.assert_array_equal(buckets, expected)


def test_gradients_are_causal(float64):
    # Twelve different tokens: the gradient by a row of the embedding is that by one position's input.
    config = dataclasses.replace(CONFIG, dtype="float64", vocab_size=12)
    params = init_params(config)

    def logits_by_position(embedding_TD):
        replaced = {**params, "embedding": {"embedding": embedding_TD}}
        return Transformer(config).apply({"params": replaced}, jnp.arange(12)[None])[0].sum(-1)

    jacobian = jax.jacobian(logits_by_position)(params["embedding"]["embedding"])
    strength_TT = np.abs(np.asarray(jacobian)).sum(-1)
    assert np.all(strength_TT[np.triu_indices(12, 1)] == 0)
    assert np.all(strength_TT[np.tril_indices(12)] > 1e-9)


@pytest.mark.parametrize("remat", ["minimal", "full"])
def test_remat_changes_nothing(remat):
    params = init_params(CONFIG)
    tokens_BT = np.random.default_rng(0).integers(0, 128, (2, 16))

    def loss(params, config):
        return jnp.mean(jnp.square(Transformer(config).apply({"params": params}, tokens_BT)))

    rematted = dataclasses.replace(CONFIG, remat=remat)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, rematted))
    assert "remat" in jaxpr or "checkpoint" in jaxpr
    expected = jax.grad(loss)(params, CONFIG)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.grad(loss)(params, rematted), expected)


def test_rotary_positions_equal_hugging_face():
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x_BTNH = np.random.default_rng(0).standard_normal((2, 9, 3, 16)).astype(np.float32)
    position_T = np.arange(5, 14)
    angles_TH = np.tile(position_T[:, None] * 10_000.0 ** (-np.arange(8) / 8), 2)
    cos_1TH, sin_1TH = (torch.from_numpy(f(angles_TH).astype(np.float32))[None] for f in (np.cos, np.sin))
    heads_first = torch.from_numpy(x_BTNH.transpose(0, 2, 1, 3))
    theirs, _ = llama.apply_rotary_pos_emb(heads_first, heads_first, cos_1TH, sin_1TH)
    np.testing.assert_allclose(
        rotate(jnp.asarray(x_BTNH), position_T), theirs.numpy().transpose(0, 2, 1, 3), atol=1e-5, rtol=1e-5
    )


def test_rotary_attention_knows_distances_only():
    q_BTNH, k_BTNH = np.random.default_rng(1).standard_normal((2, 1, 6, 2, 8)).astype(np.float32)
    logits = [
        jnp.einsum("BTNH,BSNH->BNTS", rotate(q_BTNH, jnp.arange(6) + shift), rotate(k_BTNH, jnp.arange(6) + shift))
        for shift in (0, 100)
    ]
    np.testing.assert_allclose(*logits, atol=1e-4)
    plain = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH)
    assert np.abs(logits[0] - plain).max() > 0.1


@pytest.mark.parametrize("position", ["relative_bias", "rotary"])
def test_packed_sequences_equal_each_alone(position):
    config = dataclasses.replace(CONFIG, position=position)
    params = init_params(config)
    generator = np.random.default_rng(2)
    sequences = [generator.integers(0, 128, length) for length in (7, 1, 12)]
    packed_1T = np.concatenate([*sequences, np.zeros(4, int)])[None]
    segments_1T = np.repeat([1, 2, 3, 0], [7, 1, 12, 4])[None]
    packed_1TV = Transformer(config).apply({"params": params}, packed_1T, segment_ids_BT=jnp.asarray(segments_1T))
    start = 0
    for tokens in sequences:
        alone_1TV = Transformer(config).apply({"params": params}, tokens[None])
        np.testing.assert_allclose(packed_1TV[:, start : start + len(tokens)], alone_1TV, atol=2e-5)
        start += len(tokens)
    # Without the segments the later sequences see the earlier ones.
    mixed_1TV = Transformer(config).apply({"params": params}, packed_1T)
    assert np.abs(mixed_1TV[:, 8:20] - packed_1TV[:, 8:20]).max() > 1e-2


@pytest.mark.parametrize("unrolled_layers", [1, 2])
def test_scanned_layers_equal_a_loop(unrolled_layers):
    config = dataclasses.replace(CONFIG, unrolled_layers=unrolled_layers)
    params = init_params(CONFIG)
    tokens_BT = np.random.default_rng(3).integers(0, 128, (2, 10))

    def looped(params):
        x_BTD = params["embedding"]["embedding"][tokens_BT]
        for layer in layers_of(params):
            x_BTD, _ = Block(CONFIG).apply({"params": layer}, x_BTD, params["position_bias"], (None, None), True)
        return jnp.sum(jnp.sin(RMSNorm(CONFIG).apply({"params": params["final_norm"]}, x_BTD) @ params["head"]))

    def scanned(params):
        return jnp.sum(jnp.sin(Transformer(config).apply({"params": params}, tokens_BT)))

    assert str(jax.make_jaxpr(scanned)(params)).count("scan[") == 1 + str(jax.make_jaxpr(looped)(params)).count("scan[")
    expected, actual = jax.value_and_grad(looped)(params), jax.value_and_grad(scanned)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), actual, expected)


def test_parameter_counts_of_the_paper():
    for gated, millions in ((False, 151), (True, 201)):
        config = TransformerConfig(1, 12, 16, 1024, 4096, gated_mlp=gated)
        shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes["layers"]))
        assert round(count / 1e6) == millions


def test_dropout_acts_in_training_only():
    config = dataclasses.replace(CONFIG, dropout_rate=0.5)
    params = init_params(config)
    tokens_BT = np.zeros((1, 8), int)
    run = lambda seed: Transformer(config).apply(
        {"params": params}, tokens_BT, deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )
    assert not np.allclose(run(0), run(1))
    np.testing.assert_array_equal(run(0), run(0))
    plain = Transformer(CONFIG).apply({"params": params}, tokens_BT)
    np.testing.assert_array_equal(Transformer(config).apply({"params": params}, tokens_BT), plain)


@pytest.mark.parametrize("has_condition", [False, True])
def test_a_prefix_sees_itself_in_both_directions_and_nothing_after_it(has_condition):
    config = dataclasses.replace(CONFIG, prefix_attention=True, block_positions=4)
    params = init_params(config)
    tokens_T = np.random.default_rng(0).integers(NUM_SPECIAL, 100, 13)
    if has_condition:
        tokens_T[6] = SEP
    # In row j token j is another one (but the separator); the last row is as it was.
    tokens_BT = np.tile(tokens_T, (14, 1))
    changed_T = np.flatnonzero(tokens_T != SEP)
    tokens_BT[changed_T, changed_T] += 1
    states_BTD = Transformer(config).apply({"params": params}, jnp.asarray(tokens_BT), method="hidden")
    sees_ST = np.any(np.abs(states_BTD[:13] - states_BTD[13]) > 1e-5, axis=-1)
    expected_ST = np.triu(np.ones((13, 13), bool))
    if has_condition:
        expected_ST |= np.arange(13)[:, None] < 7
    np.testing.assert_array_equal(sees_ST[changed_T], expected_ST[changed_T])
