import json

import numpy as np
import pytest

from policymix.data import lerobot, pictures, writer
from policymix.runs import split_dataset

LENGTHS = (3, 5, 4, 6, 2, 4, 3)
FEATURES = {
    "observation.image": {
        "dtype": "image",
        "shape": [4, 5, 3],
        "names": ["height", "width", "channel"],
    },
    "observation.state": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
    "action": {"dtype": "float32", "shape": [2], "names": None},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "note": {"dtype": "string", "shape": [1], "names": None},
}
FIRST_X = (5, 1, 4, 0, 6, 2, 3)  # of every episode's state


def _episode(number):
    rng, length = np.random.default_rng(number), LENGTHS[number]
    state = rng.normal(size=(length, 2)).astype(np.float32)
    state[0] = FIRST_X[number], -number
    return {
        "observation.image": rng.integers(0, 256, (length, 4, 5, 3), dtype=np.uint8),
        "observation.state": state,
        "action": rng.normal(size=(length, 2)),
        "next.reward": np.full(length, number),
        "note": [f"{number}/{frame}" for frame in range(length)],
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Seven episodes in several data files; task "odd" or "even", and "last" in the last frame."""
    path = tmp_path_factory.mktemp("source") / "dataset"
    with writer.Writer(
        path, fps=20, features=FEATURES, robot_type="arm", data_files_size_in_mb=0.005
    ) as opened:
        for number, length in enumerate(LENGTHS):
            task = ["odd" if number % 2 else "even"] * (length - 1) + ["last"]
            opened.add_episode(_episode(number), task)
    assert len(list(path.glob("data/*/*"))) > 1
    return path


def _notes(path):
    return lerobot.open_dataset(path).column("note").tolist()


def _check_complete(source, output, paths):
    """Every episode of the source is in the one split that splits.json names, value by value."""
    origin = lerobot.open_dataset(source)
    images = pictures.load(origin, "observation.image")
    episodes = json.loads((output / "splits.json").read_text())["episodes"]
    assert list(episodes) == [path.name for path in paths]
    assert sorted(n for part in episodes.values() for n in part) == list(range(len(LENGTHS)))
    for path in paths:
        part, chosen = lerobot.open_dataset(path), episodes[path.name]
        assert chosen == sorted(chosen)
        assert (part.version, part.fps, part.info["robot_type"]) == ("v3.0", 20, "arm")
        assert part.features == origin.features
        frames = np.concatenate(
            [np.arange(origin.episode_from[n], origin.episode_to[n]) for n in chosen]
        )
        own = ("index", "episode_index", "task_index")
        for name in (*origin.numeric_keys, "note"):
            if name not in own:
                np.testing.assert_array_equal(part.column(name), origin.column(name)[frames])
        np.testing.assert_array_equal(pictures.load(part, "observation.image"), images[frames])
        tasks = [part.tasks[n] for n in part.column("task_index")]
        assert tasks == [origin.tasks[n] for n in origin.column("task_index")[frames]]
        assert set(part.tasks) == set(tasks)
        stats = json.loads((path / "meta" / "stats.json").read_text())
        mean = part.column("action").astype(float).mean(0)
        np.testing.assert_allclose(stats["action"]["mean"], mean, rtol=1e-12)


def test_splits_are_disjoint_complete_and_whole(source, tmp_path, capsys):
    output = tmp_path / "out"
    paths = split_dataset.split(source, output, num_splits=3)
    assert paths == [output / f"split_{i}" for i in range(3)]
    assert sorted(p.name for p in output.iterdir()) == ["split_0", "split_1", "split_2",
                                                        "splits.json"]  # fmt: skip
    _check_complete(source, output, paths)
    sizes = [lerobot.open_dataset(path).num_episodes for path in paths]
    assert sorted(sizes) == [2, 2, 3]
    said = json.loads((output / "splits.json").read_text())
    fingerprint = lerobot.open_dataset(source).fingerprint()
    assert said["source"] == {"path": str(source), "fingerprint": fingerprint}
    assert (said["seed"], said["sort_by"]) == (42, "")
    assert "split_2: 2 episodes" in capsys.readouterr().out


def test_a_split_without_a_task_does_not_list_it(source, tmp_path):
    paths = split_dataset.split(source, tmp_path / "out", num_splits=7)
    tasks = [lerobot.open_dataset(path).tasks for path in paths]
    assert sorted(map(sorted, tasks)) == [["even", "last"]] * 4 + [["last", "odd"]] * 3


def test_the_seed_decides_who_goes_where(source, tmp_path):
    def parts(seed):
        return split_dataset.assign(lerobot.open_dataset(source), 3, seed)

    assert parts(1) == parts(1)
    assert parts(1) != parts(2)
    shuffled = np.random.default_rng(1).permutation(7)
    assert parts(1)[0] == sorted(shuffled[[0, 3, 6]].tolist())
    prints = []
    for name in "ab":
        paths = split_dataset.split(source, tmp_path / name, num_splits=2, seed=5)
        prints.append([lerobot.open_dataset(path).fingerprint() for path in paths])
    assert prints[0] == prints[1]
    assert prints[0][0] != prints[0][1]


@pytest.mark.parametrize(
    ("sort_by", "parts"),
    [
        ("observation.state[0]", [[1, 3, 5], [2, 6], [0, 4]]),
        ("observation.state[1]", [[4, 5, 6], [2, 3], [0, 1]]),
        ("next.reward", [[0, 1, 2], [3, 4], [5, 6]]),
        ("next.reward[0]", [[0, 1, 2], [3, 4], [5, 6]]),
    ],
)
def test_sorted_splits_hold_a_region_each(source, sort_by, parts):
    dataset = lerobot.open_dataset(source)
    assert split_dataset.assign(dataset, 3, sort_by=sort_by) == parts


def test_sorted_splits_are_complete_too(source, tmp_path):
    output = tmp_path / "out"
    options = {"num_splits": 2, "sort_by": "observation.state[0]"}
    _check_complete(source, output, split_dataset.split(source, output, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_splits": 1}, "num_splits is 1; .* has 7 episodes, so 2..7"),
        ({"num_splits": 8}, "num_splits is 8"),
        ({"sort_by": "speed"}, "no numbers called 'speed'; it has"),
        ({"sort_by": "note"}, "no numbers called 'note'"),
        ({"sort_by": "observation.image[0]"}, "no numbers called 'observation.image'"),
        ({"sort_by": "observation.state[2]"}, r"shape \[2\]; write observation.state\[0\] to "),
        ({"sort_by": "observation.state"}, r"write observation.state\[0\] to observation.state\["),
        ({"sort_by": "next.reward[1]"}, r"shape \[1\]; write next.reward$"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        split_dataset.split(source, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_videos_are_refused_by_name(tmp_path, request):
    testdata = request.config.rootpath / "tests/testdata/lerobot"
    for name in ("pusht_v30_video", "pusht_v21_video"):
        with pytest.raises(ValueError, match=r"the videos \['observation.image'\], and videos"):
            split_dataset.split(testdata / name, tmp_path / "out")


def test_a_dry_run_touches_nothing(source, tmp_path, capsys):
    split_dataset.split(source, tmp_path / "out", dry_run=True)
    out = capsys.readouterr().out
    assert "split_3: 1 episodes" in out
    assert "nothing was written" in out
    assert not list(tmp_path.iterdir())


def test_only_its_own_output_is_replaced(source, tmp_path):
    output = tmp_path / "out"
    split_dataset.split(source, output, num_splits=3)
    with pytest.raises(FileExistsError, match="--overwrite"):
        split_dataset.split(source, output, num_splits=2)
    split_dataset.split(source, output, num_splits=2, overwrite=True)
    assert not (output / "split_2").exists()
    (output / "splits.json").unlink()
    with pytest.raises(FileExistsError, match="not written by this command"):
        split_dataset.split(source, output, num_splits=2, overwrite=True)
    with pytest.raises(ValueError, match="overlaps the input"):
        split_dataset.split(source, source / "splits", num_splits=2)


def test_a_fault_of_the_source_is_told_by_its_own_episode(source, tmp_path, monkeypatch):
    image = pictures.png(np.zeros((4, 5, 3), np.uint8))
    broken = [image] * sum(LENGTHS)
    broken[sum(LENGTHS[:4])] = image[:40]  # the first frame of episode 4
    monkeypatch.setattr(pictures, "stored", lambda *_: iter(broken))
    message = rf"^{source}, episode 4: 'observation.image', frame 0: 40 bytes"
    with pytest.raises(ValueError, match=message):
        split_dataset.split(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
