"""Scores → recordings: MIDI played by FluidSynth on a sampled piano, for tests and demos without real recordings.

What is rendered stays apart from what was recorded: every file lies below `rendered/`, so that its id, and the id of
its tokens, begins with that word, and every row of the manifest says `"source": "rendered"`.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np
import tqdm

from audiolm_jax import audio, files
from audiolm_jax.data import manifest
from audiolm_jax.errors import UserError

SOURCE = "rendered"
SAMPLE_RATE = 16_000
PEAK = 0.5
# Below the samples' own rate their overtones would fold back.
SYNTHESIS_RATE = 44_100
MIDI_SUFFIXES = (".mid", ".midi")
# Where Debian's packages put a piano, the better ones first.
SOUNDFONTS = tuple(
    pathlib.Path("/usr/share/sounds") / name
    for name in ("sf2/FluidR3_GM.sf2", "sf3/FluidR3Mono_GM.sf3", "sf2/default-GM.sf2", "sf2/TimGM6mb.sf2")
)
INSTALL = "apt-get install fluidsynth timgm6mb-soundfont"


def render(midi: str, output: str, soundfont: str | None, report: Callable[[str], None]):
    """Plays scores into the new folder `output`: FLAC, mono, 16 kHz, and `manifest.jsonl` with a split for each.

    The instrument is the score's; without a program change that is the soundfont's first, a grand piano.

    Args:
      midi: a MIDI file, or a folder that is searched recursively.
      output: `rendered/NAME.flac` for each score, NAME being its path below `midi`.
      soundfont: an SF2 or SF3 file; one that Debian installs by default.
      report: called with one line for each score that cannot be played.

    Raises:
      UserError: FluidSynth or the soundfont is missing, no score can be played, the output exists.
    """
    files.refuse_existing(output)
    scores = _find_scores(pathlib.Path(midi))
    if shutil.which("fluidsynth") is None:
        raise UserError("FluidSynth is missing", "fluidsynth", INSTALL)
    instrument = _find_soundfont(soundfont)
    refused: list[UserError] = []
    quiet = 0.5 if sys.stderr.isatty() else 10.0
    with files.new_folder(output) as scratch:
        for name, path in tqdm.tqdm(scores.items(), desc="render", unit="score", mininterval=quiet):
            try:
                wave_W = play(path, instrument)
            except UserError as error:
                report(f"left out: {error}")
                refused.append(error)
            else:
                files.write_bytes(scratch / SOURCE / f"{name}.flac", audio.encode_wav(wave_W, SAMPLE_RATE, "FLAC"))
        if len(refused) == len(scores):
            raise refused[0]
        recordings = manifest.read_manifest(scratch)
        notes = {recording.id: {"source": SOURCE, "soundfont": instrument.name} for recording in recordings}
        manifest.write_manifest(scratch / "manifest.jsonl", recordings, notes)


def _find_scores(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """MIDI files by their names below `path`, without the suffix."""
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in MIDI_SUFFIXES and p.is_file())
    else:
        paths = [path] if path.is_file() else []
    if not paths:
        raise UserError("no scores", path, f"give a folder with files ending in {' or '.join(MIDI_SUFFIXES)}")
    scores: dict[str, pathlib.Path] = {}
    for score in paths:
        name = score.relative_to(path if path.is_dir() else path.parent).with_suffix("").as_posix()
        if name in scores:
            raise UserError("two scores of one name", f"{scores[name]}, {score}", "rename one")
        scores[name] = score
    return scores


def _find_soundfont(given: str | None) -> pathlib.Path:
    candidates = SOUNDFONTS if given is None else (pathlib.Path(given),)
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError("soundfont is missing", given or "/usr/share/sounds", INSTALL)
    with open(found, "rb") as file:
        header = file.read(12)
    # FluidSynth would play another one, without a word to the caller.
    if header[:4] != b"RIFF" or header[8:] != b"sfbk":
        raise UserError("not a soundfont", found, "give an SF2 or SF3 file")
    return found


def play(score: pathlib.Path, soundfont: pathlib.Path) -> np.ndarray:
    """One score as samples at `SAMPLE_RATE`, the loudest of them `PEAK`: float32 [W].

    Raises:
      UserError: not a MIDI file, damaged, or silent.
    """
    with open(score, "rb") as file:
        if file.read(4) != b"MThd":
            raise UserError("not a MIDI file", score, "leave it out")
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder) / "played.wav"
        command = ["fluidsynth", "-n", "-i", "-q", "-r", str(SYNTHESIS_RATE), "-T", "wav", "-O", "float"]
        arguments = ["-F", str(target), str(soundfont.absolute()), str(score.absolute())]
        ended = subprocess.run(command + arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        # Its exit status is 0 for many errors.
        errors = [line for line in ended.stderr.splitlines() if "error:" in line]
        if errors or ended.returncode or not target.is_file():
            reason = errors[0].partition("error:")[2].strip() if errors else f"exit status {ended.returncode}"
            raise UserError(f"score cannot be played ({reason})", score, "mend it or leave it out")
        wave_W = audio.read(target, SAMPLE_RATE)
    loudest = float(np.abs(wave_W).max())
    if loudest == 0:
        raise UserError("score without a sound", score, "leave it out")
    return wave_W * np.float32(PEAK / loudest)
