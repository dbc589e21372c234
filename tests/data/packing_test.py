"""Plans of packed rows: complete, within bounds, dense."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from audiolm_jax.data import packing
from audiolm_jax.lm.stages import make_stage


@given(
    capacity=st.integers(1, 3000), count=st.integers(0, 600), seed=st.integers(0, 2**32 - 1), short=st.floats(0.01, 1)
)
@settings(max_examples=60)
def test_every_record_has_a_row_with_room_for_it(capacity, count, seed, short):
    lengths = np.random.default_rng(seed).integers(1, max(2, int(capacity * short) + 1), count)
    lengths = np.minimum(lengths, capacity)
    row_of = packing.plan(lengths, capacity, seed)
    assert sorted(set(row_of)) == list(range(row_of.max(initial=-1) + 1))
    assert np.bincount(row_of, lengths, minlength=1).max() <= capacity
    np.testing.assert_array_equal(row_of, packing.plan(lengths, capacity, seed))


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(10, 400, 4000)
    row_of = packing.plan(lengths, 1000, 0)
    assert lengths.sum() / (1000 * (row_of.max() + 1)) > 0.97
    assert not np.array_equal(row_of, packing.plan(lengths, 1000, 1))


def test_two_records_that_fill_a_row_share_it():
    row_of = packing.plan(np.full(100, 500), 1000, 0)
    np.testing.assert_array_equal(np.bincount(row_of), np.full(50, 2))


def test_rows_hold_each_record_once_and_fit_the_stage():
    stage = make_stage(
        "coarse", num_clusters=8, codebook_size=16, num_quantizers=3, num_coarse_quantizers=2, semantic_rate=25,
        acoustic_rate=50, crop_seconds=4.0, deduplicate=False,
    )  # fmt: skip
    num_frames = np.random.default_rng(0).integers(1, 250, 300)
    rows = packing.Rows(num_frames, stage, 0)
    groups = [rows[row] for row in range(len(rows))]
    assert sorted(record for group in groups for record in group) == list(range(300))
    # BOS and SEP, a semantic token and four acoustic ones a frame.
    positions = [sum(2 + 5 * min(100, num_frames[record]) for record in group) for group in groups]
    assert max(positions) <= stage.sequence_length and len(groups) < 300
