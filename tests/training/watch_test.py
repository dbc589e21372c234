"""Curves that must and must not raise a warning."""

import json
import re

import numpy as np
import pytest

from audiolm_jax.codec import health
from audiolm_jax.objective import Symptom
from audiolm_jax.semantic.health import symptoms as w2v_bert_symptoms
from audiolm_jax.training import watch
from audiolm_jax.training.watch import Seen, Watch, observe

LEVELS, CODES = 3, 1024
SYMPTOMS = health.symptoms(LEVELS, CODES)


def healthy(steps, every, seed=None):
    """Rows of a run as it should be: losses fall and waver, discriminators join halfway."""
    generator = np.random.default_rng(seed)
    rows = []
    for step in range(every, steps + 1, every):
        noise = generator.lognormal(0.0, 0.15, 3)
        joined = step > steps // 2
        rows.append({
            "step": step,
            "reconstruction": (20.0 + 80.0 * np.exp(-step / (0.1 * steps)) + 3.0 * joined) * noise[0],
            "discriminator": 1.4 * noise[1] * joined, "accuracy_fake": 0.8 * joined,
            **{f"perplexity_{level}": 500.0 * noise[2] for level in range(LEVELS)},
        })  # fmt: skip
    return rows


def look_at(rows):
    """(warnings, marks of each row)."""
    lines = []
    one = Watch(SYMPTOMS, [], lines.append)
    return lines, [one.look(row["step"], row) for row in rows]


@pytest.mark.parametrize(("steps", "every"), [(2000, 50), (40, 1), (3000, 1), (1_000_000, 5000)])
def test_a_healthy_run_is_left_alone(steps, every):
    lines, marks = look_at(healthy(steps, every))
    assert lines == []
    assert marks[-1] == {"diverging": 0, "discriminator_wins": 0, "codebook_collapsed": 0}


def change(rows, first, **values):
    return [{**row, **(values if row["step"] >= first else {})} for row in rows]


# An alarm of wavering curves is right but for a share of them: these are always the same.
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("diverging", {"reconstruction": 60.0}, r"the reconstruction loss rose from (1[6-9]|2[0-3])(\.\d+)? to [3-6]"),
        ("discriminator_wins", {"discriminator": 0.001, "accuracy_fake": 1.0}, "they tell every fake$"),
        ("codebook_collapsed", {"perplexity_1": 3.0}, "level 1 uses as if it had"),
    ],
)
def test_what_goes_wrong_is_said_once_and_marked(name, values, words, seed):
    lines, marks = look_at(change(healthy(20_000, 100, seed), 15_000, **values))
    assert len(lines) == 1
    assert re.match(rf"warning: {name} at step 1\d+: .*{words}", lines[0])
    marked = [100 * (index + 1) for index, mark in enumerate(marks) if mark[name]]
    # It takes some rows to believe it, and then it stays.
    assert 15_000 < marked[0] < 19_000 and marked == list(range(marked[0], 20_001, 100))
    assert not any(mark[other] for mark in marks for other in mark if other != name)


@pytest.mark.parametrize(("collapsed", "expected"), [(60.0, True), (120.0, False)])
def test_targets_of_a_tenth_of_the_codes_are_a_collapse(collapsed, expected):
    generator, lines = np.random.default_rng(), []
    one = Watch(w2v_bert_symptoms(1024), [], lines.append)
    for step in range(100, 20_001, 100):
        perplexity = 400.0 if step < 15_000 else collapsed
        one.look(step, {"target_perplexity": perplexity * generator.lognormal(0.0, 0.1)})
    assert len(lines) == expected
    if expected:
        assert lines[0].startswith("warning: codebook_collapsed at step 1") and "of 1024 codes" in lines[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_single_bad_row_is_no_symptom(seed):
    rows = healthy(20_000, 100, seed)
    rows[150] = {**rows[150], "reconstruction": 60.0, "perplexity_0": 1.0, "discriminator": 0.0, "accuracy_fake": 1.0}
    assert look_at(rows)[0] == []


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_recovers_may_fall_ill_again(seed):
    rows = healthy(40_000, 100, seed)
    ill = [{**row, "reconstruction": 80.0} if row["step"] // 5000 in (3, 6) else row for row in rows]
    lines, marks = look_at(ill)
    assert len(lines) == 2 and marks[-1]["diverging"] == 0


def test_steps_that_were_not_taken_do_not_count():
    rows = change(healthy(20_000, 100), 15_000, reconstruction=float("nan"), perplexity_0=None)
    lines, marks = look_at(rows)
    assert lines == [] and marks[-1]["diverging"] == 0


def test_a_resumed_watch_goes_on_as_if_it_had_not_stopped():
    rows = change(healthy(20_000, 100), 12_000, reconstruction=np.float32(100 / 3))
    expected = look_at(rows)
    for cut in (5, 123, 190):
        written = [json.loads(json.dumps({name: float(value) for name, value in row.items()})) for row in rows[:cut]]
        lines = []
        resumed = Watch(SYMPTOMS, written, lines.append)
        assert [resumed.look(row["step"], row) for row in rows[cut:]] == expected[1][cut:]
        said_before = any(mark["diverging"] for mark in expected[1][:cut])
        assert lines == ([] if said_before else expected[0])


def test_averages_by_their_formula():
    symptom = Symptom("high", ("value",), lambda averages, lowest: None)
    generator = np.random.default_rng()
    values, seen = generator.standard_normal(60), Seen()
    steps = np.cumsum(generator.integers(1, 400, 60))
    average = 0.0
    for index, (step, value) in enumerate(zip(steps, values, strict=True)):
        gap = step - (steps[index - 1] if index else 0)
        # A plain mean of the first rows, then a tenth for a row, or less where rows are closer than 100 steps.
        share = max(1 / (index + 1), min(gap / watch.STEPS, 1 / watch.ROWS))
        average = (1 - share) * average + share * value
        seen, _ = observe([symptom], seen, int(step), {"value": np.float64(value)})
        assert seen.averages["value"] == pytest.approx(average, rel=1e-9, abs=1e-12)
    assert seen.rows == 60 and seen.step == steps[-1]
