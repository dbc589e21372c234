import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax.semantic import masking


def test_spans_cover_the_papers_share_and_stop_at_the_rows_end():
    lengths_B = jnp.full(64, 400)
    spans_BT = np.asarray(masking.span_mask(jax.random.key(0), lengths_B, 450, 0.065, 10))
    assert not spans_BT[:, 400:].any()
    # Away from the start, a frame is visible when none of ten frames started a span.
    np.testing.assert_allclose(spans_BT[:, 10:400].mean(), 1 - (1 - 0.065) ** 10, atol=0.02)


def test_spans_are_span_long_unless_cut_by_the_end():
    spans_BT = np.asarray(masking.span_mask(jax.random.key(1), jnp.full(200, 300), 300, 0.004, 10))
    runs = []
    for row_T in spans_BT:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row_T, [0]])))
        runs += [end - start for start, end in zip(edges[::2], edges[1::2]) if end < 300]
    assert min(runs) == 10
    assert np.mean(np.array(runs) == 10) > 0.9


def test_every_row_with_a_frame_has_a_masked_one():
    lengths_B = jnp.array([0, 1, 2, 5, 30])
    for seed in range(20):
        spans_BT = masking.span_mask(jax.random.key(seed), lengths_B, 30, 1e-6, 10)
        assert np.asarray(spans_BT.any(axis=1)).tolist() == [False, True, True, True, True]
        assert not np.asarray(spans_BT & (jnp.arange(30) >= lengths_B[:, None])).any()


def test_distractors_are_other_masked_frames_all_equally_often():
    spans_BT = np.zeros((3, 12), bool)
    spans_BT[0, [1, 2, 3, 7, 11]] = True
    spans_BT[1, [0, 11]] = True
    spans_BT[2] = True
    distractors_BTX = np.asarray(masking.sample_distractors(jax.random.key(0), jnp.asarray(spans_BT), 4000))
    for b, t in np.argwhere(spans_BT):
        found, counts = np.unique(distractors_BTX[b, t], return_counts=True)
        assert found.tolist() == [s for s in np.flatnonzero(spans_BT[b]) if s != t]
        np.testing.assert_allclose(counts / 4000, 1 / len(found), atol=0.04)


def test_distractors_of_rows_with_fewer_than_two_masked_frames_stay_in_range():
    spans_BT = jnp.zeros((2, 4), bool).at[1, 2].set(True)
    distractors_BTX = masking.sample_distractors(jax.random.key(0), spans_BT, 50)
    assert ((distractors_BTX >= 0) & (distractors_BTX < 4)).all()
