"""Watches a run's metrics for the symptoms of its objective, and says so when one shows.

What is looked at are moving averages over about a thousand steps or ten logged rows, whichever is longer, and nothing
is said before the tenth row. All that a watch remembers follows from the rows in order, so a resumed run takes it from
the rows that stand in `metrics.jsonl` and goes on as if it had not stopped.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from audiolm_jax.objective import Symptom

STEPS, ROWS = 1000, 10


@dataclasses.dataclass(frozen=True)
class Seen:
    """What there is to remember of the rows so far.

    Attributes:
      step: of the last row.
      rows: how many there were.
      averages: moving averages of the metrics that symptoms are read from.
      lowest: the lowest of each, from the tenth row on.
      showing: names of the symptoms that show.
    """

    step: int = 0
    rows: int = 0
    averages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lowest: Mapping[str, float] = dataclasses.field(default_factory=dict)
    showing: frozenset[str] = frozenset()


def observe(symptoms: Iterable[Symptom], seen: Seen, step: int, row: Mapping[str, Any]) -> tuple[Seen, dict[str, str]]:
    """What is known after one more row, and the symptoms that show in it for the first time since they did not.

    Values that are missing or not finite (of a step that was not taken) leave their averages as they are.
    """
    averages, rows = dict(seen.averages), seen.rows + 1
    share = max(min((step - seen.step) / STEPS, 1 / ROWS), 1 / rows)
    for name in {name for symptom in symptoms for name in symptom.metrics}:
        value = row.get(name)
        if value is not None and math.isfinite(number := float(np.asarray(value))):
            averages[name] = averages.get(name, number) + share * (number - averages.get(name, number))
    if rows < ROWS:
        return Seen(step, rows, averages), {}
    lowest = {name: min(average, seen.lowest.get(name, average)) for name, average in averages.items()}
    readable = [symptom for symptom in symptoms if all(name in averages for name in symptom.metrics)]
    described = {symptom.name: symptom.describe(averages, lowest) for symptom in readable}
    showing = {name: words for name, words in described.items() if words is not None}
    new = {name: words for name, words in showing.items() if name not in seen.showing}
    return Seen(step, rows, averages, lowest, frozenset(showing)), new


class Watch:
    """The watch over one run.

    Args:
      symptoms: of its objective.
      rows: of the metrics so far, where the run is resumed.
      warn: called with one line when a symptom begins to show.
    """

    def __init__(self, symptoms: Iterable[Symptom], rows: Iterable[Mapping[str, Any]], warn: Callable[[str], None]):
        self._symptoms, self._warn, self._seen = tuple(symptoms), warn, Seen()
        for row in rows:
            self._seen, _ = observe(self._symptoms, self._seen, row["step"], row)

    def look(self, step: int, metrics: Mapping[str, Any]) -> dict[str, int]:
        """Warns of what shows anew; the marks of all symptoms, for the row."""
        self._seen, new = observe(self._symptoms, self._seen, step, metrics)
        for name, words in new.items():
            self._warn(f"warning: {name} at step {step}: {words}")
        return {symptom.name: int(symptom.name in self._seen.showing) for symptom in self._symptoms}
