"""Centroids of others: what scikit-learn, joblib, pickle and NumPy write, and what must not be read."""

import os
import pickle

import joblib
import numpy as np
import pytest
from sklearn.cluster import KMeans, MiniBatchKMeans

import audiolm_jax
from audiolm_jax import cli
from audiolm_jax.errors import UserError
from audiolm_jax.interop import pickles
from audiolm_jax.interop.centroids import read_centroids
from audiolm_jax.parts import read_part
from tests import tiny


def frames(width=3, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(width).normal(size=(60, width)).astype(dtype)


FITTED = {
    "KMeans": KMeans(4, random_state=np.random.RandomState(1), n_init=1).fit(frames()),
    "MiniBatchKMeans": MiniBatchKMeans(5, random_state=0, n_init=1).fit(frames(2, np.float64)),
}


@pytest.fixture(params=list(FITTED))
def fitted(request):
    return FITTED[request.param]


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_k_means_of_every_protocol(fitted, protocol, tmp_path):
    path = tmp_path / "k_means.pkl"
    path.write_bytes(pickle.dumps(fitted, protocol))
    np.testing.assert_array_equal(read_centroids(path), fitted.cluster_centers_.astype(np.float32))


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("lzma", 3), ("xz", 3)])
def test_k_means_dumped_by_joblib(fitted, protocol, compress, tmp_path):
    path = tmp_path / "k_means.bin"
    joblib.dump(fitted, path, compress=compress, protocol=protocol)
    np.testing.assert_array_equal(read_centroids(path), fitted.cluster_centers_.astype(np.float32))


def test_attributes_are_read_as_they_are(tmp_path):
    """Not only the centroids: every array that joblib put between the opcodes."""
    model = FITTED["MiniBatchKMeans"]
    joblib.dump(model, tmp_path / "k_means.joblib")
    state = pickles.read(tmp_path / "k_means.joblib").state
    assert set(state) == {*vars(model), "_sklearn_version"}
    for name, value in vars(model).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(state[name], value)
            assert state[name].dtype == value.dtype
        elif name != "random_state":
            assert state[name] == value


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda x: x.astype(">f8"), lambda x: x[::2], np.float16])
@pytest.mark.parametrize("dump", [joblib.dump, lambda x, path: path.write_bytes(pickle.dumps(x, 2))])
def test_arrays_of_every_layout(layout, dump, tmp_path):
    array = layout(frames())
    dump(array, tmp_path / "centroids.pkl")
    np.testing.assert_array_equal(read_centroids(tmp_path / "centroids.pkl"), np.asarray(array, np.float32))


def test_numpy_files(tmp_path):
    np.save(tmp_path / "a.npy", frames())
    np.savez(tmp_path / "b.npz", anything=frames())
    np.savez_compressed(tmp_path / "c.npz", centroids=frames(), counts=np.ones(60))
    for name in ("a.npy", "b.npz", "c.npz"):
        np.testing.assert_array_equal(read_centroids(tmp_path / name), frames())


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hide_in(value, trap):
    """The trap beside what is wanted."""
    model = MiniBatchKMeans(5)
    model.__dict__.update(vars(FITTED["MiniBatchKMeans"]), random_state=trap, cluster_centers_=value)
    return model


@pytest.mark.parametrize("compress", [0, 3])
@pytest.mark.parametrize(
    "wrap", [lambda trap: trap, lambda trap: hide_in(frames(), trap), lambda trap: hide_in(trap, 0)]
)
def test_a_malicious_pickle_is_refused_and_never_run(compress, wrap, tmp_path):
    path, trace = tmp_path / "k_means.bin", tmp_path / "trace"
    joblib.dump(wrap(Malicious(trace)), path, compress=compress)
    with pytest.raises(UserError, match="the pickle asks for posix.mkdir"):
        read_centroids(path)
    assert not trace.exists()
    joblib.load(path)  # The trap works.
    assert trace.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b'cbuiltins\neval\n(S\'open("trace", "w")\'\ntR.',
        b"(cos\nsystem\nS'touch trace'\no.",
        b"(S'touch trace'\nios\nsystem\n.",
        b"\x80\x02}\x82\x01.",
        b"Ptrace\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch trace\x85R.",
        # An allowed name by a path of attributes, and the functions that reach all others.
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.mro\x93)R.",
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93)R.",
    ],
)
def test_no_opcode_runs_anything(opcodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k_means.pkl").write_bytes(opcodes)
    with pytest.raises(UserError, match="asks for|not a pickle, or damaged"):
        read_centroids("k_means.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["k_means.pkl"]


def save(path, value):
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_text("no pickle"), "not a pickle, or damaged"),
        (lambda path: path.write_bytes(pickle.dumps(FITTED["KMeans"])[:-300]), "not a pickle, or damaged"),
        (lambda path: path.write_bytes(b"\x04\x22\x4d\x18 and so on"), "compressed by lz4"),
        (lambda path: path.write_bytes(b"\x78\x9c and so on"), "not a pickle, or damaged"),
        (lambda path: save(path, KMeans(3)), "k-means that was not fitted"),
        (lambda path: save(path, {"cluster_centers_": 1}), "neither k-means nor an array"),
        (lambda path: save(path, np.array(["a"])), "something else than numbers"),
        (lambda path: save(path, np.ones(3)), r"centroids are \[3\] of type float64"),
        (lambda path: save(path, np.ones((0, 3))), r"centroids are \[0, 3\]"),
        (lambda path: save(path, np.full((2, 3), np.nan)), "centroids are not finite"),
        (lambda path: np.save(path.open("wb"), np.array([{}]), allow_pickle=True), "no array of numbers"),
        (lambda path: np.savez(path.open("wb"), a=frames(), b=frames()), "arrays a, b"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and so on"), "no array of numbers"),
    ],
)
def test_other_files_are_refused_by_name(write, message, tmp_path):
    write(tmp_path / "centroids")
    with pytest.raises(UserError, match=message):
        read_centroids(tmp_path / "centroids")


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    return stopped.value.code or 0


def test_convert_makes_a_tokenizer_of_an_encoder_and_centroids(tmp_path, capsys):
    folders = tiny.write_parts(tmp_path / "parts")
    encoder = audiolm_jax.load_semantic_tokenizer(folders["encoder"])
    wave_BW = np.random.default_rng(0).standard_normal((2, 12_800)).astype(np.float32)
    x_BTD = encoder.features(wave_BW, layer=2)
    model = MiniBatchKMeans(6, random_state=0, n_init=1).fit(x_BTD.reshape(-1, x_BTD.shape[-1]))
    joblib.dump(model, tmp_path / "k_means.bin")
    source, output = f"--source={tmp_path / 'k_means.bin'}", f"--output={tmp_path / 'tokenizer'}"
    # Clusters that the encoder's folder has already are replaced.
    part, layer = f"--encoder={folders['semantic_tokenizer']}", "--layer=2"
    assert run("convert", source, part, layer, output) == 0
    tokenizer = audiolm_jax.load_semantic_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.vocab_size == 6 and read_part(tmp_path / "tokenizer").settings == {"layer": 2}
    expected_M = model.predict(x_BTD.reshape(-1, x_BTD.shape[-1]))
    assert len(set(expected_M)) > 2
    np.testing.assert_array_equal(tokenizer.encode(wave_BW).reshape(-1), expected_M)

    np.save(tmp_path / "wide.npy", frames(9))
    for arguments, message in (
        ([source, part, layer], "exists"),
        ([source, part], "both --encoder and --layer"),
        ([source, part, "--layer=3"], "no such layer"),
        ([source, f"--encoder={folders['codec']}", layer], "not a semantic encoder but a soundstream"),
        ([f"--source={tmp_path / 'wide.npy'}", part, layer], "centroids are 9 wide, the encoder's frames 8"),
    ):
        target = output if message == "exists" else f"--output={tmp_path / 'another'}"
        assert run("convert", *arguments, target) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "another").exists()
