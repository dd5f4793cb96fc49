"""Datasets written here, opened by LeRobot itself.

POLICYMIX_LEROBOT_PYTHON names the Python interpreters that have it, with ":" between them: LeRobot
0.4 reads version 3.0 of the format, 0.3 version 2.1.
"""

import functools
import os
import pathlib
import subprocess

import numpy as np
import pytest

from policymix.data import lerobot, video_files, writer

VARIABLE = "POLICYMIX_LEROBOT_PYTHON"
SCRIPT = pathlib.Path(__file__).with_name("lerobot_items.py")
FPS = 10
LENGTHS = (10, 7, 12)
TASKS = ("push the block", "lift it", "push the block")
pytestmark = pytest.mark.slow


@functools.cache
def interpreters():
    """{version of the format: interpreter}"""
    paths = [path for path in os.environ.get(VARIABLE, "").split(":") if path]
    return {run(path, "version").strip(): path for path in paths}


def run(interpreter, *args):
    found = subprocess.run(
        [interpreter, SCRIPT, *map(str, args)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


def interpreter(version):
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} names no Python with LeRobot")
    if version not in interpreters():
        pytest.skip(f"no LeRobot of {VARIABLE} reads {version}, only {sorted(interpreters())}")
    return interpreters()[version]


def features(dtype):
    picture = {"dtype": dtype, "shape": [48, 64, 3], "names": ["height", "width", "channel"]}
    return {
        "observation.images.top": picture,
        "observation.images.wrist": picture,
        "observation.state": {"dtype": "float32", "shape": [3], "names": {"motors": list("xyz")}},
        "action": {"dtype": "float32", "shape": [2], "names": None},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        "map": {"dtype": "float32", "shape": [2, 3], "names": None},
    }


def episode(number):
    rng, length = np.random.default_rng(number), LENGTHS[number]
    y, x = np.mgrid[:48, :64]
    phases = np.arange(length)[:, None, None] / 4
    planes = [np.sin(x / (9 + c) + phases + number) * np.cos(y / (7 + c)) for c in range(3)]
    images = (127.5 + 120 * np.stack(planes, -1)).astype(np.uint8)
    return {
        "observation.images.top": images,
        "observation.images.wrist": images[:, ::-1],
        "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
        "next.done": np.arange(length) == length - 1,
        "map": rng.normal(size=(length, 2, 3)).astype(np.float32),
    }


def write(path, dtype, without=(), **options):
    kept = {name: f for name, f in features(dtype).items() if name not in without}
    with writer.Writer(path, fps=FPS, features=kept, **options) as opened:
        for number, task in enumerate(TASKS):
            arrays = {name: values for name, values in episode(number).items() if name in kept}
            opened.add_episode(arrays, task)
    return lerobot.open_dataset(path)


def copy(path, source, **options):
    """The same episodes with their videos as clips."""
    cameras = [key for key in source.features if "images" in key]
    stored = source.episode_stats()
    with writer.Writer(path, fps=FPS, features=features("video"), **options) as opened:
        for number, task in enumerate(TASKS):
            arrays = episode(number)
            for key in cameras:
                file, first = source.clip(key, number)
                arrays[key] = video_files.Clip(file, first, LENGTHS[number], FPS)
            opened.add_episode(arrays, task, {key: stored[number][key] for key in cameras})
    return lerobot.open_dataset(path)


def check(dataset, found):
    """That LeRobot's items are what was written, episode by episode."""
    episodes = [episode(number) for number in range(3)]
    written = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}
    for key in {"observation.state", "action", "next.done", "map"} & dataset.features.keys():
        np.testing.assert_array_equal(
            found[f"plain/{key}"].reshape(written[key].shape), written[key]
        )
    assert found["plain/task"].tolist() == list(np.repeat(TASKS, LENGTHS))
    assert found["episodes"] == 3
    ends = np.cumsum(LENGTHS)
    last = np.repeat(ends - 1, LENGTHS)
    rows = np.minimum(np.arange(ends[-1])[:, None] + np.arange(3), last[:, None])
    np.testing.assert_array_equal(found["around/action"], written["action"][rows])
    exact = dataset.features["observation.images.top"]["dtype"] == "image"
    for key in ("observation.images.top", "observation.images.wrist"):
        images = np.moveaxis(np.round(255 * found[f"plain/{key}"]), 1, -1)
        ours = dataset.frames(key).get(np.arange(dataset.num_frames)).astype(float)
        assert np.abs(images - ours).max() <= (0 if exact else 3)  # of another FFmpeg's rounding
        check_pictures(images, written[key], exact)
        before = np.maximum(np.arange(ends[-1]) - 1, np.repeat(ends - LENGTHS, LENGTHS))
        around = found[f"around/{key}"]
        np.testing.assert_array_equal(around[:, 1], found[f"plain/{key}"])
        np.testing.assert_array_equal(around[:, 0], found[f"plain/{key}"][before])


def check_pictures(found, written, exact):
    """Each is the one that was written there; of a video more like it than like its neighbours."""
    off = np.abs(found - written).mean((1, 2, 3))
    assert off.max() <= (0 if exact else 8)
    for first, length in zip(np.cumsum(LENGTHS) - LENGTHS, LENGTHS, strict=True):
        episode_off = off[first + 1 : first + length]
        shifted = found[first + 1 : first + length] - written[first : first + length - 1]
        assert (episode_off < np.abs(shifted).mean((1, 2, 3))).all()


def check_stats(found):
    states = np.concatenate([episode(number)["observation.state"] for number in range(3)])
    for name, expected in (
        ("mean", states.mean(0)),
        ("std", states.std(0)),
        ("max", states.max(0)),
    ):
        np.testing.assert_allclose(found[f"stats/observation.state/{name}"], expected, rtol=1e-5)
    pixels = (
        np.concatenate([episode(number)["observation.images.top"] for number in range(3)]) / 255
    )
    for name, expected in (("mean", pixels.mean((0, 1, 2))), ("std", pixels.std((0, 1, 2)))):
        ours = found[f"stats/observation.images.top/{name}"].ravel()
        np.testing.assert_allclose(ours, expected, atol=0.01)


WRITTEN = {
    "images": ("image", {}),
    "av1": ("video", {}),
    "h264": ("video", {"codec": "h264"}),
    "small files": ("video", {"video_files_size_in_mb": 0.01, "data_files_size_in_mb": 0.01}),
}
COPIED = [(version, codec) for version in ("v3.0", "v2.1") for codec in ("av1", "h264")]


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Version → {case: (dataset, its items by LeRobot)}: LeRobot is started once for all cases."""

    @functools.cache
    def read_all(version):
        python, folder = interpreter(version), tmp_path_factory.mktemp("written")
        datasets = {
            case: write(folder / case, dtype, version=version, **options)
            for case, (dtype, options) in WRITTEN.items()
        }
        for source, codec in COPIED:
            original = write(folder / f"{source}-{codec}", "video", version=source, codec=codec)
            case = f"copied {source}-{codec}"
            datasets[case] = copy(folder / case, original, version=version, codec=codec)
            check_equal(datasets[case], original)
        run(python, "items", *(dataset.path for dataset in datasets.values()))
        return {case: (found, np.load(f"{found.path}.npz")) for case, found in datasets.items()}

    return read_all


def check_equal(dataset, source):
    every = np.arange(dataset.num_frames)
    for key in dataset.camera_keys:
        np.testing.assert_array_equal(dataset.frames(key).get(every), source.frames(key).get(every))


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
@pytest.mark.parametrize("case", [*WRITTEN, *(f"copied {v}-{c}" for v, c in COPIED)])
def test_lerobot_reads_what_was_written(case, version, read):
    dataset, found = read(version)[case]
    check(dataset, found)
    check_stats(found)


def test_lerobot_converts_version_21(tmp_path):
    python, cases = interpreter("v3.0"), {"v": "video", "i": "image"}
    for name, dtype in cases.items():
        # LeRobot's converter cannot join tables with features of two dimensions.
        write(tmp_path / name, dtype, without=("map",), version="v2.1")
    folders = [tmp_path / name for name in cases]
    run(python, "convert", *folders)
    run(python, "items", *folders)
    for folder in folders:
        dataset = lerobot.open_dataset(folder)
        assert dataset.version == "v3.0"
        with np.load(f"{folder}.npz") as found:
            check(dataset, found)
            check_stats(found)
            assert found["stats/action/q99"].shape == (2,)  # which LeRobot's own 2.1 has not
