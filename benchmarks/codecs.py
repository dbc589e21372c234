"""Public codecs with their published sizes and random weights: ours beside Hugging Face `transformers` in PyTorch.

    python benchmarks/codecs.py                              # DAC 16 kHz, EnCodec 24 kHz, Mimi; one core, ten minutes

Both encode and decode the same recording of noise with the same weights, taking turns, in one process, on one thread.
Prints one table: medians, and how many times faster than real time. Nothing else should use the core meanwhile.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

COLUMNS = ("codec", "step", "ours, ms", "transformers, ms", "x transformers", "ours, x real time", "codes that differ")


def build_models() -> dict:
    """Models as published, but with random weights; sizes are the configurations' own but for DAC's 16 kHz variant."""
    import transformers

    torch_seed()
    return {
        "DAC 16 kHz": transformers.DacModel(
            transformers.DacConfig(
                sampling_rate=16_000, downsampling_ratios=[2, 4, 5, 8], upsampling_ratios=[8, 5, 4, 2], n_codebooks=12
            )
        ),
        "EnCodec 24 kHz": transformers.EncodecModel(transformers.EncodecConfig()),
        "Mimi": transformers.MimiModel(transformers.MimiConfig()),
    }


def torch_seed():
    """The same random weights in every run."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)


def randomize(model):
    """Codebooks that are not all zeros, as fresh models have them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith(("codebook.embed", "codebook.embed_sum")):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))


def their_steps(model, wave_BW: np.ndarray) -> tuple[Callable, Callable]:
    """Functions without arguments: codes [B, Q, T] of the waveform, and the waveform of these codes."""
    import torch

    wave = torch.tensor(wave_BW)[:, None]
    match type(model).__name__:
        case "EncodecModel":
            encode = lambda: model.encode(wave, bandwidth=model.config.target_bandwidths[-1]).audio_codes[0]
            decode = lambda codes: model.decode(codes[None], [None]).audio_values
        case _:
            encode = lambda: model.encode(wave).audio_codes
            decode = lambda codes: model.decode(audio_codes=codes).audio_values
    with torch.no_grad():
        codes = encode()
    return torch.no_grad()(encode), torch.no_grad()(lambda: decode(codes))


def timed(function: Callable) -> float:
    start = time.perf_counter()
    np.asarray(function())
    return time.perf_counter() - start


def rows(name: str, model, seconds: float, repeats: int) -> list[str]:
    """The table's rows of one codec."""
    import audiolm_jax
    from audiolm_jax.interop.convert import convert

    model.eval()
    randomize(model)
    with tempfile.TemporaryDirectory() as folder:
        source, output = pathlib.Path(folder) / "theirs", pathlib.Path(folder) / "ours"
        model.save_pretrained(source)
        convert(source, output)
        codec = audiolm_jax.load_codec(output)
    wave_BW = np.random.default_rng(0).uniform(-0.3, 0.3, (1, round(seconds * codec.sample_rate))).astype(np.float32)
    their_encode, their_decode = their_steps(model, wave_BW)
    codes_BTQ = np.swapaxes(np.asarray(their_encode()), 1, 2)
    levels = codes_BTQ.shape[2]
    our_encode, our_decode = lambda: codec.encode(wave_BW, num_quantizers=levels), lambda: codec.decode(codes_BTQ)
    differing = np.mean(np.asarray(our_encode()) != codes_BTQ)
    lines = []
    for step, ours, theirs in (("encode", our_encode, their_encode), ("decode", our_decode, their_decode)):
        timed(ours), timed(theirs)
        pairs = [(timed(ours), timed(theirs)) for _ in range(repeats)]
        our_time, their_time = (statistics.median(times) for times in zip(*pairs, strict=True))
        cells = [name, step, f"{1e3 * our_time:.0f}", f"{1e3 * their_time:.0f}", f"{their_time / our_time:.2f}"]
        cells += [f"{seconds / our_time:.1f}", f"{differing:.2%}" if step == "encode" else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of audio (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement (default: %(default)s)")
    parser.add_argument("--core", type=int, default=0, help="the one to run on (default: %(default)s)")
    options = parser.parse_args()
    # Before JAX asks how many cores there are.
    os.sched_setaffinity(0, {options.core})
    print(f"| {' | '.join(COLUMNS)} |\n| --- | --- " + "| ---: " * (len(COLUMNS) - 2) + "|")
    for name, model in build_models().items():
        print("\n".join(rows(name, model, options.seconds, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
