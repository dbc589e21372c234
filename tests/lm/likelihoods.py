"""The plain sum of log-softmax of an uncached, unbatched forward pass, in NumPy and double precision.

As a module, run in a process of its own with 8 CPU devices: prints the losses that `lm.scoring` finds on meshes.
"""

import json
import sys

import numpy as np

from audiolm_jax.lm import scoring
from audiolm_jax.lm.decode import LanguageModel
from audiolm_jax.lm.stages import SEP

# What of the architecture changes how a token is scored; heads and units divide by the meshes' axes.
ARCHITECTURES = {
    "relative_bias": {"num_heads": 4, "mlp_dim": 64},
    "rotary": {"num_heads": 4, "mlp_dim": 64, "position": "rotary", "gated_mlp": True},
    "prefix": {"num_heads": 4, "mlp_dim": 64, "prefix_attention": True},
}


def plain_losses(config, params, tokens) -> np.ndarray:
    """Negative log-probabilities [T] of tokens 1 … T, one head and one layer after the other."""
    params = _wide(params)
    inputs, num_positions = tokens[:-1], len(tokens) - 1
    distance_TS = np.arange(num_positions)[:, None] - np.arange(num_positions)
    seen_TS = distance_TS >= 0
    if config.prefix_attention and SEP in inputs:
        seen_TS = seen_TS | (np.arange(num_positions) <= list(inputs).index(SEP))
    x_TD = params["embedding"]["embedding"][inputs]
    for number in range(config.num_layers):
        layer = _layer(params["layers"], number)
        normed_TD, heads = _normed(x_TD, layer["attention_norm"]["scale"]), layer["attention"]
        for head in range(config.num_heads):
            q_TH, k_TH, v_TH = (normed_TD @ heads[name][:, head] for name in ("query", "key", "value"))
            if config.position == "rotary":
                q_TH, k_TH = _turned(q_TH), _turned(k_TH)
            logits_TS = q_TH @ k_TH.T
            if config.position == "relative_bias":
                logits_TS = logits_TS + params["position_bias"][_buckets(distance_TS, config), head]
            logits_TS = np.where(seen_TS, logits_TS, -np.inf)
            weights_TS = np.exp(logits_TS - logits_TS.max(axis=1, keepdims=True))
            x_TD = x_TD + (weights_TS / weights_TS.sum(axis=1, keepdims=True)) @ v_TH @ heads["out"][head]
        normed_TD, mlp = _normed(x_TD, layer["mlp_norm"]["scale"]), layer["mlp"]
        wide_TF = normed_TD @ mlp["wide"]
        wide_TF = wide_TF / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide_TF + 0.044715 * wide_TF**3)))
        x_TD = x_TD + (wide_TF * (normed_TD @ mlp["gate"]) if config.gated_mlp else wide_TF) @ mlp["narrow"]
    logits_TV = _normed(x_TD, params["final_norm"]["scale"]) @ params["head"]
    log_z_T = np.log(np.exp(logits_TV - logits_TV.max(axis=1, keepdims=True)).sum(axis=1)) + logits_TV.max(axis=1)
    return log_z_T - logits_TV[np.arange(num_positions), tokens[1:]]


def _wide(tree):
    return {k: _wide(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)


def _layer(tree, number: int):
    return {k: _layer(v, number) for k, v in tree.items()} if isinstance(tree, dict) else tree[number]


def _normed(x_TD, scale_D):
    return x_TD / np.sqrt(np.mean(x_TD**2, axis=1, keepdims=True) + 1e-6) * scale_D


def _turned(x_TH):
    """As complex numbers, dimension i the real part and i + H/2 the imaginary one."""
    half = x_TH.shape[1] // 2
    rates = 10_000.0 ** (-np.arange(half) / half)
    turned = (x_TH[:, :half] + 1j * x_TH[:, half:]) * np.exp(1j * np.arange(len(x_TH))[:, None] * rates)
    return np.concatenate([turned.real, turned.imag], axis=1)


def _buckets(distance_TS, config):
    """T5's: the first half of the buckets for a distance each, the others wider and wider up to the last."""
    exact = config.num_buckets // 2
    distance_TS = np.maximum(distance_TS, 0)
    share_TS = np.log(np.maximum(distance_TS, 1) / exact) / np.log(config.max_distance / exact)
    far_TS = exact + np.trunc(share_TS * (config.num_buckets - exact)).astype(int)
    return np.where(distance_TS < exact, distance_TS, np.minimum(far_TS, config.num_buckets - 1))


def sequences_of(stage, seed: int) -> list[np.ndarray]:
    """Sequences of five lengths, one of them twice."""
    from tests.lm.decode_test import prefix_of

    return [prefix_of(stage, frames, seed + frames) for frames in (9, 3, 30, 9, 17, 1)]


def main(seed: str):
    from tests.lm.decode_test import STAGES, model_of
    from tests.lm.meshes import mesh_of

    scoring.BLOCK_POSITIONS = 16
    results: dict = {}
    for stage in STAGES[:3]:
        config, params = model_of(stage, **ARCHITECTURES["relative_bias"])
        for shape in ((8, 1, 1), (1, 1, 4), (2, 2, 2)):
            lm = LanguageModel(stage, config, params, mesh=mesh_of(shape))
            losses = scoring.next_token_losses(lm, sequences_of(stage, int(seed)))
            results.setdefault(stage.name, {})[str(shape)] = [losses_T.tolist() for losses_T in losses]
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
