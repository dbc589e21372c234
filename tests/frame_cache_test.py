import numpy as np
import pytest

from audiolm_jax import frame_cache
from audiolm_jax.errors import UserError
from audiolm_jax.semantic import moments

SHARDS = [[(0, 40), (40, 41)], [(41, 100)], [(0, 0)], [(100, 160), (160, 230)]]


class Encoder:
    """Frames of two layers, 3 and 2 wide; a batch is a range of them."""

    def __init__(self):
        generator = np.random.default_rng()
        self.layers = [generator.normal(5.0, 2.0, (230, width)).astype(np.float32) for width in (3, 2)]
        self.computed = []

    def __call__(self, batch):
        self.computed.append(batch)
        start, stop = batch
        return [x_MD[start:stop] for x_MD in self.layers] if stop > start else []


def test_frames_and_moments_are_the_encoders(tmp_path):
    encoder = Encoder()
    cache = frame_cache.fill(tmp_path, SHARDS, [4, 7], encoder, identity="one")
    for layer, x_MD in zip((4, 7), encoder.layers):
        frames = cache.frames(layer)
        rows = np.random.default_rng().integers(0, 230, 500)
        assert len(frames) == 230
        np.testing.assert_array_equal(frames.take(rows), x_MD[rows])
        found, exact = cache.moments(layer), x_MD.astype(np.float64)
        np.testing.assert_allclose(found["mean"], exact.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.deviation(found), exact.std(0), rtol=1e-12)


def test_it_goes_on_behind_the_last_whole_shard(tmp_path):
    whole, cut = Encoder(), Encoder()
    cut.layers = whole.layers
    expected = frame_cache.fill(tmp_path / "whole", SHARDS, [4, 7], whole, identity="one", keep=0.5)

    def fails(batch):
        if batch == (160, 230):
            raise KeyboardInterrupt
        return cut(batch)

    with pytest.raises(KeyboardInterrupt):
        frame_cache.fill(tmp_path / "cut", SHARDS, [4, 7], fails, identity="one", keep=0.5)
    cut.computed.clear()
    found = frame_cache.fill(tmp_path / "cut", SHARDS, [4, 7], cut, identity="one", keep=0.5)
    assert cut.computed == SHARDS[3]
    everything = np.arange(115)
    for layer in (4, 7):
        np.testing.assert_array_equal(found.frames(layer).take(everything), expected.frames(layer).take(everything))
        np.testing.assert_array_equal(found.moments(layer)["squares"], expected.moments(layer)["squares"])


def test_what_is_kept_is_drawn_evenly_the_same_of_all_layers_and_no_more_than_asked(tmp_path):
    index_M = np.arange(20_000, dtype=np.float32)[:, None]
    shards = [[(start, start + 100) for start in range(first, first + 2000, 100)] for first in range(0, 20_000, 2000)]
    compute = lambda batch: [index_M[slice(*batch)], -index_M[slice(*batch)]]
    cache = frame_cache.fill(tmp_path, shards, [0, 1], compute, identity="", keep=0.0503, most=1000)
    kept_M, negative_M = (cache.frames(layer).take(np.arange(1000))[:, 0] for layer in (0, 1))
    assert len(cache.frames(0)) == 1000 and len(np.unique(kept_M)) == 1000
    np.testing.assert_array_equal(kept_M, -negative_M)
    np.testing.assert_allclose(np.histogram(kept_M, bins=10, range=(0, 20_000))[0], 100, atol=7)
    np.testing.assert_allclose(cache.moments(0)["mean"], 9999.5)


def test_a_cache_of_something_else_is_refused_or_replaced(tmp_path):
    frame_cache.fill(tmp_path, SHARDS, [4, 7], Encoder(), identity="one")
    for changed in ({"identity": "two"}, {"keep": 0.5}, {"dtype": "float16"}):
        with pytest.raises(UserError, match="cache holds frames of another"):
            frame_cache.fill(tmp_path, SHARDS, [4, 7], Encoder(), **{"identity": "one", **changed})
    other = Encoder()
    cache = frame_cache.fill(tmp_path, SHARDS[:2], [4, 7], other, identity="two", replace=True)
    np.testing.assert_array_equal(cache.frames(4).take(np.arange(100)), other.layers[0][:100])


def test_float16_takes_half_the_room_where_it_is_fine_enough(tmp_path):
    encoder = Encoder()
    cache = frame_cache.fill(tmp_path / "fine", SHARDS, [4, 7], encoder, identity="", dtype="float16")
    half_MD = cache.frames(4).take(np.arange(230))
    assert half_MD.dtype == np.float16
    np.testing.assert_array_equal(half_MD, encoder.layers[0].astype(np.float16))
    encoder.layers[1][:, 1] = 1000.0 + encoder.layers[1][:, 1]
    with pytest.raises(UserError, match="float16 is too coarse or too small for these frames: layer 7"):
        frame_cache.fill(tmp_path / "coarse", SHARDS, [4, 7], encoder, identity="", dtype="float16")
    encoder.layers[1] = np.random.default_rng().normal(0.0, 1e5, (230, 2)).astype(np.float32)
    with pytest.raises(UserError, match="layer 7"):
        frame_cache.fill(tmp_path / "small", SHARDS, [4, 7], encoder, identity="", dtype="float16")


def test_a_damaged_shard_is_named(tmp_path):
    cache = frame_cache.fill(tmp_path, SHARDS, [4, 7], Encoder(), identity="one")
    (tmp_path / "layer_4" / "00001.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"cache is damaged .*layer_4/00001.npy"):
        cache.frames(4)
    (tmp_path / "00003.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match=r"cache is damaged .*00003.npz"):
        cache.moments(7)
