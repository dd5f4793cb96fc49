import io
import json
import pathlib
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from policymix.data import lerobot

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata" / "lerobot"
NAMES = ("pusht_v30_video", "pusht_v21_video")
V3, V2 = NAMES
IMAGES = "pusht_v30_multifile_image"
CAMERA = "observation.image"
# Read back through LeRobot itself (0.4.4 for v3.0, 0.3.3 for v2.1) with these deltas; the fields
# are saved as <index>/<field>.
GOLDEN_DELTAS = {
    "observation.image": [-0.1, 0],
    "observation.state": [-0.1, 0],
    "action": [step / 10 for step in range(8)],
}


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


@pytest.mark.parametrize("name", [*NAMES, IMAGES])
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
        if field == CAMERA:
            assert np.abs(got.astype(int) - want).max() <= 1, entry
        else:
            np.testing.assert_array_equal(got, want, err_msg=entry)
    assert len(items) == 9
    assert len(golden.files) == 108


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
    assert set(item) == {*dataset.numeric_keys, CAMERA, "task"}
    assert (item[CAMERA].dtype, item[CAMERA].shape) == (np.uint8, (3, 96, 96))
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


@pytest.mark.parametrize("name", [*NAMES, IMAGES])
def test_deltas_are_the_single_items_at_the_clamped_frames(name):
    dataset, rng = lerobot.open_dataset(TESTDATA / name), np.random.default_rng(0)
    keys = (CAMERA, "observation.state", "timestamp")
    for index in [0, 77, 78, 752, *rng.integers(0, 753, 4).tolist()]:
        steps = rng.integers(-100, 100, 5)
        item = dataset.item(index, {key: (steps / 10).tolist() for key in keys})
        episode = dataset.column("episode_index")[index]
        first, last = dataset.episode_from[episode], dataset.episode_to[episode] - 1
        singles = [dataset.item(int(np.clip(index + step, first, last))) for step in steps]
        for key in keys:
            np.testing.assert_array_equal(item[key], np.stack([one[key] for one in singles]))
            np.testing.assert_array_equal(
                item[f"{key}_is_pad"], (index + steps < first) | (index + steps > last)
            )


@pytest.mark.parametrize("name", [*NAMES, IMAGES])
def test_a_list_of_one_offset_keeps_its_axis_but_for_videos(name):
    dataset = lerobot.open_dataset(TESTDATA / name)
    plain = dataset.item(80)
    item = dataset.item(80, {CAMERA: [0], "action": [0.0]})
    assert item["action"].shape == (1, 2)
    assert item[f"{CAMERA}_is_pad"].tolist() == [False]
    pictures = item[CAMERA] if name == IMAGES else item[CAMERA][None]
    np.testing.assert_array_equal(pictures, plain[CAMERA][None])
    np.testing.assert_array_equal(item["action"], plain["action"][None])
    assert item["task"] == plain["task"]


def test_both_versions_show_the_same_videos():
    v3, v2 = (lerobot.open_dataset(TESTDATA / name) for name in NAMES)
    indices = np.array([0, 77, 78, 400, 752])
    # Encoded one by one and all in one file: not the same bits, but the same scenes.
    left, right = (d.frames(CAMERA).get(indices).astype(int) for d in (v3, v2))
    assert np.abs(left - right).mean() < 1
    assert np.abs(left[0] - right[3]).mean() > 3  # what another scene differs by


def test_pictures_and_unknown_features_are_explained():
    dataset = lerobot.open_dataset(TESTDATA / "pusht_v30_video")
    with pytest.raises(ValueError, match=r"observation\.image.*columns are numbers and text"):
        dataset.column(CAMERA)
    with pytest.raises(ValueError, match=r"'action' has dtype float32, expected image or video"):
        dataset.frames("action")
    with pytest.raises(ValueError, match=r"'acton'.*did you mean 'action'"):
        dataset.column("acton")
    with pytest.raises(ValueError, match=r"'observation\.imag'.*did you mean"):
        dataset.frames("observation.imag")
    with pytest.raises(ValueError, match=r"'acton'.*did you mean 'action'"):
        dataset.item(0, {"acton": [0]})


def test_clips_of_both_versions():
    v3, v2 = (lerobot.open_dataset(TESTDATA / name) for name in NAMES)
    file = "videos/observation.image/chunk-000/file-000.mp4"
    for episode in range(8):
        assert v3.clip(CAMERA, episode) == (v3.path / file, v3.episode_from[episode])
    assert v2.clip(CAMERA, 3) == (
        v2.path / "videos/chunk-000/observation.image/episode_000003.mp4",
        0,
    )
    with pytest.raises(ValueError, match="'observation.image' is no video"):
        lerobot.open_dataset(TESTDATA / IMAGES).clip(CAMERA, 0)


def test_episode_statistics_as_stored(copies):
    v3, v2 = (lerobot.open_dataset(TESTDATA / name) for name in NAMES)
    assert [len(d.episode_stats()) for d in (v3, v2)] == [8, 8]
    actions = v3.column("action")
    for episode in (0, 7):
        rows = actions[v3.episode_from[episode] : v3.episode_to[episode]]
        for dataset in (v3, v2):
            stats = dataset.episode_stats()[episode]
            np.testing.assert_allclose(stats["action"]["mean"], rows.mean(axis=0), rtol=1e-5)
            assert stats["action"]["count"].tolist() == [len(rows)]
            assert stats[CAMERA]["mean"].shape == (3, 1, 1)
    assert (v3.robot_type, v2.robot_type) == ("2d pointer", "2d pointer")
    for dataset in (v3, v2):
        few = dataset.episode_stats([CAMERA])
        assert [list(stats) for stats in few] == [[CAMERA]] * 8
        np.testing.assert_equal(few[3][CAMERA], dataset.episode_stats()[3][CAMERA])
    (copies["pusht_v21_video"] / "meta/episodes_stats.jsonl").unlink()
    assert lerobot.open_dataset(copies["pusht_v21_video"]).episode_stats() is None


def _edit_rows(path, file="data/chunk-000/file-000.parquet", **columns):
    """Puts other values into columns: {name: {row: value}}."""
    table = pq.read_table(path / file)
    for name, changes in columns.items():
        values = table[name].to_pylist()
        for row, value in changes.items():
            values[row] = value
        place, kind = table.schema.get_field_index(name), table.schema.field(name).type
        table = table.set_column(place, name, pa.array(values, kind))
    pq.write_table(table, path / file)


EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def test_bad_episodes_are_named_and_do_not_stop_the_reader(copies):
    path = copies["pusht_v30_video"]
    _edit_rows(path, action={80: [np.nan, 0], 81: [0, np.inf]}, **{"next.reward": {752: -np.inf}})
    dataset = lerobot.open_dataset(path)
    assert np.isnan(dataset.column("action")[80, 0])
    assert dataset.check_episodes(["observation.state", "index"]) == {}
    assert dataset.check_episodes(["action", "next.reward"]) == {
        1: "'action' is not finite in 2 frames, the first is frame 2",
        7: "'next.reward' is not finite in 1 frames, the first is frame 79",
    }
    with pytest.raises(ValueError, match="did you mean 'action'"):
        dataset.check_episodes(["acton"])


def test_an_episode_without_frames_is_an_error_unless_asked_for(tmp_path):
    features = {"x": {"dtype": "float32", "shape": [1]}}
    columns = {"x": pa.array([1.0, 2.0, 3.0])}
    path = _write_v3(tmp_path, {(0, 0): [1, 0, 2]}, features, columns)
    with pytest.raises(ValueError, match=r"episodes.*: episode 1 has length 0.*edit_dataset"):
        lerobot.open_dataset(path)
    dataset = lerobot.open_dataset(path, empty_episodes=True)
    assert dataset.check_episodes(["x"]) == {1: "it has no frames"}
    assert dataset.item(1, {"x": [-0.1, 0, 0.1]})["x"].tolist() == [2, 2, 3]
    assert dataset.item(0, {"x": [-0.1, 0, 0.1]})["x"].tolist() == [1, 1, 1]  # of length 1


def test_an_empty_episode_of_v2_has_a_video_that_nobody_asks_for(copies):
    path = copies["pusht_v21_video"]
    lines = (path / "meta/episodes.jsonl").read_text().splitlines()
    row = json.dumps(json.loads(lines[-1]) | {"episode_index": 8, "length": 0})
    (path / "meta/episodes.jsonl").write_text("\n".join([*lines, row]))
    _edit_info(path, total_episodes=9)
    with pytest.raises(ValueError, match=r"episodes\.jsonl: episode 8 has length 0"):
        lerobot.open_dataset(path)
    dataset = lerobot.open_dataset(path, empty_episodes=True)
    assert dataset.item(752)["episode_index"] == 7


@pytest.mark.parametrize(
    ("row", "time", "said"),
    [
        (100, 2.3, r"episode 1, frame 22, has timestamp 2\.3 s.*22 / 10 = 2\.2 s.*correct fps in"),
        (0, np.nan, r"episode 0, frame 0, has timestamp nan s"),
    ],
)
def test_timestamps_that_are_not_at_fps(copies, row, time, said):
    path = copies["pusht_v30_video"]
    _edit_rows(path, timestamp={row: time})
    with pytest.raises(ValueError, match=rf"file-000\.parquet: {said}"):
        lerobot.open_dataset(path).column("action")


@pytest.mark.parametrize("name", NAMES)
def test_fps_that_does_not_match_the_timestamps(copies, name):
    _edit_info(copies[name], fps=20)
    file = r"file-000\.parquet" if name == V3 else r"episode_000000\.parquet"
    with pytest.raises(ValueError, match=rf"{file}: episode 0, frame 1, .*0\.1 s.*1 / 20 = 0\.05"):
        lerobot.open_dataset(copies[name]).item(0)


def test_timestamps_of_hours_are_as_coarse_as_float32(tmp_path):
    count = 3_000_000  # 8 hours at 100 frames/s: float32 is good to 2 ms there
    at = np.arange(count - 3, count)
    dataset = lerobot.Dataset(
        tmp_path,
        {"codebase_version": "v3.0", "fps": 100, "total_frames": 3, "features": {}},
        ["do"],
        np.array([3]),
        [],
    )
    dataset._check_times(at, (at / 100).astype(np.float32), np.zeros(3, int))


def test_frames_that_do_not_start_their_episode_have_another_place_on_video(copies):
    path = copies["pusht_v30_video"]
    late = {row: row + 1 for row in range(78)}
    _edit_rows(path, frame_index=late, timestamp={row: n / 10 for row, n in late.items()})
    with pytest.raises(ValueError, match="row 0 should have frame_index 0, found 1"):
        lerobot.open_dataset(path).frames(CAMERA)


@pytest.mark.parametrize(
    ("name", "key", "template"),
    [
        (V3, "data_path", "../data/{chunk_index}/{file_index}.parquet"),
        (V3, "data_path", "/etc/{chunk_index}/{file_index}.parquet"),
        (V3, "video_path", "videos/{video_key}/../../../{chunk_index}/{file_index}.mp4"),
        (V2, "data_path", "data/../../{episode_chunk}/{episode_index}.parquet"),
        (V2, "video_path", "/videos/{video_key}/{episode_index}.mp4"),
    ],
)
def test_paths_that_leave_the_folder_are_refused(copies, name, key, template):
    _edit_info(copies[name], **{key: template})
    with pytest.raises(ValueError, match=rf"info\.json: {key} is .* out of the dataset's folder"):
        lerobot.open_dataset(copies[name]).frames(CAMERA)


def test_a_camera_whose_name_leaves_the_folder_is_refused(copies):
    path = copies["pusht_v21_video"]
    features = json.loads((path / "meta/info.json").read_text())["features"]
    _edit_info(path, features=features | {"../../up": features[CAMERA]})
    with pytest.raises(ValueError, match="out of the dataset's folder"):
        lerobot.open_dataset(path).frames("../../up")


@pytest.mark.parametrize("template", [None, "a.mp4", "{nothing}.mp4", "{video_key.__class__}.mp4"])
def test_a_video_path_that_is_none(copies, template):
    _edit_info(copies["pusht_v30_video"], video_path=template)
    dataset = lerobot.open_dataset(copies["pusht_v30_video"])
    with pytest.raises(ValueError, match=r"video_path is .*expected.*\{video_key\}"):
        dataset.item(0)


def test_paths_of_ones_own_are_followed(copies):
    v3, v2 = (copies[name] for name in NAMES)
    (v3 / "videos/observation.image").rename(v3 / "films")
    (v3 / "films/chunk-000/file-000.mp4").rename(v3 / "films/0-0.mp4")
    _edit_info(v3, video_path="films/{chunk_index:d}-{file_index}.mp4")
    (v2 / "data").rename(v2 / "rows")
    _edit_info(v2, data_path="rows/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet")
    for path, name in ((v3, V3), (v2, V2)):
        got, want = (lerobot.open_dataset(p).item(400) for p in (path, TESTDATA / name))
        np.testing.assert_array_equal(got[CAMERA], want[CAMERA])
        np.testing.assert_array_equal(got["action"], want["action"])


def test_episodes_may_lie_anywhere_on_video(copies):
    """Two files, from_timestamp in reverse order of the episodes."""
    path = copies["pusht_v30_video"]
    prefix = f"videos/{CAMERA}"
    folder = path / prefix / "chunk-000"
    shutil.copytree(folder, path / prefix / "chunk-002")
    (path / prefix / "chunk-002/file-000.mp4").rename(path / prefix / "chunk-002/file-007.mp4")
    swapped = {0: 26.9, 3: 0.0}  # episodes of 78 and 122 frames: the starts of 3 and of 0
    _edit_rows(
        path,
        EPISODES,
        **{
            f"{prefix}/from_timestamp": swapped,
            f"{prefix}/to_timestamp": {0: 26.9 + 7.8, 3: 12.2},
            f"{prefix}/chunk_index": dict.fromkeys(range(2, 8), 2),
            f"{prefix}/file_index": dict.fromkeys(range(2, 8), 7),
        },
    )
    found = lerobot.open_dataset(path)
    true = lerobot.open_dataset(TESTDATA / V3).frames(CAMERA)
    indices = np.array([269, 5, 400, 5, 300])
    expected = true.get(np.array([0, 274, 400, 274, 31]))
    np.testing.assert_array_equal(found.frames(CAMERA).get(indices), expected)
    assert found.clip(CAMERA, 3) == (path / prefix / "chunk-002/file-007.mp4", 0)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, 1e300])
def test_an_episode_that_is_nowhere_on_video(copies, value):
    path = copies["pusht_v30_video"]
    _edit_rows(path, EPISODES, **{f"videos/{CAMERA}/from_timestamp": {5: value}})
    with pytest.raises(ValueError, match=r"file-000\.parquet: episode 5 has .*from_timestamp"):
        lerobot.open_dataset(path).frames(CAMERA)


@pytest.mark.parametrize(
    ("name", "shift", "message"),
    [
        ("from", 0.5, r"episode 5 has \d+ frames, .* s after from_timestamp; correct"),
        ("to", -0.1, r"episode 5 has \d+ frames, .* s after from_timestamp; correct"),
        (
            "from",
            0.02,
            r"episode 5 has .*from_timestamp .* expected a multiple of 1 / fps = 1 / 10",
        ),
    ],
)
def test_an_episode_that_lies_beside_its_frames_on_video(copies, name, shift, message):
    path, column = copies["pusht_v30_video"], f"videos/{CAMERA}/{name}_timestamp"
    value = pq.read_table(path / EPISODES)[column].to_pylist()[5]
    _edit_rows(path, EPISODES, **{column: {5: value + shift}})
    with pytest.raises(ValueError, match=rf"file-000\.parquet: {message}"):
        lerobot.open_dataset(path).clip(CAMERA, 5)


def test_an_end_on_video_need_not_be_told(copies):
    path = copies["pusht_v30_video"]
    table = pq.read_table(path / EPISODES).drop_columns([f"videos/{CAMERA}/to_timestamp"])
    pq.write_table(table, path / EPISODES)
    assert lerobot.open_dataset(path).clip(CAMERA, 1)[1] == 78


def test_what_writers_leave_odd_does_not_matter(copies):
    path = copies["pusht_v30_video"]
    info = json.loads((path / "meta/info.json").read_text())
    for name, feature in info["features"].items():
        feature |= {} if name == CAMERA else {"fps": 10}
    info |= {"total_tasks": 17, "data_files_size_in_mb": 0.5, "chunks_size": 1000.0, "tools": []}
    info["features"][CAMERA] |= {"shape": [3, 96, 96], "names": ["channels", "height", "width"]}
    (path / "meta/info.json").write_text(json.dumps(info))
    np.testing.assert_array_equal(
        lerobot.open_dataset(path).item(3)[CAMERA],
        lerobot.open_dataset(TESTDATA / V3).item(3)[CAMERA],
    )


def test_a_dataset_pickles(copies):
    for name in (*NAMES, IMAGES):
        dataset = lerobot.open_dataset(TESTDATA / name)
        item = dataset.item(100)
        again = pickle.loads(pickle.dumps(dataset)).item(100)
        np.testing.assert_array_equal(again[CAMERA], item[CAMERA])
        np.testing.assert_array_equal(again["action"], item["action"])


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


def _picture(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


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
        "camera": pa.array([{"bytes": _picture(k), "path": None} for k in range(n)]),
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
    assert [int(dataset.item(k)["camera"].max()) for k in range(n)] == list(range(n))
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
        ({"fps": 10**400}, "fps is 1000"),
        ({"chunks_size": "x"}, "chunks_size is 'x', expected a whole number"),
        ({"features": {"action": {"shape": [2]}}}, "'action' needs dtype"),
        ({"features": {"a": {"dtype": None, "shape": [2]}}}, r"'a' has dtype None and shape \[2\]"),
        *(
            ({"features": {"a": {"dtype": "int8", "shape": shape}}}, "'a' has dtype 'int8' and sha")
            for shape in (None, 5, ["a"], [2.5], [-1], [10**400])
        ),
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
