import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest

from policymix.data import lerobot, pictures, writer

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata" / "lerobot"
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
VECTOR = {"dtype": "float32", "shape": [2], "names": {"motors": ["x", "y"]}}
ONE = {"shape": [1], "names": None}
IMAGE = {"dtype": "image", "shape": [6, 8, 3], "names": ["height", "width", "channel"]}
FEATURES = {
    "observation.image": IMAGE,
    "observation.state": VECTOR,
    "action": VECTOR,
    "next.reward": {"dtype": "float32"} | ONE,
    "next.done": {"dtype": "bool"} | ONE,
}
# What LeRobot 0.4.4 wrote for a dataset with these features: as data, for datasets, for pandas.
STORED = {
    "observation.image": "struct<bytes: binary, path: string>",
    "observation.state": "fixed_size_list<element: float>[2]",
    "action": "fixed_size_list<element: float>[2]",
    "next.reward": "float",
    "next.done": "bool",
    "timestamp": "float",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
HUGGING_FACE = (
    '{"info": {"features": {"observation.image": {"_type": "Image"}, '
    '"observation.state": {"feature": {"dtype": "float32", "_type": "Value"}, "length": 2, '
    '"_type": "List"}, "action": {"feature": {"dtype": "float32", "_type": "Value"}, '
    '"length": 2, "_type": "List"}, "next.reward": {"dtype": "float32", "_type": "Value"}, '
    '"next.done": {"dtype": "bool", "_type": "Value"}, '
    '"timestamp": {"dtype": "float32", "_type": "Value"}, '
    '"frame_index": {"dtype": "int64", "_type": "Value"}, '
    '"episode_index": {"dtype": "int64", "_type": "Value"}, '
    '"index": {"dtype": "int64", "_type": "Value"}, '
    '"task_index": {"dtype": "int64", "_type": "Value"}}}}'
)
STATS = ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")


def episode(length, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "observation.image": rng.integers(0, 256, (length, 6, 8, 3), dtype=np.uint8),
        "observation.state": rng.normal(size=(length, 2)).astype(np.float32),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
        "next.reward": rng.random(length).astype(np.float32),
        "next.done": np.arange(length) == length - 1,
    }


def write(path, *episodes, features=FEATURES, tasks=None, **options):
    tasks = tasks or ["push"] * len(episodes)
    with writer.Writer(path, fps=10, features=features, **options) as opened:
        for arrays, task in zip(episodes, tasks, strict=True):
            opened.add_episode(arrays, task)
    return lerobot.open_dataset(path)


def frames(dataset, key):
    """All pictures of a feature: uint8 [num_frames, hh, ww, 3]."""
    return dataset.frames(key).get(np.arange(dataset.num_frames))


def test_what_is_written_is_read_back(tmp_path):
    tasks = ["push", ["lift", "push", "lift"]]
    dataset = write(tmp_path / "d", episode(5, 1), episode(3, 2), tasks=tasks, robot_type="arm")
    both = {k: np.concatenate([episode(5, 1)[k], episode(3, 2)[k]]) for k in FEATURES}
    for name in FEATURES.keys() - {"observation.image"}:
        np.testing.assert_array_equal(dataset.column(name), both[name])
        assert dataset.column(name).dtype == both[name].dtype
    images = frames(dataset, "observation.image")
    np.testing.assert_array_equal(images, both["observation.image"])
    assert dataset.tasks == ["push", "lift"]
    assert dataset.column("task_index").tolist() == [0] * 5 + [1, 0, 1]
    table = pq.read_table(dataset.path / EPISODES)
    assert table["tasks"].to_pylist() == [["push"], ["lift", "push"]]
    assert dataset.column("frame_index").tolist() == [*range(5), *range(3)]
    assert dataset.column("timestamp")[6] == np.float32(0.1)
    assert (dataset.version, dataset.fps, dataset.info["robot_type"]) == ("v3.0", 10, "arm")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_tables_are_those_that_lerobot_writes(tmp_path):
    dataset = write(tmp_path / "d", episode(5), episode(3))
    data = pq.ParquetFile(dataset.path / DATA)
    assert {f.name: str(f.type) for f in data.schema_arrow} == STORED
    assert list(data.schema_arrow.names) == list(STORED)
    assert data.schema_arrow.metadata == {b"huggingface": HUGGING_FACE.encode()}
    assert [data.metadata.row_group(i).num_rows for i in range(data.num_row_groups)] == [5, 3]
    assert data.metadata.row_group(0).column(0).compression == "SNAPPY"
    paths = data.read()["observation.image"].to_pylist()
    assert [row["path"] for row in paths][4:6] == ["frame-000004.png", "frame-000000.png"]

    table = pq.read_table(dataset.path / EPISODES)
    places = ["data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index"]
    stats = [f"stats/{name}/{stat}" for name in STORED for stat in STATS]
    own = [f"meta/episodes/{name}" for name in ("chunk_index", "file_index")]
    assert table.column_names == ["episode_index", "tasks", "length", *places, *stats, *own]
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types["tasks"] == "list<element: string>"
    assert types["stats/next.done/max"] == "list<element: bool>"
    assert types["stats/next.done/std"] == types["stats/action/min"] == "list<element: double>"
    assert types["stats/index/min"] == types["stats/action/count"] == "list<element: int64>"
    nested = "list<element: list<element: list<element: double>>>"
    assert types["stats/observation.image/q50"] == nested
    assert table["dataset_to_index"].to_pylist() == [5, 8]


@pytest.mark.parametrize("file", ["meta/tasks.parquet", EPISODES, DATA])
def test_schemas_equal_those_of_a_dataset_by_lerobot(file, tmp_path):
    """The one with videos: a video has no column of data, but columns in the episode table."""
    source = lerobot.open_dataset(TESTDATA / "pusht_v30_video")
    features = {k: f for k, f in source.features.items() if k not in writer.AUTOMATIC}
    del features["observation.image"]
    arrays = {name: source.column(name)[:78] for name in features}
    dataset = write(tmp_path / "d", arrays, features=features, tasks=source.tasks)
    ours, theirs = (pq.read_schema(d.path / file) for d in (dataset, source))
    # The reference computed statistics of a video too, and LeRobot stores when it was recorded.
    expected = [f for f in theirs if "observation.image" not in f.name]
    assert list(ours) == expected
    if file != DATA:
        assert _pandas(ours) == _pandas(theirs)
    else:
        described = [json.loads(s.metadata[b"huggingface"])["info"] for s in (ours, theirs)]
        assert described[0] == described[1]


def _pandas(schema):
    """What pandas needs to know, without who wrote it."""
    described = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
    return {k: v for k, v in described.items() if k not in ("creator", "pandas_version")}


def test_info_equals_that_of_lerobot(tmp_path):
    source = lerobot.open_dataset(TESTDATA / "pusht_v30_video")
    features = {k: f for k, f in source.features.items() if k not in writer.AUTOMATIC}
    del features["observation.image"]
    episodes = [
        {name: source.column(name)[start:end] for name in features}
        for start, end in zip(source.episode_from, source.episode_to, strict=True)
    ]
    robot = source.info["robot_type"]
    dataset = write(
        tmp_path / "d", *episodes, features=features, tasks=source.tasks * 8, robot_type=robot
    )
    theirs = source.info | {"video_path": None}
    theirs["features"] = {k: f for k, f in source.features.items() if k != "observation.image"}
    assert dataset.info == theirs
    assert list(dataset.info) == list(source.info)
    for name in source.numeric_keys:
        np.testing.assert_array_equal(dataset.column(name), source.column(name))
    ours, theirs = (json.loads((d.path / "meta/stats.json").read_text()) for d in (dataset, source))
    for name in source.numeric_keys:  # LeRobot's quantiles are estimates
        for stat in ("min", "max", "mean", "std", "count"):
            np.testing.assert_allclose(ours[name][stat], theirs[name][stat], rtol=1e-5)


def test_statistics_are_exact(tmp_path):
    dataset = write(tmp_path / "d", episode(5, 1), episode(3, 2))
    stats = json.loads((dataset.path / "meta/stats.json").read_text())
    assert list(stats) == list(STORED)
    assert all(tuple(entry) == STATS for entry in stats.values())
    actions = dataset.column("action").astype(np.float64)
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats["action"]["std"], actions.std(0), rtol=1e-12)
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(actions, 0.99, 0), rtol=1e-12)
    assert stats["next.done"]["max"] == [True]
    assert stats["index"]["count"] == [8]
    assert stats["next.reward"]["q10"] == [
        pytest.approx(np.quantile(dataset.column("next.reward").astype(float), 0.1))
    ]
    row = pq.read_table(dataset.path / EPISODES).to_pylist()[1]
    np.testing.assert_allclose(row["stats/action/min"], episode(3, 2)["action"].min(0))
    assert row["stats/index/min"] == [5]


def test_statistics_of_pictures_are_of_their_pixels(tmp_path):
    dataset = write(tmp_path / "d", episode(5, 1), episode(3, 2))
    pixels = frames(dataset, "observation.image").reshape(-1, 3) / 255
    stats = json.loads((dataset.path / "meta/stats.json").read_text())["observation.image"]
    assert np.shape(stats["mean"]) == (3, 1, 1)
    assert stats["count"] == [8]
    expected = {"mean": pixels.mean(0), "std": pixels.std(0), "min": pixels.min(0)}
    expected |= {"q10": np.quantile(pixels, 0.1, 0), "q99": np.quantile(pixels, 0.99, 0)}
    for name, values in expected.items():
        np.testing.assert_allclose(np.ravel(stats[name]), values, rtol=1e-12, err_msg=name)


def test_pictures_of_long_episodes_are_sampled_and_large_ones_thinned(tmp_path):
    image = IMAGE | {"shape": [2, 300, 3]}
    images = np.zeros((150, 2, 300, 3), np.uint8)
    images[:, :, 1::2] = 255  # every other column, which a stride of two passes over
    dataset = write(tmp_path / "d", {"top": images}, features={"top": image})
    stats = json.loads((dataset.path / "meta/stats.json").read_text())["top"]
    assert stats["count"] == [100]
    assert stats["max"] == [[[0]], [[0]], [[0]]]


def test_features_of_many_kinds(tmp_path):
    features = {
        "map": {"dtype": "float64", "shape": [3, 4], "names": None},
        "camera": IMAGE | {"shape": [3, 6, 8], "names": ["channels", "height", "width"]},
        "note": {"dtype": "string"} | ONE,
        "count": {"dtype": "uint8"} | ONE,
    }
    rng = np.random.default_rng(0)
    arrays = {
        "map": rng.normal(size=(5, 3, 4)),
        "camera": rng.integers(0, 256, (5, 3, 6, 8), dtype=np.uint8),
        "note": ["a", "b", "", "d", "e"],
        "count": np.arange(251, 256, dtype=np.uint8)[:, None],
    }
    dataset = write(tmp_path / "d", arrays, features=features)
    np.testing.assert_array_equal(dataset.column("map"), arrays["map"])
    assert dataset.column("note").tolist() == arrays["note"]
    assert dataset.column("count").tolist() == [251, 252, 253, 254, 255]
    np.testing.assert_array_equal(frames(dataset, "camera"), np.moveaxis(arrays["camera"], 1, -1))
    field = pq.read_schema(dataset.path / DATA).field("map")
    assert field.metadata == {
        b"ARROW:extension:name": b"datasets.features.features.Array2DExtensionType",
        b"ARROW:extension:metadata": b'[[3, 4], "float64"]',
    }
    stats = json.loads((dataset.path / "meta/stats.json").read_text())
    # LeRobot's are over all axes but the last.
    np.testing.assert_allclose(stats["map"]["mean"], arrays["map"].mean((0, 1)), rtol=1e-12)
    assert stats["map"]["count"] == [5]
    assert "note" not in stats


def test_pictures_may_be_given_as_files(tmp_path):
    arrays = episode(3)
    arrays["observation.image"] = [pictures.png(image) for image in arrays["observation.image"]]
    dataset = write(tmp_path / "files", arrays)
    column = pq.read_table(dataset.path / DATA)["observation.image"].to_pylist()
    assert [row["bytes"] for row in column] == arrays["observation.image"]
    assert write(tmp_path / "arrays", episode(3)).fingerprint() == dataset.fingerprint()
    arrays["observation.image"][2] = pictures.png(np.zeros((6, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=r"frame 2: .*expected RGB \[6, 8, 3\], found RGB"):
        write(tmp_path / "wrong", arrays)


def test_the_same_episodes_give_the_same_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name, episode(5, 1), episode(3, 2), tasks=["push", "lift"])
    found = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(found) == 5
    for file in found:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_files_and_folders_rotate(tmp_path):
    episodes = [episode(40, seed) for seed in range(11)]
    options = {"data_files_size_in_mb": 0.03, "chunks_size": 2}
    dataset = write(tmp_path / "d", *episodes, **options)
    found = sorted(str(p.relative_to(dataset.path)) for p in dataset.path.glob("data/*/*"))
    assert len(found) > 3
    assert found[:3] == [
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
        "data/chunk-001/file-000.parquet",
    ]
    rows = pq.read_table(dataset.path / EPISODES).to_pylist()
    placed = [f"data/chunk-{r['data/chunk_index']:03d}/file-{r['data/file_index']:03d}.parquet"
              for r in rows]  # fmt: skip
    assert sorted(set(placed)) == found
    assert len(placed) > len(found)  # some hold several episodes
    for row, file in zip(rows, placed, strict=True):
        assert (
            row["episode_index"] in pq.read_table(dataset.path / file)["episode_index"].to_pylist()
        )
        assert (dataset.path / file).stat().st_size < 0.04 * 2**20
    np.testing.assert_array_equal(
        dataset.column("action"), np.concatenate([e["action"] for e in episodes])
    )


WRONG = {
    "shape": ({"action": np.zeros((3, 4))}, "'action' has shape [3, 4], expected [frames, 2]"),
    "dtype": ({"next.done": np.zeros(3)}, "'next.done' has dtype float64, expected bool"),
    "bool": ({"next.reward": np.ones(3, bool)}, "'next.reward' has dtype bool, expected float32"),
    "complex": ({"action": np.zeros((3, 2), complex)}, "'action' has dtype complex128"),
    "ragged": ({"action": [[1, 2], [3]]}, "'action' is no array of numbers"),
    "length": ({"action": np.zeros((4, 2))}, "as many of every feature"),
    "NaN": ({"action": [[0, 0], [0, np.nan], [0, 0]]}, "'action', frame 1: nan is not finite"),
    "overflow": ({"action": [[0, 0], [0, 0], [1e300, 0]]}, "frame 2: 1e+300 is not finite"),
    "extra": ({"velocity": np.zeros(3)}, "missing [], unknown ['velocity']"),
    "float picture": ({"observation.image": np.zeros((3, 6, 8, 3))}, "expected uint8 [frames, 6"),
    "picture": ({"observation.image": np.zeros((3, 6, 9, 3), np.uint8)}, "uint8 [3, 6, 9, 3]"),
    "no picture": ({"observation.image": [b"a", b"b", b"c"]}, "'observation.image', frame 0: 1 b"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_episode_is_told_and_leaves_no_trace(name, tmp_path):
    changes, message = WRONG[name]
    with writer.Writer(tmp_path / "d", fps=10, features=FEATURES) as opened:
        opened.add_episode(episode(3, 1), "push")
        with pytest.raises(ValueError, match="episode 1: ") as raised:
            opened.add_episode(episode(3, 2) | changes, "a new task")
        opened.add_episode(episode(3, 3), "push")
    assert message in str(raised.value)
    dataset = lerobot.open_dataset(tmp_path / "d")
    assert (dataset.num_episodes, dataset.tasks) == (2, ["push"])
    assert write(tmp_path / "e", episode(3, 1), episode(3, 3)).fingerprint() == (
        dataset.fingerprint()
    )


def test_missing_features_empty_episodes_and_tasks_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"missing \['action'\]"):
        write(tmp_path / "d", {k: v for k, v in episode(3).items() if k != "action"})
    with pytest.raises(ValueError, match="episode 0: expected one or more frames"):
        write(tmp_path / "d", episode(0))
    with pytest.raises(ValueError, match="or 3 of them, one per frame; got 2"):
        write(tmp_path / "d", episode(3), tasks=[["a", "b"]])
    with pytest.raises(ValueError, match="no episodes were added"):
        write(tmp_path / "d")
    small = {"n": {"dtype": "int8"} | ONE}
    with pytest.raises(ValueError, match="'n', frame 1: 300 does not fit into int8"):
        write(tmp_path / "d", {"n": np.array([1, 300])}, features=small)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "feature", "message"),
    [
        ("a/b", VECTOR, "without '/'"),
        ("index", VECTOR, "'index' is written by itself"),
        ("top", IMAGE | {"dtype": "video", "shape": [3, 3, 4, 4]}, "only colour pictures"),
        ("top", IMAGE | {"shape": [6, 8, 1]}, "only colour pictures"),
        ("x", VECTOR | {"dtype": "float31"}, "dtype 'float31'; known are"),
        ("x", VECTOR | {"shape": [0]}, "shape [0]"),
        ("x", VECTOR | {"shape": [2] * 6}, "one to five"),
        ("x", {"dtype": "float32"}, "needs dtype and shape"),
    ],
)
def test_features_that_cannot_be_written(name, feature, message, tmp_path):
    with pytest.raises(ValueError, match="^") as raised:
        writer.Writer(tmp_path / "d", fps=10, features={name: feature})
    assert message in str(raised.value)
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": {"a": VECTOR | {"names": np.array(["x", "y"])}}}, "feature 'a' is .* JSON"),
        ({"features": {"\udce9": VECTOR}}, "feature .* JSON"),
        ({"robot_type": float("nan")}, "robot_type is nan, which JSON has no words for"),
        ({"data_files_size_in_mb": float("nan")}, "size of files is .* JSON has no words"),
        ({"fps": float("nan")}, "fps is nan; expected a whole number, 1 or more"),
        ({"fps": "x"}, "fps is 'x'; expected a whole number"),
        ({"fps": 9.5}, "fps is 9.5; expected a whole number"),
        ({"chunks_size": 1.5}, "chunks_size is 1.5; expected a whole number"),
    ],
)
def test_what_info_cannot_hold_is_told_at_the_start(options, message, tmp_path):
    with pytest.raises(ValueError, match=rf"/d: .*{message}") as raised:
        writer.Writer(tmp_path / "d", **({"fps": 10, "features": {"a": VECTOR}} | options))
    assert "\n" not in str(raised.value)


def test_a_task_that_no_file_can_hold_is_told_with_its_episode(tmp_path):
    with writer.Writer(tmp_path / "d", fps=10, features={"a": VECTOR}) as opened:
        opened.add_episode({"a": np.zeros((3, 2))}, "open")
        with pytest.raises(ValueError, match=r"d, episode 1: task: 'open \\udce9' is no text"):
            opened.add_episode({"a": np.zeros((3, 2))}, "open \udce9")
    assert lerobot.open_dataset(tmp_path / "d").num_episodes == 1


def test_shapes_may_be_of_numpy(tmp_path):
    features = {"a": VECTOR | {"shape": (np.int64(2),)}}
    dataset = write(tmp_path / "d", {"a": np.zeros((3, 2))}, features=features)
    assert dataset.features["a"]["shape"] == [2]


@pytest.mark.parametrize("version", writer.VERSIONS)
def test_an_episode_takes_little_memory(version, tmp_path):
    """Rows of the episode table, as Python objects, would take 40 KB each here."""
    features = {f"f{k}": VECTOR | {"shape": [7]} for k in range(6)}
    arrays = {name: np.ones((1, 7), np.float32) for name in features}
    with writer.Writer(tmp_path / "d", fps=10, features=features, version=version) as opened:
        tracemalloc.start()
        for _ in range(600):
            opened.add_episode(arrays, "push")
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert used < 600 * 20_000


def test_an_error_in_the_block_leaves_nothing_and_the_old_dataset(tmp_path):
    old = write(tmp_path / "d", episode(3)).fingerprint()

    def fall():
        with writer.Writer(tmp_path / "d", fps=10, features=FEATURES, overwrite=True) as opened:
            opened.add_episode(episode(5), "push")
            raise RuntimeError("robot fell")

    with pytest.raises(RuntimeError, match="robot fell"):
        fall()
    assert lerobot.open_dataset(tmp_path / "d").fingerprint() == old
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_an_existing_folder_is_replaced_only_if_asked_and_a_dataset(tmp_path):
    write(tmp_path / "d", episode(3))
    with pytest.raises(FileExistsError, match="--overwrite"):
        write(tmp_path / "d", episode(4))
    assert write(tmp_path / "d", episode(4), overwrite=True).num_frames == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(FileExistsError, match="not written by this command"):
        write(tmp_path / "mine", episode(4), overwrite=True)


def test_an_episode_that_the_disk_refused_spoils_the_dataset(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def go_on_regardless():
        with writer.Writer(tmp_path / "d", fps=10, features=FEATURES) as opened:
            opened.add_episode(episode(3), "push")
            with monkeypatch.context() as patched:
                patched.setattr(pq.ParquetWriter, "write_table", full)
                with pytest.raises(OSError, match="No space"):
                    opened.add_episode(episode(3), "push")

    with pytest.raises(ValueError, match="could not be written"):
        go_on_regardless()
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_nothing_that_opens(tmp_path):
    program = f"""
import sys
import numpy as np
from policymix.data import writer
features = {{"action": {VECTOR!r}}}
with writer.Writer({str(tmp_path / "d")!r}, fps=10, features=features) as w:
    while True:
        w.add_episode({{"action": np.zeros((50, 2), np.float32)}}, "push")
        print("one", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[2],
    ) as process:
        assert process.stdout.readline() == b"one\n"
        os.kill(process.pid, signal.SIGKILL)
    (leftover,) = tmp_path.iterdir()  # hidden, and removed by the next run
    assert leftover.name.startswith(".d.partial-")
    with pytest.raises(FileNotFoundError):
        lerobot.open_dataset(leftover)
    assert write(tmp_path / "d", episode(3)).num_frames == 3
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_damaged_copy_is_noticed_by_the_reader(tmp_path):
    dataset = write(tmp_path / "d", episode(3), episode(4))
    shutil.copy(dataset.path / EPISODES, dataset.path / DATA)
    with pytest.raises(ValueError, match="expected 7 rows, found 2"):
        lerobot.open_dataset(dataset.path)
