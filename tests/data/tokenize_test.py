"""Tokenizing: what the dataset holds, who may make it, what a killed run leaves, what cannot be read."""

import hashlib
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from audiolm_jax import cli, files
from audiolm_jax.data import manifest, token_dataset, tokenize
from audiolm_jax.errors import UserError
from tests.data import fakes

LENGTHS = (4000, 23456, 12345, 1000, 40001, 23456, 31000, 8000, 700, 16000, 27500, 5123)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Noise of many lengths; four of twelve held out."""
    folder = tmp_path_factory.mktemp("recordings")
    generator = np.random.default_rng()
    rows = []
    for i, length in enumerate(LENGTHS):
        wave_W = np.cumsum(generator.standard_normal(length)) % 2 - 1
        soundfile.write(folder / f"{i}.wav", wave_W.astype(np.float32), fakes.RATE, subtype="FLOAT")
        fields = {"id": f"r{i:02}", "speaker": f"s{i % 2}", "split": "validation" if i % 3 == 1 else "train"}
        rows.append({"path": f"{i}.wav", **fields, **({"start": 0.0, "end": 0.5} if i == 6 else {})})
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest.read_manifest(folder / "list.jsonl")


def request(recordings, output, **fields):
    return tokenize.Request(recordings, output, **{"shard_seconds": 1.0, "batch_seconds": 4.0, **fields})


def ignore(line):
    pass


@pytest.fixture(scope="module")
def whole(recordings, tmp_path_factory):
    """The dataset of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "tokens"
    tokenize.tokenize(request(recordings, output), fakes.load(), ignore)
    return output


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def test_records_are_the_recordings_tokens(recordings, whole):
    dataset = token_dataset.TokenDataset(str(whole))
    assert sorted(dataset.splits) == ["train", "validation"]
    total = np.zeros(3, int)
    for split in dataset.splits:
        expected = [recording for recording in recordings if recording.split == split]
        records = list(dataset.source(split))
        assert [record["id"].decode() for record in records] == [recording.id for recording in expected]
        assert dataset.num_frames(split).tolist() == [len(record["semantic"]) for record in records]
        for record, recording in zip(records, expected, strict=True):
            wave_W, _ = soundfile.read(recording.path, dtype="float32")
            wave_W = wave_W[: 8000 if recording.id == "r06" else None]
            np.testing.assert_array_equal(record["semantic"], fakes.semantic(wave_W))
            np.testing.assert_array_equal(record["acoustic"], fakes.acoustic(wave_W))
            assert record["num_samples"] == len(wave_W) and record["is_end"] == (recording.id != "r06")
            assert record["speaker"].decode() == recording.speaker
            total += [len(wave_W), record["semantic"].size, record["acoustic"].size]
    counters = json.loads((whole / "tokenization.json").read_text())["counters"]
    assert counters == {
        "recordings": 12, "seconds": total[0] / 16000, "semantic_tokens": total[1], "acoustic_tokens": total[2],
        "left_out": {},
    }  # fmt: skip
    frames = {"r06": 8000}
    train = [
        fakes.semantic(soundfile.read(recording.path, frames.get(recording.id, -1), dtype="float32")[0])
        for recording in recordings
        if recording.split == "train"
    ]
    runs = sum(1 + int((tokens[1:] != tokens[:-1]).sum()) for tokens in train)
    assert dataset.metadata.mean_run_length == pytest.approx(sum(map(len, train)) / runs, rel=1e-12)


def test_files_are_tfds_files_with_checksums(whole):
    names = sorted(path.name for path in whole.iterdir())
    shards = [f"folder_tokens-train.array_record-{i:05}-of-00004" for i in range(4)]
    shards += [f"folder_tokens-validation.array_record-{i:05}-of-00004" for i in range(4)]
    others = ["SHA256SUMS", "dataset_info.json", "features.json", "left_out.jsonl", "metadata.json"]
    others += ["num_frames_train.npy", "num_frames_validation.npy", "tokenization.json"]
    assert names == sorted(shards + others)
    sums = dict(reversed(line.split("  ")) for line in (whole / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((whole / name).read_bytes()).hexdigest() for name in names[1:]}
    assert [path.name for path in whole.parent.iterdir()] == ["tokens"]


def test_batches_waste_little_and_have_few_sizes(recordings, tmp_path):
    tokenizers = fakes.load()
    tokenize.tokenize(request(recordings, tmp_path / "t", shard_seconds=1e9), tokenizers, ignore)
    shapes = tokenizers.codec.shapes
    assert {batch for batch, _ in shapes} <= {1, 2, 4, 8} and max(batch for batch, _ in shapes) > 1
    assert all(batch == 1 or batch * length <= 64000 for batch, length in shapes)
    lengths = [8000 if i == 6 else length for i, length in enumerate(LENGTHS)]
    assert sum(batch for batch, _ in shapes) == 12
    assert sum(batch * length for batch, length in shapes) < 1.5 * sum(lengths)


@pytest.mark.parametrize("num_hosts", [2, 5, 8])
def test_hosts_share_the_work_and_the_last_one_finishes(recordings, whole, tmp_path, num_hosts):
    order = np.random.default_rng().permutation(num_hosts)
    encoded = 0
    for host in order:
        tokenizers = fakes.load()
        assert not (tmp_path / "tokens").exists()
        tokenize.tokenize(request(recordings, tmp_path / "tokens"), tokenizers, ignore, int(host), num_hosts)
        encoded += sum(batch for batch, _ in tokenizers.codec.shapes)
    assert encoded == 12
    assert contents(tmp_path / "tokens") == contents(whole)
    lines = []
    tokenize.tokenize(request(recordings, tmp_path / "tokens"), fakes.load(), lines.append, 0, num_hosts)
    assert lines == [f"nothing to do: {tmp_path / 'tokens'} is whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_whatever_a_run_was_doing_when_it_died_the_next_one_goes_on(recordings, whole, tmp_path, monkeypatch):
    """Dies before and after each file gets its final name, and in the midst of the metadata and of clearing up."""

    class Killed(BaseException):
        pass

    left = 0

    def dying(function, after):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0 and not after:
                raise Killed
            result = function(*arguments, **options)
            if left < 0:
                raise Killed
            return result

        return call

    for survived in range(100):
        for module, name in ((os, "replace"), (token_dataset, "write_num_frames"), (shutil, "rmtree")):
            monkeypatch.setattr(module, name, dying(getattr(module, name), after=bool(survived % 2)))
        output = tmp_path / str(survived)
        left, tokenizers = survived, fakes.load()
        killed = False
        try:
            tokenize.tokenize(request(recordings, output), tokenizers, ignore)
        except Killed:
            killed = True
        finally:
            monkeypatch.undo()
        if not killed:
            break
        again = fakes.load()
        tokenize.tokenize(request(recordings, output), again, ignore)
        assert contents(output) == contents(whole)
        assert not (tmp_path / f"{output.name}.incomplete").exists()
        # At most one shard is made twice.
        encoded = [sum(batch for batch, _ in both.codec.shapes) for both in (tokenizers, again)]
        assert 12 <= sum(encoded) <= 12 + 4
    assert survived > 15


def test_another_request_begins_anew_alone_but_hosts_refuse(recordings, tmp_path):
    output = tmp_path / "tokens"
    tokenize.tokenize(request(recordings, output), fakes.load(), ignore, 0, 2)
    for other, tokenizers in (
        (request(recordings, output, shard_seconds=3.0), fakes.load()),
        (request(recordings[1:], output), fakes.load()),
        (request(recordings, output), fakes.load_others()),
    ):
        with pytest.raises(UserError, match="shards of other recordings, tokenizers or options"):
            tokenize.tokenize(other, tokenizers, ignore, 1, 2)
    others = fakes.load_others()
    tokenize.tokenize(request(recordings, output), others, ignore)
    assert sum(batch for batch, _ in others.codec.shapes) == 12
    assert token_dataset.TokenDataset(str(output)).metadata.codec == "d" * 8
    with pytest.raises(UserError, match="output already exists"):
        tokenize.tokenize(request(recordings, output), fakes.load(), ignore)


def test_shares_that_cannot_be(recordings, tmp_path):
    for host, num_hosts in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(UserError, match=f"no such share: --host={host} --num_hosts={num_hosts}"):
            tokenize.tokenize(request(recordings, tmp_path / "t"), fakes.load(), ignore, host, num_hosts)
    folder = tmp_path / "t.incomplete"
    with files.exclusive(files.make_folder(folder) / ".lock-1-of-2", "", ""):
        with pytest.raises(UserError, match="another run is writing this dataset"):
            tokenize.tokenize(request(recordings, tmp_path / "t"), fakes.load(), ignore, 1, 2)


def write_poison(folder):
    """Recordings that cannot be read, by name, with what must be said of each."""
    good = (folder / "good0.flac").read_bytes()
    (folder / "text.flac").write_text("this is no audio")
    (folder / "empty.wav").touch()
    soundfile.write(folder / "no_samples.wav", np.zeros(0), 16000)
    (folder / "header_alone.flac").write_bytes(good[:60])
    (folder / "cut.flac").write_bytes(good[: len(good) // 3])
    soundfile.write(folder / "nan.wav", np.array([0.1] * 999 + [np.nan]), 16000, subtype="FLOAT")
    soundfile.write(folder / "infinite.wav", np.array([0.1] * 999 + [np.inf]), 16000, subtype="FLOAT")
    (folder / "broken_link.wav").symlink_to(folder / "nowhere.wav")
    (folder / "picture.mp3").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
    soundfile.write(folder / "too_short.wav", np.full(60, 0.1), 16000)
    return {
        "text": "not audio that can be read", "empty": "empty file", "no_samples": "audio of zero length",
        "header_alone": "", "cut": "", "nan": "not finite",
        "infinite": "not finite", "broken_link": "not found|link to nothing", "picture": "not audio",
        "too_short": "too short for a token",
    }  # fmt: skip


def test_ten_poison_files_are_named_and_all_others_tokenized(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for i in range(5):
        soundfile.write(folder / f"good{i}.flac", np.random.default_rng().uniform(-1, 1, 20000 + 999 * i), 16000)
    wanted = write_poison(folder)
    lines: list[str] = []
    output = tmp_path / "tokens"
    tokenize.tokenize(request(manifest.read_manifest(folder), output), fakes.load(), lines.append)
    dataset = token_dataset.TokenDataset(str(output))
    records = [record for split in dataset.splits for record in dataset.source(split)]
    assert sorted(record["id"].decode() for record in records) == [f"good{i}" for i in range(5)]
    left_out = [json.loads(line) for line in (output / "left_out.jsonl").read_text().splitlines()]
    assert sorted(entry["id"] for entry in left_out) == sorted(wanted)
    for entry in left_out:
        assert any(kind in entry["reason"] for kind in wanted[entry["id"]].split("|")), entry
        assert pathlib.Path(entry["path"]).stem == entry["id"] and entry["path"] in entry["reason"]
        assert f"left out: {entry['reason']}" in lines
    counters = json.loads((output / "tokenization.json").read_text())["counters"]
    assert sum(counters["left_out"].values()) == 10 and counters["left_out"]["empty file"] == 1
    assert counters["recordings"] == 5 and lines[-1].startswith("tokenized 5 recordings")


def test_nothing_but_poison_leaves_nothing(tmp_path):
    soundfile.write(tmp_path / "nan.wav", np.full(9999, np.nan), 16000, subtype="FLOAT")
    for name, message in (("nan", "no recording could be read"), ("text", "not audio")):
        (tmp_path / "text.wav").write_text("no audio")
        listed = manifest.read_manifest(tmp_path / f"{name}.wav")
        with pytest.raises(UserError, match=message):
            tokenize.tokenize(request(listed, tmp_path / "out"), fakes.load(), ignore)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.wav", "text.wav"]


def test_a_split_of_poison_alone_is_not_in_the_dataset(tmp_path):
    soundfile.write(tmp_path / "good.flac", np.random.default_rng().uniform(-1, 1, 20000), 16000)
    damaged = tmp_path / os.fsdecode(b"na\xefve.wav")
    with open(damaged, "wb") as file:
        soundfile.write(file, np.full(9999, np.nan), 16000, format="WAV", subtype="FLOAT")
    for kept, lost in (("train", "validation"), ("validation", "train")):
        recordings = [
            manifest.Recording("bad", damaged, split=lost),
            manifest.Recording("good", tmp_path / "good.flac", split=kept),
            manifest.Recording("missing", tmp_path / os.fsdecode(b"\xff.wav"), split=kept),
        ]
        output = tmp_path / kept
        tokenize.tokenize(request(recordings, output), fakes.load(), ignore)
        assert token_dataset.verify(output, ignore) == 7
        assert not list(output.glob(f"*{lost}*"))
        dataset = token_dataset.TokenDataset(str(output))
        assert dataset.splits == (kept,) and len(dataset.source(kept)) == 1
        assert list(tfds.builder_from_directory(output).as_data_source()) == [kept]
        left_out = [json.loads(line) for line in (output / "left_out.jsonl").read_text().splitlines()]
        assert [entry["path"] for entry in left_out] == [f"{tmp_path}/\\udcff.wav", f"{tmp_path}/na\\udcefve.wav"]


@pytest.mark.parametrize("split", ["all", "a/b", "te st", "../x", "-x", "train[:1]", "a+b", "", "x\n"])
def test_splits_that_tfds_cannot_name_are_refused_before_any_work(tmp_path, split):
    recordings = [manifest.Recording("a", tmp_path / "a.wav", split=split)]
    with pytest.raises(UserError, match="no name for a split of a dataset"):
        tokenize.tokenize(request(recordings, tmp_path / "out"), fakes.load(), ignore)
    assert not list(tmp_path.iterdir())


def test_a_mistake_of_ours_is_no_poison(recordings, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(manifest.Recording, "read", broken)
    with pytest.raises(ZeroDivisionError):
        tokenize.tokenize(request(recordings, tmp_path / "tokens"), fakes.load(), ignore)
    assert not (tmp_path / "tokens").exists()


@pytest.fixture
def copy(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_missing_shard_is_named_at_once(copy):
    name = "folder_tokens-train.array_record-00002-of-00004"
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"shard is missing: {copy / name}; restore it"):
        token_dataset.TokenDataset(str(copy))
    with pytest.raises(UserError, match=f"{name} is missing"):
        token_dataset.verify(copy, ignore)


def test_a_damaged_shard_is_named_by_its_checksum_and_in_reading(copy):
    assert token_dataset.verify(copy, ignore) == 15
    path = copy / "folder_tokens-train.array_record-00001-of-00004"
    good = path.read_bytes()
    damaged = bytearray(good)
    at = int(np.random.default_rng().integers(len(good) // 3, len(good) // 2))
    damaged[at : at + 40] = bytes(255 - byte for byte in damaged[at : at + 40])
    path.write_bytes(damaged)
    lines: list[str] = []
    found = hashlib.sha256(damaged).hexdigest()
    with pytest.raises(UserError, match=rf"{path.name} is damaged \(SHA-256 is {found}, was"):
        token_dataset.verify(copy, lines.append)
    assert len(lines) == 1 and hashlib.sha256(good).hexdigest() in lines[0]


def test_reading_names_a_damaged_shard(copy):
    path = copy / "folder_tokens-train.array_record-00001-of-00004"
    good = path.read_bytes()
    source = token_dataset.TokenDataset(str(copy)).source("train")
    with pytest.raises(IndexError):
        source[len(source)]
    # Cut in the padding, in the records; an empty file; other bytes where the index of the records is.
    at = good.rindex(good.rstrip(b"\0")[-1]) - 40
    for damaged in (good[:-10], good[: len(good) // 2], b"", good[:at] + bytes(255 - x for x in good[at:])):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"shard is damaged .*{path.name}; find all such shards"):
            list(token_dataset.TokenDataset(str(copy)).source("train"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dataset_info.json", "", "dataset's description is damaged"),
        ("dataset_info.json", '{"name": "folder', "dataset's description is damaged"),
        ("dataset_info.json", "{}", "dataset's description is damaged"),
        ("features.json", "", "dataset's description is damaged"),
        ("features.json", None, "dataset's description is damaged"),
        ("metadata.json", "{", "dataset's description is damaged"),
        ("metadata.json", "[]", "not a token dataset of this version"),
        ("metadata.json", None, "not a token dataset of this version"),
    ],
)
def test_a_damaged_description_is_told(copy, name, text, message):
    if text is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(text)
    with pytest.raises(UserError, match=f"{message}.*: {copy}; "):
        token_dataset.TokenDataset(str(copy))
    with pytest.raises(UserError, match=name):
        token_dataset.verify(copy, ignore)


@pytest.mark.parametrize("damage", ["missing", "empty", "junk", "cut", "short"])
def test_damaged_lengths_are_told(copy, damage):
    path = copy / "num_frames_train.npy"
    data, lengths = path.read_bytes(), np.load(path)
    path.unlink()
    match damage:
        case "short":
            np.save(path, lengths[:-1])
        case "missing":
            pass
        case _:
            path.write_bytes({"empty": b"", "junk": b"junk", "cut": data[:-3]}[damage])
    with pytest.raises(UserError, match=f"lengths .*: {path}; find what is damaged"):
        token_dataset.TokenDataset(str(copy)).num_frames("train")


@pytest.mark.parametrize("field", [{"format_version": 2}, {"num_clusters": "7"}, {"more": 1}])
def test_another_version_is_refused(copy, field):
    metadata = json.loads((copy / "metadata.json").read_text())
    (copy / "metadata.json").write_text(json.dumps({**metadata, **field}))
    with pytest.raises(UserError, match="not a token dataset of this version"):
        token_dataset.TokenDataset(str(copy))


@pytest.mark.parametrize(("field", "stream"), [("num_clusters", "semantic"), ("codebook_size", "acoustic")])
def test_tokens_outside_of_the_described_vocabulary_are_refused(copy, field, stream):
    largest = max(int(record[stream].max()) for record in token_dataset.TokenDataset(str(copy)).source("train"))
    metadata = json.loads((copy / "metadata.json").read_text())
    for size in (largest + 1, largest):
        (copy / "metadata.json").write_text(json.dumps({**metadata, field: size}))
        source = token_dataset.TokenDataset(str(copy)).source("train")
        if size > largest:
            assert len(list(source)) == len(source)
        else:
            with pytest.raises(
                UserError, match=rf"{stream} token {largest} of {size} in record .*-of-00004; find what"
            ):
                list(source)


@pytest.mark.parametrize("damage", [b"", b"abc\n", b"\xff" * 64 + b"  features.json\n"])
def test_damaged_checksums_verify_nothing(copy, damage):
    (copy / "SHA256SUMS").write_bytes(damage)
    with pytest.raises(UserError, match=f"checksums are damaged: {copy}/SHA256SUMS; "):
        token_dataset.verify(copy, ignore)


def test_verify_and_missing_arguments_on_the_command_line(copy, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["tokenize", *map(str, arguments)])
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    assert run(f"--verify={copy}") == (0, "all 15 files are as they were written\n", "")
    (copy / "features.json").write_text("{}")
    code, _, error = run(f"--verify={copy}")
    assert code == 2 and "error: features.json is damaged" in error.splitlines()[-1]
    (copy / "SHA256SUMS").unlink()
    code, _, error = run(f"--verify={copy}")
    assert code == 2 and error.startswith("error: no checksums: ")
    for option in ("--num_workers=2", "--pipeline_options=--x=1"):
        code, _, error = run("--codec=c", "--semantic_tokenizer=s", "--input=i", "--output=o", option)
        assert code == 2 and error.startswith(f"error: only for a runner: {option.split('=')[0]}; add --runner=direct")
    code, _, error = run("--codec=c", "--output=o")
    assert code == 2 and "required: --semantic_tokenizer, --input: audiolm tokenize; see" in error
