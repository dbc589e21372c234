"""From recordings to the clusters of several layers; the command itself is in cli_test."""

import numpy as np
import pytest
import soundfile

from audiolm_jax import clustering, frame_cache
from audiolm_jax.data.manifest import read_manifest, usable
from audiolm_jax.errors import UserError
from audiolm_jax.semantic.kmeans import Settings
from tests import tiny
from tests.semantic.clusters import assigned


class Envelopes:
    """Stands in for an encoder: layer n is a frame's n + 1 loudest samples, all in their own order."""

    sample_rate, num_layers = 16_000, 3

    def __init__(self):
        self.calls = 0

    def num_frames(self, num_samples):
        return num_samples // 640

    def features_of_layers(self, wave_BW, lengths_B, layers):
        self.calls += 1
        frames_BTW = wave_BW[:, : wave_BW.shape[1] // 640 * 640].reshape(len(wave_BW), -1, 640)
        return tuple(np.sort(frames_BTW, axis=-1)[..., -(layer + 1) :] for layer in layers)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tiny.write_recordings(tmp_path_factory.mktemp("recordings"))
    return usable(read_manifest(folder), print)


def job(**fields):
    settings = Settings(num_iterations=20, block_frames=512)
    given = {"layers": (1, 3), "num_clusters": (4, 6), "seed": 0, "max_frames": 0, "cache_dtype": "float32"}
    return clustering.Job(**{**given, "settings": settings, **fields})


def frames_of(recordings, layer):
    waves = [recording.read(16_000) for recording in recordings[0]]
    return np.concatenate([Envelopes().features_of_layers(wave_W[None], None, [layer])[0][0] for wave_W in waves])


def test_each_layer_and_number_of_clusters_is_a_fit_of_normalised_frames(tmp_path, recordings):
    encoder = Envelopes()
    lines = []
    fits = clustering.fit(job(), encoder, "print", *recordings, tmp_path, False, lines.append)
    assert [fit.name for fit in fits] == [f"layer_{layer}_clusters_{size}" for layer in (1, 3) for size in (4, 6)]
    assert len(lines) == 4
    for fit in fits:
        x_MD = frames_of(recordings, fit.layer)
        np.testing.assert_allclose(fit.clusters["mean"], x_MD.mean(0, dtype=np.float64), rtol=1e-5)
        np.testing.assert_allclose(fit.clusters["std"], x_MD.std(0, dtype=np.float64), rtol=1e-5)
        normed_MD = (x_MD - fit.clusters["mean"]) / fit.clusters["std"]
        labels_M, inertia = assigned(normed_MD, fit.clusters["centroids"])
        share_K = np.bincount(labels_M) / len(x_MD)
        expected = {
            "num_frames": len(x_MD),
            "inertia": inertia,
            "unexplained": inertia / x_MD.size,
            "perplexity": np.exp(-np.sum(share_K * np.log(share_K))),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(fit.figures[name], value, rtol=1e-3, err_msg=name)
    calls = encoder.calls
    again = clustering.fit(job(), encoder, "print", *recordings, tmp_path, False, lines.append)
    assert encoder.calls == calls
    assert [fit.figures for fit in again] == [fit.figures for fit in fits]


def test_recordings_too_short_for_a_frame_are_left_out(tmp_path, recordings):
    soundfile.write(tmp_path / "short.wav", np.ones(639), 16_000)
    short = usable(read_manifest(tmp_path / "short.wav"), print)
    asked, lines = job(layers=(1,), num_clusters=(4,)), []
    everything = [[*one, *other] for one, other in zip(recordings, short)]
    (fit,) = clustering.fit(asked, Envelopes(), "print", *everything, tmp_path / "cache", False, lines.append)
    assert lines[0] == f"left out: too short for a frame: {tmp_path / 'short.wav'}"
    assert fit.figures["num_frames"] == len(frames_of(recordings, 1))


def test_no_more_frames_are_clustered_than_asked(tmp_path, recordings):
    asked = job(max_frames=200, layers=(1,), num_clusters=(4,))
    (fit,) = clustering.fit(asked, Envelopes(), "print", *recordings, tmp_path, False, print)
    assert 195 <= fit.figures["num_frames"] <= 200
    np.testing.assert_allclose(fit.clusters["mean"], frames_of(recordings, 1).mean(0, dtype=np.float64), rtol=1e-5)


def test_more_clusters_than_frames_are_refused_after_the_pass(tmp_path, recordings):
    with pytest.raises(UserError, match="more clusters than frames: num_clusters=5000"):
        clustering.fit(job(num_clusters=(4, 5000)), Envelopes(), "print", *recordings, tmp_path, False, print)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (1, 4)}, "no such layer: layer 4; choose 0 to 3"),
        ({"num_clusters": (4, 0)}, "num_clusters must be 1 or more: 0"),
        ({"max_frames": -1}, "max_frames must be 0 or more: -1"),
        ({"seed": -1}, "seed must be 0 or more: -1"),
        ({"settings": Settings(num_iterations=0)}, "num_iterations must be 1 or more: 0"),
        ({"settings": Settings(tolerance=float("nan"))}, "tolerance must be 0 or more: nan"),
        ({"settings": Settings(mini_batch=-5)}, "mini_batch must be 0 or more: -5"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        job(**fields).check(num_layers=3)


def test_the_plan_has_every_recording_once_in_batches_and_shards_of_the_size(monkeypatch):
    seconds = np.random.default_rng().exponential(8.0, 500).tolist() + [3000.0]
    shards = clustering.plan(seconds)
    batches = [batch for shard in shards for batch in shard]
    assert sorted(index for batch in batches for index in batch) == list(range(501))
    longest = lambda batch: max(seconds[index] for index in batch)
    assert all(len(batch) * longest(batch) <= clustering.BATCH_SECONDS or len(batch) == 1 for batch in batches)
    lengths = [sum(seconds[index] for batch in shard for index in batch) for shard in shards]
    assert all(length <= clustering.SHARD_SECONDS for length in lengths[:-1])
    assert clustering.plan([]) == [[[]]]


def test_damaged_progress_is_named(tmp_path):
    state = clustering.State(tmp_path / "layer_1" / "fit.npz")
    assert state.load() is None
    state.save({"a": np.arange(3)})
    np.testing.assert_array_equal(state.load()["a"], np.arange(3))
    state.path.write_bytes(state.path.read_bytes()[:30])
    with pytest.raises(UserError, match="saved progress is damaged"):
        state.load()


def test_the_folder_of_an_output_goes_in_the_end_and_a_cache_stays(tmp_path):
    for cache in (None, str(tmp_path / "kept")):
        with clustering.cache_folder(str(tmp_path / "out"), cache) as (folder, is_ours):
            assert folder.is_dir() and is_ours == (cache is None)
            frame_cache.fill(folder, [[0]], [0], lambda _: [np.zeros((3, 2), np.float32)], identity="")
            with pytest.raises(UserError, match="another run"), clustering.cache_folder(str(tmp_path / "out"), cache):
                pass
    assert not (tmp_path / "out.incomplete").exists() and (tmp_path / "kept" / "00000.npz").is_file()
