"""Manifests of corpora in their own layouts, made here of noise; and a corpus of everything that can be wrong."""

import csv
import json
import os
import pathlib
import re

import hypothesis
import numpy as np
import pytest
import soundfile
from hypothesis import strategies

from audiolm_jax import audio
from audiolm_jax.cli import main
from audiolm_jax.data import sources, token_dataset
from audiolm_jax.data.manifest import Recording, read_manifest, usable
from audiolm_jax.data.pipeline import AudioCrops
from audiolm_jax.data.tokenize import Request, tokenize
from audiolm_jax.errors import UserError
from tests.data import fakes

RATE = 8000


def write_noise(path: pathlib.Path, seconds: float, rate: int = RATE) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave_W = np.random.default_rng().integers(-9000, 9000, round(seconds * rate)).astype(np.int16)
    soundfile.write(path, wave_W, rate)
    return wave_W.astype(np.float32) / 2**15


DEFAULTS = {"target_seconds": 60.0, "min_seconds": 30.0, "validation_share": 0.05, "decode": False}


def write(tmp_path, source: str, corpus: pathlib.Path, **options) -> tuple[list[Recording], list[str], list[str]]:
    """The recordings of a manifest, its lines about what was left out, and what was reported."""
    said: list[str] = []
    output = tmp_path / "manifests" / f"{source}.jsonl"
    sources.write(sources.Request(source=source, input=corpus, output=output, **{**DEFAULTS, **options}), said.append)
    left_out = output.with_name(f"{source}.left_out.txt").read_text().splitlines()
    return read_manifest(output), left_out, said


def cut_by_vad(segments, target_seconds):
    """Libri-Light's rule in other words: a segment begins a piece where it would not fit any more."""
    pieces = []
    for segment in segments:
        total = sum(offset - onset for onset, offset in pieces[-1]) if pieces else np.inf
        if total + segment[1] - segment[0] > target_seconds:
            pieces.append([])
        pieces[-1].append(segment)
    return pieces


@hypothesis.given(
    lengths=strategies.lists(strategies.integers(1, 160), max_size=30), least=strategies.sampled_from([0, 60, 120])
)
def test_segments_are_joined_as_libri_light_does(lengths, least):
    # In half seconds, whose sums are exact.
    ends = np.cumsum(lengths) / 2 + np.arange(len(lengths))
    segments = [(end - length / 2, end) for end, length in zip(ends.tolist(), lengths)]
    pieces = sources.join_segments(segments, 60.0, least / 2)
    assert [segment for piece in pieces for segment in piece] == (segments if sum(lengths) >= least else [])
    seconds = [sum(offset - onset for onset, offset in piece) for piece in pieces]
    assert all(total >= least / 2 for total in seconds)
    reference = cut_by_vad(segments, 60.0)
    if least == 0:
        assert pieces == reference
    if all(sum(offset - onset for onset, offset in piece) >= least / 2 for piece in reference):
        assert pieces == reference
    for piece, total in zip(pieces[:-1], seconds[:-1]):
        # Full: without its last segment it was too short or within the target.
        assert total <= 60 or total - (piece[-1][1] - piece[-1][0]) < max(least / 2, 1e-9)


def write_book(folder: pathlib.Path, name: str, segments, seconds: float, **meta) -> np.ndarray:
    wave_W = write_noise(folder / f"{name}.flac", seconds)
    meta = {"speaker": folder.parent.name, "book_meta": {"id": "77"}, "snr": 9.5, "voice_activity": segments, **meta}
    (folder / f"{name}.json").write_text(json.dumps(meta))
    return wave_W


def test_librilight(tmp_path):
    corpus = tmp_path / "unlab-600"
    segments = [[0.5, 1.5], [2.0, 3.25], [3.5, 4.0], [4.5, 6.5], [7.0, 7.25]]
    wave_W = write_book(corpus / "100" / "77", "a_tale.64kb", segments, 7.2)
    write_book(corpus / "101" / "78", "short", [[0.0, 0.5]], 1.0)
    write_book(corpus / "101" / "78", "shifted", [[0.0, 1.5], [2.0, 4.0]], 1.75)
    write_book(corpus / "101" / "78", "odd", [[0.0, "1.5"]], 1.75)
    write_noise(corpus / "101" / "78" / "alone.flac", 2.0)
    (corpus / "101" / "78" / "silent.json").write_text('{"voice_activity": [[0, 2]]}')
    (corpus / "101" / "78" / "torn.json").write_text('{"voice_activity": [[0,')
    recordings, left_out, said = write(tmp_path, "librilight", corpus, target_seconds=2.5, min_seconds=1.0)
    assert [(r.id, r.speaker, r.is_end) for r in recordings] == [
        ("100/77/a_tale.64kb_0000", "100", False),
        ("100/77/a_tale.64kb_0001", "100", True),
    ]
    # The last segment, cut to the recording's end, is too short for a piece.
    bounds = [[(4000, 12000), (16000, 26000)], [(28000, 32000), (36000, 52000), (56000, 57600)]]
    for recording, pairs in zip(recordings, bounds, strict=True):
        joined_W = np.concatenate([wave_W[start:stop] for start, stop in pairs])
        np.testing.assert_array_equal(recording.read(RATE), joined_W)
        assert recording.seconds() == pytest.approx(len(joined_W) / RATE)
        crops = AudioCrops([recording], [recording.seconds()], RATE, 0.9, pytest.fail)
        assert len(crops) == 3
        for index in range(3):
            crop = crops.fixed_crop(index)
            expected_W = joined_W[index * 7200 : (index + 1) * 7200]
            np.testing.assert_array_equal(crop["wave_BW"][: crop["lengths_B"]], expected_W)
    row = json.loads((tmp_path / "manifests" / "librilight.jsonl").read_text().splitlines()[0])
    assert (row["path"], row["snr"], row["book"]) == (str(corpus / "100/77/a_tale.64kb.flac"), 9.5, "77")
    reasons = [
        "no JSON beside",
        "no `voice_activity`",
        "voice activity beyond",
        "speech shorter",
        "recording not found",
        "not JSON",
    ]
    names = ["alone.json", "odd.json", "shifted.flac", "short.flac", "silent.flac", "torn.json"]
    assert len(left_out) == 6
    for line, reason, name in zip(left_out, reasons, names):
        assert line.startswith(reason) and f"101/78/{name};" in line
    assert "left out: 1 x voice activity beyond the end of the recording" in said


def test_a_new_speaker_of_librilight_moves_none(tmp_path):
    def splits(numbers):
        for number in numbers:
            write_book(tmp_path / "corpus" / str(number) / "1", "x", [[0, 1], [1.5, 2.5]], 3.0)
        options = {"target_seconds": 1, "min_seconds": 1, "validation_share": 0.3}
        found, _, _ = write(tmp_path / str(len(numbers)), "librilight", tmp_path / "corpus", **options)
        assert len(found) == 2 * len(numbers)
        return {r.id: r.split for r in found}

    numbers = np.random.default_rng().permutation(9000)[:60].tolist()
    before, after = splits(numbers[:40]), splits(numbers)
    assert set(before.values()) == {"train", "validation"}
    assert before == {identifier: after[identifier] for identifier in before}


def test_librispeech(tmp_path):
    corpus = tmp_path / "LibriSpeech"
    utterances = {"dev-clean/84/121123/84-121123-0000": 0.7, "train-clean-100/19/198/19-198-0003": 0.5}
    for name, seconds in utterances.items():
        write_noise(corpus / f"{name}.flac", seconds)
    write_noise(corpus / "music/19/199/19-199-0000.flac", 0.5)
    (corpus / "dev-clean/84/121123/84-121123.trans.txt").write_text(
        "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 NO\n"
    )
    recordings, left_out, said = write(tmp_path, "librispeech", corpus)
    fields = [(r.id, r.speaker, r.split, r.text, r.is_end, r.seconds()) for r in recordings]
    assert fields == [
        ("19-198-0003", "19", "train", "", True, 0.5),
        ("84-121123-0000", "84", "validation", "GO DO YOU HEAR", True, 0.7),
    ]
    assert len(left_out) == 1 and "subset neither train, dev nor test (music)" in left_out[0]
    assert "left out: 1 x subset neither train, dev nor test" in said
    alone, _, _ = write(tmp_path / "alone", "librispeech", corpus / "dev-clean")
    assert alone == recordings[1:]


@pytest.mark.parametrize("damage", ["encoding", "link"])
def test_transcripts_that_cannot_be_read_are_named(tmp_path, damage):
    corpus = tmp_path / "LibriSpeech"
    write_noise(corpus / "dev-clean/84/121123/84-121123-0000.flac", 0.5)
    transcripts = corpus / "dev-clean/84/121123/84-121123.trans.txt"
    if damage == "link":
        transcripts.symlink_to("nowhere")
    else:
        transcripts.write_bytes(b"84-121123-0000 CAF\xc9\n")
    with pytest.raises(UserError, match=f"transcripts cannot be read .*: {transcripts}; get them anew"):
        write(tmp_path, "librispeech", corpus)


def write_maestro(corpus: pathlib.Path, **changed):
    rows = [
        {
            "canonical_composer": composer,
            "canonical_title": f"Sonata, No. {number}",
            "split": split,
            "year": "2004",
            "midi_filename": f"2004/{number}.midi",
            "audio_filename": f"2004/{number}.wav",
            "duration": "99",
        }
        | changed
        for number, (composer, split) in enumerate([("A. B.", "train"), ("A. B.", "test"), ("É. F.", "validation")])
    ]
    corpus.mkdir(parents=True, exist_ok=True)
    with open(corpus / "maestro-v3.0.0.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def test_maestro(tmp_path):
    corpus = tmp_path / "maestro"
    write_maestro(corpus)
    for number in (0, 2):
        write_noise(corpus / "2004" / f"{number}.wav", 1.5 + number, 44_100)
    recordings, left_out, _ = write(tmp_path, "maestro", corpus)
    assert [(r.id, r.split, r.speaker, r.is_end) for r in recordings] == [
        ("2004/0", "train", "", True),
        ("2004/2", "validation", "", True),
    ]
    assert [r.seconds() for r in recordings] == [1.5, 3.5]
    assert left_out == [f"recording not found: {corpus}/2004/1.wav; check the path"]
    row = json.loads((tmp_path / "manifests" / "maestro.jsonl").read_text().splitlines()[1])
    notes = {"composer": "É. F.", "title": "Sonata, No. 2", "year": "2004", "midi": f"{corpus}/2004/2.midi"}
    assert notes.items() <= row.items()
    by_table, _, _ = write(tmp_path / "by table", "maestro", corpus / "maestro-v3.0.0.csv")
    assert by_table == recordings


def test_a_folder_with_speakers(tmp_path):
    for number in range(30):
        for take in range(2):
            write_noise(tmp_path / "corpus" / f"speaker{number}" / f"{take}.wav", 0.25)
    recordings, left_out, said = write(tmp_path, "folder", tmp_path / "corpus")
    direct = read_manifest(tmp_path / "corpus")
    assert [(r.id, r.path, r.speaker, r.split) for r in recordings] == [
        (r.id, r.path, r.speaker, r.split) for r in direct
    ]
    sides = [{r.speaker for r in recordings if r.split == split} for split in ("train", "validation")]
    assert all(sides) and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 30
    assert left_out == [] and said[0] == f"train: {2 * len(sides[0])} recordings, 0.00 hours, {len(sides[0])} speakers"
    # What is written down is not told anew, and headers are read anew.
    again, _, _ = write(tmp_path / "again", "folder", tmp_path / "manifests" / "folder.jsonl", validation_share=0.9)
    assert again == recordings


def test_nothing_half_written(tmp_path, monkeypatch):
    write_noise(tmp_path / "corpus" / "a.wav", 0.25)
    output = tmp_path / "lists" / "all.jsonl"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", full)
        with pytest.raises(OSError):
            request = sources.Request(source="folder", input=tmp_path / "corpus", output=output, **DEFAULTS)
            sources.write(request, print)
    assert not output.exists() and not list(output.parent.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=folder", "--input=nowhere"], "input not found: "),
        (["--source=tfds", "--input=corpus"], "no dataset of TFDS: "),
        (["--source=maestro", "--input=corpus"], "0 files maestro*.csv: "),
        (["--source=librilight", "--input=corpus"], "no recording can be used (1 left out, the first because: no JSON"),
        (["--source=librispeech", "--input=empty"], "no recording can be used (0 left out): "),
        (["--source=folder", "--input=corpus", "--min_seconds=90"], "need 0 <= min_seconds <= target_seconds"),
        (["--source=folder", "--input=corpus", "--validation_share=1"], "need 0 <= min_seconds <= target_seconds"),
        (["--source=folder", "--input=corpus", "--output=list.json"], "a manifest's name ends in .jsonl: "),
        (["--source=folder", "--input=corpus", "--output=there.jsonl"], "output already exists: "),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_noise(pathlib.Path("corpus/a.flac"), 0.25)
    pathlib.Path("empty").mkdir()
    pathlib.Path("there.jsonl").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(["manifest", "--output=list.jsonl", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_altered_table_is_refused(tmp_path):
    write_maestro(tmp_path)
    table = tmp_path / "maestro-v3.0.0.csv"
    table.write_text(table.read_text().replace("split", "part"))
    with pytest.raises(UserError, match="no column split"):
        write(tmp_path, "maestro", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no column "),
        ("é".encode("latin-1"), "not a CSV file in UTF-8"),
        (b"x" * 200_000, "not a CSV file in UTF-8"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, message):
    (tmp_path / "maestro-v3.0.0.csv").write_bytes(text)
    with pytest.raises(UserError, match=message):
        write(tmp_path, "maestro", tmp_path)


def test_rows_that_are_cut_off_are_left_out_by_name(tmp_path):
    corpus = tmp_path / "maestro"
    write_maestro(corpus)
    write_noise(corpus / "2004" / "0.wav", 0.5)
    table = corpus / "maestro-v3.0.0.csv"
    header, first, *_ = table.read_text(encoding="utf-8").splitlines()
    rows = [first, "A. B.,Sonata", "A. B.,Sonata,train,2004,2004/1.midi", "A. B.,Sonata,train,2004,2004/1.midi,.,9"]
    # With the mark of its encoding, as spreadsheets write it.
    table.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    recordings, left_out, _ = write(tmp_path, "maestro", corpus)
    assert [recording.id for recording in recordings] == ["2004/0"]
    assert [reason.partition(":")[0] for reason in left_out] == [
        "row without split", "row without audio_filename", "row without audio_filename",
    ]  # fmt: skip


GOOD = {"good0", "good1", "good2", "high_rate", "six_channels", "mp3_named_wav"}
BAD = {
    "cut.flac": "damaged or cut-off audio",
    "empty.wav": "empty file",
    "header.wav": "audio of zero length",
    "nan.wav": "audio has samples that are not finite",
    "inf.wav": "audio has samples that are not finite",
    "text.flac": "not audio that can be read",
    "locked.wav": "recording cannot be read (Permission denied)",
    "broken.wav": "link to nothing",
}


@pytest.fixture
def poisoned(tmp_path, monkeypatch):
    """A corpus with everything in it that can be wrong with a recording."""
    folder = tmp_path / "corpus"
    for number in range(3):
        write_noise(folder / f"good{number}.flac", 1.0)
    soundfile.write(folder / "high_rate.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 384_000), 384_000)
    soundfile.write(folder / "six_channels.flac", np.random.default_rng(0).uniform(-0.1, 0.1, (16_000, 6)), 16_000)
    soundfile.write(folder / "mp3_named_wav.mp3", np.random.default_rng(0).uniform(-0.1, 0.1, 16_000), 16_000)
    (folder / "mp3_named_wav.mp3").rename(folder / "mp3_named_wav.wav")
    write_noise(folder / "cut.flac", 2.0)
    data = (folder / "cut.flac").read_bytes()
    (folder / "cut.flac").write_bytes(data[: len(data) // 2])
    (folder / "empty.wav").touch()
    soundfile.write(folder / "header.wav", np.zeros(0), 16_000)
    for value in ("nan", "inf"):
        soundfile.write(folder / f"{value}.wav", np.full(16_000, float(value)), 16_000, subtype="FLOAT")
    (folder / "text.flac").write_text("these are words, not samples\n" * 40)
    (folder / "broken.wav").symlink_to(folder / "nowhere.wav")
    write_noise(folder / "locked.wav", 1.0)
    open_file = open

    def open_unless_locked(path, *arguments):
        if pathlib.Path(path).name == "locked.wav":
            raise PermissionError(13, "Permission denied", path)
        return open_file(path, *arguments)

    # The superuser, as whom tests may run, may read everything.
    monkeypatch.setattr(audio, "open", open_unless_locked, raising=False)
    rows = [{"path": f"corpus/{path.name}", "id": path.stem} for path in sorted(folder.iterdir())]
    rows.append({"path": "corpus/good1.flac", "id": "good0"})
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "all.jsonl"


def check_left_out(lines, bad):
    """Every bad recording is in one line, with its reason, and nothing else is."""
    assert len(lines) == len(bad) + 1
    for name, reason in bad.items():
        (line,) = [line for line in lines if f"/corpus/{name};" in line]
        assert reason in line
    (line,) = [line for line in lines if "id comes twice" in line]
    assert "corpus/good1.flac (id good0, as " in line


def test_headers_tell_some_of_the_bad_ones_and_samples_the_others(tmp_path, poisoned):
    in_samples = {"cut.flac", "nan.wav", "inf.wav"}
    recordings, left_out, said = write(tmp_path, "folder", poisoned)
    assert {r.id for r in recordings} == GOOD | {name.split(".")[0] for name in in_samples}
    check_left_out(left_out, {name: reason for name, reason in BAD.items() if name not in in_samples})
    assert "left out: 1 x id comes twice" in said and "left out: 1 x not audio that can be read" in said
    recordings, left_out, said = write(tmp_path / "decoded", "folder", poisoned, decode=True)
    assert {r.id for r in recordings} == GOOD
    check_left_out(left_out, BAD)
    assert "left out: 2 x audio has samples that are not finite" in said


def test_tokenizing_names_the_bad_ones_and_keeps_the_good_ones(tmp_path, poisoned):
    lines: list[str] = []
    tokenize(Request(read_manifest(poisoned), tmp_path / "tokens"), fakes.load(), lines.append)
    check_left_out([line for line in lines if line.startswith("left out: ")], BAD)
    listed = (tmp_path / "tokens" / token_dataset.LEFT_OUT_FILE).read_text().splitlines()
    check_left_out([json.loads(line)["reason"] for line in listed], BAD)
    dataset = token_dataset.TokenDataset(str(tmp_path / "tokens"))
    records = [dict(record) for split in dataset.splits for record in dataset.source(split)]
    assert {record["id"].decode() for record in records} == GOOD
    assert {len(record["semantic"]) for record in records} == {25}


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tfds(tmp_path, file_format, monkeypatch):
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    features = tfds.features.FeaturesDict(
        {
            "audio": tfds.features.Audio(sample_rate=RATE),
            "id": tfds.features.Text(),
            "speaker": tfds.features.ClassLabel(names=["ann", "ben"]),
            "text": tfds.features.Text(),
            "pitch": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        }
    )
    generator = np.random.default_rng()
    waves = [generator.integers(-(2**15), 2**15, size) for size in (800, 1200, 0)]
    examples = [
        {"audio": wave_W, "id": f"x/{i}", "speaker": i % 2, "text": "héllo", "pitch": np.zeros(2, np.float32)}
        for i, wave_W in enumerate(waves)
    ]
    folder = tmp_path / "dataset"
    folder.mkdir()
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name="noise", filetype_suffix=file_format)
    infos = []
    for split in ("train_clean", "dev"):
        path = folder / f"noise-{split}.{file_format}-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "") if file_format == "array_record" else tf.io.TFRecordWriter(str(path))
        for example in examples:
            writer.write(features.serialize_example({**example, "id": f"{split}/{example['id']}"}))
        writer.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[3], num_bytes=1, filename_template=template.replace(split=split)
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        filename_template=template,
        version="1.0.0",
        check_data=False,
    )
    recordings, left_out, _ = write(tmp_path, "tfds", folder)
    assert [(r.id, r.split, r.speaker, r.text, r.is_end) for r in recordings] == [
        (f"{name}/x/{i}", split, speaker, "héllo", True)
        for name, split in (("dev", "validation"), ("train_clean", "train"))
        for i, speaker in enumerate(["ann", "ben"])
    ]
    for recording, wave_W in zip(recordings, waves[:2] * 2, strict=True):
        samples_W, rate = soundfile.read(recording.path, dtype="int16")
        assert rate == RATE and recording.seconds() == len(wave_W) / RATE
        np.testing.assert_array_equal(samples_W, wave_W)
    assert [re.sub(": .*/", ": ", line) for line in sorted(left_out)] == [
        f"audio of zero length: dataset example 2 of {split}; give a recording with samples in it"
        for split in ("dev", "train_clean")
    ]
    (tmp_path / "manifests" / "tfds.jsonl").unlink()
    with pytest.raises(UserError, match="already exists.*tfds.audio"):
        write(tmp_path, "tfds", folder)

    def refuse(stem, *_):
        raise UserError("samples of more than 16 bits", stem, "scale them")

    monkeypatch.setattr(audio, "write_lossless", refuse)
    with pytest.raises(UserError, match=r"no recording can be used \(6 left out"):
        write(tmp_path / "none", "tfds", folder)
    assert not list((tmp_path / "none").rglob("*.audio"))


def test_a_damaged_description_of_tfds_is_told(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=f"dataset's description is damaged .*: {tmp_path}; prepare it anew"):
        write(tmp_path / "out", "tfds", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif("AUDIOLM_RECORDINGS" not in os.environ, reason="AUDIOLM_RECORDINGS names no folder of recordings")
def test_real_recordings_arranged_as_librilight(tmp_path):
    paths = sorted(pathlib.Path(os.environ["AUDIOLM_RECORDINGS"]).rglob("*.flac"))[:200]
    total = 0.0
    for number, path in enumerate(paths):
        book = tmp_path / "unlab-600" / path.parent.name / "1"
        book.mkdir(parents=True, exist_ok=True)
        (book / f"{number}.flac").symlink_to(path)
        seconds = audio.duration(path)
        total += seconds
        cuts = np.linspace(0, seconds, 4).tolist()
        (book / f"{number}.json").write_text(json.dumps({"voice_activity": list(zip(cuts, cuts[1:]))}))
    recordings, left_out, _ = write(tmp_path, "librilight", tmp_path / "unlab-600", target_seconds=2, min_seconds=0)
    assert left_out == []
    kept, seconds = usable(recordings, print)
    assert kept == recordings and sum(seconds) == pytest.approx(total, abs=1e-3)
    for recording in recordings[::20]:
        assert len(recording.read(16_000)) == pytest.approx(recording.seconds() * 16_000, abs=8)
