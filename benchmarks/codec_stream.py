"""A codec chunk by chunk: how long a chunk takes, how much faster than real time that is, and is memory flat?

    python benchmarks/codec_stream.py                        # SoundStream, C = 32 and 16, random weights, one core
    python benchmarks/codec_stream.py --codec=DIR            # a codec of your own
    python benchmarks/codec_stream.py --minutes=1,60         # also peak memory of `audiolm encode` and `decode`

Latency is the least delay that a listener has: a chunk's length, and what encoder, quantizer and decoder take for it.
Prints one table each.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import soundfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHUNK_HOPS = "1,3,17,50,500"
MEASURED_SECONDS = 10.0
TIMES = ("ms", "95 %", "x real time")
COLUMNS = (
    "codec",
    "hops",
    "chunk, ms",
    *(f"{step}, {time}" for step in ("encode", "decode") for time in TIMES),
    "latency, ms",
)


def write_codec(folder: pathlib.Path, channels: int) -> pathlib.Path:
    """A SoundStream of the paper's sizes and that width, with random weights."""
    import jax

    from audiolm_jax.config import soundstream_config
    from audiolm_jax.parts import Part, write_part
    from audiolm_jax.training.registry import build_objective
    from audiolm_jax.training.sharding import unbox

    config = soundstream_config()
    config.model.channels = channels
    objective = build_objective(config)
    weights = objective.weights(unbox(jax.jit(objective.init)(jax.random.key(0))))
    folder.mkdir()
    write_part(folder, Part("soundstream", config, jax.tree.map(np.asarray, weights)))
    return folder


def time_chunks(step: Callable, chunks: list[np.ndarray]) -> list[float]:
    """Seconds of each chunk of a stream, once its program is compiled."""
    _, state = step(chunks[0], None)
    times = []
    for chunk in chunks:
        start = time.perf_counter()
        result, state = step(chunk, state)
        np.asarray(result)
        times.append(time.perf_counter() - start)
    return times


def speed_rows(name: str, folder: pathlib.Path, chunk_hops: tuple[int, ...], seconds: float) -> list[str]:
    """A row of the table of speed for each size of chunk."""
    import audiolm_jax

    codec = audiolm_jax.load_codec(folder)
    generator, rows = np.random.default_rng(0), []
    for hops in chunk_hops:
        size = hops * codec.hop_length
        count = max(5, round(seconds * codec.sample_rate / size))
        waves = [generator.uniform(-0.3, 0.3, (1, size)).astype(np.float32) for _ in range(count)]
        shape = (1, hops, codec.num_quantizers)
        codes = [generator.integers(codec.codebook_size, size=shape).astype(np.int32) for _ in range(count)]
        chunk_ms = 1e3 * size / codec.sample_rate
        cells, latency = [name, f"{hops}", f"{chunk_ms:.0f}"], chunk_ms
        for step, chunks in ((codec.encode_chunk, waves), (codec.decode_chunk, codes)):
            times_ms = [1e3 * second for second in time_chunks(step, chunks)]
            median, slow = statistics.median(times_ms), float(np.percentile(times_ms, 95))
            latency += median
            cells += [f"{median:.2f}", f"{slow:.2f}", f"{chunk_ms / statistics.mean(times_ms):.1f}"]
        rows.append(f"| {' | '.join([*cells, f'{latency:.1f}'])} |")
    return rows


def write_noise(path: pathlib.Path, minutes: float, sample_rate: int):
    """A recording of a tone and noise, written a minute at a time."""
    generator = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", sample_rate, 1, "PCM_16") as sound:
        for _ in range(round(minutes * 6)):
            time_W = np.arange(10 * sample_rate) / sample_rate
            sound.write(0.2 * np.sin(2 * np.pi * 220 * time_W) + 0.05 * generator.standard_normal(len(time_W)))


def peak_bytes(*arguments: str) -> int:
    """Resident memory, at most, of an `audiolm` command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "audiolm_jax", *arguments], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: `audiolm {arguments[0]}` failed; see its message above")
    return usage.ru_maxrss * 1024


def memory_rows(name: str, folder: pathlib.Path, minutes: list[float], scratch: pathlib.Path) -> list[str]:
    """A row of the table of memory for each length; the recordings have another rate than the codec."""
    rows = []
    for length in minutes:
        wav, npz, back = (scratch / f"{length:g}{end}" for end in (".wav", ".npz", "-back.wav"))
        write_noise(wav, length, 22_050)
        peaks = [
            peak_bytes(command, f"--codec={folder}", f"--input={source}", f"--output={target}")
            for command, source, target in (("encode", wav, npz), ("decode", npz, back))
        ]
        for path in (wav, npz, back):
            path.unlink()
        rows.append(f"| {name} | {length:g} | " + " | ".join(f"{peak / 2**20:.0f}" for peak in peaks) + " |")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", type=pathlib.Path, help="folder of a codec; default: random SoundStreams")
    parser.add_argument(
        "--chunks", default=",".join(map(str, CHUNK_HOPS)), help="hops of a chunk (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=MEASURED_SECONDS, help="of audio each (default: %(default)s)")
    parser.add_argument("--minutes", default="", help="lengths whose peak memory is measured, such as 1,60")
    parser.add_argument("--core", type=int, default=0, help="the one to run on (default: 0); -1: all")
    options = parser.parse_args()
    if options.core >= 0:
        # Before JAX asks how many cores there are.
        os.sched_setaffinity(0, {options.core})
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        codecs = {options.codec.name: options.codec} if options.codec else {}
        for channels in () if options.codec else (32, 16):
            codecs[f"SoundStream, C = {channels}"] = write_codec(scratch / f"codec{channels}", channels)
        print(f"| {' | '.join(COLUMNS)} |\n| --- " + "| ---: " * (len(COLUMNS) - 1) + "|")
        hops = tuple(int(number) for number in options.chunks.split(","))
        for title, folder in codecs.items():
            print("\n".join(speed_rows(title, folder, hops, options.seconds)), flush=True)
        if options.minutes:
            print("\n| codec | minutes | encode, peak MiB | decode, peak MiB |\n| --- | ---: | ---: | ---: |")
            minutes = [float(number) for number in options.minutes.split(",")]
            for title, folder in codecs.items():
                print("\n".join(memory_rows(title, folder, minutes, scratch)), flush=True)


if __name__ == "__main__":
    main()
