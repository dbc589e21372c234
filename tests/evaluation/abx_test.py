"""ABX against the published definition, one triple at a time, in plain Python."""

import collections
import functools
import math
from statistics import fmean

import numpy as np
import pytest

from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import abx, statistics
from audiolm_jax.evaluation.items import HEADER, Item, Items, read_items, write_items

RATE = 50.0


@functools.cache
def angle(a_D, b_D):
    if not any(a_D) or not any(b_D):
        return 0.0 if not any(a_D) and not any(b_D) else 1.0
    norms = math.sqrt(math.fsum(a * a for a in a_D) * math.fsum(b * b for b in b_D))
    cosine = round(math.fsum(a * b for a, b in zip(a_D, b_D)) / norms, abx.COSINE_DECIMALS)
    return math.acos(max(-1.0, min(1.0, cosine))) / math.pi


@functools.cache
def distance(x, y):
    """Least total cost by dynamic programming, divided by the length of the path traced back from the end."""
    cost = {}
    for i in range(len(x)):
        for j in range(len(y)):
            before = [cost[k] for k in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if k in cost]
            cost[i, j] = angle(x[i], y[j]) + (min(before) if before else 0.0)
    i, j, length = len(x) - 1, len(y) - 1, 1
    while (i, j) != (0, 0):
        steps = [k for k in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if k in cost]
        i, j = min(steps, key=cost.get)
        length += 1
    return cost[len(x) - 1, len(y) - 1] / length


def published(tokens):
    """Within and across errors of (context, speaker, phone, frames), no group too large to be taken whole."""
    groups = collections.defaultdict(list)
    for context, speaker, phone, frames in tokens:
        if len(frames):
            groups[context, speaker, phone].append(frames)
    cells = {"within": collections.defaultdict(list), "across": collections.defaultdict(list)}
    for (context, speaker, phone), a_tokens in groups.items():
        for (other_context, other_speaker, other), b_tokens in groups.items():
            if (other_context, other_speaker) != (context, speaker) or other == phone:
                continue
            for (x_context, x_speaker, x_phone), x_tokens in groups.items():
                if (x_context, x_phone) != (context, phone):
                    continue
                wrong = []
                for x, x_token in enumerate(x_tokens):
                    for a, a_token in enumerate(a_tokens):
                        if x_speaker == speaker and a == x:
                            continue
                        swap = x_speaker == speaker and a < x
                        to_a = distance(a_token, x_token) if swap else distance(x_token, a_token)
                        for b_token in b_tokens:
                            to_b = distance(x_token, b_token)
                            wrong.append(0.5 if to_a == to_b else float(to_a > to_b))
                if wrong:
                    mode = "within" if x_speaker == speaker else "across"
                    cells[mode][phone, other, speaker].append(fmean(wrong))
    errors = {}
    for mode, found in cells.items():
        pairs = collections.defaultdict(list)
        for (phone, other, _), over_contexts in found.items():
            pairs[phone, other].append(fmean(over_contexts))
        errors[mode] = fmean(map(fmean, pairs.values())) if pairs else math.nan
    return errors


def random_items(generator, num_items, speakers, phones, contexts, num_files=4, seconds=8.0):
    """Items of one to twelve frames or none, anywhere in the files."""
    choose = lambda name, count: f"{name}{generator.integers(count)}"
    items = []
    for _ in range(num_items):
        onset = generator.uniform(0, seconds)
        offset = min(seconds, onset + generator.uniform(0, 0.25))
        where = choose("file", num_files)
        around = choose("p", contexts), choose("n", contexts)
        items.append(Item(where, onset, offset, choose("ph", phones), *around, choose("speaker", speakers)))
    return items


def ours(items, x_by_file, **settings):
    columns = Items.of(items)
    sizes = np.array([len(x_by_file[name]) for name in columns.files])
    first_I, last_I = columns.frames(RATE, sizes[columns.file_I])
    offsets = (np.cumsum(sizes) - sizes)[columns.file_I]
    x_FD = np.concatenate([x_by_file[name] for name in columns.files])
    cells = abx.measure(columns, x_FD, first_I + offsets, last_I + offsets, **settings)
    return columns, cells


def published_of(items, x_by_file):
    tokens = []
    for item in items:
        x_FD = x_by_file[item.file].astype(float)
        first = max(0, math.ceil(item.onset * RATE - 0.5))
        last = min(len(x_FD), math.floor(item.offset * RATE - 0.5))
        tokens.append(
            ((item.previous, item.following), item.speaker, item.phone, tuple(map(tuple, x_FD[first:last].tolist())))
        )
    return published(tokens)


def kinds_of_features(generator):
    """Random vectors; one-hot tokens with runs, where ties are everywhere; vectors of few kinds, some of them zero."""
    names = [f"file{number}" for number in range(4)]
    table_KD = generator.standard_normal((5, 6)).astype(np.float32)
    table_KD[0] = 0
    tokens = lambda count: np.repeat(generator.integers(count, size=200), 2)
    return {
        "random": {name: generator.standard_normal((400, 6)).astype(np.float32) for name in names},
        "one-hot": {name: np.eye(7, dtype=np.float32)[tokens(7)] for name in names},
        "few": {name: table_KD[tokens(5)] for name in names},
    }


@pytest.mark.parametrize("kind", ["random", "one-hot", "few"])
@pytest.mark.parametrize("num_items, speakers, phones, contexts", [(25, 1, 3, 1), (40, 3, 3, 1), (90, 12, 3, 2)])
def test_equals_the_published_definition(kind, num_items, speakers, phones, contexts):
    # A cosine may lie where its rounding hangs on the precision; of these none does.
    generator = np.random.default_rng(num_items)
    x_by_file = kinds_of_features(generator)[kind]
    items = random_items(generator, num_items, speakers, phones, contexts)
    columns, cells = ours(items, x_by_file, max_size_group=1000, max_x_across=1000)
    expected = published_of(items, x_by_file)
    for mode in abx.MODES:
        found = abx.Averaging.of(getattr(cells, mode)()).mean()
        np.testing.assert_allclose(found, expected[mode], atol=1e-6, err_msg=mode)


def test_many_small_pieces_give_the_same(monkeypatch):
    generator = np.random.default_rng()
    x_by_file = kinds_of_features(generator)["few"]
    items = random_items(generator, 200, 6, 4, 3)
    _, expected = ours(items, x_by_file)
    for name, size in (("GROUPS_A_BLOCK", 2), ("ANGLES_AT_ONCE", 500), ("PAIRS_AT_ONCE", 7)):
        monkeypatch.setattr(abx, name, size)
    _, found = ours(items, x_by_file)
    assert len(found.error_C) > 50
    for name in ("speaker_C", "phone_C", "other_C", "context_C", "x_speaker_C", "triples_C", "error_C"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_a_tie_counts_a_half_and_opposite_frames_are_one_apart():
    # X is as far from A as from B; then B lies opposite.
    items = [Item("f", t, t + 0.061, phone, "p", "n", "s") for t, phone in ((0.0, "a"), (0.2, "a"), (0.4, "b"))]
    x_FD = np.tile([[1.0, 0.0]], (30, 1))
    _, cells = ours(items, {"f": x_FD})
    assert cells.error_C.tolist() == [0.5] and cells.triples_C.tolist() == [2]
    x_FD[20:] = [-1.0, 0.0]
    _, cells = ours(items, {"f": x_FD})
    assert cells.error_C.tolist() == [0.0]
    np.testing.assert_array_equal(abx.angles(x_FD[[0, 20]], np.array([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])),
                                  [[0.0, 0.5, 1.0], [1.0, 0.5, 1.0]])  # fmt: skip
    assert abx.angles(np.zeros((1, 2)), np.zeros((1, 2))).tolist() == [[0.0]]


def test_large_groups_and_many_speakers_are_sampled():
    generator = np.random.default_rng(0)
    x_by_file = kinds_of_features(generator)["random"]
    items = [
        Item("file0", onset, onset + 0.1, f"ph{phone}", "p", "n", f"s{speaker}")
        for speaker in range(8)
        for phone in range(2)
        for onset in generator.uniform(0, 7, 15)
    ]
    _, cells = ours(items, x_by_file, seed=3)
    within, across = cells.within(), cells.across()
    assert within.triples_C.tolist() == [10 * 9 * 10] * 16
    assert across.triples_C.tolist() == [10 * 10 * 10] * (8 * 2 * 5)
    pairs = np.stack([across.speaker_C, across.phone_C, across.x_speaker_C])
    assert np.unique(pairs, axis=1).shape[1] == 8 * 2 * 5
    same, other = ours(items, x_by_file, seed=3)[1], ours(items, x_by_file, seed=4)[1]
    np.testing.assert_array_equal(same.error_C, cells.error_C)
    assert np.any(other.x_speaker_C != cells.x_speaker_C) and np.any(other.within().error_C != within.error_C)
    # A choice of tokens estimates the error of all of them.
    _, whole = ours(items, x_by_file, max_size_group=15, max_x_across=7)
    assert abx.Averaging.of(cells).mean() == pytest.approx(abx.Averaging.of(whole).mean(), abs=0.03)


def cells_of(rows):
    """From rows of (speaker, phone, other, context, X's speaker, error)."""
    columns = list(zip(*rows))
    return abx.Cells(*map(np.array, columns[:5]), np.array(columns[5]), np.ones(len(rows), np.int64))


def test_averages_contexts_then_speakers_then_pairs_of_phones():
    rows = [(0, 0, 1, 0, 0, 0.1), (0, 0, 1, 1, 0, 0.3), (1, 0, 1, 0, 1, 0.6), (0, 1, 0, 2, 0, 0.9)]
    averaging = abx.Averaging.of(cells_of(rows))
    assert averaging.mean() == pytest.approx(((0.2 + 0.6) / 2 + 0.9) / 2)
    weights = dict(context_weights=np.array([1.0, 3.0, 0.0]), speaker_weights=np.array([1.0, 2.0]))
    assert averaging.mean(**weights) == pytest.approx((0.25 + 2 * 0.6) / 3)
    assert math.isnan(averaging.mean(np.zeros(3), np.ones(2)))


def test_interval_covers_the_expected_error_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLINGS", 150)
    covered, trials = 0, 40
    names = dict(
        files=[], phones=["a", "b"], speakers=[str(s) for s in range(12)], contexts=[(str(c), "") for c in range(30)]
    )
    columns = {
        name: np.zeros(0, int) for name in ("file_I", "phone_I", "context_I", "speaker_I", "onset_I", "offset_I")
    }
    items = Items(**names, **columns)
    generator = np.random.default_rng(0)
    for seed in range(trials):
        of_speaker, of_context = generator.normal(0, 0.05, 12), generator.normal(0, 0.05, 30)
        rows = [
            (s, p, 1 - p, c, s, 0.3 + of_speaker[s] + of_context[c] + generator.normal(0, 0.05))
            for s in range(12) for c in range(30) for p in range(2) if generator.random() < 0.3
        ]  # fmt: skip
        averaging = abx.Averaging.of(cells_of(rows))
        found = abx.interval(averaging.mean(), abx.resampled(averaging, items, seed), 30)
        assert found.low <= found.value <= found.high
        covered += found.low <= 0.3 <= found.high
    assert 0.85 * trials <= covered <= trials


def test_frames_as_the_reference_counts_them():
    # At 50 Hz frame t stands for (t + 1/2) / 50 s: 0.1 s ... 0.2 s holds 5 ... 9, of which the last is left out.
    items = Items.of([Item("f", 0.1, 0.2, "a", "p", "n", "s"), Item("f", 0.1, 0.139, "a", "p", "n", "s"),
                      Item("f", 0.0, 9.0, "a", "p", "n", "s")])  # fmt: skip
    first_I, last_I = items.frames(RATE, np.array([100, 100, 60]))
    assert list(zip(first_I.tolist(), last_I.tolist())) == [(5, 9), (5, 6), (0, 60)]


def test_item_files(tmp_path):
    path = tmp_path / "x.item"
    written = random_items(np.random.default_rng(0), 20, 2, 2, 2)
    write_items(path, written)
    assert path.read_text().splitlines()[0] == HEADER
    found = read_items(path)
    assert len(found) == 20
    for index, item in enumerate(written):
        assert found.files[found.file_I[index]] == item.file and found.phones[found.phone_I[index]] == item.phone
        assert found.contexts[found.context_I[index]] == (item.previous, item.following)
        assert found.speakers[found.speaker_I[index]] == item.speaker
        assert found.onset_I[index] == pytest.approx(item.onset, abs=1e-4)
    for header in ("", "\ufefffile onset offset phone prev next speaker\n"):
        path.write_text(f"{header}f 0.1 0.2 a b c s\ng 0.1 0.2 a b c s\n", encoding="utf-8")
        assert read_items(path).files == ["f", "g"]
    for line, message in (
        ("f 0.1 0.2 a b c", "not an item"),
        ("f 0.1 x a b c s", "line 3"),
        ("f 0.3 0.2 a b c s", "stretch of time"),
        ("f nan 0.2 a b c s", "stretch of time"),
    ):
        path.write_text(f"{HEADER}\nf 0.1 0.2 a b c s\n{line}\n")
        with pytest.raises(UserError, match=message):
            read_items(path)
    path.write_text(HEADER + "\n")
    with pytest.raises(UserError, match="no items"):
        read_items(path)
