"""What people see on standard error meanwhile: lines, and the bar that counts seconds of audio."""

import sys
from typing import Any

import tqdm


class _SecondsBar(tqdm.tqdm):
    """Knows how many times as fast as the audio sounds it is worked on."""

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        rate = values["rate"] or (self.n - self.initial) / max(values["elapsed"], 1e-9)
        return {**values, "real_time": f"{rate * self.unit_scale:.1f} x real time"}


def seconds_bar(description: str, num_samples: float, sample_rate: int, initial: float = 0) -> tqdm.tqdm:
    """A progress bar on standard error that counts samples, of so many, and shows seconds, time left and speed.

    Args:
      description: what stands before it.
      num_samples: of all.
      sample_rate: Hz.
      initial: samples that were done before.
    """
    return _SecondsBar(
        total=num_samples,
        initial=initial,
        desc=description,
        unit_scale=1 / sample_rate,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} s [{elapsed}<{remaining}, {real_time}]",
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )


def items_bar(description: str, count: int) -> tqdm.tqdm:
    """A progress bar on standard error that counts recordings."""
    interval = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm.tqdm(desc=description, total=count, unit="recording", mininterval=interval)


def report(line: str):
    """One line on standard error, above a progress bar."""
    tqdm.tqdm.write(line, file=sys.stderr)
