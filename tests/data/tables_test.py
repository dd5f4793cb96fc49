import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from policymix.data import tables

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata" / "lerobot"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.array([{"bytes": bytes([k]) * 10, "path": "p"} for k in range(20)])
    table = pa.table({"x": list(range(20)), "x.y": [0.5] * 20, "pictures": column})
    pq.write_table(table, path, row_group_size=8)
    return path


def test_columns_that_must_be_there_and_may_be(file):
    assert tables.read(file, ["x"], ["x.y", "z"]).column_names == ["x", "x.y"]
    assert tables.column_names(file) == ["x", "x.y", "pictures"]
    with pytest.raises(ValueError, match=r"a\.parquet lacks the columns \['z'\]; it has \['x'"):
        tables.read(file, ["x", "z"])


def test_batches_are_the_column_piece_by_piece(file):
    pieces = list(tables.batches(file, "x", 6))
    assert max(map(len, pieces)) <= 6
    assert [value for piece in pieces for value in piece.to_pylist()] == list(range(20))


def test_footers_tell_rows_and_bytes(file, tmp_path):
    other = tmp_path / "b.parquet"
    pq.write_table(pa.table({"x": [1]}), other)
    assert tables.num_rows([file, other]) == {file: 20, other: 1}
    assert 200 <= tables.num_bytes(file, "pictures") < 2000
    assert tables.num_bytes(other, "pictures") == 0
    other.write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"b\.parquet: expected a whole parquet file, found 12"):
        tables.num_rows([file, other])


def test_rows_of_both_kinds(tmp_path):
    rows = [{"k": 1, "t": "a"}, {"k": 0, "t": "b"}]
    (tmp_path / "t.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert tables.rows(tmp_path / "t.jsonl", ["k"]) == rows
    assert tables.rows(tmp_path / "t.parquet", ["k"], ["t", "u"]) == rows
    (tmp_path / "t.jsonl").write_text('{"k": 1}\n{"t": 1}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2: expected \['k'\], found"):
        tables.rows(tmp_path / "t.jsonl", ["k"])
    with pytest.raises(FileNotFoundError, match=r"u\.jsonl: no such file"):
        tables.rows(tmp_path / "u.jsonl", ["k"])


def test_files_are_ordered_by_number(tmp_path):
    names = ["9/2", "9/10", "10/1", "999/0", "1000/0"]
    for name in reversed(names):
        path = tmp_path / f"data/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "data/9/.5.parquet").touch()
    found = tables.find(tmp_path, "data/*/*.parquet", None)
    assert [f"{p.parent.name}/{p.stem}" for p in found] == names
    with pytest.raises(FileNotFoundError, match=r"meta/chunk-000/file-000\.parquet: no such file"):
        tables.find(tmp_path, "meta/*/*.parquet", None)


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("v/{key}/{n:03d}.mp4", "v/cam.top/007.mp4"),
        ("{n}/{n:d}-{n:2d}.mp4", "7/7- 7.mp4"),
        ("{n}/a..b/c", "7/a..b/c"),
    ],
)
def test_places(tmp_path, template, filled):
    assert tables.place(tmp_path, template, "here", {"key": "cam.top", "n": 7}) == filled


@pytest.mark.parametrize(
    "template",
    [None, 3, "", "a/b.mp4", "{m}", "{n!r}", "{n:x}", "{n.real}", "{}", "{n", "{n}}", "{key:03d}"],
)
def test_templates_that_cannot_be_filled(tmp_path, template):
    with pytest.raises(ValueError, match=r"^here is .*; expected the path .* \{key\}, \{n\}"):
        tables.place(tmp_path, template, "here", {"key": "k", "n": 7})


@pytest.mark.parametrize("template", ["/{n}", "../{n}", "a/../../{n}", "{n}/..", "a\\{n}", "{key}"])
def test_places_outside(tmp_path, template):
    with pytest.raises(ValueError, match=r"^here is .* out of the dataset's folder"):
        tables.place(tmp_path, template, "here", {"key": "x/../../y", "n": 7})


def test_arrays_of_columns():
    column = pa.chunked_array([pa.array([[1, 2]], pa.list_(pa.int32(), 2)), [[3, 4]]])
    found = tables.to_numpy(column, np.dtype("int64"), [2], "here")
    assert (found.dtype, found.tolist()) == (np.int64, [[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"^here holds values of shape \[2\], .* declares \[3\]"):
        tables.to_numpy(column, np.dtype("int64"), [3], "here")
    text = pa.chunked_array([pa.array(["a", None])])
    assert tables.to_numpy(text, None, [1], "here").tolist() == ["a", None]
    with pytest.raises(ValueError, match="^here holds string, info.json declares float32"):
        tables.to_numpy(pa.chunked_array([["a"]]), np.dtype("float32"), [1], "here")


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (np.array([1, 2**33]), "int32", "here holds 8589934592, which does not fit into int32"),
        (np.array([1, -1]), "int8", None),
        (np.array([1, 2**31], np.uint32), "int32", "here holds 2147483648, which does not fit"),
        (np.array([0, 1e39]), "float32", None),  # infinite, which is told with its episode
        (np.array([0.1, np.inf, np.nan]), "float32", None),
        (np.array([0, 2**40]), "float32", None),
    ],
)
def test_numbers_that_are_too_large_for_what_is_declared(values, dtype, message):
    column = pa.chunked_array([values])
    if message is None:
        found = tables.to_numpy(column, np.dtype(dtype), [1], "here")
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(found, values.astype(dtype))
    else:
        with pytest.raises(ValueError, match=f"^{message}"):
            tables.to_numpy(column, np.dtype(dtype), [1], "here")


def test_statistics_of_episodes_without_any(tmp_path):
    source = TESTDATA / "pusht_v30_video" / "meta/episodes/chunk-000/file-000.parquet"
    stats = tables.episode_stats([source])
    assert set(stats[0]["action"]) == {"min", "max", "mean", "std", "count"} | {
        f"q{n}" for n in ("01", "10", "50", "90", "99")
    }
    bare = tmp_path / "file-000.parquet"
    pq.write_table(pq.read_table(source, columns=["episode_index", "length"]), bare)
    assert tables.episode_stats([bare]) is None
