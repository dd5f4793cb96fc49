import json
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from policymix.data import lerobot

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata" / "lerobot"
NAMES = ("pusht_v30_video", "pusht_v21_video")
# Read back through LeRobot itself (0.4.4 for v3.0, 0.3.3 for v2.1) with these deltas; the fields
# are saved as <index>/<field>, without pictures.
GOLDEN_DELTAS = {"observation.state": [-0.1, 0], "action": [step / 10 for step in range(8)]}


@pytest.fixture
def copies(tmp_path):
    """{name: a copy of the dataset that may be damaged}."""
    return {name: shutil.copytree(TESTDATA / name, tmp_path / name) for name in NAMES}


def _edit_info(path, **changes):
    file = path / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _write_v3(path, lengths_by_file, features, columns, tasks=("do it",)):
    """A v3.0 dataset whose episodes have these lengths: {(chunk, file): [length, ...]}."""
    lengths = [length for group in lengths_by_file.values() for length in group]
    ends, total = np.cumsum(lengths), sum(lengths)
    columns = dict(columns) | {
        "index": pa.array(range(total)),
        "episode_index": pa.array(np.repeat(np.arange(len(lengths)), lengths)),
        "task_index": pa.array(np.zeros(total, np.int64)),
    }
    table, start, rows = pa.table(columns), 0, []
    for (chunk, number), group in lengths_by_file.items():
        file = path / f"data/chunk-{chunk:03d}/file-{number:03d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(start, sum(group)), file)
        start += sum(group)
        rows += [{"data/chunk_index": chunk, "data/file_index": number} for _ in group]
    for number, row in enumerate(rows):
        row |= {"episode_index": number, "length": lengths[number], "tasks": ["do it"]}
    # The episode table in two files, whose columns are ordered differently.
    for number, part in enumerate((rows[:1], rows[1:])):
        file = path / f"meta/episodes/chunk-000/file-{number:03d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        names = sorted(part[0], reverse=bool(number))
        pq.write_table(pa.Table.from_pylist([{n: row[n] for n in names} for row in part]), file)
    named = {"task_index": list(range(len(tasks))), "task": list(tasks)}
    pq.write_table(pa.table(named), path / "meta/tasks.parquet")
    scalar = {"dtype": "int64", "shape": [1], "names": None}
    features = features | dict.fromkeys(("index", "episode_index", "task_index"), scalar)
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "total_frames": int(ends[-1]),
        "total_episodes": len(lengths),
        "features": features,
    }
    (path / "meta/info.json").write_text(json.dumps(info))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_items_equal_lerobots(name):
    dataset = lerobot.open_dataset(TESTDATA / name)
    golden = np.load(TESTDATA / f"golden_{name}.npz")
    items = {}
    for entry in golden.files:
        index, field = entry.split("/")
        if index not in items:
            items[index] = dataset.item(int(index), GOLDEN_DELTAS)
        got, want = items[index][field], golden[entry]
        assert np.shape(got) == want.shape, entry
        assert field == "task" or got.dtype == want.dtype, entry
        np.testing.assert_array_equal(got, want, err_msg=entry)
    assert len(items) == 9
    assert len(golden.files) == 90


@pytest.mark.parametrize("name", NAMES)
def test_attributes(name):
    dataset = lerobot.open_dataset(str(TESTDATA / name))
    assert dataset.version == {"pusht_v30_video": "v3.0", "pusht_v21_video": "v2.1"}[name]
    assert (dataset.fps, dataset.num_frames, dataset.num_episodes) == (10, 753, 8)
    assert dataset.tasks == ["Push the T-shaped block onto the T-shaped target."]
    assert dataset.camera_keys == ["observation.image"]
    assert dataset.numeric_keys[:3] == ["observation.state", "action", "next.reward"]
    assert "observation.image" not in dataset.numeric_keys
    assert dataset.episode_from[:2].tolist() == [0, 78]
    assert dataset.episode_to[[0, -1]].tolist() == [78, 753]
    np.testing.assert_array_equal(dataset.episode_from[1:], dataset.episode_to[:-1])
    assert dataset.episode_to.dtype == np.int64


def test_columns_have_the_declared_shape_and_dtype():
    dataset = lerobot.open_dataset(TESTDATA / "pusht_v30_video")
    for key in dataset.numeric_keys:
        feature = dataset.features[key]
        shape = () if feature["shape"] == [1] else tuple(feature["shape"])
        assert dataset.column(key).shape == (753, *shape)
        assert dataset.column(key).dtype == feature["dtype"]
    np.testing.assert_array_equal(dataset.column("index"), np.arange(753))
    assert dataset.column("action") is dataset.column("action")
    with pytest.raises(ValueError, match="read-only"):
        dataset.column("action")[0] = 0


def test_both_versions_hold_the_same_frames():
    v3, v2 = (lerobot.open_dataset(TESTDATA / name) for name in NAMES)
    for key in v3.numeric_keys:
        np.testing.assert_array_equal(v3.column(key), v2.column(key))


def test_item_without_deltas_is_one_frame_of_its_own():
    dataset = lerobot.open_dataset(TESTDATA / "pusht_v30_video")
    item = dataset.item(100)
    assert set(item) == {*dataset.numeric_keys, "task"}
    assert item["action"].shape == (2,)
    assert np.shape(item["next.done"]) == ()
    before = dataset.column("action")[100].copy()
    item["action"][:] = -1
    np.testing.assert_array_equal(dataset.column("action")[100], before)


def test_deltas_repeat_the_edges_of_the_episode():
    dataset = lerobot.open_dataset(TESTDATA / "pusht_v30_video")
    item = dataset.item(77, {"index": [-8.0, -0.1, 0, 0.1, 0.5]})
    assert item["index"].tolist() == [0, 76, 77, 77, 77]
    assert item["index_is_pad"].tolist() == [True, False, False, True, True]
    dataset.item(0, {"action": [0.10009]})  # 0.9 * the tolerance away from a frame
    with pytest.raises(ValueError, match=r"'action'.*0\.1002.*10"):
        dataset.item(0, {"action": [0.1, 0.1002]})


@pytest.mark.parametrize("index", [-1, 753])
def test_item_out_of_range(index):
    with pytest.raises(IndexError, match=r"0\.\.752"):
        lerobot.open_dataset(TESTDATA / "pusht_v30_video").item(index)


def test_pictures_and_unknown_features_are_explained():
    dataset = lerobot.open_dataset(TESTDATA / "pusht_v30_video")
    said = r"observation\.image.*this version reads numeric and text features"
    with pytest.raises(ValueError, match=said):
        dataset.column("observation.image")
    with pytest.raises(ValueError, match=said):
        dataset.item(0, {"observation.image": [0]})
    with pytest.raises(ValueError, match=r"'acton'.*did you mean 'action'"):
        dataset.column("acton")
    with pytest.raises(ValueError, match=r"'acton'.*did you mean 'action'"):
        dataset.item(0, {"acton": [0]})


def test_v20_needs_no_episode_statistics(copies):
    path = copies["pusht_v21_video"]
    _edit_info(path, codebase_version="v2.0", chunks_size=1000.0, something_new={"a": 1})
    (path / "meta" / "episodes_stats.jsonl").unlink()
    dataset = lerobot.open_dataset(path)
    assert dataset.version == "v2.0"
    assert dataset.item(752)["episode_index"] == 7


@pytest.mark.parametrize("name", ["task", "__index_level_0__"])
def test_both_spellings_of_the_task_column(copies, name):
    path = copies["pusht_v30_video"]
    table = pa.table({name: ["second", "first"], "task_index": [1, 0]})
    pq.write_table(table, path / "meta" / "tasks.parquet")
    assert lerobot.open_dataset(path).tasks == ["first", "second"]


def test_many_chunks_and_every_kind_of_column(tmp_path):
    rng = np.random.default_rng(0)
    lengths = {(0, 0): [3, 2], (0, 1): [4], (1, 0): [1, 5], (999, 0): [2], (1000, 0): [2]}
    n, matrix = 19, rng.normal(size=(19, 2, 3)).astype(np.float32)
    vectors = rng.normal(size=(n, 4))
    columns = {
        "action": pa.array(vectors.tolist(), pa.list_(pa.float32())),
        "action.raw": pa.array(vectors.tolist(), pa.list_(pa.float64(), 4)),
        "matrix": pa.array(matrix.tolist(), pa.list_(pa.list_(pa.float32()))),
        "single": pa.array([[k] for k in range(n)], pa.list_(pa.int64(), 1)),
        "flag": pa.array([k % 3 == 0 for k in range(n)]),
        "note": pa.array([f"note {k}" for k in range(n)]),
    }
    features = {
        "action": {"dtype": "float32", "shape": [4], "names": None, "fps": 10},
        "action.raw": {"dtype": "float32", "shape": [4]},
        "matrix": {"dtype": "float32", "shape": [2, 3]},
        "single": {"dtype": "int64", "shape": [1]},
        "flag": {"dtype": "bool", "shape": [1]},
        "note": {"dtype": "string", "shape": [1]},
        "camera": {"dtype": "image", "shape": [4, 4, 3]},
    }
    path = _write_v3(tmp_path, lengths, features, columns)
    (path / "data" / "chunk-000" / "._file-000.parquet").write_bytes(b"left by another system")
    dataset = lerobot.open_dataset(path)
    assert dataset.episode_to.tolist() == [3, 5, 9, 10, 15, 17, 19]
    np.testing.assert_array_equal(dataset.column("action"), vectors.astype(np.float32))
    np.testing.assert_array_equal(dataset.column("action.raw"), vectors.astype(np.float32))
    np.testing.assert_array_equal(dataset.column("matrix"), matrix)
    assert dataset.column("single").tolist() == list(range(n))
    assert dataset.column("flag").dtype == bool
    assert "note" not in dataset.numeric_keys
    item = dataset.item(9, {"note": [-0.1, 0], "matrix": [0, 0.1]})
    assert item["note"].tolist() == ["note 9", "note 9"]  # an episode of one frame
    np.testing.assert_array_equal(item["matrix"], matrix[[9, 9]])
    assert dataset.item(18)["note"] == "note 18"
    assert item["task"] == "do it"


@pytest.mark.parametrize(
    ("column", "feature", "said"),
    [
        ([[1.0], [1.0, 2.0]], {"dtype": "float32", "shape": [1]}, "several lengths"),
        ([[1.0], [2.0]], {"dtype": "float32", "shape": [2]}, r"\[1\].*\[2\]"),
        (["a", "b"], {"dtype": "float32", "shape": [1]}, "holds string"),
        ([1.5, 2.5], {"dtype": "int64", "shape": [1]}, "holds double"),
        ([1, 2], {"dtype": "string", "shape": [1]}, "holds int64"),
        ([1.0, None], {"dtype": "float32", "shape": [1]}, "1 empty"),
    ],
)
def test_values_that_contradict_their_declaration(tmp_path, column, feature, said):
    path = _write_v3(tmp_path, {(0, 0): [1, 1]}, {"x": feature}, {"x": pa.array(column)})
    with pytest.raises(ValueError, match=rf"file-000\.parquet: 'x'.*{said}"):
        lerobot.open_dataset(path).column("x")


def test_wrong_order_and_wrong_tasks(copies):
    file = copies["pusht_v30_video"] / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take([1, 0, *range(2, 753)]), file)
    with pytest.raises(ValueError, match="row 0 should have index 0, found 1"):
        lerobot.open_dataset(copies["pusht_v30_video"]).column("action")
    position = table.schema.get_field_index("task_index")
    pq.write_table(table.set_column(position, "task_index", pa.array([1] * 753)), file)
    with pytest.raises(ValueError, match="task_index goes from 1 to 1"):
        lerobot.open_dataset(copies["pusht_v30_video"]).item(0)


def _truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _drop_a_row(file):
    pq.write_table(pq.read_table(file).slice(1), file)


def _break_last_line(file):
    file.write_text(file.read_text().rstrip()[:-1])


V3, V2 = NAMES
V3_DATA = "data/chunk-000/file-000.parquet"
V2_DATA = "data/chunk-000/episode_000003.parquet"
DAMAGE = {
    "no info": (V3, "meta/info.json", pathlib.Path.unlink, FileNotFoundError),
    "bad info": (V3, "meta/info.json", _truncate, ValueError),
    "info is no object": (V3, "meta/info.json", lambda f: f.write_text("[]"), ValueError),
    "no data": (V3, V3_DATA, pathlib.Path.unlink, FileNotFoundError),
    "truncated data": (V3, V3_DATA, _truncate, ValueError),
    "empty data": (V3, V3_DATA, lambda f: f.write_bytes(b""), ValueError),
    "row lost": (V3, V3_DATA, _drop_a_row, ValueError),
    "no tasks": (V3, "meta/tasks.parquet", pathlib.Path.unlink, FileNotFoundError),
    "truncated tasks": (V3, "meta/tasks.parquet", _truncate, ValueError),
    "no episodes": (
        V3,
        "meta/episodes/chunk-000/file-000.parquet",
        pathlib.Path.unlink,
        FileNotFoundError,
    ),
    "truncated episodes": (V3, "meta/episodes/chunk-000/file-000.parquet", _truncate, ValueError),
    "v2 no data": (V2, V2_DATA, pathlib.Path.unlink, FileNotFoundError),
    "v2 truncated data": (V2, V2_DATA, _truncate, ValueError),
    "v2 row lost": (V2, V2_DATA, _drop_a_row, ValueError),
    "v2 no episodes": (V2, "meta/episodes.jsonl", pathlib.Path.unlink, FileNotFoundError),
    "v2 bad episodes": (V2, "meta/episodes.jsonl", _break_last_line, ValueError),
    "v2 bad tasks": (V2, "meta/tasks.jsonl", lambda f: f.write_text('{"task": "a"}'), ValueError),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_error_that_names_the_file(copies, what):
    name, file, damage, kind = DAMAGE[what]
    lerobot.open_dataset(copies[name])
    damage(copies[name] / file)
    with pytest.raises((ValueError, OSError)) as caught:
        lerobot.open_dataset(copies[name])
    assert caught.type is kind
    assert str(copies[name] / file) in str(caught.value)


def test_damage_inside_a_data_file_is_named_when_read(copies):
    file = copies["pusht_v30_video"] / V3_DATA
    content = bytearray(file.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    file.write_bytes(content)
    dataset = lerobot.open_dataset(copies["pusht_v30_video"])  # the footer is whole
    with pytest.raises(ValueError, match=r"file-000\.parquet: expected a whole parquet file"):
        dataset.column("observation.state")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codebase_version": "v1.6"}, r"v1\.6.*v2\.0, v2\.1, v3\.0"),
        ({"total_frames": 754}, "total_frames is 754.*753 rows"),
        ({"total_episodes": 9}, "total_episodes = 9.*8 rows"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": 9.5}, r"fps is 9\.5"),
        ({"features": {"action": {"shape": [2]}}}, "'action' needs dtype"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_info_that_contradicts_the_files(copies, name, changes, said):
    _edit_info(copies[name], **changes)
    with pytest.raises(ValueError, match=rf"info\.json.*{said}"):
        lerobot.open_dataset(copies[name])


def test_no_such_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        lerobot.open_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize("name", NAMES)
def test_fingerprint_follows_the_content_alone(copies, name):
    original = lerobot.open_dataset(TESTDATA / name).fingerprint()
    assert len(original) == 64
    assert lerobot.open_dataset(copies[name]).fingerprint() == original
    _edit_info(copies[name], robot_type="another")
    edited = lerobot.open_dataset(copies[name]).fingerprint()
    assert edited != original
    file = copies[name] / (V3_DATA if name == V3 else V2_DATA)
    pq.write_table(pq.read_table(file), file, compression="none")
    assert lerobot.open_dataset(copies[name]).fingerprint() not in (original, edited)
