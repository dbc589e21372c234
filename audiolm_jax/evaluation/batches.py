"""What is measured at once: the same batches whenever the same is asked for, so that a killed run goes on with them."""

from collections.abc import Sequence

import numpy as np


def by_length(lengths: Sequence[float], largest: float, most: int) -> list[list[int]]:
    """Indices in batches of like lengths, the shortest first.

    Args:
      lengths: of what is to be batched.
      largest: bound of a batch's longest length times its number; one alone may be longer.
      most: bound of its number.
    """
    batches: list[list[int]] = []
    for index in np.argsort(lengths, kind="stable").tolist():
        count = len(batches[-1]) + 1 if batches else most + 1
        if count > most or count * lengths[index] > largest:
            batches.append([])
        batches[-1].append(index)
    return batches
