"""The network beside the same in PyTorch, and what its mask promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from audiolm_jax.classifier.network import BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM, ClassifierConfig, ClassifierNetwork
from audiolm_jax.config import load_config

CONFIG = ClassifierConfig(16_000, 16, (4, 8, 16, 16, 24, 24), ("a", "b", "c"))


@pytest.fixture(scope="module")
def variables():
    """Random weights and statistics: as initialised, half of them would do nothing."""
    generator = np.random.default_rng()
    shapes = jax.eval_shape(
        lambda key: ClassifierNetwork(CONFIG).init(key, jnp.zeros((1, 8, 16)), jnp.ones((1, 8), bool), train=False),
        jax.random.key(0),
    )

    def draw(path, leaf):
        shape = jax.tree.leaves(leaf)[0].shape
        if path[-1].key in ("scale", "var"):
            return generator.uniform(0.5, 1.5, shape).astype(np.float32)
        fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 4
        return (generator.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    is_box = lambda leaf: hasattr(leaf, "names") or hasattr(leaf, "shape")
    return jax.tree_util.tree_map_with_path(draw, shapes, is_leaf=is_box)


def torch_network(variables) -> torch.nn.Sequential:
    """Log-mel [B, 1, T, M] → the last block's map, after the weights of ours."""
    params, statistics = variables["params"], variables["batch_stats"]
    tensor = lambda array: torch.tensor(np.asarray(array))
    layers, before = [], 1
    for index, channels in enumerate(CONFIG.channels):
        if index and channels > before:
            layers.append(torch.nn.MaxPool2d(2, 2, ceil_mode=True))
        for axis, kernel_size, padding in (("time", (3, 1), (1, 0)), ("frequency", (1, 3), (0, 1))):
            ours = params[f"block_{index}"]
            convolution = torch.nn.Conv2d(before, channels, kernel_size, padding=padding)
            norm = torch.nn.BatchNorm2d(channels, eps=BATCH_NORM_EPSILON, momentum=1 - BATCH_NORM_MOMENTUM)
            with torch.no_grad():
                convolution.weight.copy_(tensor(ours[f"conv_{axis}"]["kernel"]).permute(3, 2, 0, 1))
                convolution.bias.copy_(tensor(ours[f"conv_{axis}"]["bias"]))
                norm.weight.copy_(tensor(ours[f"norm_{axis}"]["scale"]))
                norm.bias.copy_(tensor(ours[f"norm_{axis}"]["bias"]))
                norm.running_mean.copy_(tensor(statistics[f"block_{index}"][f"norm_{axis}"]["mean"]))
                norm.running_var.copy_(tensor(statistics[f"block_{index}"][f"norm_{axis}"]["var"]))
            layers += [convolution, torch.nn.ReLU(), norm]
            before = channels
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("train", [False, True])
def test_logits_and_batch_statistics_are_pytorch_s(variables, train):
    mel_BTM = np.random.default_rng().standard_normal((3, 100, 16)).astype(np.float32)
    logits_BK, moved = jax.jit(
        lambda mel_BTM: ClassifierNetwork(CONFIG).apply(
            variables, mel_BTM, jnp.ones((3, 100), bool), train, mutable=["batch_stats"]
        )
    )(mel_BTM)
    network = torch_network(variables).train(train)
    with torch.no_grad():
        map_BCTM = network(torch.tensor(mel_BTM)[:, None])
        head = variables["params"]["head"]
        theirs_BK = map_BCTM.mean(dim=(2, 3)).numpy() @ head["kernel"] + head["bias"]
    assert map_BCTM.shape == (3, 24, 13, 2)
    np.testing.assert_allclose(logits_BK, theirs_BK, atol=1e-4)
    assert np.ptp(logits_BK, axis=0).min() > 1e-3
    norms = [layer for layer in network if isinstance(layer, torch.nn.BatchNorm2d)]
    for index, (frames, bands) in enumerate(((100, 16), (50, 8), (25, 4), (25, 4), (13, 2), (13, 2))):
        for axis in ("time", "frequency"):
            ours, theirs = moved["batch_stats"][f"block_{index}"][f"norm_{axis}"], norms.pop(0)
            np.testing.assert_allclose(ours["mean"], theirs.running_mean, atol=1e-4)
            # PyTorch averages n / (n − 1) times the variance that it normalises by.
            share = 1 - 1 / (3 * frames * bands) if train else 1.0
            before = variables["batch_stats"][f"block_{index}"][f"norm_{axis}"]["var"]
            expected = share * theirs.running_var.numpy() + (1 - share) * BATCH_NORM_MOMENTUM * before
            np.testing.assert_allclose(ours["var"], expected, rtol=1e-4)


def test_masked_frames_do_not_matter(variables):
    generator = np.random.default_rng()
    mel_BTM = generator.standard_normal((2, 64, 16)).astype(np.float32)
    mask_BT = np.arange(64) < np.array([[40], [64]])
    apply = jax.jit(
        lambda mel_BTM, mask_BT, train: ClassifierNetwork(CONFIG).apply(
            variables, mel_BTM, mask_BT, train, mutable=["batch_stats"]
        ),
        static_argnums=2,
    )
    whole_BK, _ = apply(mel_BTM, mask_BT, False)
    alone_BK, _ = apply(mel_BTM[:1, :40], mask_BT[:1, :40], False)
    np.testing.assert_allclose(whole_BK[0], alone_BK[0], atol=1e-5)
    for train in (False, True):
        other_BTM = np.where(mask_BT[..., None], mel_BTM, 100 * generator.standard_normal(mel_BTM.shape))
        ours, theirs = apply(mel_BTM, mask_BT, train), apply(other_BTM.astype(np.float32), mask_BT, train)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        unmasked_BK, _ = apply(mel_BTM, np.ones_like(mask_BT), train)
        assert np.abs(unmasked_BK - ours[0]).max() > 1e-3


def test_paper_s_size():
    config = load_config("detector").model
    model = ClassifierConfig(**config.to_dict())
    assert (model.num_mels, model.channels) == (64, (64, 128, 256, 256, 512, 512))
    params = jax.eval_shape(
        lambda key: ClassifierNetwork(model).init(key, jnp.zeros((1, 100, 64)), jnp.ones((1, 100), bool), train=False),
        jax.random.key(0),
    )["params"]
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    before, by_hand = 1, 512 * 2 + 2
    for channels in (64, 128, 256, 256, 512, 512):
        # Two kernels of three taps, two biases, two scales and two shifts.
        by_hand += 3 * before * channels + 3 * channels * channels + 6 * channels
        before = channels
    assert count == by_hand == 3_538_242
