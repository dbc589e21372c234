"""Times audiolm_jax and what the machine can do at best; `speed.py` runs this.

    python benchmarks/ours.py SIZE_AS_JSON OUTPUT_JSON

Weights are random: no time depends on their values. Every function is called before it is timed.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from audiolm_jax import accelerators, flops
from audiolm_jax.codec.codec import Codec
from audiolm_jax.codec.soundstream import Decoder, Encoder, SoundStreamConfig
from audiolm_jax.config import language_model_config, soundstream_config, w2v_bert_config
from audiolm_jax.generate import AudioLM
from audiolm_jax.lm.decode import LanguageModel, decode_stage
from audiolm_jax.lm.objective import stage_from_config, transformer_from_config
from audiolm_jax.lm.sampling import Sampling
from audiolm_jax.semantic.tokenizer import SemanticTokenizer
from audiolm_jax.training import registry, sharding, step

STAGES = ("semantic", "coarse", "fine")
Seconds = dict[str, list[float]]


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def repeated(function: Callable[[], Any], most: int, budget: float) -> list[float]:
    """Times of at most so many calls, stopping when `budget` seconds are spent."""
    times: list[float] = []
    while len(times) < most and sum(times) < budget:
        times.append(seconds_of(function))
    return times


def stage_config(name: str, size: dict) -> ml_collections.ConfigDict:
    """A stage's recipe in this size."""
    config = language_model_config(name)
    config.stage.update(size["stage"])
    config.model.update(size["model"])
    config.batch_size = size["train_batch"]
    config.optimizer.clip_norm = size["clip_norm"]
    return config


def random_weights(config: ml_collections.ConfigDict) -> Any:
    """Weights as a training run begins with them."""
    objective = registry.build_objective(config)
    return jax.jit(lambda key: objective.weights(sharding.unbox(objective.init(key))))(jax.random.key(0))


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def random_tokens(high: int, length: int) -> np.ndarray:
    """Tokens of which no two neighbours are alike."""
    steps = np.random.default_rng(0).integers(1, high, length)
    return np.cumsum(steps) % high


# --- what the machine can do


def matmul_rate(size: dict) -> float:
    """FLOPs a second of the fastest matrix product of the model's kind, in the model's type."""
    width, rows = size["model"]["embed_dim"], size["matmul_rows"]
    best = 0.0
    for m, k, n in [(rows, width, 4 * width), (rows, 4 * width, width), (rows, rows, rows)]:
        a, b = jnp.ones((m, k), size["model"]["dtype"]), jnp.ones((k, n), size["model"]["dtype"])
        # Several in a row: on a GPU, starting one takes a while.
        product = jax.jit(lambda a, b: [jnp.dot(a + i, b) for i in range(4)])
        jax.block_until_ready(product(a, b))
        best = max(best, 4 * 2 * m * k * n / min(repeated(lambda: product(a, b), 9, size["budget"])))  # noqa: B023
    return best


def read_bandwidth(num_bytes: int, size: dict) -> float:
    """Bytes a second of the fastest way to read that many once: a product with a vector or a sum, XLA's or NumPy's."""
    rows = max(1, num_bytes // (4 * 2048))
    matrix = np.ones((rows, 2048), np.float32)
    vector = np.ones(2048, np.float32)
    on_device, vector_on_device = jax.device_put((matrix, vector))
    product, total = jax.jit(jnp.dot), jax.jit(jnp.sum)
    ways = [lambda: product(on_device, vector_on_device), lambda: total(on_device)]
    if jax.default_backend() == "cpu":
        ways += [lambda: matrix @ vector, lambda: matrix.sum()]
    for way in ways:
        jax.block_until_ready(way())
    return matrix.nbytes / min(min(repeated(way, 15, size["budget"])) for way in ways)


# --- training


def training_batch(name: str, config: ml_collections.ConfigDict, size: dict) -> dict[str, np.ndarray]:
    stage = stage_from_config(config)
    condition, target = size["train"][name]
    given = random_tokens(stage.condition.vocabulary, condition) if stage.condition else None
    row = stage.prefix(given, random_tokens(stage.target.vocabulary, target))
    weights = (np.arange(len(row)) >= len(row) - target - 1).astype(np.float32)
    rows = {
        "decoder_input_tokens": row,
        "decoder_target_tokens": np.roll(row, -1),
        "decoder_loss_weights": weights,
    }
    return {field: np.tile(values, (size["train_batch"], 1)) for field, values in rows.items()}


def measure_training(name: str, size: dict) -> tuple[Seconds, dict]:
    """The step that `audiolm train` runs: guarded against what is not finite, the state donated."""
    config = stage_config(name, size)
    batch = training_batch(name, config, size)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with sharding.active(mesh):
        program = step.build_program(config, mesh)
        key = jax.random.key(0)
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        state = jax.block_until_ready(program.init(key))
        held = [state]

        def run():
            held[0], metrics = program.step(held[0], batch, key)
            return metrics

        first = seconds_of(run)
        # Waited for: calls return at once, and the next would pay for this one.
        seconds_of(run)
        times = repeated(run, 2 * size["repeats"], size["budget"])
        params = held[0]["params"]
    tokens = batch["decoder_input_tokens"].size
    # All but the embedding are in matrix products.
    weights = count(params) - count(params["embedding"])
    length = batch["decoder_input_tokens"].shape[1]
    attention = 6 * config.model.num_layers * config.model.embed_dim * length
    facts = {
        "parameters": count(params),
        "layers": count(params["layers"]),
        "tokens": tokens,
        "flops_6n": 6 * weights * tokens,
        "flops_causal": (6 * weights + attention) * tokens,
    }
    return {f"compile/train/{name}": [first], f"train/{name}": times}, facts


# --- decoding


def measure_decoding(name: str, size: dict) -> tuple[Seconds, dict]:
    config = stage_config(name, size)
    stage, transformer = stage_from_config(config), transformer_from_config(config)
    params = random_weights(config)["params"]
    lm = LanguageModel(stage, transformer, params)
    chunks = size["decode"][name]["chunks"]
    condition, frames = size["decode"][name]["condition"] // chunks, size["decode"][name]["frames"] // chunks
    most, budget, levels = size["repeats"], size["budget"], stage.target.num_levels
    tokens = random_tokens(stage.condition.vocabulary, condition + chunks) if stage.condition else None
    # Each chunk has a prefix of its own.
    given = [None if tokens is None else tokens[chunk : chunk + condition] for chunk in range(chunks)]
    prefixes = [stage.prefix(condition, np.zeros(0, np.int32)) for condition in given]
    sampling = Sampling(stage.temperature)

    def decode(frames: int, batch: int = 1):
        rows = batch * chunks
        keys_B = jax.random.split(jax.random.key(0), rows)
        return decode_stage(lm, prefixes * batch, [frames] * rows, [False] * rows, keys_B, sampling)

    seconds = {f"compile/decode/{name}": [seconds_of(lambda: decode(frames))]}
    seconds[f"decode/{name}"] = repeated(lambda: decode(frames), most, budget)
    # No frames: the prefix alone. Its cache is shorter, which is worth about a hundredth of a step.
    decode(0)
    seconds[f"prefill/{name}"] = repeated(lambda: decode(0), 2 * most, budget)
    if name == "semantic":
        for batch in size["step_batches"]:
            for count_ in (0, frames):
                decode(count_, batch)
            before = np.median(repeated(lambda: decode(0, batch), 2 * most, budget))  # noqa: B023
            times = repeated(lambda: decode(frames, batch), 2 * most, budget)  # noqa: B023
            seconds[f"step/{batch}"] = [float(spent - before) / frames for spent in times]
    else:
        steps = np.median(seconds[f"decode/{name}"]) - np.median(seconds[f"prefill/{name}"])
        seconds[f"step/{name}"] = [float(steps) / (frames * levels)]
    width, itemsize = transformer.embed_dim, jnp.dtype(transformer.dtype).itemsize
    # Of the head a step needs one level's columns and the end token's; of the embedding next to nothing.
    step_weights = count(params["layers"]) + width * (stage.target.codebook_size + 1)
    facts = {
        "chunks": chunks,
        "tokens": chunks * frames * levels,
        "prefix": len(prefixes[0]),
        "step_weights": step_weights,
        "step_bytes": step_weights * itemsize,
        # Keys and values that the mean step attends to, of one row.
        "cache_bytes": 2 * transformer.num_layers * width * itemsize * (len(prefixes[0]) + frames * levels / 2),
    }
    return seconds, facts


# --- codec, and everything together


def random_codec(size: dict) -> Codec:
    config = soundstream_config()
    fields = {name: size["codec"][name] for name in ("channels", "strides", "embed_dim")}
    config.model.update({**fields, "strides": tuple(fields["strides"])})
    config.model.update({name: size["stage"][name] for name in ("num_quantizers", "codebook_size")})
    return Codec.from_weights(config, random_weights(config))


def codec_flops(config: SoundStreamConfig, frames: int) -> dict[str, float]:
    """Of the convolutions, and of the search through the codebooks."""
    wave = jax.ShapeDtypeStruct((1, frames * config.hop_length), jnp.float32)
    latent = jax.ShapeDtypeStruct((1, frames, config.embed_dim), jnp.float32)
    search = 2 * frames * config.num_quantizers * config.codebook_size * config.embed_dim
    forward = lambda module, x: flops.traced_flops(lambda x: module.init_with_output(jax.random.key(0), x)[0], x)
    return {"encode": forward(Encoder(config), wave) + search, "decode": forward(Decoder(config), latent)}


def measure_codec(size: dict) -> tuple[Seconds, dict]:
    codec, frames = random_codec(size), size["codec"]["frames"]
    wave_BW = np.random.default_rng(0).standard_normal((1, frames * codec.hop_length)).astype(np.float32) / 10
    codes_BTQ = np.random.default_rng(0).integers(0, codec.codebook_size, (1, frames, codec.num_quantizers))
    seconds: Seconds = {}
    for name, function in {"encode": lambda: codec.encode(wave_BW), "decode": lambda: codec.decode(codes_BTQ)}.items():
        seconds[f"compile/codec/{name}"] = [seconds_of(function)]
        seconds[f"codec/{name}"] = repeated(function, 2 * size["repeats"], size["budget"])
    facts = {"parameters": count(codec.weights["generator"]), "flops": codec_flops(codec.config, frames)}
    return seconds, facts


def random_audiolm(size: dict) -> AudioLM:
    """A bundle of random weights."""
    encoder = w2v_bert_config()
    encoder.model.update(size["encoder"])
    clusters = {
        "layer": encoder.model.default_layer,
        "mean": np.zeros(encoder.model.embed_dim),
        "std": np.ones(encoder.model.embed_dim),
        "centroids": np.random.default_rng(0).standard_normal((size["stage"]["num_clusters"], encoder.model.embed_dim)),
    }
    stages = {}
    for name in STAGES:
        config = stage_config(name, size)
        params = random_weights(config)["params"]
        stages[name] = LanguageModel(stage_from_config(config), transformer_from_config(config), params)
    return AudioLM(
        codec=random_codec(size),
        tokenizer=SemanticTokenizer.from_weights(encoder, random_weights(encoder), clusters),
        stages=stages,
        mean_run_length=1.5,
        fingerprints={},
    )


def measure_continuation(size: dict) -> tuple[Seconds, dict]:
    """A prompt of 3 s and what follows: tokenizers, three stages and codec."""
    model, wanted = random_audiolm(size), size["continuation"]
    samples = round(wanted["prompt_seconds"] * model.codec.sample_rate)
    prompt_BW = np.random.default_rng(0).standard_normal((1, samples)).astype(np.float32) / 10
    generations = []

    def generate():
        generations.append(model.generate(prompt_BW, seconds=wanted["seconds"], ignore_end=True))

    seconds = {"compile/continuation": [seconds_of(generate)]}
    seconds["continuation"] = repeated(generate, size["repeats"], size["budget"])
    return seconds, {"seconds": wanted["seconds"], "tokens_per_second": generations[-1].tokens_per_second}


def main():
    size, output = json.loads(sys.argv[1]), sys.argv[2]
    device = jax.devices()[0]
    started = time.perf_counter(), time.process_time()
    seconds: Seconds = {}
    facts: dict[str, Any] = {
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "train": {},
        "decode": {},
    }
    for name in STAGES:
        times, facts["train"][name] = measure_training(name, size)
        seconds |= times
        print(f"ours: {name} trained", file=sys.stderr)
        times, facts["decode"][name] = measure_decoding(name, size)
        seconds |= times
        print(f"ours: {name} decoded", file=sys.stderr)
    times, facts["codec"] = measure_codec(size)
    seconds |= times
    if "continuation" in size:
        times, facts["continuation"] = measure_continuation(size)
        seconds |= times
    facts["matmul_rate"] = matmul_rate(size)
    facts["bandwidth"] = read_bandwidth(facts["decode"]["semantic"]["step_bytes"], size)
    if known := accelerators.of_device(device.device_kind):
        facts["peak"] = {"flops": known.peak_flops, "bandwidth": known.memory_bandwidth}
    facts["core_share"] = (time.process_time() - started[1]) / (time.perf_counter() - started[0])
    with open(output, "w") as file:
        json.dump({"facts": facts, "seconds": seconds}, file)


if __name__ == "__main__":
    main()
