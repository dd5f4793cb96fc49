import json

import numpy as np
import pyarrow as pa
import pytest

from policymix.data import columns, pictures

VIDEO = {"dtype": "video", "shape": [4, 6, 3], "names": ["height", "width", "channel"]}
FIRST = {"dtype": "video", "shape": [3, 4, 6], "names": ["channels", "height", "width"]}
VECTOR = {"dtype": "float32", "shape": [2], "names": None}
ONE = {"dtype": "int64", "shape": [1], "names": None}


def images(length=3):
    return np.random.default_rng(0).integers(0, 256, (length, 4, 6, 3), dtype=np.uint8)


def test_a_video_has_no_column():
    features = {"top": VIDEO, "action": VECTOR, "index": ONE}
    assert list(columns.stored(features)) == ["action", "index"]
    schema = columns.schema(features)
    assert schema.names == ["action", "index"]
    described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(described) == ["action", "index"]
    values = {"top": images(), "action": np.zeros((3, 2), np.float32), "index": np.arange(3)}
    table = columns.table(features, values, schema)
    assert table.to_pylist()[2] == {"action": [0, 0], "index": 2}


def test_a_video_has_its_place_in_the_episode_table():
    schema = columns.episodes_schema({"top": VIDEO, "action": VECTOR, "side": VIDEO})
    names = [name for name in schema.names if not name.startswith("stats/")]
    place = ["chunk_index", "file_index", "from_timestamp", "to_timestamp"]
    assert names[3:-2] == [
        *("data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index"),
        *(f"videos/{key}/{name}" for key in ("top", "side") for name in place),
    ]
    types = {name: schema.field(name).type for name in schema.names}
    assert types["videos/top/file_index"] == pa.int64()
    assert types["videos/top/to_timestamp"] == pa.float64()
    assert types["stats/top/std"] == pa.list_(pa.list_(pa.list_(pa.float64())))
    assert types["stats/top/count"] == pa.list_(pa.int64())


@pytest.mark.parametrize("vector", ["List", "Sequence"])
def test_lists_are_called_as_each_version_of_datasets_does(vector):
    described = json.loads(columns.schema({"a": VECTOR}, vector).metadata[b"huggingface"])
    assert described["info"]["features"]["a"]["_type"] == vector


def test_values_of_a_video_have_channels_last_and_stay_as_they_are():
    found = columns.checked(VIDEO, images(), "d")
    np.testing.assert_array_equal(found, images())
    found = columns.checked(FIRST, np.moveaxis(images(), -1, 1), "d")
    np.testing.assert_array_equal(found, images())
    files = [pictures.png(image) for image in images()]
    assert columns.checked(VIDEO, tuple(files), "d") == files
    found = columns.checked(VIDEO, list(images()), "d")
    np.testing.assert_array_equal(found, images())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 6, 4, 3), np.uint8), r"d is uint8 \[3, 6, 4, 3\], expected .* 4, 6, 3\]"),
        (np.zeros((3, 4, 6, 3), np.float32), r"d is float32 \[3, 4, 6, 3\]"),
        (np.zeros((4, 6, 3), np.uint8), r"d is uint8 \[4, 6, 3\]"),
        ([np.zeros((4, 6, 3)), np.zeros((6, 4, 3))], r"d is no array of pictures"),
        ([b"\x89PNG"], r"d, frame 0: 4 bytes that are no picture"),
        ([pictures.png(np.zeros((6, 4, 3), np.uint8))], r"d, frame 0.*expected RGB \[4, 6, 3\]"),
    ],
)
@pytest.mark.parametrize("dtype", columns.PICTURES)
def test_values_that_are_no_pictures_as_declared(dtype, values, message):
    with pytest.raises(ValueError, match=message):
        columns.checked(VIDEO | {"dtype": dtype}, values, "d")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0", 3])
def test_names_that_are_no_folders(name):
    with pytest.raises(ValueError, match=r"d: a feature's name is a text without '/'"):
        columns.check_feature(name, VIDEO, "d")
    columns.check_feature("a..b", VIDEO, "d")


def test_text_that_no_file_can_hold():
    with pytest.raises(ValueError, match=r"d: 'open \\udce9' is no text in UTF-8"):
        columns.checked({"dtype": "string", "shape": [1]}, ["a", "open \udce9"], "d")


def test_a_video_of_no_colours_is_refused():
    with pytest.raises(ValueError, match=r"d: 'top'.* only colour pictures"):
        columns.check_feature("top", VIDEO | {"shape": [4, 6, 1]}, "d")
    columns.check_feature("top", FIRST, "d")
