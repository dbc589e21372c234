import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiolm_jax.config import w2v_bert_config
from audiolm_jax.semantic import conformer, w2v_bert


@pytest.fixture(scope="module")
def model_config(config):
    return w2v_bert.W2vBertConfig(**config.model.to_dict())


@pytest.fixture(scope="module")
def inputs():
    mel_BTM = jnp.float32(np.random.default_rng(0).normal(size=(3, 36, 20)))
    return mel_BTM, jnp.arange(9) < jnp.array([9, 5, 1])[:, None]


def test_xl_has_the_papers_parameters():
    config = w2v_bert.W2vBertConfig(**w2v_bert_config().model.to_dict())
    mel_BTM, frame_BT = jnp.zeros((1, 4, 80)), jnp.ones((1, 1), bool)
    rngs = {"params": jax.random.key(0), "noise": jax.random.key(0)}
    init = lambda: w2v_bert.W2vBert(config).init(rngs, mel_BTM, frame_BT, frame_BT, 1.0, True)
    params = jax.eval_shape(init)["params"]
    assert 0.6e9 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 0.65e9
    assert config.default_layer == config.num_contrastive_layers + 7
    for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim


def test_subsampling_is_two_strided_convolutions(model_config, inputs):
    mel_BTM, _ = inputs
    module = w2v_bert.Subsampling(model_config)
    mask_BT = jnp.ones((3, 9), bool)
    params = nn.meta.unbox(module.init(jax.random.key(0), mel_BTM, mask_BT))["params"]
    ours_BTE = module.apply({"params": params}, mel_BTM, mask_BT)
    params = jax.tree.map(np.asarray, params)
    x_BTMC = np.asarray(mel_BTM)[..., None]
    for name in ("Conv_0", "Conv_1"):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        padded = np.pad(x_BTMC, ((0, 0), (0, 1), (0, 1), (0, 0)))
        out = np.zeros((*(np.array(x_BTMC.shape[:3]) // [1, 2, 2]), 4)) + bias
        for i in range(3):
            for j in range(3):
                window = padded[:, i::2, j::2][:, : out.shape[1], : out.shape[2]]
                out += window @ kernel[i, j]
        x_BTMC = out / (1 + np.exp(-out))
    flat_BTE = x_BTMC.reshape(3, 9, -1)
    normed_BTE = (flat_BTE - flat_BTE.mean(-1, keepdims=True)) / np.sqrt(flat_BTE.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(ours_BTE, normed_BTE, atol=1e-4)


def test_subsampled_rows_are_those_of_the_clip_alone(model_config, state, inputs):
    mel_BTM, mask_BT = inputs
    run = lambda *a: w2v_bert.Subsampling(model_config).apply({"params": state["params"]["subsampling"]}, *a)
    together_BTE = run(mel_BTM, mask_BT)
    for b, length in ((1, 5), (2, 1)):
        alone_BTE = run(mel_BTM[b : b + 1, : 4 * length], jnp.ones((1, length), bool))
        np.testing.assert_allclose(together_BTE[b, :length], alone_BTE[0], atol=1e-5)


def test_layers_are_numbered_as_hidden_states(model_config, state, inputs):
    mel_BTM, mask_BT = inputs
    params = state["params"]
    hidden_states = jax.jit(w2v_bert.hidden_states, static_argnums=(0, 4))
    states = hidden_states(model_config, params, mel_BTM, mask_BT, (0, 1, 2, 3))
    last_BTD, first_BTD = hidden_states(model_config, params, mel_BTM, mask_BT, (3, 1))
    np.testing.assert_allclose(last_BTD, states[3], atol=1e-6)
    np.testing.assert_allclose(first_BTD, states[1], atol=1e-6)
    features_BTE = w2v_bert.Subsampling(model_config).apply({"params": params["subsampling"]}, mel_BTM, mask_BT)
    projection = params["input_projection"]
    np.testing.assert_allclose(states[0], features_BTE @ projection["kernel"] + projection["bias"], atol=1e-5)
    blocks = [("contrastive", 0), ("masked", 0), ("masked", 1)]
    for layer, (module, index) in enumerate(blocks):
        block = jax.tree.map(lambda leaf, index=index: leaf[index], params[module]["layers"])
        arguments = (states[layer], conformer.sinusoids(9, 16), mask_BT, True)
        expected_BTD, _ = jax.jit(conformer.Block(model_config).apply, static_argnums=4)({"params": block}, *arguments)
        np.testing.assert_allclose(states[layer + 1], expected_BTD, atol=1e-5)


def test_a_layer_does_not_depend_on_later_ones(model_config, state, inputs):
    poisoned = jax.tree.map(jnp.copy, state["params"])
    poisoned["masked"] = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), poisoned["masked"])
    hidden_states = jax.jit(w2v_bert.hidden_states, static_argnums=(0, 4))
    assert np.isfinite(hidden_states(model_config, poisoned, *inputs, (2,))[0]).all()
    assert np.isnan(hidden_states(model_config, poisoned, *inputs, (3,))[0]).any()


def test_masked_frames_are_hidden_from_predictions_and_seen_by_the_quantizer(model_config, state, inputs):
    mel_BTM, _ = inputs
    model, mask_BT = w2v_bert.W2vBert(model_config), jnp.ones((3, 9), bool)
    spans_BT = jnp.zeros((3, 9), bool).at[:, 4].set(True)
    rngs = {"noise": jax.random.key(0)}
    variables = {"params": state["params"]}
    run = jax.jit(lambda mel_BTM: model.apply(variables, mel_BTM, mask_BT, spans_BT, 1.0, True, rngs=rngs))
    quantize = lambda module, mel_BTM: module.quantizer(module.subsampling(mel_BTM, mask_BT), 1.0, True)
    usage_BTK = jax.jit(lambda mel_BTM: model.apply(variables, mel_BTM, method=quantize)[-1])
    # Mel frames 17 to 19 reach no subsampled frame but the fourth: it sees 16 to 22, the third 12 to 18.
    changed = run(mel_BTM.at[:, 19].add(3.0))
    before = run(mel_BTM)
    np.testing.assert_allclose(changed.predicted_BTD, before.predicted_BTD, atol=1e-5)
    np.testing.assert_allclose(changed.context_BTG, before.context_BTG, atol=1e-5)
    difference_BTK = usage_BTK(mel_BTM.at[:, 19].add(3.0)) - usage_BTK(mel_BTM)
    assert np.abs(difference_BTK)[:, 4].max() > 1e-3
    np.testing.assert_allclose(np.delete(difference_BTK, 4, axis=1), 0.0, atol=1e-6)
    np.testing.assert_allclose(before.usage_K, jnp.sum(usage_BTK(mel_BTM), axis=(0, 1)), rtol=1e-5)


def test_quantizer_takes_the_most_likely_code(model_config):
    x_BTE = jnp.float32(np.random.default_rng(0).normal(size=(2, 6, 10)))
    quantizer = w2v_bert.GumbelQuantizer(model_config)
    params = nn.meta.unbox(quantizer.init(jax.random.key(0), x_BTE, 1.0, True))["params"]
    quantized_BTG, selected_BT, targets_BT, usage_BTK = quantizer.apply({"params": params}, x_BTE, 1.0, True)
    logits_BTK = np.asarray(x_BTE) @ params["logits"]["kernel"]
    np.testing.assert_array_equal(targets_BT, logits_BTK.argmax(-1))
    np.testing.assert_array_equal(selected_BT, targets_BT)
    np.testing.assert_allclose(quantized_BTG, params["codebook"][targets_BT])
    np.testing.assert_allclose(usage_BTK, np.exp(logits_BTK) / np.exp(logits_BTK).sum(-1, keepdims=True), rtol=1e-3)


def test_quantizer_samples_by_gumbel_and_keeps_the_targets(model_config):
    quantizer = w2v_bert.GumbelQuantizer(dataclasses.replace(model_config, codebook_size=3))
    x_BTE = jnp.ones((1, 4000, 2))
    params = {"logits": {"kernel": jnp.array([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])}, "codebook": jnp.eye(3, 8)}
    rngs = {"gumbel": jax.random.key(0)}
    quantized_BTG, selected_BT, targets_BT, _ = quantizer.apply({"params": params}, x_BTE, 0.7, False, rngs=rngs)
    assert (targets_BT == 0).all()
    # Whatever the temperature, a Gumbel-max choice follows the softmax of the logits.
    expected_K = np.exp([1.0, 0.0, -1.0]) / np.exp([1.0, 0.0, -1.0]).sum()
    np.testing.assert_allclose(np.bincount(selected_BT[0], minlength=3) / 4000, expected_K, atol=0.03)
    np.testing.assert_allclose(quantized_BTG, params["codebook"][selected_BT], atol=1e-6)


def test_quantizers_gradient_is_that_of_the_soft_choice(model_config):
    quantizer = w2v_bert.GumbelQuantizer(model_config)
    x_BTE = jnp.float32(np.random.default_rng(0).normal(size=(1, 3, 10)))
    params = nn.meta.unbox(quantizer.init(jax.random.key(0), x_BTE, 1.0, True))["params"]
    rngs, direction_G = {"gumbel": jax.random.key(3)}, jnp.arange(8.0)

    def hard(kernel):
        kernels = {**params, "logits": {"kernel": kernel}}
        return jnp.sum(quantizer.apply({"params": kernels}, x_BTE, 2.0, False, rngs=rngs)[0] @ direction_G)

    def soft(kernel):
        # Flax folds the module's path and the call's number into the key; take the noise that it drew.
        draw = lambda module: jax.random.gumbel(module.make_rng("gumbel"), (1, 3, 12))
        noise = quantizer.apply({}, rngs=rngs, method=draw)
        weights_BTK = jax.nn.softmax((x_BTE @ kernel + noise) / 2.0)
        return jnp.sum(weights_BTK @ params["codebook"] @ direction_G)

    kernel = params["logits"]["kernel"]
    np.testing.assert_allclose(jax.jit(jax.grad(hard))(kernel), jax.jit(jax.grad(soft))(kernel), rtol=1e-3, atol=1e-4)
