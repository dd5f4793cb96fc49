import json
import resource
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from policymix.data import lerobot
from policymix.runs import split_dataset
from tests.runs import episodes_support as support

LENGTHS = support.LENGTHS
# numpy's permutation of 7 with seed 42 and 1, dealt out.
DEALT = {
    (42, 2): [[0, 1, 3, 6], [2, 4, 5]],
    (42, 3): [[0, 3, 4], [1, 2], [5, 6]],
    (1, 3): [[3, 4, 5], [0, 2], [1, 6]],
}
VIDEOS = ("observation.images.top", "observation.images.wrist")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Seven episodes in several data files."""
    return support.write(tmp_path_factory.mktemp("source") / "dataset")


def _check_complete(source, output, paths, version="v3.0"):
    """Every episode of the source is in the one split that splits.json names, to the last bit."""
    origin = lerobot.open_dataset(source)
    parts = json.loads((output / "splits.json").read_text())["episodes"]
    assert list(parts) == [path.name for path in paths]
    assert sorted(n for part in parts.values() for n in part) == list(range(origin.num_episodes))
    for path in paths:
        part, chosen = lerobot.open_dataset(path), parts[path.name]
        assert chosen == sorted(chosen)
        assert (part.version, part.fps, part.robot_type) == (version, origin.fps, origin.robot_type)
        assert list(part.features) == list(origin.features)
        assert part.num_episodes == len(chosen)
        for new, old in enumerate(chosen):
            support.check_same(support.episode(part, new), support.episode(origin, old))
        assert set(part.tasks) == {part.tasks[n] for n in part.column("task_index")}
        if version == "v3.0":
            support.check_statistics(part, json.loads((path / "meta/stats.json").read_text()))


def test_splits_are_disjoint_complete_and_whole(source, tmp_path, capsys):
    output = tmp_path / "out"
    paths = split_dataset.split(source, output, num_splits=3)
    assert paths == [output / f"split_{i}" for i in range(3)]
    assert sorted(p.name for p in output.iterdir()) == ["split_0", "split_1", "split_2",
                                                        "splits.json"]  # fmt: skip
    _check_complete(source, output, paths)
    assert lerobot.open_dataset(paths[0]).features == lerobot.open_dataset(source).features
    sizes = [lerobot.open_dataset(path).num_episodes for path in paths]
    assert sorted(sizes) == [2, 2, 3]
    said = json.loads((output / "splits.json").read_text())
    fingerprint = lerobot.open_dataset(source).fingerprint()
    assert said["source"] == {"path": str(source), "fingerprint": fingerprint}
    assert (said["seed"], said["sort_by"]) == (42, "")
    assert "split_2: 2 episodes" in capsys.readouterr().out


@pytest.mark.parametrize("codec", ["av1", "h264"])
@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_videos_are_split_bit_by_bit(tmp_path, version, codec, capsys):
    options = {"video": VIDEOS, "version": version, "codec": codec}
    source = support.write(tmp_path / "source", **options)
    paths = split_dataset.split(source, tmp_path / "out", num_splits=2)
    _check_complete(source, tmp_path / "out", paths, version)
    assert f"observation.images.top: {codec}, copied" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["pusht_v30_video", "pusht_v21_video", "pusht_v30_multifile_image"]
)
def test_lerobots_own_datasets(name, tmp_path, request):
    source = request.config.rootpath / "tests/testdata/lerobot" / name
    paths = split_dataset.split(source, tmp_path / "out")
    _check_complete(source, tmp_path / "out", paths, "v2.1" if "v21" in name else "v3.0")
    stats = (
        json.loads((tmp_path / "out/split_0/meta/stats.json").read_text()) if "v30" in name else {}
    )
    if "image" in name:  # LeRobot 0.4.4 says 0.0
        assert min(np.ravel(stats["observation.image"]["std"])) > 0.01


def test_a_version_can_be_chosen(source, tmp_path):
    paths = split_dataset.split(source, tmp_path / "out", num_splits=2, version="v2.1")
    _check_complete(source, tmp_path / "out", paths, "v2.1")
    with pytest.raises(ValueError, match=r"version is 'v2.2'; expected one of v3.0, v2.1"):
        split_dataset.split(source, tmp_path / "other", version="v2.2")


def test_a_split_without_a_task_does_not_list_it(source, tmp_path):
    paths = split_dataset.split(source, tmp_path / "out", num_splits=7)
    tasks = [lerobot.open_dataset(path).tasks for path in paths]
    assert sorted(map(sorted, tasks)) == [["even", "last"]] * 4 + [["last", "odd"]] * 3


@pytest.mark.parametrize(("seed", "num_splits"), DEALT)
def test_the_seed_decides_who_goes_where_on_every_machine(source, seed, num_splits):
    dataset = lerobot.open_dataset(source)
    assert split_dataset.assign(dataset, num_splits, seed) == DEALT[seed, num_splits]


def test_workers_change_nothing(source, tmp_path):
    prints = []
    for workers in (1, 4):
        paths = split_dataset.split(
            source, tmp_path / str(workers), num_splits=2, seed=5, num_workers=workers
        )
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
        ("episode_index", [[0, 1, 2], [3, 4], [5, 6]]),
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
    ("fractions", "parts"),
    [  # of 7 episodes
        (["0.8", "0.2"], {"split_0": [0, 1, 2, 3, 4], "split_1": [5, 6]}),
        (["train=0.5", "val=0.3"], {"train": [0, 1, 2], "val": [3, 4]}),
        (["train=0.5", "val=.25", "test=.25"], {"train": [0, 1, 2], "val": [3], "test": [4, 5, 6]}),
    ],
)
def test_fractions_by_lerobots_rule(source, tmp_path, fractions, parts, capsys):
    output = tmp_path / "out"
    paths = split_dataset.split(source, output, fractions=fractions, sort_by="episode_index")
    assert [path.name for path in paths] == list(parts)
    assert json.loads((output / "splits.json").read_text())["episodes"] == parts
    left = 7 - sum(map(len, parts.values()))
    assert (f"{left} episodes are in no split" in capsys.readouterr().out) == (left > 0)


def test_fractions_of_the_shuffled_order(source):
    dataset = lerobot.open_dataset(source)
    parts = split_dataset.of_fractions(dataset, {"a": 0.5, "b": 0.5}, seed=42)
    order = np.random.default_rng(42).permutation(7)
    assert parts == {"a": sorted(order[:3].tolist()), "b": sorted(order[3:].tolist())}


def test_lists_of_episodes(source, tmp_path):
    output = tmp_path / "out"
    lists = ["train=0:3,6", "val=4, 3"]
    split_dataset.split(source, output, lists=lists, num_splits=2)
    said = json.loads((output / "splits.json").read_text())
    assert said["episodes"] == {"train": [0, 1, 2, 6], "val": [3, 4]}
    assert said["seed"] is None
    part, origin = (lerobot.open_dataset(path) for path in (output / "val", source))
    support.check_same(support.episode(part, 1), support.episode(origin, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_splits": 1}, "num_splits is 1; .* has 7 episodes, so 2..7"),
        ({"num_splits": 8}, "num_splits is 8"),
        ({"sort_by": "speed"}, "no numbers called 'speed'; it has"),
        ({"sort_by": "note"}, "no numbers called 'note'"),
        ({"sort_by": VIDEOS[0]}, "no numbers called 'observation.images.top'"),
        ({"sort_by": "observation.state[2]"}, r"shape \[2\]; write observation.state\[0\] to "),
        ({"sort_by": "observation.state"}, r"write observation.state\[0\] to observation.state\["),
        ({"sort_by": "next.reward[1]"}, r"shape \[1\]; write next.reward$"),
        ({"fractions": ["0.8", "0.3"]}, r"fractions are \[0.8, 0.3\]; expected .* add up to 1"),
        ({"fractions": ["0.8", "-0.3"]}, "expected numbers above 0"),
        ({"fractions": ["0.9", "b=0.1", "c=some"]}, "'some' is no number"),
        ({"fractions": ["a=0.9", "b=0.1", "a=0.1"]}, "'a' names no split, or two"),
        ({"fractions": ["../a=0.9", "b=0.1"]}, "'../a' names no split"),
        ({"fractions": ["a=0.1", "b=0.9"]}, "fraction 0.1 of the 7 episodes .* none for a"),
        ({"fractions": ["0.5"], "lists": ["a=1"]}, "neither fractions nor sort_by"),
        ({"fractions": ["0.5", "0.5"], "num_splits": 3}, "num_splits is 3, but fractions are .* 2"),
        ({"lists": ["a=1", "b=2"], "num_splits": 4}, "num_splits is 4, but episodes are .* for 2"),
        ({"lists": ["a=0:4", "b=3,5"]}, "episodes 3 are in a and in b; splits share no episode"),
        ({"lists": ["a=0:4", "b=7"]}, r"episodes=b='7': '7' names .* has 0..6"),
        ({"lists": ["a=0:4", "b=5-6"]}, "'5-6' is neither a number nor a range; write 3,5:8"),
        ({"lists": ["a=0:4", "b="]}, "episodes=b has none"),
        ({"lists": ["a=4:4"]}, r"'4:4' names episodes that"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        split_dataset.split(source, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


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


def test_a_fault_of_the_source_is_told_by_its_own_episode(tmp_path):
    source = support.write(tmp_path / "source", data_files_size_in_mb=100)
    path = source / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    rows = table[VIDEOS[0]].to_pylist()
    rows[sum(LENGTHS[:4])]["bytes"] = rows[0]["bytes"][:40]  # the first frame of episode 4
    place, field = table.schema.get_field_index(VIDEOS[0]), table.schema.field(VIDEOS[0])
    pq.write_table(table.set_column(place, field, pa.array(rows, field.type)), path)
    message = rf"^{source}, episode 4: '{VIDEOS[0]}', frame 0: 40 bytes"
    with pytest.raises(ValueError, match=message):
        split_dataset.split(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("size", [4, 1000])
def test_row_groups_of_any_size(source, tmp_path, size):
    """Converters do not write one for each episode."""
    origin = shutil.copytree(source, tmp_path / "source")
    for path in (origin / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=size)
    paths = split_dataset.split(origin, tmp_path / "out", num_splits=3, num_workers=4)
    _check_complete(source, tmp_path / "out", paths)


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_a_missing_or_truncated_video_is_told(tmp_path, version):
    source = support.write(tmp_path / "source", video=VIDEOS, version=version)
    path = sorted((source / "videos").rglob("*.mp4"))[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"^{source}, episode \d.*{path}"):
        split_dataset.split(source, tmp_path / "out", num_splits=2)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"^{source}, episode \d.*{path}.*no such file"):
        split_dataset.split(source, tmp_path / "out", num_splits=2, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_open_files_that_are_too_few_are_told_before_the_work(tmp_path):
    source = support.write(tmp_path / "source", video=VIDEOS)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"7 datasets at a time .* allows 100: .* ulimit -n 106,"):
            split_dataset.split(source, tmp_path / "out", num_splits=7)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_record_files_go_with_their_episodes(source, tmp_path):
    origin = shutil.copytree(source, tmp_path / "source")
    lines = [f"episode_{number:06d}.mp4,operator {number}" for number in range(7)]
    (origin / "meta/v1_record.csv").write_text("\n".join(["video,who", *lines]) + "\n")
    (origin / "meta/setup_record.csv").write_text("camera,lens\ntop,8 mm\n")
    lists = ["a=2,5", "b=0:2"]
    split_dataset.split(origin, tmp_path / "out", lists=lists)
    meta = tmp_path / "out" / "a" / "meta"
    assert (meta / "v1_record.csv").read_text().splitlines() == [
        "video,who", "episode_000000.mp4,operator 2", "episode_000001.mp4,operator 5",
    ]  # fmt: skip
    assert (meta / "setup_record.csv").read_text() == "camera,lens\ntop,8 mm\n"
    (origin / "meta/v1_record.csv").write_text('video,who\n"episode_000000.mp4\n')
    with pytest.raises(ValueError, match=r"v1_record.csv is no table"):
        split_dataset.split(origin, tmp_path / "other", lists=lists)
    assert not (tmp_path / "other").exists()
