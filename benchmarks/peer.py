"""Times audiolm-pytorch 2.4.0; `speed.py` runs this with the Python that `make_peer.sh` set up.

    PEER_PYTHON benchmarks/peer.py SIZE_AS_JSON OUTPUT_JSON
    PEER_PYTHON benchmarks/peer.py                             # imports it, and no more

Its best settings that are right: the key/value cache on, "flash attention" off (with both, its logits are wrong), no
end token (its semantic stage would stop early), its trainers' own AdamW and gradient clipping. What only speech
encoders and training on audio files need (fairseq, torchaudio, wandb) is replaced by empty modules.
"""

import importlib.machinery
import json
import sys
import time
import types

import torch
import transformers  # noqa: F401  It looks for torchaudio, and must not find the one below.

END_NEVER = -1e9
DEFAULT_T5 = "google/t5-v1_1-base"


def stand_in(name: str, **contents):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(contents)
    sys.modules[name] = module
    return module


def import_peer():
    """audiolm_pytorch, without what cannot be installed or reached offline."""
    functional = stand_in("torchaudio.functional", resample=None)
    mel = stand_in("torchaudio.transforms", MelSpectrogram=lambda **_: torch.nn.Identity())
    stand_in("torchaudio", functional=functional, transforms=mel, __version__="0")
    stand_in("fairseq")
    stand_in("wandb")
    from audiolm_pytorch import t5

    # It asks the hub for the width of a text encoder that an unconditioned model has no use for.
    t5.T5_CONFIGS[DEFAULT_T5] = {"config": types.SimpleNamespace(d_model=768)}
    import audiolm_pytorch

    return audiolm_pytorch


def soundstream(peer, size: dict):
    """Our SoundStream's architecture: no local attention, the same channels, strides, width and codebooks."""
    codec, stage = size["codec"], size["stage"]
    return peer.SoundStream(
        channels=codec["channels"],
        strides=tuple(codec["strides"]),
        codebook_dim=codec["embed_dim"],
        codebook_size=stage["codebook_size"],
        rq_num_quantizers=stage["num_quantizers"],
        use_local_attn=False,
    ).eval()


def language_models(peer, size: dict, codec) -> dict:
    """The three stages in their wrappers, which generate and give the training loss."""
    model, stage = size["model"], size["stage"]
    shape = {"dim": model["embed_dim"], "depth": model["num_layers"], "heads": model["num_heads"], "flash_attn": False}
    clusters, codes, levels = stage["num_clusters"], stage["codebook_size"], stage["num_coarse_quantizers"]
    fine_levels = stage["num_quantizers"] - levels
    semantic = peer.SemanticTransformer(num_semantic_tokens=clusters, **shape)
    coarse = peer.CoarseTransformer(
        num_semantic_tokens=clusters, codebook_size=codes, num_coarse_quantizers=levels, **shape
    )
    fine = peer.FineTransformer(
        num_coarse_quantizers=levels, num_fine_quantizers=fine_levels, codebook_size=codes, **shape
    )
    with torch.no_grad():
        semantic.to_logits.bias[semantic.eos_id] = END_NEVER
    return {
        "semantic": peer.SemanticTransformerWrapper(transformer=semantic, unique_consecutive=False),
        "coarse": peer.CoarseTransformerWrapper(transformer=coarse, codec=codec, unique_consecutive=False),
        "fine": peer.FineTransformerWrapper(transformer=fine, codec=codec),
    }


def seconds_of(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def repeated(function, most: int, budget: float) -> list[float]:
    """Times of at most so many calls, stopping when `budget` seconds are spent."""
    times: list[float] = []
    while len(times) < most and sum(times) < budget:
        times.append(seconds_of(function))
    return times


def random_ids(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape)


def measure_decoding(name: str, wrapper, size: dict) -> dict[str, list[float]]:
    stage, decode = size["stage"], size["decode"]
    condition, frames = decode[name]["condition"], decode[name]["frames"]
    most, budget = size["repeats"], size["budget"]
    codes, levels = stage["codebook_size"], stage["num_coarse_quantizers"]
    none = torch.empty((1, 0), dtype=torch.long)
    transformer = wrapper.transformer
    if name == "semantic":
        generate = lambda frames, batch=1: wrapper.generate(max_length=frames, batch_size=batch)
        prefill = lambda: transformer(ids=none)
    elif name == "coarse":
        given = random_ids(stage["num_clusters"], 1, condition)
        generate = lambda frames: wrapper.generate(semantic_token_ids=given, max_time_steps=frames)
        prefill = lambda: transformer(
            semantic_token_ids=given, coarse_token_ids=none, return_only_coarse_logits=True, return_cache=True
        )
    else:
        given = random_ids(codes, 1, condition // levels, levels)
        # As many frames as it is given coarse ones.
        generate = lambda frames: wrapper.generate(coarse_token_ids=given[:, :frames])
        prefill = lambda: transformer(
            coarse_token_ids=given, fine_token_ids=none, return_only_fine_logits=True, return_cache=True
        )
    wrapper.eval()
    seconds = {f"compile/decode/{name}": [seconds_of(lambda: generate(2))]}
    with torch.inference_mode():
        prefill()
        seconds[f"prefill/{name}"] = repeated(prefill, 2 * most, budget)
    seconds[f"decode/{name}"] = repeated(lambda: generate(frames), most, budget)
    if name == "semantic":
        for batch in size["step_batches"]:
            times = repeated(lambda batch=batch: generate(frames, batch), most, budget)
            seconds[f"step/{batch}"] = [spent / frames for spent in times]
    return seconds


def measure_training(name: str, wrapper, size: dict) -> dict[str, list[float]]:
    from audiolm_pytorch.optimizer import get_optimizer

    stage, (condition, target), batch = size["stage"], size["train"][name], size["train_batch"]
    codes = stage["codebook_size"]
    match name:
        case "semantic":
            inputs = {"semantic_token_ids": random_ids(stage["num_clusters"], batch, target)}
        case "coarse":
            inputs = {
                "semantic_token_ids": random_ids(stage["num_clusters"], batch, condition),
                "coarse_token_ids": random_ids(codes, batch, target),
            }
        case _:
            inputs = {
                "coarse_token_ids": random_ids(codes, batch, condition),
                "fine_token_ids": random_ids(codes, batch, target),
            }
    parameters = list(wrapper.transformer.parameters())
    optimizer = get_optimizer(parameters, lr=1e-4, wd=1e-2)
    wrapper.train()

    def step():
        wrapper(**inputs, return_loss=True).backward()
        torch.nn.utils.clip_grad_norm_(parameters, size["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()

    first = [seconds_of(step)]
    step()
    return {f"compile/train/{name}": first, f"train/{name}": repeated(step, 2 * size["repeats"], size["budget"])}


def measure_codec(codec, size: dict) -> dict[str, list[float]]:
    wave = torch.randn(1, size["codec"]["hop_length"] * size["codec"]["frames"]) / 10
    codes = random_ids(size["stage"]["codebook_size"], 1, size["codec"]["frames"], size["stage"]["num_quantizers"])

    @torch.inference_mode()
    def encode():
        codec.tokenize(wave)

    @torch.inference_mode()
    def decode():
        codec.decode_from_codebook_indices(codes)

    seconds = {}
    for name, function in {"encode": encode, "decode": decode}.items():
        seconds[f"compile/codec/{name}"] = [seconds_of(function)]
        seconds[f"codec/{name}"] = repeated(function, 2 * size["repeats"], size["budget"])
    return seconds


def main():
    size, output = json.loads(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(size["threads"])
    torch.manual_seed(0)
    peer = import_peer()
    codec = soundstream(peer, size)
    wrappers = language_models(peer, size, codec)
    count = lambda parameters: sum(parameter.numel() for parameter in parameters)
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": {
            **{name: count(wrapper.transformer.parameters()) for name, wrapper in wrappers.items()},
            "layers": count(wrappers["semantic"].transformer.transformer.layers.parameters()),
            "codec": count([*codec.encoder.parameters(), *codec.decoder.parameters()]),
        },
    }
    seconds: dict[str, list[float]] = {}
    started = time.perf_counter(), time.process_time()
    for name, wrapper in wrappers.items():
        seconds |= measure_training(name, wrapper, size)
        print(f"peer: {name} trained", file=sys.stderr)
        seconds |= measure_decoding(name, wrapper, size)
        print(f"peer: {name} decoded", file=sys.stderr)
    seconds |= measure_codec(codec, size)
    facts["core_share"] = (time.process_time() - started[1]) / (time.perf_counter() - started[0])
    with open(output, "w") as file:
        json.dump({"facts": facts, "seconds": seconds}, file)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        import_peer()
    else:
        main()
