"""Listing recordings: folders, single files, manifests, and what is left out."""

import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest
import soundfile
import soxr

from audiolm_jax.data.manifest import Recording, read_manifest, usable, with_splits, write_manifest
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
    for i in range(30):
        (folder / f"first{i}.wav").write_bytes((folder / "four.wav").read_bytes())
    before = {r.id: r.split for r in read_manifest(folder)}
    assert set(before.values()) == {"train", "validation"}
    for i in range(300):
        (folder / f"more{i}.wav").write_bytes((folder / "four.wav").read_bytes())
    after = {r.id: r.split for r in read_manifest(folder)}
    share = np.mean([split == "validation" for split in after.values()])
    assert 0.01 < share < 0.12
    assert before == {identifier: after[identifier] for identifier in before}


def by_hash(key, share):
    """In a way of its own: the first 16 hexadecimal digits as a fraction."""
    return "validation" if int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) < share * 16**16 else "train"


def test_a_speaker_is_on_one_side_for_good():
    generator = np.random.default_rng()
    speakers = [f"speaker {number}" for number in generator.permutation(1000)[:200]]
    all_of_them = [Recording(f"{s}/{i}", "x.wav", s, split="") for s in speakers for i in range(3)]
    few = [all_of_them[index] for index in generator.permutation(600)[:300]]
    for share in (0.05, 0.2):
        after = {r.id: r.split for r in with_splits(all_of_them, share)}
        assert after == {r.id: by_hash(r.speaker, share) for r in all_of_them}
        assert {r.id: r.split for r in with_splits(few, share)} == {r.id: after[r.id] for r in few}
    assert {r.split for r in with_splits([dataclasses.replace(r, split="test") for r in few])} == {"test"}


def test_recordings_of_one_speaker_are_split_one_by_one():
    recordings = [Recording(f"r{i}", "x.wav", "only", split="") for i in range(200)]
    assert {r.id: r.split for r in with_splits(recordings)} == {r.id: by_hash(r.id, 0.05) for r in recordings}


def test_where_the_hash_holds_out_none_one_speaker_is_and_none_goes_from_training_to_validation():
    speakers = [s for s in map(str, range(100)) if by_hash(s, 0.05) == "train"][:20]
    before = set()
    for count in range(2, 21):
        recordings = with_splits([Recording(f"{s}{i}", "x.wav", s, split="") for s in speakers[:count] for i in "ab"])
        held_out = {r.speaker for r in recordings if r.split == "validation"}
        assert len(held_out) == 1 and held_out <= before | {speakers[count - 1], speakers[0]}
        before = held_out
    given = [Recording("v", "x.wav", "v", split="validation"), *(Recording(s, "x.wav", s, split="") for s in speakers)]
    assert [r.split for r in with_splits(given)] == ["validation", *["train"] * 20]


def test_same_stem_with_two_extensions_keeps_both(folder):
    soundfile.write(folder / "four.flac", np.zeros(8000, np.float32), 16000)
    assert {"four.wav", "four.flac"} <= {r.id for r in read_manifest(folder)}


def test_a_name_in_another_encoding(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"na\xefve.wav")
    path.parent.mkdir()
    with open(path, "wb") as file:
        soundfile.write(file, np.zeros(8000), 16000, format="WAV")
    (recording,) = read_manifest(tmp_path)
    assert (recording.id, recording.speaker) == ("caf\\udce9/na\\udcefve", "caf\\udce9")
    assert recording.seconds() == 0.5 and len(recording.read(16000)) == 8000
    write_manifest(tmp_path / "list.jsonl", [recording], {})
    assert read_manifest(tmp_path / "list.jsonl") == [recording]


def test_manifest_in_another_encoding(tmp_path):
    (tmp_path / "list.jsonl").write_bytes('{"path": "é.wav"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not in UTF-8"):
        read_manifest(tmp_path / "list.jsonl")


def test_what_is_no_text_is_written_as_text(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16000)
    fields = '"id": "\\ud800", "speaker": "s\\udcff", "text": "\\ud83d", "label": "\\udc00"'
    (tmp_path / "list.jsonl").write_text('{"path": "a.wav", ' + fields + "}")
    (recording,) = read_manifest(tmp_path / "list.jsonl")
    assert (recording.id, recording.speaker, recording.text, recording.label) == (
        "\\ud800", "s\\udcff", "\\ud83d", "\\udc00",
    )  # fmt: skip


def test_a_manifest_may_begin_with_the_mark_of_its_encoding(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"path": "é.wav"}\n', encoding="utf-8-sig")
    assert [recording.id for recording in read_manifest(tmp_path / "list.jsonl")] == ["é.wav"]


def test_links_to_folders_are_followed_but_for_those_that_lead_back(folder, tmp_path_factory):
    corpus = tmp_path_factory.mktemp("corpus")
    for name in ("anna", "ben"):
        (corpus / name).symlink_to(folder / name)
    (folder / "anna" / "deep" / "back").symlink_to(folder / "anna")
    (folder / "ben" / "across").symlink_to(folder / "anna")
    (folder / "ben" / "itself.wav").symlink_to("itself.wav")
    recordings = read_manifest(corpus)
    assert [(r.id, r.speaker) for r in recordings] == [
        ("anna/deep/two", "anna"), ("anna/one", "anna"), ("ben/across/deep/two", "ben"), ("ben/across/one", "ben"),
        ("ben/itself", "ben"), ("ben/three", "ben"),
    ]  # fmt: skip


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
        ('{"path": "a.wav", "start": -1}', "`start` must be 0 or more"),
        ('{"path": "a.wav", "end": NaN}', "`end` must be 0 or more"),
        ('{"path": "a.wav", "seconds": true}', "`seconds` of the wrong type"),
        ('{"path": "a.wav", "is_end": 1}', "`is_end` of the wrong type"),
        ('{"path": "a.wav", "segments": [[2.0, 1.0]]}', "`segments` must be pairs"),
        ('{"path": "a.wav", "segments": [[0.0, 1.0], 2]}', "`segments` must be pairs"),
        ('{"path": null}', "no `path`"),
        pytest.param('{"path": "a.wav", "end": 1' + "0" * 400 + "}", "`end` must be 0 or more", id="long number"),
        pytest.param('{"path": "a.wav", "end": 1' + "0" * 5000 + "}", "not JSON", id="longer number"),
        pytest.param('{"path": "a.wav", "segments": [[0, 1' + "0" * 400 + "]]}", "`segments` must", id="long segment"),
        pytest.param('{"path": ' + "[" * 10**5, "not JSON", id="deep"),
        ("", r'no recordings: .*; write {"path"'),
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


def test_the_first_of_an_id_is_usable(folder):
    rows = [{"path": name, "id": "same"} for name in ("missing.wav", "four.wav", "five.WAV")]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = []
    (kept,), _ = usable(read_manifest(folder / "list.jsonl"), lines.append)
    assert kept.path == folder / "four.wav"
    assert len(lines) == 2 and "missing.wav" in lines[0] and "id comes twice" in lines[1] and "five.WAV" in lines[1]


def test_what_a_manifest_says_of_lengths_is_believed(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"path": "nowhere.wav", "seconds": 12.5}')
    (kept,), seconds = usable(read_manifest(tmp_path / "list.jsonl"), print)
    assert seconds == [12.5]
    with pytest.raises(UserError, match="not found"):
        kept.read(16000)


@pytest.fixture
def noise(tmp_path):
    wave_W = np.random.default_rng().integers(-9000, 9000, 40_000)
    soundfile.write(tmp_path / "noise.flac", wave_W.astype(np.int16), 8000)
    return tmp_path / "noise.flac", (wave_W / 2**15).astype(np.float32)


def test_a_length_of_nothing_is_no_length(folder):
    assert Recording("four", folder / "four.wav", known_seconds=0).seconds() == 0.5


def test_segments_are_read_without_what_lies_between(noise):
    path, wave_W = noise
    segments = ((0.25, 1.0), (1.5, 1.625), (4.0, 9.0))
    recording = Recording("x", path, segments=segments)
    joined_W = np.concatenate([wave_W[2000:8000], wave_W[12000:13000], wave_W[32000:]])
    np.testing.assert_array_equal(recording.read(8000), joined_W)
    assert recording.seconds() == pytest.approx(len(joined_W) / 8000)
    # Resampled as one: nothing is heard where they meet.
    np.testing.assert_allclose(recording.read(16000), soxr.resample(joined_W, 8000, 16000), atol=1e-6)
    for start, stop in ((0.0, 0.5), (0.5, 0.8), (0.8, 0.9), (0.7, 1.2), (0.75, 0.875), (1.0, None)):
        part = dataclasses.replace(recording, start=start, end=stop)
        expected_W = joined_W[round(start * 8000) : None if stop is None else round(stop * 8000)]
        np.testing.assert_array_equal(part.read(8000), expected_W)
        assert part.seconds() == pytest.approx(len(expected_W) / 8000)


def test_a_crop_is_a_stretch_of_the_joined(noise):
    path, wave_W = noise
    recording = Recording("x", path, start=0.5, segments=((0.25, 1.0), (1.5, 2.5)), known_seconds=1.25)
    crop = recording.crop(0.125, 1.0)
    np.testing.assert_array_equal(crop.read(8000), np.concatenate([wave_W[7000:8000], wave_W[12000:18000]]))
    assert crop.seconds() == 0.875 and recording.is_end and not crop.is_end


def test_written_and_read_again_recordings_are_the_same(tmp_path):
    generator = np.random.default_rng()
    recordings = [
        Recording(
            id=f"id {number:02} “é”",
            path=tmp_path / "lists" / "below" / f"{number}.wav" if number % 3 else tmp_path / "elsewhere.wav",
            speaker=("", "someone")[number % 2],
            start=float(generator.choice([0.0, generator.uniform(0, 9)])),
            end=generator.choice([None, float(generator.uniform(9, 99))]),
            split=str(generator.choice(["train", "validation", "test"])),
            text=str(generator.choice(["", 'said "so"\n\u2028é'])),
            segments=tuple(map(tuple, np.sort(generator.uniform(0, 50, (number % 4, 2))).tolist())),
            is_end=generator.choice([None, True, False]),
            known_seconds=generator.choice([None, float(generator.uniform(1, 99))]),
        )
        for number in range(40)
    ]
    path = tmp_path / "lists" / "list.jsonl"
    write_manifest(path, recordings, {recordings[1].id: {"composer": "nobody"}})
    assert read_manifest(path) == recordings
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[1]["path"] == "below/1.wav" and rows[1]["composer"] == "nobody"
    assert rows[0]["path"] == str(tmp_path / "elsewhere.wav")


def test_usable_raises_where_nothing_is_left(folder):
    (folder / "bad.wav").write_text("not audio at all")
    with pytest.raises(UserError, match="not audio"):
        usable(read_manifest(folder / "bad.wav"), print)
