"""MIDI to recordings: the notes sound at their pitches and times; what cannot be played is named."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from audiolm_jax import cli, render
from audiolm_jax.data import manifest
from audiolm_jax.errors import UserError
from tests import scores

needs_fluidsynth = pytest.mark.skipif(
    shutil.which("fluidsynth") is None or not any(path.is_file() for path in render.SOUNDFONTS),
    reason=f"no FluidSynth: {render.INSTALL}",
)


@needs_fluidsynth
def test_notes_sound_at_their_pitches_and_times(tmp_path):
    pitches = np.random.default_rng().choice(np.arange(57, 82), 6, replace=False)
    quarter = 500_000
    notes = [(2 * i * scores.TICKS, (2 * i + 2) * scores.TICKS, int(pitch), 90) for i, pitch in enumerate(pitches)]
    scores.write_midi(tmp_path / "scale.mid", notes, quarter)
    wave_W = render.play(tmp_path / "scale.mid", render._find_soundfont(None))
    assert np.abs(wave_W).max() == pytest.approx(render.PEAK) and wave_W.dtype == np.float32
    for i, pitch in enumerate(pitches):
        # A second a note; of its middle half, the strongest partials are multiples of its frequency.
        start = round((i + 0.25) * render.SAMPLE_RATE)
        spectrum = np.abs(np.fft.rfft(wave_W[start : start + 8000] * np.hanning(8000), 2**17))
        frequency = np.argmax(spectrum) * render.SAMPLE_RATE / 2**17
        multiple = frequency / (440 * 2 ** ((pitch - 69) / 12))
        assert round(multiple) in (1, 2, 3) and abs(multiple / round(multiple) - 1) < 0.01


@needs_fluidsynth
def test_a_folder_of_scores_becomes_a_manifest_apart_from_recordings(tmp_path, capsys):
    seed = int(np.random.default_rng().integers(99))
    folder = scores.write_pieces(tmp_path / "midi" / "book", 4, seconds=4.0, seed=seed)
    (folder / "notes.mid").write_text("no MIDI at all")
    whole = (folder / "piece00.mid").read_bytes()
    (folder / "torn.MID").write_bytes(whole[: len(whole) // 2])
    for output in ("once", "twice"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["render", f"--midi={tmp_path / 'midi'}", f"--output={tmp_path / output}"])
        assert not stopped.value.code
    errors = capsys.readouterr().err
    assert (
        "left out: not a MIDI file: " in errors
        and "left out: score cannot be played (Unexpected end of file)" in errors
    )
    recordings = manifest.read_manifest(tmp_path / "once" / "manifest.jsonl")
    assert [recording.id for recording in recordings] == [f"rendered/book/piece{i:02}" for i in range(4)]
    assert {recording.split for recording in recordings} == {"train", "validation"}
    rows = [json.loads(line) for line in (tmp_path / "once" / "manifest.jsonl").read_text().splitlines()]
    assert all(row["source"] == "rendered" and row["soundfont"] and not row["path"].startswith("/") for row in rows)
    for recording, row in zip(recordings, rows, strict=True):
        info = soundfile.info(recording.path)
        assert (info.format, info.samplerate, info.channels) == ("FLAC", 16000, 1) and info.duration > 4
        # The same score, the same file.
        assert recording.path.read_bytes() == (tmp_path / "twice" / row["path"]).read_bytes()


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    def refusal(midi, soundfont=None):
        with pytest.raises(UserError) as refused:
            render.render(str(midi), str(tmp_path / "output"), soundfont, print)
        assert not (tmp_path / "output").exists()
        return str(refused.value)

    assert refusal(tmp_path / "nowhere").startswith("no scores: ")
    folder = scores.write_pieces(tmp_path / "midi", 1, seconds=1.0)
    monkeypatch.setattr(render.shutil, "which", lambda name: None)
    assert refusal(folder) == f"FluidSynth is missing: fluidsynth; {render.INSTALL}"
    monkeypatch.setattr(render.shutil, "which", lambda name: name)
    (tmp_path / "sound.sf2").write_bytes(b"RIFF....WAVE")
    assert refusal(folder, str(tmp_path / "sound.sf2")).startswith("not a soundfont: ")
    assert refusal(folder, str(tmp_path / "none.sf2")).startswith("soundfont is missing: ")
    monkeypatch.setattr(render, "SOUNDFONTS", (tmp_path / "none.sf2",))
    assert refusal(folder) == f"soundfont is missing: /usr/share/sounds; {render.INSTALL}"
    (folder / "piece00.midi").write_bytes((folder / "piece00.mid").read_bytes())
    assert refusal(folder).startswith("two scores of one name: ")
