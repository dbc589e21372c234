"""Random tonal pieces as MIDI files, where no performances are at hand: `python -m tests.scores OUTPUT [NUM_PIECES]`.

Each has a key, a tempo, a chord a bar, a melody that wanders over the scale and lands on chord tones, and a
broken-chord left hand: enough harmony for a model to continue or to fail to.
"""

import pathlib
import struct
import sys

import numpy as np

TICKS = 480  # A quarter note.
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
NEXT_CHORDS = {0: (3, 4, 5, 1), 1: (4,), 3: (4, 0, 1), 4: (0, 5), 5: (3, 1)}  # By scale degree, from 0.

Note = tuple[int, int, int, int]  # Start and end in ticks, pitch, velocity.


def compose(seconds: float, seed: int) -> tuple[list[Note], int]:
    """A piece of at least so many seconds: its notes, and microseconds of a quarter note."""
    generator = np.random.default_rng(seed)
    tonic, scale = 57 + int(generator.integers(12)), (MAJOR, MINOR)[generator.integers(2)]
    quarter = int(generator.integers(450_000, 750_000))
    pitch = lambda degree: tonic + 12 * (degree // 7) + scale[degree % 7]
    notes: list[Note] = []
    degree, chord, bar = 7, 0, 0
    num_bars = int(np.ceil(seconds * 1e6 / quarter / 4))
    while bar < num_bars:
        is_last = bar == num_bars - 1
        chord = 0 if is_last else int(generator.choice(NEXT_CHORDS[chord]))
        start = 4 * TICKS * bar
        for eighth in range(8):
            left = pitch(chord + (0, 4, 2, 4)[eighth % 4] - 7)
            notes.append((start + eighth * TICKS // 2, start + (eighth + 1) * TICKS // 2, left, 50))
        time = 0
        while time < 4 * TICKS:
            length = min(4 * TICKS - time, TICKS * int(generator.choice([1, 1, 2, 4])) // 2)
            step = int(generator.choice([-2, -1, -1, 0, 1, 1, 2]))
            degree = int(np.clip(degree + step, 4, 16))
            if time == 0 and (degree - chord) % 7 not in (0, 2, 4):
                degree += 1
            notes.append((start + time, start + time + length, pitch(degree), int(generator.integers(60, 100))))
            time += length
        bar += 1
    return notes, quarter


def write_midi(path: pathlib.Path, notes: list[Note], quarter: int):
    """A MIDI file of one track: notes, and microseconds of a quarter note."""
    events = [(0, b"\xff\x51\x03" + quarter.to_bytes(3))]
    for start, end, pitch, velocity in notes:
        events += [(start, bytes([0x90, pitch, velocity])), (end, bytes([0x80, pitch, 0]))]
    # Where one note ends and the same one begins, the end comes first.
    events.sort(key=lambda event: (event[0], event[1][0] == 0x90))
    events.append((events[-1][0] + TICKS, b"\xff\x2f\x00"))
    track, before = b"", 0
    for time, message in events:
        track += _variable_length(time - before) + message
        before = time
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, TICKS)
    path.write_bytes(header + struct.pack(">4sI", b"MTrk", len(track)) + track)


def _variable_length(number: int) -> bytes:
    digits = [number & 0x7F]
    while number := number >> 7:
        digits.append(number & 0x7F | 0x80)
    return bytes(reversed(digits))


def write_pieces(folder: pathlib.Path, num_pieces: int, seconds: float = 40.0, seed: int = 0) -> pathlib.Path:
    """Writes `piece00.mid` … into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_pieces):
        write_midi(folder / f"piece{number:02}.mid", *compose(seconds, seed + number))
    return folder


if __name__ == "__main__":
    write_pieces(pathlib.Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 12)
