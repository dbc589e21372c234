"""What to expect of a training run at which step: a picture of its metrics, and a table to paste into the docs.

    python benchmarks/training_curve.py runs/codec --metric reconstruction --metric eval_si_sdr \
        --metric perplexity_0,perplexity_11 --output docs/codec-training.png

Each `--metric` is a panel; names with commas between them share one. The table is printed.
"""

import argparse
import math
import pathlib
from typing import Any

import matplotlib.figure

from audiolm_jax.errors import UserError
from audiolm_jax.training.metrics import read_metrics

COLUMNS, TABLE_ROWS = 3, 10


def points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) wherever the metric was logged."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if not found:
        known = ", ".join(sorted({name for row in rows for name in row}))
        raise UserError(f"no metric {name}", "--metric", f"use one of {known}")
    return found


def draw(rows: list[dict[str, Any]], panels: list[list[str]]) -> matplotlib.figure.Figure:
    """A panel for each list of names."""
    height = math.ceil(len(panels) / COLUMNS)
    figure = matplotlib.figure.Figure(figsize=(4 * COLUMNS, 2.8 * height), layout="constrained")
    axes = figure.subplots(height, COLUMNS, sharex=True, squeeze=False)
    for panel, names in zip(axes.flat, panels, strict=False):
        for name in names:
            panel.plot(*zip(*points(rows, name), strict=True), label=name, linewidth=1)
        panel.legend(fontsize="x-small")
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    figure.supxlabel("step")
    return figure


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Markdown: the metrics at about `TABLE_ROWS` of the steps that logged all of them."""
    complete = [row for row in rows if all(row.get(name) is not None for name in names)]
    chosen = complete[:: max(1, len(complete) // TABLE_ROWS)]
    if complete and chosen[-1] is not complete[-1]:
        chosen.append(complete[-1])
    lines = [["step", *names], ["---:"] * (1 + len(names))]
    lines += [[f"{row['step']}", *(f"{row[name]:.4g}" for name in names)] for row in chosen]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--metric", action="append", required=True, metavar="NAME[,NAME ...]")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the picture, .png or .svg")
    options = parser.parse_args()
    rows = read_metrics(options.workdir)
    panels = [panel.split(",") for panel in options.metric]
    try:
        draw(rows, panels).savefig(options.output, dpi=110)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(table(rows, [name for panel in panels for name in panel]))


if __name__ == "__main__":
    main()
