"""The command line from outside: help, errors, exit statuses, every command on tiny models."""

import json
import os
import resource
import stat
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from audiolm_jax import cli
from audiolm_jax.parts import read_part
from tests import tiny
from tests.audio_test import bad_files

COMMANDS = (
    "quickstart", "train", "fit-kmeans", "tokenize", "encode", "decode", "convert", "bundle", "generate", "evaluate",
    "inspect", "render", "compare", "detect", "detection-data",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A bundle, its parts, recordings."""
    folder = tmp_path_factory.mktemp("world")
    bundle = tiny.write_bundle(folder)
    recordings = tiny.write_recordings(folder / "recordings")
    parts = {path.name: str(path) for path in (folder / "parts").iterdir()}
    return {"bundle": str(bundle), "recordings": str(recordings), "wav": str(recordings / "low" / "tone0.wav"), **parts}


def run(capsys, *arguments):
    """Exit status, standard output and the last line of standard error of a command run in this process."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    return stopped.value.code or 0, captured.out, lines[-1] if lines else "", captured.err


def assert_user_error(result, message):
    status, _, last, everything = result
    assert status == 2, everything[-2000:]
    assert last.startswith("error: ") and message in last, last
    what, _, rest = last.removeprefix("error: ").partition(": ")
    assert what and ";" in rest
    assert "Traceback" not in everything


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(capsys, command):
    status, out, _, _ = run(capsys, command, "--help")
    assert status == 0 and f"usage: audiolm {command}" in out and len(out) > 300


def test_help_and_version_need_no_jax():
    code = (
        "import sys, audiolm_jax.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nprint(sorted(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in out for name in COMMANDS)
    modules = out.splitlines()[-1]
    assert not any(f"'{name}'" in modules for name in ("jax", "numpy", "tensorflow", "seqio", "flax", "matplotlib"))


def test_import_loads_neither_tensorflow_nor_seqio():
    code = (
        "import sys, audiolm_jax, audiolm_jax.generate, audiolm_jax.bundle, audiolm_jax.training.loop, "
        "audiolm_jax.data.pipeline, audiolm_jax.quickstart\n"
        "print([m for m in ('tensorflow', 'seqio', 'tensorflow_datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_reading_tokens_does_not_load_tensorflow(tmp_path):
    from tests.data.pipeline_test import METADATA
    from tests.training import tokens

    folder = tokens.write(tmp_path / "tokens", METADATA)
    code = (
        "import sys\nfrom audiolm_jax.data.token_dataset import TokenDataset\n"
        f"print(len(TokenDataset({str(folder)!r}).source('train')), 'tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["20", "False"]


def test_python_m_is_the_same_command():
    out = subprocess.run([sys.executable, "-m", "audiolm_jax", "--version"], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "audiolm_jax 0.1.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("sing",), "invalid choice: 'sing'"),
        (("generate", "--bundle=x"), "the following arguments are required"),
        (
            ("generate", "--bundle=x", "--mode=continuation", "--output=y", "--prompt=z", "--seed=x"),
            "invalid seed value",
        ),
        (("evaluate", "--suite=fad", "--output=y", "--seed=-1"), "argument --seed: must be 0 or more"),
        (("inspect", "x", "--output=y", f"--seed={2**63}"), "argument --seed: must be 0 or more and less than 2^63"),
        (
            ("generate", "--bundle=x", "--mode=acoustic", "--output=y", "--seed=-1"),
            "argument --seed: must be 0 or more",
        ),
        (("fit-kmeans", "--encoder=x", "--input=y", "--output=z", f"--seed={2**70}"), "argument --seed: must be 0 or"),
        (("bundle", "--codec=a", "--chorus=b"), "required"),
        (("train", "--config=soundstream_tiny", "--workdir=w", "--banana"), "unknown argument: --banana"),
        (("train", "--config=soundstream_tyny", "--workdir=w"), "unknown config: soundstream_tyny; did you mean"),
        (("train", "--config=nowhere.py", "--workdir=w"), "config file not found: nowhere.py"),
        (
            ("train", "--config=fine_tiny", "--workdir=w", "--config.model.num_layer=3"),
            "did you mean config.model.num_layers",
        ),
        (("train", "--config=fine_tiny", "--workdir=w", "--config.seed=many"), "config.seed"),
        (("train", "--config=fine_tiny", "--workdir=w", "--config.batch_size=1.5"), "config.batch_size"),
        (("train", "--config=fine_tiny", "--workdir=w", "--config.seed"), "config field without a value"),
        (("train", "--config=soundstream_tiny", "--workdir=w", "--config.model.strides=(2,a)"), "config.model.strides"),
        (("train", "--config=fine_tiny", "--workdir=w"), "no training data: config.data_dir"),
        (("train", "--config=fine_tiny", "--workdir=w", "--config.data_dir=nowhere"), "no token dataset: nowhere"),
        (
            ("train", "--config=soundstream_tiny", "--workdir=w", "--config.data_dir=nowhere"),
            "input not found: nowhere",
        ),
        (
            ("train", "--config=fine_tiny", "--workdir=w", "--config.batch_size=0"),
            "must be 1 or more: config.batch_size=0",
        ),
        (("train", "--config=fine_tiny", "--workdir=w", "--config.model.num_heads=5"), "num_heads=5 does not divide"),
        (("train", "--config=fine_tiny", "--workdir=w", "--config.mesh.tensor=3"), "mesh does not divide"),
    ],
)
def test_bad_arguments(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert_user_error(run(capsys, *arguments), message)


def test_every_shipped_config_loads_and_builds():
    import jax

    from audiolm_jax.config import load_config, shipped_configs
    from audiolm_jax.training.registry import build_objective

    names = shipped_configs()
    assert {"soundstream_base", "w2v_bert_xl", "semantic_librilight", "coarse_piano_tiny"} <= set(names)
    for name in names:
        config = load_config(name, ["--config.seed=5"])
        jax.eval_shape(build_objective(config).init, jax.random.key(config.seed))


def test_bad_recordings(capsys, tmp_path, world):
    for name, message in bad_files(tmp_path).items():
        output = tmp_path / "out"
        path = tmp_path / name
        encode = run(capsys, "encode", f"--codec={world['codec']}", f"--input={path}", f"--output={output}.npz")
        assert_user_error(encode, message if name != "missing.wav" else "not found")
        prompt = ("--mode=continuation", f"--prompt={path}", f"--output={output}")
        assert_user_error(run(capsys, "generate", f"--bundle={world['bundle']}", *prompt), name)
        parts = (f"--codec={world['codec']}", f"--semantic_tokenizer={world['semantic_tokenizer']}")
        assert_user_error(
            run(capsys, "tokenize", *parts, f"--input={path}", f"--output={output}"),
            name if name != "nan.wav" else "no recording",
        )
        assert not output.exists() and not (tmp_path / "out.npz").exists()


def test_prompt_shorter_than_one_token(capsys, tmp_path, world):
    soundfile.write(tmp_path / "short.wav", np.full(600, 0.1), 16000)
    request = ("--mode=acoustic", f"--prompt={tmp_path / 'short.wav'}", f"--output={tmp_path / 'out'}")
    assert_user_error(
        run(capsys, "generate", f"--bundle={world['bundle']}", *request), "shorter than one semantic token"
    )
    assert not (tmp_path / "out" / "generation.json").exists()


def test_bad_generation_requests(capsys, tmp_path, world):
    def generate(*arguments):
        return run(capsys, "generate", f"--bundle={world['bundle']}", f"--output={tmp_path / 'out'}", *arguments)

    prompt = f"--prompt={world['wav']}"
    assert_user_error(generate("--mode=hum", prompt), "unknown mode: hum")
    assert_user_error(generate("--mode=acoustic", prompt, "--seconds=3"), "seconds are refused")
    assert_user_error(generate("--mode=unconditional", prompt), "a prompt is refused")
    assert_user_error(generate("--mode=continuation"), "no prompt")
    assert_user_error(generate("--mode=continuation", prompt, "--top_p=2"), "top_p out of range")
    assert_user_error(generate("--mode=continuation", prompt, prompt), "prompt given twice")
    unprompted = lambda *mesh: generate("--mode=unconditional", *mesh)
    assert_user_error(unprompted("--mesh_data=2"), "mesh of 2 devices; there are 1: --mesh_data=2 --mesh_tensor=1")
    assert_user_error(unprompted("--mesh_tensor=0"), "mesh axes must be 1 or more: --mesh_data=1 --mesh_tensor=0")
    assert_user_error(unprompted("--mesh_tensor=two"), "invalid int value: 'two'")
    assert_user_error(
        run(capsys, "generate", f"--bundle={world['codec']}", "--mode=unconditional", f"--output={tmp_path}"),
        "not a bundle",
    )
    assert not (tmp_path / "out").exists()


def test_generate_writes_wavs_and_their_list(capsys, tmp_path, world):
    status, *_, error = run(
        capsys, "generate", f"--bundle={world['bundle']}", "--mode=continuation", f"--prompt={world['wav']}",
        f"--prompt={world['recordings']}/high", "--prompt_seconds=1", "--seconds=0.5", "--num_samples=2", "--seed=3",
        "--temperature_coarse=0.7", "--top_k=5", "--ignore_end", f"--output={tmp_path}",
    )  # fmt: skip
    assert status == 0 and "generate:   0%|" in error and "15.0/15.0 s" in error
    entries = json.loads((tmp_path / "generation.json").read_text())
    assert [entry["path"] for entry in entries] == [f"tone{i}_{k:02}.wav" for i in (0, 1, 3, 5, 7) for k in (0, 1)]
    for entry in entries:
        info = soundfile.info(tmp_path / entry["path"])
        assert (info.frames, info.samplerate, info.subtype) == (24000, 16000, "PCM_16")
        assert entry["seed"] == 3 and entry["ended"] is False and entry["seconds"] == 1.5
        assert entry["settings"]["coarse"] == {"temperature": 0.7, "top_k": 5, "top_p": 1.0}
        assert entry["settings"]["fine"] == {"temperature": 0.6, "top_k": 5, "top_p": 1.0}
        assert set(entry["tokens_per_second"]) == {"semantic", "coarse", "fine"}
    assert {path.suffix for path in tmp_path.iterdir()} == {".wav", ".json"}


def test_prompts_of_a_manifest_are_its_stretches(capsys, tmp_path, world):
    wave_W = np.random.default_rng(0).uniform(-0.1, 0.1, 48000)
    soundfile.write(tmp_path / "long.wav", wave_W, 16000)
    rows = [
        {"path": "long.wav", "id": "book/first", "start": 0.5, "end": 0.9},
        {"path": "long.wav", "id": "book/joined", "segments": [[0.25, 0.5], [1, 3]]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    joined_W = np.concatenate([wave_W[4000:8000], wave_W[16000:]])
    for name, prompt_W in (("first", wave_W[8000:14400]), ("joined", joined_W)):
        soundfile.write(tmp_path / f"{name}.wav", prompt_W, 16000)
    prompts = {"manifest": [tmp_path / "rows.jsonl"], "files": [tmp_path / "first.wav", tmp_path / "joined.wav"]}
    common = ("generate", f"--bundle={world['bundle']}", "--mode=continuation", "--prompt_seconds=1", "--seconds=0.5")
    for output, paths in prompts.items():
        given = [f"--prompt={path}" for path in paths]
        status, *_, error = run(capsys, *common, *given, "--ignore_end", f"--output={tmp_path / output}")
        assert status == 0, error
    entries = json.loads((tmp_path / "manifest" / "generation.json").read_text())
    assert [entry["path"] for entry in entries] == ["book-first_00.wav", "book-joined_00.wav"]
    assert [entry["prompt_seconds"] for entry in entries] == [0.4, 1.0]
    assert [entry["prompt_stretches"] for entry in entries] == [[[0.5, 0.9]], [[0.25, 0.5], [1, 3]]]
    for name, other in (("book-first_00", "first_00"), ("book-joined_00", "joined_00")):
        both = [soundfile.read(tmp_path / folder)[0] for folder in (f"manifest/{name}.wav", f"files/{other}.wav")]
        np.testing.assert_array_equal(*both)


def test_progress_is_of_what_end_tokens_leave(capsys, tmp_path, world):
    status, *_, error = run(
        capsys, "generate", f"--bundle={world['bundle']}", "--mode=unconditional", "--seconds=4", "--num_samples=12",
        "--temperature=4", f"--output={tmp_path}",
    )  # fmt: skip
    entries = json.loads((tmp_path / "generation.json").read_text())
    seconds = sum(entry["seconds"] for entry in entries)
    assert status == 0 and any(entry["ended"] for entry in entries) and seconds < 48
    assert "/48.0 s" in error and f"{seconds:.1f}/{seconds:.1f} s" in error
    for entry in entries:
        assert soundfile.info(tmp_path / entry["path"]).frames == round(entry["seconds"] * 16000)


def test_encode_and_decode_round_trip(capsys, tmp_path, world):
    npz, wav = tmp_path / "codes.npz", tmp_path / "back.wav"
    assert (
        run(
            capsys,
            "encode",
            f"--codec={world['codec']}",
            f"--input={world['wav']}",
            f"--output={npz}",
            "--num_quantizers=2",
        )[0]
        == 0
    )
    with np.load(npz) as archive:
        samples = round(4.2 * 16000)
        assert archive["codes"].shape == (-(-samples // 320), 2)
        assert archive["sample_rate"] == 16000 and archive["num_samples"] == samples
    assert run(capsys, "decode", f"--codec={world['codec']}", f"--input={npz}", f"--output={wav}")[0] == 0
    assert soundfile.info(wav).frames == samples
    too_many = run(
        capsys,
        "encode",
        f"--codec={world['codec']}",
        f"--input={world['wav']}",
        f"--output={npz}",
        "--num_quantizers=9",
    )
    assert_user_error(too_many, "9")
    npz.write_bytes(npz.read_bytes()[:200])
    assert_user_error(
        run(capsys, "decode", f"--codec={world['codec']}", f"--input={npz}", f"--output={wav}"), "not codes of ours"
    )


def test_fit_kmeans_and_tokenize(capsys, tmp_path, world):
    import tensorflow_datasets as tfds

    fit = ("fit-kmeans", f"--encoder={world['encoder']}", f"--input={world['recordings']}", "--num_clusters=5")
    assert run(capsys, *fit, "--layer=1", f"--output={tmp_path / 'tok'}")[0] == 0
    assert_user_error(run(capsys, *fit, "--layer=9", f"--output={tmp_path / 'no'}"), "layer 9")
    assert_user_error(run(capsys, *fit, "--layer=1", f"--output={tmp_path / 'tok'}"), "output already exists")
    assert_user_error(run(capsys, *fit, "--layer=1,x", f"--output={tmp_path / 'no'}"), "--layer")
    tokenize = ("tokenize", f"--codec={world['codec']}", f"--input={world['recordings']}")
    assert_user_error(
        run(capsys, *tokenize, f"--semantic_tokenizer={world['encoder']}", f"--output={tmp_path / 'no'}"), "fit-kmeans"
    )
    assert run(capsys, *tokenize, f"--semantic_tokenizer={tmp_path / 'tok'}", f"--output={tmp_path / 'tokens'}")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tok", "tokens"]
    builder = tfds.builder_from_directory(str(tmp_path / "tokens"))
    records = [record for split in ("train", "validation") for record in builder.as_data_source(split=split)]
    assert len(records) == 8 and builder.info.metadata["num_clusters"] == 5
    for record in records:
        assert len(record["semantic"]) == -(-record["num_samples"] // 640)
        assert record["acoustic"].shape == (-(-record["num_samples"] // 320), tiny.LEVELS)
        assert record["semantic"].max() < 5 and record["is_end"]


def test_fit_kmeans_of_several_layers_and_numbers_of_clusters(capsys, tmp_path, world):
    fit = ("fit-kmeans", f"--encoder={world['encoder']}", f"--input={world['recordings']}", "--num_clusters=5")
    single, cache = (*fit, "--layer=1", f"--output={tmp_path / 'tok'}"), f"--cache={tmp_path / 'cache'}"
    assert run(capsys, *single)[0] == 0
    several = (*fit, "--num_clusters=3", "--layer=0,1", cache, f"--output={tmp_path / 'toks'}")
    assert run(capsys, *several)[0] == 0
    names = [f"layer_{layer}_clusters_{size}" for layer in (0, 1) for size in (3, 5)]
    assert sorted(path.name for path in (tmp_path / "toks").iterdir()) == [*names, "results.json", "results.png"]
    rows = json.loads((tmp_path / "toks" / "results.json").read_text())["fits"]
    assert sorted(f"layer_{row['layer']}_clusters_{row['num_clusters']}" for row in rows) == names
    alone, among = (read_part(tmp_path / name) for name in ("tok", "toks/layer_1_clusters_5"))
    assert alone.fingerprint() == among.fingerprint()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "tok", "toks"]
    other = (*fit, "--layer=1", cache, f"--output={tmp_path / 'no'}")
    assert_user_error(run(capsys, *other), "cache holds frames of another encoder, layers, recordings or options")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_not_writable(capsys, tmp_path, world):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    result = run(
        capsys, "generate", f"--bundle={world['bundle']}", "--mode=unconditional", f"--output={tmp_path / 'out'}"
    )
    assert_user_error(result, "output folder not writable")


def test_output_below_a_file(capsys, tmp_path, world):
    (tmp_path / "file").touch()
    for command in (
        (
            "generate",
            f"--bundle={world['bundle']}",
            "--mode=unconditional",
            "--seconds=0.1",
            f"--output={tmp_path / 'file' / 'out'}",
        ),
        ("encode", f"--codec={world['codec']}", f"--input={world['wav']}", f"--output={tmp_path / 'file' / 'out.npz'}"),
        ("train", "--config=fine_tiny", f"--workdir={tmp_path / 'file' / 'w'}"),
        ("quickstart", f"--workdir={tmp_path / 'file' / 'w'}"),
    ):
        assert_user_error(run(capsys, *command), "output folder not writable")


def test_disk_full(tmp_path, world):
    """Files may not grow beyond a few kilobytes: as on a full disk, writes fail half-way."""

    def limited(*arguments):
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
        return subprocess.run(
            [sys.executable, "-m", "audiolm_jax", *arguments],
            capture_output=True,
            text=True,
            preexec_fn=limit,
            env=environment,
        )

    codes = tmp_path / "codes.npz"
    encode = ("encode", f"--codec={world['codec']}", f"--input={world['wav']}")
    subprocess.run([sys.executable, "-m", "audiolm_jax", *encode, f"--output={codes}"], check=True, capture_output=True)
    from tests.data.pipeline_test import METADATA
    from tests.training import tokens

    data = tokens.write(tmp_path / "tokens", METADATA)
    train = (
        "train",
        "--config=semantic_tiny",
        f"--config.data_dir={data}",
        *tiny.flags_of("semantic"),
        "--config.num_train_steps=2",
    )
    out, roles = tmp_path / "out", ("codec", "semantic_tokenizer", *tiny.STAGES)
    for arguments in (
        ("decode", f"--codec={world['codec']}", f"--input={codes}", f"--output={out / 'back.wav'}"),
        ("generate", f"--bundle={world['bundle']}", "--mode=unconditional", "--seconds=1", f"--output={out}"),
        ("bundle", *(f"--{role}={world[role]}" for role in roles), f"--output={out / 'b'}"),
        (*train, f"--workdir={tmp_path / 'w'}"),
    ):  # fmt: skip
        result = limited(*arguments)
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 2, result.stderr[-3000:]
        assert last.startswith("error: File too large: ") and "Traceback" not in result.stderr
        assert not [path for path in out.rglob("*") if path.is_file()]


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of Linux's C library")
def test_program_starts_itself_with_memory_in_huge_pages(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import os, sys\nraise ValueError(os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.flags.utf8_mode)"
    )
    command = [sys.executable, "-X", "utf8", "-m", "audiolm_jax", "train", f"--config={recipe}", "--workdir=a b"]
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    for chosen in ("glibc.malloc.hugetlb=1", "glibc.malloc.check=0"):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2
        assert f"ValueError: ('{chosen}', ['train', '--config={recipe}', '--workdir=a b'], 1)" in done.stderr
        environment["GLIBC_TUNABLES"] = "glibc.malloc.check=0"
