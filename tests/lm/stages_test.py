"""Sequence layouts: flatten and offset round trips, vocabulary ranges, end tokens."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiolm_jax.config import load_config
from audiolm_jax.lm.objective import stage_from_config
from audiolm_jax.lm.stages import BOS, EOS, NUM_SPECIAL, SEP, make_stage, run_starts

SPEECH = {
    "num_clusters": 32, "codebook_size": 16, "num_quantizers": 12, "num_coarse_quantizers": 4,
    "semantic_rate": 25, "acoustic_rate": 50, "deduplicate": True,
}  # fmt: skip
PIANO = {**SPEECH, "codebook_size": 2**14, "num_quantizers": 3, "num_coarse_quantizers": 3}
LAYOUTS = [("semantic", SPEECH), ("coarse", SPEECH), ("fine", SPEECH), ("semantic", PIANO), ("coarse", PIANO)]


def tokens_of(layout, frames, seed):
    generator = np.random.default_rng(seed)
    semantic_T = generator.integers(0, layout["num_clusters"], frames)
    acoustic_TQ = generator.integers(0, layout["codebook_size"], (2 * frames, layout["num_quantizers"]))
    return semantic_T, acoustic_TQ


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@given(frames=st.integers(1, 40), seed=st.integers(0, 2**31), at_end=st.booleans())
@settings(max_examples=25)
def test_target_round_trip(name, layout, frames, seed, at_end):
    stage = make_stage(name, crop_seconds=3.0, **layout)
    semantic_T, acoustic_TQ = tokens_of(layout, frames, seed)
    tokens, loss_start = stage.sequence(semantic_T, acoustic_TQ, at_end)
    target = tokens[loss_start:]
    if at_end and stage.predicts_end:
        assert target[-1] == EOS
        target = target[:-1]
    assert EOS not in target
    codes_TQ = stage.target.unflatten(target - stage.target_offset)
    first, count = stage.target.first_level, stage.target.num_levels
    if stage.target.source == "semantic":
        np.testing.assert_array_equal(codes_TQ[:, 0], semantic_T[run_starts(semantic_T)])
    else:
        np.testing.assert_array_equal(codes_TQ, acoustic_TQ[:, first : first + count])
    assert tokens[0] == BOS and tokens.max() < stage.vocab_size
    # The paper's offset: token i of a flattened sequence lies in the block of level i mod Q'.
    blocks = (target - stage.target_offset) // stage.target.codebook_size
    np.testing.assert_array_equal(blocks, np.arange(len(target)) % count)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_vocabulary_blocks_do_not_overlap(name, layout):
    stage = make_stage(name, crop_seconds=3.0, **layout)
    semantic_T, acoustic_TQ = tokens_of(layout, 20, 0)
    tokens, loss_start = stage.sequence(semantic_T, acoustic_TQ, at_end=True)
    condition = tokens[1 : loss_start - 1] if stage.condition else tokens[:0]
    if stage.condition:
        assert tokens[loss_start - 1] == SEP
        assert NUM_SPECIAL <= condition.min() and condition.max() < stage.target_offset
    assert stage.vocab_size % 128 == 0


def test_condition_of_each_stage():
    semantic_T, acoustic_TQ = tokens_of(SPEECH, 10, 1)
    coarse = make_stage("coarse", crop_seconds=3.0, **SPEECH)
    tokens, loss_start = coarse.sequence(semantic_T, acoustic_TQ, at_end=False)
    np.testing.assert_array_equal(tokens[1 : loss_start - 1] - NUM_SPECIAL, semantic_T[run_starts(semantic_T)])
    fine = make_stage("fine", crop_seconds=3.0, **SPEECH)
    tokens, loss_start = fine.sequence(semantic_T, acoustic_TQ, at_end=True)
    condition = fine.condition.unflatten(tokens[1 : loss_start - 1] - NUM_SPECIAL)
    np.testing.assert_array_equal(condition, acoustic_TQ[:, :4])
    assert EOS not in tokens


def test_paper_sequence_lengths():
    paper = {**SPEECH, "num_clusters": 1024, "codebook_size": 1024}
    lengths = {name: make_stage(name, crop_seconds=s, **paper).sequence_length
               for name, s in (("semantic", 30.0), ("coarse", 10.0), ("fine", 3.0))}  # fmt: skip
    assert lengths == {"semantic": 1 + 750, "coarse": 2 + 250 + 2000, "fine": 2 + 600 + 1200}


def test_piano_has_no_fine_stage():
    with pytest.raises(ValueError, match="no stage 'fine'"):
        make_stage("fine", crop_seconds=3.0, **PIANO)


@pytest.mark.parametrize(
    "recipe, condition, target, length",
    [
        ("semantic_piano", 0, 1024, 1 + 750),
        ("coarse_piano", 1024, 3 * 2**14, 2 + 250 + 1500),
        ("acoustic_piano", 0, 3 * 2**14, 1 + 1500),
    ],
)
def test_piano_recipes_are_the_papers(recipe, condition, target, length):
    """Two stages and the baseline of acoustic tokens alone: 30 and 10 s of 1024 semantic tokens and 3 x 2^14 codes."""
    stage = stage_from_config(load_config(recipe))
    assert (stage.condition.vocabulary if stage.condition else 0) == condition
    assert stage.target.vocabulary == target and stage.sequence_length == length
    codec = load_config("soundstream_piano").model
    assert (codec.num_quantizers, codec.codebook_size, codec.sample_rate // math.prod(codec.strides)) == (3, 2**14, 50)


def test_run_starts():
    np.testing.assert_array_equal(run_starts(np.array([3, 3, 1, 1, 1, 3])), [True, False, True, False, False, True])
    assert run_starts(np.array([], int)).shape == (0,)
