"""Does one core feed the paper's slice, how soon does the first batch come, and is memory flat over an epoch?

    python benchmarks/pipeline.py                          # all recipes; memory over a million utterances
    python benchmarks/pipeline.py --utterances=20000 --seconds=3 --recipes=coarse_librilight
    python benchmarks/pipeline.py --folder=FOLDER          # keeps the datasets there, and finds them there again

A step has batch_size · sequence_length tokens. What 16 TPU v4 at 50 % utilisation consume is

    16 · 275e12 FLOP/s · 0.5 / (FLOPs of a step) · (tokens of a step)

where the FLOPs are those of the matrix products of forward and backward pass (`training.step.model_flops`): six times
the parameters in them times the tokens, and attention. A host of v4 has four chips, so each feeds a quarter of that.
The throughput is of the whole pipeline, from files to batches, over utterances as long as Libri-Light's segments, on
one core: by the clock, and by the processor time taken, which other programs disturb less. Start-up is from the config
to the first batch, without imports. Prints a table each.
"""

import argparse
import os
import pathlib
import tempfile
import time

import ml_collections
import numpy as np

CHIPS, UTILIZATION = 16, 0.5
RECIPES = "semantic_librilight,coarse_librilight,fine_librilight,semantic_piano,coarse_piano"
SEGMENT_SECONDS, SEGMENTS = 60.0, 1000
SHORT_SECONDS = (1.0, 4.0)
DISTINCT = 500
POINTS = 10


def write_dataset(
    folder: pathlib.Path, stage: ml_collections.ConfigDict, seconds: tuple[float, float], count: int, num_shards: int
):
    """A token dataset of random tokens, `count` utterances of between so many seconds; all but `DISTINCT` repeat."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from audiolm_jax.data import token_dataset

    generator, ratio = np.random.default_rng(0), stage.acoustic_rate // stage.semantic_rate
    features = token_dataset.features(stage.num_quantizers)
    records, frames = (
        [],
        generator.integers(*(round(length * stage.semantic_rate) for length in seconds), DISTINCT, endpoint=True),
    )
    for number, size in enumerate(frames.tolist()):
        shape = (size * ratio, stage.num_quantizers)
        record = {
            "id": f"utterance/{number}",
            "semantic": generator.integers(stage.num_clusters, size=size).astype(np.int32),
            "acoustic": generator.integers(stage.codebook_size, size=shape).astype(np.int32),
            "num_samples": size * 16_000 // stage.semantic_rate,
            "speaker": "nobody",
            "is_end": True,
        }
        records.append(features.serialize_example(record))
    folder.mkdir(parents=True)
    which = np.arange(count) % DISTINCT
    shares = np.array_split(which, num_shards)
    for shard, share in enumerate(shares):
        writer = ArrayRecordWriter(str(folder / token_dataset.shard_name("train", shard, num_shards)), "group_size:1")
        for number in share.tolist():
            writer.write(records[number])
        writer.close()
    names = ("num_clusters", "codebook_size", "num_quantizers", "semantic_rate", "acoustic_rate")
    metadata = token_dataset.TokenMetadata(
        "codec", "tokenizer", sample_rate=16_000, mean_run_length=1.0, **{name: stage[name] for name in names}
    )
    token_dataset.write_info(folder, {"train": [len(share) for share in shares]}, {"train": frames[which]}, metadata)


def start(config: ml_collections.ConfigDict):
    """Batches of a config's training data, and the seconds until the first one was there."""
    import tensorflow_datasets  # noqa: F401, as the clock leaves out imports.

    from audiolm_jax.training.registry import build_input

    before = time.perf_counter()
    batches = build_input(config, print).training(np.arange(config.batch_size))
    next(batches)
    return batches, time.perf_counter() - before


def throughput(batches, batch_tokens: int, warm_up: int, seconds: float) -> tuple[float, float]:
    """Tokens a second of time and a second of processor time, once what was read ahead is used up."""
    for _ in range(warm_up):
        next(batches)
    count, begin, begin_processor = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        next(batches)
        count += 1
    tokens = count * batch_tokens
    return tokens / (time.perf_counter() - begin), tokens / (time.process_time() - begin_processor)


def consumed_tokens_per_second(config: ml_collections.ConfigDict) -> float:
    """What the slice trains on in a second."""
    from audiolm_jax.accelerators import ACCELERATORS
    from audiolm_jax.training.step import model_flops

    (chip,) = (accelerator for accelerator in ACCELERATORS if accelerator.name == "v4")
    return CHIPS * chip.peak_flops * UTILIZATION / model_flops(config) * step_tokens(config)


def step_tokens(config: ml_collections.ConfigDict) -> int:
    from audiolm_jax.lm.objective import stage_from_config

    return config.batch_size * stage_from_config(config).sequence_length


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def speed_row(recipe: str, packing: bool, folder: pathlib.Path, batch_size: int, seconds: float) -> str:
    """The table of speed: one recipe, packed or not."""
    from audiolm_jax.config import load_config

    config = load_config(recipe)
    consumed = consumed_tokens_per_second(config)
    data = folder / f"segments-{config.stage.num_quantizers}x{config.stage.codebook_size}"
    if not data.exists():
        write_dataset(data, config.stage, (SEGMENT_SECONDS, SEGMENT_SECONDS), SEGMENTS, 4)
    config.update({"data_dir": str(data), "packing": packing, "batch_size": batch_size})
    batches, startup = start(config)
    rates = throughput(batches, step_tokens(config), 2 * config.input.prefetch_batches, seconds)
    cells = (f"{startup:.2f}", *(f"{rate / 1e6:.2f}" for rate in (*rates, consumed)), f"{rates[1] / consumed:.2f}")
    return f"| {recipe} | {'yes' if packing else 'no'} | {' | '.join(cells)} |"


def memory_row(utterances: int, packing: bool, folder: pathlib.Path) -> str:
    """The table of memory: an epoch of short utterances, the semantic stage."""
    from audiolm_jax.config import load_config
    from audiolm_jax.data.pipeline import open_members
    from audiolm_jax.lm.objective import stage_from_config

    config = load_config("semantic_piano")
    data = folder / f"short-{utterances}"
    if not data.exists():
        write_dataset(data, config.stage, SHORT_SECONDS, utterances, max(1, utterances // 20_000))
    # A crop as long as the longest, packed sixteen to a row or more.
    config.stage.crop_seconds = SHORT_SECONDS[1] * (8 if packing else 1)
    config.update({"data_dir": str(data), "packing": packing, "batch_size": 32 if packing else 256})
    (member,) = open_members(config, stage_from_config(config))
    steps = len(member.training) // config.batch_size
    del member
    batches, startup = start(config)
    before, resident = time.perf_counter(), [resident_bytes()]
    for step in range(1, steps + 1):
        next(batches)
        if step * POINTS // steps > (step - 1) * POINTS // steps:
            resident.append(resident_bytes())
    rate = utterances / (time.perf_counter() - before)
    mebibytes = ", ".join(f"{size / 2**20:.0f}" for size in resident)
    return f"| {utterances:,} | {'yes' if packing else 'no'} | {startup:.2f} | {rate:,.0f} | {mebibytes} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=RECIPES, help="whose throughput (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured of each (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of a measured batch (default: %(default)s)")
    parser.add_argument("--utterances", type=int, default=1_000_000, help="whose memory is measured; 0: none")
    parser.add_argument("--folder", type=pathlib.Path, help="where the datasets are written (default: a scratch one)")
    parser.add_argument("--core", type=int, default=0, help="the one to run on (default: 0); -1: all")
    options = parser.parse_args()
    if options.core >= 0:
        os.sched_setaffinity(0, {options.core})
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or pathlib.Path(scratch)
        print(
            "| recipe | packed | start-up, s | M tokens/s | M tokens / processor s | of 16 TPU v4, M tokens/s | ratio |"
        )
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
        for recipe in filter(None, options.recipes.split(",")):
            for packing in (False, True):
                print(speed_row(recipe, packing, folder, options.batch_size, options.seconds), flush=True)
        if options.utterances:
            print(
                "\n| utterances | packed | start-up, s | utterances/s | MiB at the start and each tenth of an epoch |"
            )
            print("| ---: | --- | ---: | ---: | --- |")
            for packing in (False, True):
                print(memory_row(options.utterances, packing, folder), flush=True)


if __name__ == "__main__":
    main()
