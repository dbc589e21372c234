"""Windows of long generations with random weights: what each is given, and what they leave in memory."""

import dataclasses
import gc
import tracemalloc

import jax
import jax.monitoring
import numpy as np
import pytest

from audiolm_jax import windows as windows_module

RATE = 16000


def prompt(samples=RATE, seed=0):
    return np.random.default_rng(seed).uniform(-0.3, 0.3, (1, samples)).astype(np.float32)


@pytest.fixture
def calls(monkeypatch):
    """What `decode_stage` was asked for, one row a call: stage name, prefix, number of frames."""
    asked = []
    decode_stage = windows_module.decode_stage

    def noted(lm, prefixes, num_frames, *rest):
        asked.extend((lm.stage.name, prefix, count) for prefix, count in zip(prefixes, num_frames, strict=True))
        return decode_stage(lm, prefixes, num_frames, *rest)

    monkeypatch.setattr(windows_module, "decode_stage", noted)
    return asked


@pytest.mark.parametrize("crop_seconds", [2.0, 2.1])
def test_a_window_has_the_end_of_the_last_and_the_meaning_of_all_of_it(model, calls, crop_seconds):
    """The longer crop is of 105 acoustic frames: half a semantic one too many."""
    coarse = model.stages["coarse"]
    coarse = dataclasses.replace(coarse, stage=dataclasses.replace(coarse.stage, crop_seconds=crop_seconds))
    model = dataclasses.replace(model, stages={**model.stages, "coarse": coarse})
    out = model.generate(prompt(), seconds=7.3, ignore_end=True)
    semantic_T, acoustic_TQ = out.semantic_BT[0], out.acoustic_BTQ[0]
    done, window = 50, coarse.stage.crop_frames
    asked = [(prefix, count) for name, prefix, count in calls if name == "coarse"]
    for number, (prefix, count) in enumerate(asked):
        # In semantic frames: the first window begins with the prompt, the others with 30 % of a window.
        start = 0 if number == 0 else done // 2 - int(0.3 * window)
        last = number == len(asked) - 1
        tokens_T = semantic_T[start:] if last else semantic_T[start : start + window]
        given = coarse.stage.target.flatten(acoustic_TQ[2 * start : done])
        expected = coarse.stage.prefix(coarse.stage.condition.flatten(tokens_T), given)
        np.testing.assert_array_equal(prefix, expected)
        done += count
        assert last or done == 2 * (start + window)
    assert done == 415 and len(asked) >= 5


def test_a_chunk_begins_before_the_frames_it_is_for(model, calls):
    out = model.generate(prompt(), seconds=7.3, ignore_end=True)
    fine, acoustic_TQ = model.stages["fine"].stage, out.acoustic_BTQ[0]
    assert fine.condition is not None
    asked = [(prefix, count) for name, prefix, count in calls if name == "fine"]
    finished = 50
    for window_end in (*range(100, 415, 70), 415):
        known = finished
        while finished < window_end and (window_end == 415 or finished + 45 <= window_end):
            # Of 50 frames 5 are carried.
            first, stop = finished - 5, min(finished + 45, window_end)
            given = fine.target.flatten(acoustic_TQ[first:finished] if finished == known else acoustic_TQ[:0])
            prefix, count = asked.pop(0)
            expected = fine.prefix(fine.condition.flatten(acoustic_TQ[first:stop]), given)
            np.testing.assert_array_equal(prefix, expected)
            assert count == stop - first - len(given) // fine.target.num_levels
            finished = stop
    assert asked == [] and finished == 415


def steady(model, seconds):
    """A stream of which nothing is kept: live arrays' bytes at most, what Python and NumPy add at most, and how many
    programs were compiled."""
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    gc.collect()
    jax.monitoring.register_event_duration_secs_listener(listener)
    tracemalloc.start()
    try:
        live = [
            sum(array.nbytes for array in jax.live_arrays())
            for _ in model.stream(prompt(), seconds=seconds, ignore_end=True)
        ]
        return max(live), tracemalloc.get_traced_memory()[1], len(compiled)
    finally:
        tracemalloc.stop()
        jax.monitoring.unregister_event_duration_listener(listener)


def test_memory_does_not_grow_with_the_length(model, calls):
    steady(model, 20)
    longest_20 = max(len(prefix) + count for _, prefix, count in calls)
    calls.clear()
    *_, compiled = steady(model, 60)
    # The condition's length varies with the repeats in it.
    assert compiled <= 2 and max(len(prefix) + count for _, prefix, count in calls) <= longest_20 + 5
    arrays_20, host_20, _ = steady(model, 20)
    arrays_60, host_60, compiled = steady(model, 60)
    assert compiled == 0 and arrays_60 == arrays_20
    # A tenth of the samples that are more; the codes stay, 600 bytes a second.
    assert host_60 - host_20 < 0.1 * 40 * RATE * 4
