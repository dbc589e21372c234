"""The bar that counts seconds of audio."""

import sys

import tqdm


def seconds_bar(description: str, num_samples: int, sample_rate: int) -> tqdm.tqdm:
    """A progress bar on standard error that counts samples, of so many, and shows seconds."""
    return tqdm.tqdm(
        total=num_samples,
        desc=description,
        unit_scale=1 / sample_rate,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} s [{elapsed}<{remaining}]",
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
