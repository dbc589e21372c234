"""Listing recordings: folders, single files, manifests, and what is left out."""

import json

import numpy as np
import pytest
import soundfile

from audiolm_jax.data.manifest import Recording, read_manifest, usable
from audiolm_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("anna/one.wav", "anna/deep/two.flac", "ben/three.ogg", "four.wav", "five.WAV"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.sin(np.arange(8000) / 9).astype(np.float32), 16000, format=path.suffix[1:].upper())
    (tmp_path / "notes.txt").write_text("not audio")
    return tmp_path


def test_folder_is_searched_recursively_and_sorted(folder):
    recordings = read_manifest(folder)
    assert [r.id for r in recordings] == ["anna/deep/two", "anna/one", "ben/three", "five", "four"]
    assert [r.speaker for r in recordings] == ["anna", "anna", "ben", "", ""]
    assert {r.split for r in recordings} == {"train", "validation"}


def test_splits_depend_on_the_id_alone(folder):
    before = {r.id: r.split for r in read_manifest(folder)}
    for i in range(300):
        (folder / f"more{i}.wav").write_bytes((folder / "four.wav").read_bytes())
    after = {r.id: r.split for r in read_manifest(folder)}
    share = np.mean([split == "validation" for split in after.values()])
    assert 0.01 < share < 0.12
    for i in range(300):
        (folder / f"more{i}.wav").unlink()
    assert before == {r.id: r.split for r in read_manifest(folder)}


def test_same_stem_with_two_extensions_keeps_both(folder):
    soundfile.write(folder / "four.flac", np.zeros(8000, np.float32), 16000)
    assert {"four.wav", "four.flac"} <= {r.id for r in read_manifest(folder)}


def test_single_file(folder):
    (recording,) = read_manifest(folder / "four.wav")
    assert recording == Recording("four", folder / "four.wav")


def test_jsonl_manifest(folder):
    rows = [
        {"path": "four.wav", "id": "a", "speaker": "s", "split": "validation", "text": "hello", "extra": 1},
        {"path": "anna/one.wav", "start": 0.1, "end": 0.3},
    ]
    path = folder / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = read_manifest(path)
    assert (first.id, first.speaker, first.split, first.text, first.is_end) == ("a", "s", "validation", "hello", True)
    assert second.seconds() == pytest.approx(0.2) and not second.is_end
    assert len(second.read(16000)) == 3200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "not JSON"),
        ('{"id": "x"}', "no `path`"),
        ('{"path": "a.wav", "start": "soon"}', "`start` of the wrong type"),
        ('{"path": "a.wav", "id": "x"}\n{"path": "b.wav", "id": "x"}', "id comes twice"),
        ("", "no recordings"),
    ],
)
def test_malformed_manifests(tmp_path, text, message):
    path = tmp_path / "list.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_manifest(path)


def test_usable_leaves_out_bad_files_by_name(folder):
    (folder / "bad.wav").write_text("not audio at all")
    (folder / "empty.wav").touch()
    lines = []
    kept, seconds = usable(read_manifest(folder), lines.append)
    assert len(kept) == 5 and seconds == pytest.approx([0.5] * 5)
    assert len(lines) == 2 and "bad.wav" in lines[0] and "empty.wav" in lines[1]


def test_usable_raises_where_nothing_is_left(folder):
    (folder / "bad.wav").write_text("not audio at all")
    with pytest.raises(UserError, match="not audio"):
        usable(read_manifest(folder / "bad.wav"), print)
