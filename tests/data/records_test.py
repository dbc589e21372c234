"""Token records, taken apart by NumPy, against TFDS and Protocol Buffers."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from audiolm_jax.data import records, token_dataset


def packed(values):
    """Protocol Buffers' own encoding of a list of integers: what stands behind the field's tag and length."""
    int64_list = tf_example_pb2.Example().features.feature["integers"].int64_list
    int64_list.value.extend(values)
    data, start = int64_list.SerializeToString(), 1
    while values and data[start] >= 0x80:
        start += 1
    return data[start + 1 :]


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 2**14), max_size=40))
def test_integers_as_protocol_buffers_packs_them(values):
    found_N = records.unpack_varints(packed(values))
    assert found_N.dtype == np.int64 and found_N.tolist() == values


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_an_integer_that_is_cut_off(values):
    data = packed([*values, 2**40])
    with pytest.raises(ValueError, match="cut off"):
        records.unpack_varints(data[:-1])


def test_an_integer_that_is_too_long():
    with pytest.raises(ValueError, match="longer than ten bytes"):
        records.unpack_varints(b"\x05" + b"\x80" * 10 + b"\x01")


@given(st.integers(1, 12), st.integers(0, 50), st.integers(0, 50), st.text(), st.booleans(), st.integers(0, 2**32))
def test_a_record_as_tfds_reads_it(num_quantizers, semantic_frames, acoustic_frames, text, is_end, seed):
    generator = np.random.default_rng(seed)
    features = token_dataset.features(num_quantizers)
    data = features.serialize_example({
        "id": text, "speaker": text[::-1], "is_end": is_end, "num_samples": seed,
        "semantic": generator.integers(2**31, size=semantic_frames, dtype=np.int32),
        "acoustic": generator.integers(2**16, size=(acoustic_frames, num_quantizers), dtype=np.int32),
    })  # fmt: skip
    expected, found = features.deserialize_example_np(data), records.parse_record(data, num_quantizers)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert type(found[name]) is type(value)
        np.testing.assert_array_equal(found[name], value)
        assert not isinstance(value, np.ndarray) or found[name].dtype == value.dtype


def test_what_is_not_a_token_record():
    other = tfds.features.FeaturesDict({"id": tfds.features.Text()}).serialize_example({"id": "a"})
    with pytest.raises(ValueError, match="a field is missing"):
        records.parse_record(other, 3)
    with pytest.raises(ValueError):
        records.parse_record(b"\x0a\xff", 3)
