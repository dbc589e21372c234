"""ABX discriminability of phones in features, by the protocol of Libri-Light (arXiv 1912.07875 §4; ZeroSpeech 2021).

A and X are tokens of one phone, B of another, all between the same neighbours, A and B of one speaker, X of the same
(within) or of another (across). The error is the share of triples in which X is farther from A than from B; where both
are equally far it counts a half. The distance of two tokens is the mean, along the path of least total by dynamic time
warping, of the angles between their frames, in units of pi.

Two choices are ours: of a group of more than `max_size_group` tokens (same context, speaker and phone) one random
choice serves all comparisons, where the reference draws anew for each; and cosines are rounded to ten decimals, so that
equal frames are equal and rounding errors decide fewer ties.

Shape suffixes: I items, F, G frames, D dimensions, P pairs, C cells, R rows (items as X), S columns (items as A or B).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from audiolm_jax.evaluation import statistics
from audiolm_jax.evaluation.items import Items
from audiolm_jax.evaluation.statistics import Estimate

MODES = ("within", "across")
COSINE_DECIMALS = 10
# What bounds memory: groups of X in a block, angles kept before they are warped, and pairs warped at a time.
GROUPS_A_BLOCK, ANGLES_AT_ONCE, PAIRS_AT_ONCE = 8, 1 << 21, 1 << 11


class Features(Protocol):
    """Frames of all recordings, one after the other, looked up by index: x[index_F] is [F, D]."""

    def __getitem__(self, index_F: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Cells:
    """Errors of the triples of one speaker (of A and B), two phones, one context and one speaker of X.

    Attributes:
      speaker_C, phone_C, other_C, context_C, x_speaker_C: indices into the items' names; `phone_C` is A's and X's,
        `other_C` B's.
      error_C: share of the triples.
      triples_C: how many.
    """

    speaker_C: np.ndarray
    phone_C: np.ndarray
    other_C: np.ndarray
    context_C: np.ndarray
    x_speaker_C: np.ndarray
    error_C: np.ndarray
    triples_C: np.ndarray

    def within(self) -> "Cells":
        """Those whose X has the speaker of A and B."""
        return self._only(self.speaker_C == self.x_speaker_C)

    def across(self) -> "Cells":
        """Those whose X has another speaker."""
        return self._only(self.speaker_C != self.x_speaker_C)

    def _only(self, chosen_C: np.ndarray) -> "Cells":
        return Cells(*(getattr(self, field.name)[chosen_C] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Block:
    """Tokens of one context and speaker, and (some of) the X that they are compared with.

    Attributes:
      speaker, context: indices of the names.
      columns_S: items as A and B, sorted by phone.
      groups: phone, speaker and items of each group of X.
    """

    speaker: int
    context: int
    columns_S: np.ndarray
    groups: Sequence[tuple[int, int, np.ndarray]]

    @property
    def rows_R(self) -> np.ndarray:
        """The items of all X, group by group."""
        return np.concatenate([group for _, _, group in self.groups])


def blocks(
    items: Items, usable_I: np.ndarray, seed: int, max_size_group: int = 10, max_x_across: int = 5
) -> Iterator[Block]:
    """All comparisons of the protocol.

    Args:
      items: what there is to compare.
      usable_I: whether the item has any frame.
      seed: of the choice among too many tokens or speakers.
      max_size_group: tokens of a context, speaker and phone that take part.
      max_x_across: other speakers whose tokens are X, for each A.
    """
    rank_I = np.random.default_rng(seed).permutation(len(items))
    for context, of_speaker in _groups(items, usable_I, rank_I, max_size_group).items():
        for speaker, of_phone in of_speaker.items():
            if len(of_phone) < 2:
                continue
            chosen: list[tuple[int, int, np.ndarray]] = []
            for phone, group in of_phone.items():
                if len(group) > 1:
                    chosen.append((phone, speaker, group))
            for phone in of_phone:
                others = [name for name, phones in of_speaker.items() if name != speaker and phone in phones]
                if len(others) > max_x_across:
                    generator = np.random.default_rng([seed, context, speaker, phone])
                    others = [others[index] for index in generator.permutation(len(others))[:max_x_across]]
                chosen.extend((phone, name, of_speaker[name][phone]) for name in others)
            columns_S = np.concatenate(list(of_phone.values()))
            for start in range(0, len(chosen), GROUPS_A_BLOCK):
                yield Block(speaker, context, columns_S, chosen[start : start + GROUPS_A_BLOCK])


def _groups(
    items: Items, usable_I: np.ndarray, rank_I: np.ndarray, max_size_group: int
) -> dict[int, dict[int, dict[int, np.ndarray]]]:
    """Items by context, speaker and phone, all sorted; of a large group those of least rank."""
    index_I = np.flatnonzero(usable_I)
    keys = np.stack([column[index_I] for column in (items.context_I, items.speaker_I, items.phone_I)])
    order_I = np.lexsort(keys[::-1])
    index_I, keys = index_I[order_I], keys[:, order_I]
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(keys) != 0).any(axis=0)])[: len(index_I)])
    found: dict[int, dict[int, dict[int, np.ndarray]]] = {}
    for (context, speaker, phone), group in zip(keys[:, starts].T.tolist(), np.split(index_I, starts[1:])):
        if len(group) > max_size_group:
            group = np.sort(group[np.argsort(rank_I[group])[:max_size_group]])
        found.setdefault(context, {}).setdefault(speaker, {})[phone] = group
    return found


def measure(
    items: Items,
    x: Features,
    first_I: np.ndarray,
    last_I: np.ndarray,
    seed: int = 0,
    max_size_group: int = 10,
    max_x_across: int = 5,
) -> Cells:
    """Errors of every cell, within and across speakers.

    Args:
      items: to compare.
      x: features.
      first_I, last_I: of each item the first frame in `x`, and the one past its last; items without any take no part.
      seed, max_size_group, max_x_across: see `blocks`.
    """
    found = [np.zeros((7, 0))]
    waiting: list[tuple[Block, np.ndarray]] = []
    num_angles, length_I = 0, last_I - first_I

    def finish():
        for (block, _), distances_RS in zip(waiting, _warp_blocks(waiting, length_I)):
            found.append(_errors(block, distances_RS, items.phone_I))
        waiting.clear()

    for block in blocks(items, length_I > 0, seed, max_size_group, max_x_across):
        rows_FD, columns_GD = (
            np.asarray(x[_frames(index, first_I, length_I)]) for index in (block.rows_R, block.columns_S)
        )
        waiting.append((block, angles(rows_FD, columns_GD)))
        num_angles += waiting[-1][1].size
        if num_angles > ANGLES_AT_ONCE:
            finish()
            num_angles = 0
    finish()
    *names, error_C, triples_C = np.concatenate(found, axis=1)
    speaker_C, phone_C, other_C, context_C, x_speaker_C = (name_C.astype(np.int64) for name_C in names)
    return Cells(speaker_C, phone_C, other_C, context_C, x_speaker_C, error_C, triples_C.astype(np.int64))


def _frames(index: np.ndarray, first_I: np.ndarray, length_I: np.ndarray) -> np.ndarray:
    """Indices of all frames of these items, one item after the other."""
    starts = np.cumsum(length_I[index]) - length_I[index]
    return np.arange(length_I[index].sum()) + np.repeat(first_I[index] - starts, length_I[index])


def angles(x_FD: np.ndarray, y_GD: np.ndarray) -> np.ndarray:
    """Angles between frames in units of pi, [F, G]; a frame of zeros is at 1 from all others, at 0 from its like."""
    units, are_zero = [], []
    for frames_FD in (x_FD, y_GD):
        frames_FD = frames_FD.astype(np.float64)
        norm_F1 = np.linalg.norm(frames_FD, axis=1, keepdims=True)
        units.append(frames_FD / np.where(norm_F1 > 0, norm_F1, 1.0))
        are_zero.append(norm_F1[:, 0] == 0)
    cosine_FG = np.round(units[0] @ units[1].T, COSINE_DECIMALS)
    if are_zero[0].any() or are_zero[1].any():
        cosine_FG[are_zero[0]] = cosine_FG[:, are_zero[1]] = -1.0
        cosine_FG[np.ix_(*are_zero)] = 1.0
    return np.arccos(np.clip(cosine_FG, -1.0, 1.0)) / np.pi


def _warp_blocks(waiting: Sequence[tuple[Block, np.ndarray]], length_I: np.ndarray) -> list[np.ndarray]:
    """Distances [R, S] of every X from every A and B of each block.

    Within a group of one speaker the distance of two tokens is taken once, with the earlier one as X, as the
    reference does: where several paths are equally good, their lengths can depend on it.
    """
    corners, strides, heights, widths, distances = [], [], [], [], []
    base = 0
    for block, angles_FG in waiting:
        rows_R, columns_S = length_I[block.rows_R], length_I[block.columns_S]
        top_R, left_S = np.cumsum(rows_R) - rows_R, np.cumsum(columns_S) - columns_S
        corners.append((base + top_R[:, None] * angles_FG.shape[1] + left_S).ravel())
        strides.append(np.full(len(rows_R) * len(columns_S), angles_FG.shape[1]))
        heights.append(np.repeat(rows_R, len(columns_S)))
        widths.append(np.tile(columns_S, len(rows_R)))
        distances.append((len(rows_R), len(columns_S)))
        base += angles_FG.size
    if not waiting:
        return []
    flat = np.concatenate([angles_FG.ravel() for _, angles_FG in waiting])
    found_P = warp(flat, *(np.concatenate(columns) for columns in (corners, strides, heights, widths)))
    ends = np.cumsum([rows * columns for rows, columns in distances])
    return [part.reshape(shape) for part, shape in zip(np.split(found_P, ends[:-1]), distances)]


def warp(
    flat: np.ndarray, corner_P: np.ndarray, stride_P: np.ndarray, height_P: np.ndarray, width_P: np.ndarray
) -> np.ndarray:
    """Mean along the path of least total, for many pairs: [P].

    Steps go down, right, or both, from the first frames of both tokens to the last. Of equally good predecessors the
    path takes the diagonal one, then the left one, as the reference does tracing it back.

    Args:
      flat: frame distances.
      corner_P, stride_P: element (i, j) of pair p is flat[corner_P[p] + i * stride_P[p] + j].
      height_P, width_P: frames of the two tokens.
    """
    mean_P = np.empty(len(corner_P))
    order_P = np.lexsort((width_P, height_P))
    for start in range(0, len(order_P), PAIRS_AT_ONCE):
        pairs = order_P[start : start + PAIRS_AT_ONCE]
        mean_P[pairs] = _warp_some(flat, corner_P[pairs], stride_P[pairs], height_P[pairs], width_P[pairs])
    return mean_P


def _warp_some(flat, corner_P, stride_P, height_P, width_P) -> np.ndarray:
    """`warp` of few pairs at once: row by row of the frame distances, each element for all pairs."""
    width, num_pairs = int(width_P.max()), len(corner_P)
    column_JP = np.minimum(np.arange(width)[:, None], width_P - 1)
    # Totals and steps of the row above, with a border to the left: the path begins at its corner.
    above_JP, above_steps_JP = np.full((width + 1, num_pairs), np.inf), np.zeros((width + 1, num_pairs))
    above_JP[0], mean_P = 0.0, np.empty(num_pairs)
    for i in range(int(height_P.max())):
        distance_JP = flat[corner_P + np.minimum(i, height_P - 1) * stride_P + column_JP]
        total_JP, steps_JP = np.full_like(above_JP, np.inf), np.zeros_like(above_steps_JP)
        for j in range(width):
            diagonal_P, up_P, left_P = above_JP[j], above_JP[j + 1], total_JP[j]
            side_P = np.minimum(left_P, up_P)
            total_JP[j + 1] = distance_JP[j] + np.minimum(diagonal_P, side_P)
            side_steps_P = np.where(left_P <= up_P, steps_JP[j], above_steps_JP[j + 1])
            steps_JP[j + 1] = np.where(diagonal_P <= side_P, above_steps_JP[j], side_steps_P) + 1.0
        ended = np.flatnonzero(height_P == i + 1)
        mean_P[ended] = total_JP[width_P[ended], ended] / steps_JP[width_P[ended], ended]
        above_JP, above_steps_JP = total_JP, steps_JP
    return mean_P


def _errors(block: Block, distances_RS: np.ndarray, phone_I: np.ndarray) -> np.ndarray:
    """The block's cells as columns of a table, in the order of `Cells`' fields: [7, C]."""
    phone_S = phone_I[block.columns_S]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(phone_S) != 0]))
    phones, counts = phone_S[starts], np.diff(np.append(starts, len(phone_S)))
    cells = np.empty((len(block.groups), 7, len(phones)))
    first_row = 0
    for number, (phone, x_speaker, group) in enumerate(block.groups):
        of_a = int(np.searchsorted(phones, phone))
        distances_XS = distances_RS[first_row : first_row + len(group)]
        first_row += len(group)
        to_a_XA = distances_XS[:, starts[of_a] : starts[of_a] + counts[of_a]]
        pairs = to_a_XA.size
        if x_speaker == block.speaker:
            # X is one of the group itself, and not its own A.
            to_a_XA = np.triu(to_a_XA, 1) + np.triu(to_a_XA, 1).T
            np.fill_diagonal(to_a_XA, np.inf)
            pairs -= len(group)
        nearer = (to_a_XA[:, :, None] < distances_XS[:, None, :]).sum(axis=(0, 1))
        equal = (to_a_XA[:, :, None] == distances_XS[:, None, :]).sum(axis=(0, 1))
        triples = pairs * counts
        error = 1.0 - np.add.reduceat(nearer + 0.5 * equal, starts) / triples
        for row, values in enumerate((block.speaker, phone, phones, block.context, x_speaker, error, triples)):
            cells[number, row] = values
    table = np.moveaxis(cells, 1, 0).reshape(7, -1)
    return table[:, table[1] != table[2]]


# --- from cells to figures


@dataclasses.dataclass(frozen=True)
class Averaging:
    """The reference's order of averaging: contexts (and speakers of X), then speakers, then ordered pairs of phones.

    Every mean takes what there is: a pair of phones that a speaker never says between the same neighbours counts for
    nothing. Each level's weights are those of a bootstrap's resampling; all 1 for the figure itself.
    """

    cells: Cells
    # Of each cell its (speaker, phone, other), of each of these its (phone, other), as numbers from 0.
    triple_C: np.ndarray
    pair_T: np.ndarray
    speaker_T: np.ndarray

    @classmethod
    def of(cls, cells: Cells) -> "Averaging":
        table = np.stack([cells.phone_C, cells.other_C, cells.speaker_C])
        triples, triple_C = np.unique(table, axis=1, return_inverse=True)
        _, pair_T = np.unique(triples[:2], axis=1, return_inverse=True)
        return cls(cells, triple_C.reshape(-1), pair_T.reshape(-1), triples[2])

    def mean(self, context_weights: np.ndarray | None = None, speaker_weights: np.ndarray | None = None) -> float:
        """The error; NaN where nothing has any weight.

        Args:
          context_weights: by index of a context's name.
          speaker_weights: by index of a speaker's name.
        """
        weights_C, weights_T = np.ones(len(self.triple_C)), np.ones(len(self.pair_T))
        if context_weights is not None and speaker_weights is not None:
            x_is_other_C = self.cells.speaker_C != self.cells.x_speaker_C
            x_weights_C = np.where(x_is_other_C, speaker_weights[self.cells.x_speaker_C], 1.0)
            weights_C = context_weights[self.cells.context_C] * x_weights_C
            weights_T = speaker_weights[self.speaker_T]
        error_T, has_T = _grouped_mean(self.triple_C, self.cells.error_C, weights_C, len(self.pair_T))
        num_pairs = int(self.pair_T.max(initial=-1)) + 1
        error_P, has_P = _grouped_mean(self.pair_T, error_T, weights_T * has_T, num_pairs)
        return float(error_P[has_P].mean()) if has_P.any() else float("nan")


def _grouped_mean(group_M, values_M, weights_M, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean of each group, and which have any weight."""
    total_G = np.bincount(group_M, weights_M, num_groups)
    return np.bincount(group_M, weights_M * values_M, num_groups) / np.where(total_G > 0, total_G, 1.0), total_G > 0


def resampled(averaging: Averaging, items: Items, seed: int) -> np.ndarray:
    """The error in `RESAMPLINGS` bootstrap samples [S]; with one seed the same draws for all features.

    Contexts are resampled, and speakers too where there are several (both at once, Owen 2007: a cell weighs the product
    of how often its context and its speakers, X's included, were drawn). No token is in two contexts, so contexts are
    as good as independent, which triples, cells and pairs of phones are not: they share tokens. With one speaker the
    interval says what other words of that speaker would give, and nothing of other speakers.
    """
    generator = np.random.default_rng(seed)
    errors_S = np.empty(statistics.RESAMPLINGS)
    for index in range(statistics.RESAMPLINGS):
        context_weights, speaker_weights = (
            generator.multinomial(len(names), np.full(len(names), 1 / len(names))).astype(np.float64)
            for names in (items.contexts, items.speakers)
        )
        errors_S[index] = averaging.mean(context_weights, speaker_weights)
    return errors_S


def interval(value: float, samples_S: np.ndarray, count: int) -> Estimate:
    """An estimate from its bootstrap samples, by percentiles; samples without any cell (NaN) are left out."""
    low, high = np.nanpercentile(samples_S, (2.5, 97.5))
    return Estimate(value, float(min(low, value)), float(max(high, value)), count)
