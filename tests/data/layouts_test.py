"""Datasets with videos, and version 2.1: what the writer lays down, beside what LeRobot did."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from policymix.data import lerobot, pictures, statistics, video_files, writer
from policymix.data.video_files import Clip

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata" / "lerobot"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
FPS = 10
TOP, WRIST = "observation.images.top", "observation.images.wrist"
VIDEO = {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channel"]}
FEATURES = {
    TOP: VIDEO,
    WRIST: VIDEO | {"shape": [3, 32, 40], "names": ["channels", "height", "width"]},
    "action": {"dtype": "float32", "shape": [2], "names": None},
}
BOTH = pytest.mark.parametrize("version", ["v3.0", "v2.1"])


def images(length, seed=0, shape=(48, 64)):
    """Smooth colours that move: uint8 [length, hh, ww, 3]."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    phases = np.arange(length)[:, None, None] / 3 + seed
    planes = [np.sin(x / (9 + c) + phases) * np.cos(y / (7 + c)) for c in range(3)]
    return (127.5 + 90 * np.stack(planes, -1)).astype(np.uint8)


def episode(length, seed=0):
    return {
        TOP: images(length, seed),
        WRIST: np.moveaxis(images(length, seed + 5, (32, 40)), -1, 1),
        "action": np.random.default_rng(seed).normal(size=(length, 2)).astype(np.float32),
    }


def write(path, *episodes, features=FEATURES, task="push", stats=None, fps=FPS, **options):
    with writer.Writer(path, fps=fps, features=features, **options) as opened:
        for number, arrays in enumerate(episodes):
            opened.add_episode(arrays, task, stats and stats[number])
    return lerobot.open_dataset(path)


def frames(dataset, key):
    return dataset.frames(key).get(np.arange(dataset.num_frames))


def clips(source):
    """A dataset's episodes with its videos as clips."""
    given = [name for name in source.features if name not in writer.AUTOMATIC]
    for number, (first, last) in enumerate(
        zip(source.episode_from, source.episode_to, strict=True)
    ):
        arrays = {n: source.column(n)[first:last] for n in given if n not in source.camera_keys}
        for key in source.camera_keys:
            path, start = source.clip(key, number)
            arrays[key] = Clip(path, start, int(last - first), source.fps)
        yield arrays


def copy(path, source, like=None, **options):
    """The source's episodes as clips, with the pictures' statistics of `like`."""
    features = {n: f for n, f in source.features.items() if n not in writer.AUTOMATIC}
    arrays = list(clips(source))
    stored = (like or source).episode_stats()
    stats = [{key: row[key] for key in source.camera_keys} for row in stored]
    robot, task = source.info["robot_type"], source.tasks[0]
    return write(
        path, *arrays, features=features, robot_type=robot, task=task, stats=stats, **options
    )


@BOTH
@pytest.mark.parametrize("codec", video_files.CODECS)
def test_videos_are_read_back(codec, version, tmp_path):
    episodes = [episode(10, 1), episode(1, 2), episode(7, 3)]
    dataset = write(tmp_path / "d", *episodes, version=version, codec=codec)
    assert (dataset.version, dataset.num_frames) == (version, 18)
    for key in (TOP, WRIST):
        written = np.concatenate([arrays[key] for arrays in episodes]).astype(float)
        written = written if key == TOP else np.moveaxis(written, 1, -1)
        off = np.abs(frames(dataset, key) - written).mean((1, 2, 3))
        assert off.max() < np.abs(np.diff(written[:10], axis=0)).mean() / 2
    actions = np.concatenate([arrays["action"] for arrays in episodes])
    np.testing.assert_array_equal(dataset.column("action"), actions)
    assert dataset.features[WRIST]["info"] == {
        "video.height": 32,
        "video.width": 40,
        "video.codec": codec,
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": FPS,
        "video.channels": 3,
        "has_audio": False,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_copied_dataset_is_the_one_that_lerobot_wrote(tmp_path):
    source = lerobot.open_dataset(TESTDATA / "pusht_v30_video")
    dataset = copy(tmp_path / "d", source)
    assert dataset.info == source.info
    assert list(dataset.info) == list(source.info)
    ours, theirs = (pq.read_table(d.path / EPISODES) for d in (dataset, source))
    assert ours.schema.equals(theirs.schema)
    for name in theirs.column_names:
        if not name.startswith("stats/"):
            found, expected = ours[name].to_pylist(), theirs[name].to_pylist()
            assert found == (expected if name == "tasks" else pytest.approx(expected, abs=1e-9))
    key = "observation.image"
    for name in ("mean", "count", "q50"):  # its deviation is zero, so all is computed again
        np.testing.assert_allclose(
            ours[f"stats/{key}/{name}"].to_pylist(),
            theirs[f"stats/{key}/{name}"].to_pylist(),
            atol=0.03,  # theirs are of the frames before they were encoded
        )
    np.testing.assert_array_equal(frames(dataset, key), frames(source, key))


def test_a_dataset_of_version_21_is_as_lerobot_wrote_it(tmp_path):
    source = lerobot.open_dataset(TESTDATA / "pusht_v30_video")
    reference = TESTDATA / "pusht_v21_video"
    dataset = copy(tmp_path / "d", source, lerobot.open_dataset(reference), version="v2.1")
    for name in ("meta/tasks.jsonl", "meta/episodes.jsonl"):
        assert (dataset.path / name).read_text() == (reference / name).read_text()
    info = json.loads((reference / "meta/info.json").read_text())
    assert dataset.info == info
    assert list(dataset.info) == list(info)
    for number in range(8):
        name = f"data/chunk-000/episode_{number:06d}.parquet"
        ours, theirs = (pq.ParquetFile(folder / name) for folder in (dataset.path, reference))
        assert ours.schema_arrow.equals(theirs.schema_arrow)
        described = [json.loads(f.schema_arrow.metadata[b"huggingface"]) for f in (ours, theirs)]
        assert described[0] == described[1]
        assert ours.read().equals(theirs.read())
    lines = [
        [json.loads(line) for line in (folder / "meta/episodes_stats.jsonl").open()]
        for folder in (dataset.path, reference)
    ]
    for ours, theirs in zip(*lines, strict=True):
        assert ours["episode_index"] == theirs["episode_index"]
        assert list(ours["stats"]) == list(theirs["stats"])
        for key, stats in theirs["stats"].items():
            kept = key == "observation.image"  # LeRobot's own, which have no quantiles
            names = statistics.MOMENTS if kept else statistics.NAMES
            assert tuple(ours["stats"][key]) == names
            for name, value in stats.items():
                tolerance = 0 if kept else 1e-5
                np.testing.assert_allclose(ours["stats"][key][name], value, rtol=tolerance)


def test_pictures_of_version_21_are_called_as_lerobot_calls_them(tmp_path):
    features = {"top": VIDEO | {"dtype": "image"}}
    dataset = write(tmp_path / "d", {"top": images(3)}, features=features, version="v2.1")
    table = pq.read_table(dataset.path / "data/chunk-000/episode_000000.parquet")
    assert [row["path"] for row in table["top"].to_pylist()][2] == "frame_000002.png"
    np.testing.assert_array_equal(frames(dataset, "top"), images(3))
    assert (dataset.info["video_path"], dataset.info["total_videos"]) == (None, 0)


def test_episodes_share_files_until_they_are_full(tmp_path):
    episodes = [episode(10, seed) for seed in range(5)]
    size = video_files.segment(images(10), video_files.Format("av1", FPS, 48, 64), "d").size / 2**20
    dataset = write(tmp_path / "d", *episodes, video_files_size_in_mb=2.5 * size, chunks_size=2)
    table = pq.read_table(dataset.path / EPISODES)
    places = {
        name: table[f"videos/{TOP}/{name}"].to_pylist()
        for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    }
    assert places["chunk_index"] == [0, 0, 0, 0, 1]
    assert places["file_index"] == [0, 0, 1, 1, 0]
    assert places["from_timestamp"] == [0, 1, 0, 1, 0]
    assert places["to_timestamp"] == [1, 2, 1, 2, 1]
    assert table["data/file_index"].to_pylist() == [0] * 5
    together = write(tmp_path / "e", *episodes)
    np.testing.assert_array_equal(frames(dataset, TOP), frames(together, TOP))
    assert len(list(together.path.rglob("*.mp4"))) == 2


def test_clips_of_another_encoder_begin_a_file(tmp_path):
    """Their packets need other parameters, so that they cannot follow in the same file."""
    ours = write(tmp_path / "a", {"top": images(10)}, features={"top": VIDEO}, codec="h264")
    with av.open(str(tmp_path / "theirs.mp4"), "w") as file:
        stream = file.add_stream("libx264", FPS, options={"g": "12", "crf": "10"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for image in images(24, 4):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    one, two = Clip(*ours.clip("top", 0), 10, FPS), Clip(tmp_path / "theirs.mp4", 0, 24, FPS)
    dataset = write(
        tmp_path / "d",
        *({"top": clip} for clip in (one, one, two, one)),
        features={"top": VIDEO},
        codec="h264",
    )
    table = pq.read_table(dataset.path / EPISODES)
    assert table["videos/top/file_index"].to_pylist() == [0, 0, 1, 2]
    assert table["videos/top/from_timestamp"].to_pylist() == [0, 1, 0, 0]
    with av.open(str(tmp_path / "theirs.mp4")) as file:
        theirs = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    source = frames(ours, "top")
    expected = np.concatenate([source, source, theirs, source])
    np.testing.assert_array_equal(frames(dataset, "top"), expected)


@BOTH
def test_the_same_episodes_give_the_same_bytes(version, tmp_path):
    for name in "ab":
        write(tmp_path / name, episode(10, 1), episode(7, 2), version=version)
    found = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(found) == (7 if version == "v3.0" else 10)
    for file in found:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_frames_may_be_files(tmp_path):
    png = {"top": [pictures.png(image) for image in images(7)]}
    given = write(tmp_path / "a", png, features={"top": VIDEO})
    arrays = write(tmp_path / "b", {"top": images(7)}, features={"top": VIDEO})
    np.testing.assert_array_equal(frames(given, "top"), frames(arrays, "top"))
    stats = [(d.path / "meta/stats.json").read_text() for d in (given, arrays)]
    assert stats[0] == stats[1]


def stored_stats(dataset):
    return json.loads((dataset.path / "meta/stats.json").read_text())["top"]


def test_statistics_of_videos_are_of_their_pixels(tmp_path):
    episodes = [{"top": images(10, 1)}, {"top": images(6, 2)}]
    dataset = write(tmp_path / "d", *episodes, features={"top": VIDEO})
    pixels = np.concatenate([e["top"] for e in episodes]).reshape(-1, 3) / 255
    stats = stored_stats(dataset)
    for name, expected in (
        ("mean", pixels.mean(0)),
        ("std", pixels.std(0)),
        ("q10", np.quantile(pixels, 0.1, 0)),
    ):
        np.testing.assert_allclose(np.ravel(stats[name]), expected, rtol=1e-12)
    # Of clips they are of what is decoded.
    again = [{"top": Clip(*dataset.clip("top", n), k, FPS)} for n, k in ((0, 10), (1, 6))]
    stats = stored_stats(write(tmp_path / "e", *again, features={"top": VIDEO}))
    pixels = frames(dataset, "top").reshape(-1, 3) / 255
    np.testing.assert_allclose(np.ravel(stats["std"]), pixels.std(0), rtol=1e-12)
    np.testing.assert_allclose(np.ravel(stats["q90"]), np.quantile(pixels, 0.9, 0), rtol=1e-12)


def made_up(**changes):
    stats = {name: np.full((3, 1, 1), 0.25) for name in statistics.NAMES}
    return stats | {"count": np.array([4]), "max": np.ones((3, 1, 1))} | changes


def test_given_statistics_are_kept(tmp_path):
    episodes = [{"top": images(10, seed)} for seed in range(2)]
    stats = [{"top": made_up()}, {"top": made_up(mean=np.full((3, 1, 1), 0.75))}]
    dataset = write(tmp_path / "d", *episodes, features={"top": VIDEO}, stats=stats)
    assert np.ravel(stored_stats(dataset)["mean"]).tolist() == [0.5] * 3
    rows = dataset.episode_stats()
    assert np.ravel(rows[1]["top"]["mean"]).tolist() == [0.75] * 3
    assert stored_stats(dataset)["count"] == [8]
    mixed = write(tmp_path / "e", *episodes, features={"top": VIDEO}, stats=[stats[0], {}])
    assert stored_stats(mixed)["count"] == [14]


def test_given_statistics_without_quantiles_stay_without(tmp_path):
    """Version 2.1 has none, and pictures are not decoded for them."""
    stats = {name: made_up()[name] for name in statistics.MOMENTS}
    arrays, stats = {"top": images(10)}, [{"top": stats}]
    dataset = write(tmp_path / "d", arrays, features={"top": VIDEO}, stats=stats)
    assert tuple(stored_stats(dataset)) == statistics.MOMENTS
    assert pq.read_table(dataset.path / EPISODES)["stats/top/q01"].to_pylist() == [None]


@pytest.mark.parametrize("wrong", [{"std": np.zeros((3, 1, 1))}, {"mean": None}])
def test_given_statistics_that_are_worth_nothing_are_computed_again(wrong, tmp_path):
    """LeRobot 0.4 wrote a deviation of zero."""
    found = [
        stored_stats(
            write(tmp_path / name, {"top": images(9)}, features={"top": VIDEO}, stats=stats)
        )
        for name, stats in (("d", [{"top": made_up(**wrong)}]), ("e", None))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({TOP: images(5, 0, (48, 66))}, r"'observation.images.top' is uint8 \[5, 48, 66, 3\]"),
        ({TOP: images(5).astype(np.float32)}, r"images.top' is float32"),
        ({TOP: images(4)}, r"as many of every feature; found .*images.top': 4"),
        ({TOP: [b"GIF89a"] * 5}, r"images.top', frame 0: 6 bytes that are no picture"),
        ({TOP: Clip("no.mp4", 0, 5, FPS)}, r"images.top': the video no.mp4 does not exist"),
        ({TOP: Clip("no.mp4", 0, 4, FPS)}, r"as many of every feature; found .*images.top': 4"),
        ({TOP: Clip("no.mp4", 0, 5, 20)}, r"counts 20 frames per second, the dataset 10"),
    ],
)
def test_a_wrong_video_is_told_and_leaves_no_trace(change, message, tmp_path):
    with writer.Writer(tmp_path / "d", fps=FPS, features=FEATURES) as opened:
        opened.add_episode(episode(5, 1), "push")
        with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
            opened.add_episode(episode(5, 2) | change, "lift")
        assert str(raised.value).startswith(f"{tmp_path}/d, episode 1")
        opened.add_episode(episode(5, 3), "push")
    dataset = lerobot.open_dataset(tmp_path / "d")
    expected = write(tmp_path / "e", episode(5, 1), episode(5, 3))
    assert dataset.fingerprint() == expected.fingerprint()
    np.testing.assert_array_equal(frames(dataset, TOP), frames(expected, TOP))


def test_pictures_that_an_encoder_does_not_take_are_told(tmp_path):
    features = {"top": VIDEO | {"shape": [47, 64, 3]}}
    with pytest.raises(ValueError, match=r"d, episode 0: 'top': H.264 takes .* even"):
        write(tmp_path / "d", {"top": images(3, 0, (47, 64))}, features=features, codec="h264")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"action": made_up()}, r"stats are taken of the pictures \['top'\] alone, got \['action'"),
        ({"top": made_up(mean=np.ones(3))}, r"'top': statistic 'mean' is .* of shape \[3, 1, 1\]"),
        ({"top": made_up(max=np.full((3, 1, 1), np.nan))}, r"'top': statistic 'max' is .* finite"),
    ],
)
def test_wrong_statistics_are_told(stats, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "d", {"top": images(3)}, features={"top": VIDEO}, stats=[stats])


@pytest.mark.parametrize("wrong", [{"version": "v2.0"}, {"codec": "hevc"}])
def test_unknown_versions_and_codecs_are_told(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"v3.0, v2.1 and codec one of av1, h264; got") as raised:
        writer.Writer(tmp_path / "d", fps=FPS, features=FEATURES, **wrong)
    assert repr(next(iter(wrong.values()))) in str(raised.value)


PROGRAM = """
import resource, sys
import numpy as np
from policymix.data import writer
features = {"top": {"dtype": "video", "shape": [96, 96, 3], "names": None}}
noise = np.random.default_rng(0).integers(0, 256, (20, 96, 96, 3), dtype=np.uint8)
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
with writer.Writer(sys.argv[1], fps=10, features=features, version=sys.argv[3]) as opened:
    for _ in range(5 if sys.argv[2] == "full" else 10_000):
        opened.add_episode({"top": noise}, "push")
        print("one", flush=True)
"""


def start(*args):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
    )


@BOTH
def test_a_full_disk_is_told_with_the_output_and_the_episode(version, tmp_path):
    _, errors = start(tmp_path / "d", "full", version).communicate()
    told = rf"cannot write {tmp_path}/d, episode [0-9]+: File too large; make room, or write else"
    assert re.search(told, errors.splitlines()[-1])
    assert not list(tmp_path.iterdir())


@BOTH
def test_a_killed_writer_leaves_nothing_that_opens(version, tmp_path):
    with start(tmp_path / "d", "killed", version) as process:
        assert process.stdout.readline() == "one\n"
        os.kill(process.pid, signal.SIGKILL)
    (leftover,) = tmp_path.iterdir()  # hidden, and removed by the next run
    assert leftover.name.startswith(".d.partial-")
    with pytest.raises(FileNotFoundError):
        lerobot.open_dataset(leftover)
    assert write(tmp_path / "d", episode(3), version=version).num_frames == 3
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
