"""What notes [N, 3] (onset and offset in seconds, MIDI pitch) say of a piece: pitch classes, key, onsets."""

from typing import NamedTuple

import numpy as np

# How well each scale degree fits a key (Krumhansl and Kessler 1982), from the tonic on, in half-tones.
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
# Notes that begin so close together are one onset.
CHORD_SECONDS = 0.03


class Key(NamedTuple):
    """A key: its tonic's pitch class (0 is C), and whether it is a minor one."""

    tonic: int
    is_minor: bool


def pitch_classes(notes_N3: np.ndarray) -> np.ndarray:
    """Seconds that each of the 12 pitch classes sounds."""
    classes = np.rint(notes_N3[:, 2]).astype(int) % 12
    return np.bincount(classes, weights=notes_N3[:, 1] - notes_N3[:, 0], minlength=12)


def likeness(first_P: np.ndarray, second_P: np.ndarray) -> float | None:
    """Cosine of two pitch-class histograms; None where one is empty."""
    norm = float(np.linalg.norm(first_P) * np.linalg.norm(second_P))
    return float(first_P @ second_P) / norm if norm > 0 else None


def key(histogram_P: np.ndarray) -> Key | None:
    """The key whose profile correlates most with the histogram (Krumhansl and Schmuckler); None where none does more.

    Args:
      histogram_P: seconds of the 12 pitch classes.
    """
    if np.ptp(histogram_P) == 0:
        return None
    keys = [Key(tonic, is_minor) for is_minor in (False, True) for tonic in range(12)]
    profiles = [np.roll(MINOR if one.is_minor else MAJOR, one.tonic) for one in keys]
    return keys[int(np.argmax([np.corrcoef(histogram_P, profile)[0, 1] for profile in profiles]))]


def key_score(reference: Key, found: Key) -> float:
    """How near a key is, by MIREX: 1 the same, 0.5 a fifth above, 0.3 the relative, 0.2 the parallel, 0 any other."""
    interval = (found.tonic - reference.tonic) % 12
    if found.is_minor == reference.is_minor:
        return {0: 1.0, 7: 0.5}.get(interval, 0.0)
    if interval == 0:
        return 0.2
    return 0.3 if interval == (3 if reference.is_minor else 9) else 0.0


def onsets(notes_N3: np.ndarray) -> np.ndarray:
    """Seconds at which something begins; the notes of a chord begin once."""
    times = np.sort(notes_N3[:, 0])
    return times[np.concatenate([[True], np.diff(times) > CHORD_SECONDS])] if len(times) else times
