import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.data import examples, tfrecord
from tests.data import rlds_support as support

_LISTS = st.one_of(
    st.lists(st.binary(max_size=300), max_size=6),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40).map(lambda v: np.array(v, np.int64)),
    st.lists(st.floats(width=32, allow_nan=False), max_size=9).map(
        lambda v: np.array(v, np.float32)
    ),
)


def _same(found, wanted):
    if isinstance(wanted, np.ndarray):
        return found.dtype == wanted.dtype and np.array_equal(found, wanted)
    return found.tolist() == list(wanted)


def _varint(value):
    out = []
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number, content):
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _example(key, feature):
    return _field(1, _field(1, _field(1, key) + _field(2, feature)))


@given(st.dictionaries(st.text(max_size=9), _LISTS, max_size=4))
@settings(max_examples=100, deadline=None)
def test_parse_inverts_serialize(features):
    data = examples.serialize(features)
    found = examples.parse(data)
    assert list(found) == list(features)
    assert all(_same(found[key], values) for key, values in features.items())


def test_bytes_are_no_copies_and_say_where_they_lie():
    data = examples.serialize({"a": [b"one", b"", b"x" * 200]})
    found = examples.parse(data)["a"]
    assert found[2].obj is data
    assert [data[start : start + length] for start, length in found.ranges] == found.tolist()


def test_numbers_that_are_not_packed():
    floats = np.array([1.5, -2], "<f4")
    loose = b"".join(b"\x0d" + value.tobytes() for value in floats)
    assert _same(examples.parse(_example(b"f", _field(2, loose)))["f"], floats)
    ints = [0, 300, 2**63 - 1, -1]
    loose = b"".join(b"\x08" + _varint(n & (2**64 - 1)) for n in ints)
    assert _same(examples.parse(_example(b"i", _field(3, loose)))["i"], np.array(ints))
    mixed = b"\x08\x05" + _field(1, b"\x01\x02")  # packed and not, as a parser has to take it
    assert _same(examples.parse(_example(b"m", _field(3, mixed)))["m"], np.array([5, 1, 2]))


def test_empty_lists_and_features_without_a_value():
    assert examples.parse(b"") == {}
    assert examples.parse(_example(b"none", b"")) == {"none": None}
    for number, dtype in ((2, np.float32), (3, np.int64)):
        found = examples.parse(_example(b"k", _field(number, b"")))["k"]
        assert found.shape == (0,)
        assert found.dtype == dtype
    assert len(examples.parse(_example(b"k", _field(1, b"")))["k"]) == 0


def test_unknown_fields_are_passed_over():
    data = _example(b"k", _field(3, _field(1, b"\x07"))) + _field(9, b"later") + b"\x50\x96\x01"
    assert examples.parse(data)["k"].tolist() == [7]


def test_replace_keeps_all_else_bit_for_bit():
    shard = support.shard(support.TESTDATA / "bridge_tiny" / "1.0.0")
    data = next(tfrecord.read(shard)).data
    assert examples.replace(data, {}) == data
    key = "steps/observation/image_0"
    old, new = examples.parse(data), [b"new", b"pictures"]
    found = examples.parse(examples.replace(data, {key: new}))
    assert list(found) == list(old)
    assert found.pop(key).tolist() == new
    for name, values in found.items():
        assert _same(values, old[name] if isinstance(old[name], np.ndarray) else old[name].tolist())
    with pytest.raises(ValueError, match="lacks \\['absent'\\]"):
        examples.replace(data, {"absent": []})


@pytest.mark.parametrize("cut", [1, 3, 50, 4000])
def test_cut_off_examples_are_found(cut):
    shard = support.shard(support.TESTDATA / "bridge_tiny" / "1.0.0")
    data = next(tfrecord.read(shard)).data
    with pytest.raises(ValueError, match="byte"):
        examples.parse(data[:-cut])


@pytest.mark.parametrize(
    "feature",
    [
        _field(3, _field(1, b"\x80\x80")),  # a number without an end
        _field(3, _field(1, b"\xff" * 11 + b"\x01")),
        _field(2, _field(1, b"\x00\x00\x00")),
        _field(1, b"\x0a\x7f\x00"),
        _field(1, b"\x12\x01\x00"),
    ],
)
def test_damaged_lists_are_found(feature):
    with pytest.raises(ValueError, match="byte"):
        examples.parse(_example(b"k", feature))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_bytes_end_in_anything_but_a_value_error(data):
    said = "byte"
    try:
        examples.parse(data)
    except ValueError as error:
        said = str(error)
    assert "byte" in said
