"""Small datasets of everything that a dataset can hold, and what makes two episodes the same."""

import numpy as np

from policymix.data import writer

LENGTHS = (3, 5, 4, 6, 2, 4, 3)
HEIGHT, WIDTH = 48, 64
_CAMERA = {"shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channel"]}
FEATURES = {
    "observation.images.top": {"dtype": "image"} | _CAMERA,
    "observation.images.wrist": {"dtype": "image"} | _CAMERA,
    "observation.state": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
    "contacts": {"dtype": "float64", "shape": [2, 3], "names": None},
    "action": {"dtype": "float32", "shape": [2], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "note": {"dtype": "string", "shape": [1], "names": None},
}
FIRST_X = (5, 1, 4, 0, 6, 2, 3)  # of every episode's state
ITS_OWN = ("index", "episode_index", "task_index")  # what is numbered anew


def arrays(number):
    """The values of an episode; its pictures move smoothly, as videos do."""
    rng, length = np.random.default_rng(number), LENGTHS[number]
    state = rng.normal(size=(length, 2)).astype(np.float32)
    state[0] = FIRST_X[number], -number
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    ramps = [(3 * columns + 30 * number + 5 * frame) % 256 for frame in range(length)]
    top = np.stack([np.stack([ramp, 4 * rows, 255 - ramp], -1) for ramp in ramps])
    return {
        "observation.images.top": top.astype(np.uint8),
        "observation.images.wrist": np.ascontiguousarray(top[:, ::-1]).astype(np.uint8),
        "observation.state": state,
        "contacts": rng.normal(size=(length, 2, 3)),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
        "next.done": np.arange(length) == length - 1,
        "next.reward": np.full(length, number, np.float32),
        "note": [f"{number}/{frame}" for frame in range(length)],
    }


def features(video=()):
    return {k: f | {"dtype": "video"} if k in video else f for k, f in FEATURES.items()}


def write(path, numbers=range(7), *, video=(), **options):
    """A dataset of these episodes; tasks are "odd" or "even", and "last" in the last frame."""
    options = {"fps": 20, "robot_type": "arm", "data_files_size_in_mb": 0.02} | options
    with writer.Writer(path, features=features(video), **options) as opened:
        for number in numbers:
            task = ["odd" if number % 2 else "even"] * (LENGTHS[number] - 1) + ["last"]
            opened.add_episode(arrays(number), task)
    return path


def episode(dataset, number, *, but=()):
    """All that a dataset says of one of its episodes, pictures decoded."""
    frames = np.arange(dataset.episode_from[number], dataset.episode_to[number])
    found = {"task": [dataset.tasks[n] for n in dataset.column("task_index")[frames]]}
    for name in dataset.features:
        if name in dataset.camera_keys:
            found[name] = dataset.frames(name).get(frames)
        elif name not in ITS_OWN:
            found[name] = dataset.column(name)[frames]
    return {name: value for name, value in found.items() if name not in but}


def check_same(mine, theirs):
    """Both as `episode` tells; arrays of the same type and equal to the last bit."""
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        assert np.asarray(value).dtype == np.asarray(theirs[name]).dtype, name
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def check_statistics(dataset, told):
    """stats.json against the numbers themselves."""
    for name in dataset.numeric_keys:
        values = dataset.column(name).astype(np.float64)
        values = values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
        found = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0),
                 "max": values.max(0), "count": [dataset.num_frames]}  # fmt: skip
        for stat, value in found.items():
            np.testing.assert_allclose(
                np.asarray(told[name][stat], float), value, rtol=1e-6, atol=1e-9, err_msg=name
            )
