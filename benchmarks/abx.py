"""How long ABX takes: a slope measured on items of random features, and what it makes of LibriSpeech dev-clean.

    python benchmarks/abx.py                                 # 768 dimensions at 50 Hz; one core, some minutes

Phones follow each other by a random chain over 39 phones whose frequencies fall as English ones do; every speaker says
an equal share. Triphones last 0.24 s on average. dev-clean: 40 speakers and 5.4 hours, taken as 10 triphones a second.
Times are processor seconds of one core for the comparisons alone: what the encoder takes for its features is its own
affair.
"""

import argparse
import os
import time

import numpy as np

COLUMNS = ("triphones", "pairs of tokens", "triples", "processor seconds", "microseconds a pair", "peak MiB")
PHONES, SPEAKERS, TRIPHONE_SECONDS = 39, 40, 0.24
DEV_CLEAN_TRIPHONES = round(5.4 * 3600 * 10)


def random_items(generator: np.random.Generator, num_items: int):
    """Triphones of `SPEAKERS` speakers, a file each, one after the other."""
    from audiolm_jax.evaluation.items import Item, Items

    # The frequency of English phones falls by about a tenth from one to the next.
    frequency_P = 0.9 ** np.arange(PHONES)
    chain_PP = generator.gamma(0.3, size=(PHONES, PHONES)) * frequency_P
    edges_PP = np.cumsum(chain_PP / chain_PP.sum(axis=1, keepdims=True), axis=1)
    items = []
    for speaker in range(SPEAKERS):
        phones = [0]
        for draw in generator.random(num_items // SPEAKERS + 1):
            phones.append(min(PHONES - 1, int(np.searchsorted(edges_PP[phones[-1]], draw))))
        onsets = np.cumsum(generator.gamma(9.0, TRIPHONE_SECONDS / 27, size=len(phones) + 1))
        for index in range(1, len(phones) - 1):
            previous, phone, following = (f"p{number}" for number in phones[index - 1 : index + 2])
            times = float(onsets[index - 1]), float(onsets[index + 2])
            items.append(Item(f"s{speaker}", *times, phone, previous, following, f"s{speaker}"))
    return Items.of(items)


def count_pairs(items, usable_I: np.ndarray) -> int:
    """Distances that the protocol asks for."""
    from audiolm_jax.evaluation import abx

    return sum(len(block.rows_R) * len(block.columns_S) for block in abx.blocks(items, usable_I, seed=0))


def row(num_items: int, frame_rate: float, dimensions: int) -> dict[str, float]:
    """One measurement, by column."""
    import resource

    from audiolm_jax.evaluation import abx

    generator = np.random.default_rng(0)
    items = random_items(generator, num_items)
    frames = int(items.offset_I.max() * frame_rate) + 1
    first_I, last_I = items.frames(frame_rate, np.full(len(items), frames))
    x_FD = generator.standard_normal((SPEAKERS * frames, dimensions), dtype=np.float32)
    start = time.process_time()
    cells = abx.measure(items, x_FD, first_I + items.file_I * frames, last_I + items.file_I * frames)
    seconds = time.process_time() - start
    pairs = count_pairs(items, last_I > first_I)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    values = len(items), pairs, int(cells.triples_C.sum()), seconds, 1e6 * seconds / pairs, peak
    return dict(zip(COLUMNS, values, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[5_000, 10_000, 20_000], help="sizes to measure")
    parser.add_argument("--frame_rate", type=float, default=50.0, help="Hz (default: %(default)s)")
    parser.add_argument("--dimensions", type=int, default=768, help="of a frame (default: %(default)s)")
    parser.add_argument("--core", type=int, default=0, help="the one to run on (default: %(default)s)")
    options = parser.parse_args()
    # Before NumPy asks how many cores there are.
    os.sched_setaffinity(0, {options.core})
    print(f"| {' | '.join(COLUMNS)} |\n" + "| ---: " * len(COLUMNS) + "|")
    measured = []
    for size in options.items:
        measured.append(row(size, options.frame_rate, options.dimensions))
        cells = (f"{value:.4g}" if value % 1 else f"{value:.0f}" for value in measured[-1].values())
        print(f"| {' | '.join(cells)} |", flush=True)
    items = random_items(np.random.default_rng(0), DEV_CLEAN_TRIPHONES)
    pairs = count_pairs(items, np.ones(len(items), bool))
    minutes = slope([found[COLUMNS[1]] for found in measured], [found[COLUMNS[3]] for found in measured]) * pairs / 60
    print(f"\ndev-clean: {DEV_CLEAN_TRIPHONES} triphones, {pairs} pairs: {minutes:.1f} minutes a set of features")


def slope(pairs: list[float], seconds: list[float]) -> float:
    """Seconds a pair: by the two largest sizes, or on average of a single one."""
    order = np.argsort(pairs)
    pairs, seconds = [0.0, *np.array(pairs)[order]], [0.0, *np.array(seconds)[order]]
    return (seconds[-1] - seconds[-2]) / (pairs[-1] - pairs[-2])


if __name__ == "__main__":
    main()
