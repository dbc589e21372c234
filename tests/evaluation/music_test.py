"""Pitch classes, keys and onsets of notes, against what theory says of scales and chords."""

import numpy as np
import pytest

from audiolm_jax.evaluation import music, piano
from audiolm_jax.evaluation.music import Key

MAJOR_SCALE, MINOR_SCALE = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 11)


def played(pitches, step=0.25, length=0.2):
    """Notes one after the other."""
    return np.array([[step * index, step * index + length, pitch] for index, pitch in enumerate(pitches)])


def melody(tonic, scale):
    """Up and down a scale, and home by its triad."""
    third = scale[2]
    return played([tonic + step for step in (*scale, 12, *scale[::-1], 0, third, 7, 0, 7, 0)])


@pytest.mark.parametrize("tonic", range(12))
@pytest.mark.parametrize("is_minor", (False, True))
def test_key_of_a_melody(tonic, is_minor):
    notes_N3 = melody(60 + tonic, MINOR_SCALE if is_minor else MAJOR_SCALE)
    assert music.key(music.pitch_classes(notes_N3)) == Key(tonic, is_minor)


def test_key_score_is_mirex():
    c, a_minor = Key(0, False), Key(9, True)
    expected = {Key(7, False): 0.5, Key(5, False): 0.0, a_minor: 0.3, Key(0, True): 0.2, Key(2, True): 0.0, c: 1.0}
    assert {found: music.key_score(c, found) for found in expected} == expected
    assert music.key_score(a_minor, c) == 0.3 and music.key_score(a_minor, Key(4, True)) == 0.5
    mir_eval = pytest.importorskip("mir_eval")
    names = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
    title = lambda one: f"{names[one.tonic]} {'minor' if one.is_minor else 'major'}"
    keys = [Key(tonic, is_minor) for tonic in range(12) for is_minor in (False, True)]
    for reference in keys:
        for found in keys:
            assert music.key_score(reference, found) == mir_eval.key.weighted_score(title(reference), title(found))


def test_pitch_classes_and_onsets():
    notes_N3 = np.array([[0.0, 1.0, 60], [0.01, 0.5, 72], [0.02, 0.5, 64], [1.0, 3.0, 67]])
    histogram_P = music.pitch_classes(notes_N3)
    assert histogram_P[[0, 4, 7]] == pytest.approx([1.49, 0.48, 2.0]) and histogram_P.sum() == pytest.approx(3.97)
    assert music.onsets(notes_N3).tolist() == [0.0, 1.0]
    assert music.likeness(histogram_P, np.roll(histogram_P, 1)) < 0.5 < music.likeness(histogram_P, 3 * histogram_P)
    assert music.likeness(histogram_P, np.zeros(12)) is None and music.key(np.zeros(12)) is None
    assert len(music.onsets(notes_N3[:0])) == 0


def test_a_piece_beside_itself_and_beside_another():
    prompt_N3 = melody(60, MAJOR_SCALE)
    same = piano.compare(prompt_N3, prompt_N3, 5.0, 5.0)
    assert same == {
        "pitch_class_similarity": pytest.approx(1.0),
        "same_key": 1.0,
        "key_score": 1.0,
        "onset_rate": pytest.approx(len(prompt_N3) / 5.0),
        "onset_rate_ratio": 0.0,
        "inter_onset_seconds": pytest.approx(0.25),
        "inter_onset_distance": pytest.approx(0.0, abs=1e-9),
    }
    # A half-tone up and at half the speed.
    other = piano.compare(prompt_N3, melody(61, MAJOR_SCALE) * [2.0, 2.0, 1.0], 5.0, 10.0)
    assert other["same_key"] == other["key_score"] == 0.0 and other["pitch_class_similarity"] < 0.6
    assert other["onset_rate_ratio"] == pytest.approx(1.0) and other["inter_onset_distance"] == pytest.approx(1.0)
    none = piano.compare(prompt_N3, prompt_N3[:0], 5.0, 5.0)
    assert none["onset_rate"] == 0.0 and [value for value in none.values() if value is not None] == [0.0]
