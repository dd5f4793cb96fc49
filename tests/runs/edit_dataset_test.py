import json
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from policymix.data import lerobot, statistics, tables
from policymix.runs import edit_dataset, label_rewards, split_dataset
from tests.runs import episodes_support as support

VIDEOS = ("observation.images.top", "observation.images.wrist")
ORIGINS = ("pusht_v30_video", "pusht_v21_video", "pusht_v30_multifile_image")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return support.write(tmp_path_factory.mktemp("source") / "dataset")


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """One camera filmed, the other's pictures kept."""
    return support.write(tmp_path_factory.mktemp("filmed") / "dataset", video=VIDEOS[:1])


def edit(operation, sources, output, **request):
    options = {k: request.pop(k) for k in ("num_workers", "overwrite", "dry_run") if k in request}
    sources = sources if isinstance(sources, list) else [sources]
    edit_dataset.run(operation, sources, output, edit_dataset.Request(**request), **options)
    return lerobot.open_dataset(output)


def _check_same(mine, theirs, numbers, *, but=()):
    """Episode k of `mine` is episode numbers[k] of `theirs`."""
    assert mine.num_episodes == len(numbers)
    for new, old in enumerate(numbers):
        found, expected = (support.episode(d, n, but=but) for d, n in ((mine, new), (theirs, old)))
        support.check_same(found, expected)


def _stats(path):
    return json.loads((path / "meta" / "stats.json").read_text())


@pytest.mark.parametrize("kind", ["source", "filmed"])
def test_a_merge_of_splits_is_the_source(kind, tmp_path, request):
    source = request.getfixturevalue(kind)
    lists = ["a=0:3", "b=3:7"]
    paths = split_dataset.split(source, tmp_path / "splits", lists=lists)
    merged, origin = edit("merge", paths, tmp_path / "merged"), lerobot.open_dataset(source)
    _check_same(merged, origin, range(7))
    assert merged.features == origin.features
    assert merged.tasks == origin.tasks
    support.check_statistics(merged, _stats(merged.path))
    data = [file.read_bytes() for file in sorted((source / "data").rglob("*.parquet"))]
    assert data == [f.read_bytes() for f in sorted((merged.path / "data").rglob("*.parquet"))]
    assert _stats(merged.path)["contacts"] == _stats(source)["contacts"]


@pytest.mark.parametrize("name", ORIGINS)
def test_lerobots_splits_merge_into_lerobots_dataset(name, tmp_path, request):
    source = request.config.rootpath / "tests/testdata/lerobot" / name
    paths = split_dataset.split(source, tmp_path / "splits", fractions=["0.6", "0.4"])
    merged, origin = edit("merge", paths, tmp_path / "merged"), lerobot.open_dataset(source)
    parts = json.loads((tmp_path / "splits/splits.json").read_text())["episodes"].values()
    _check_same(merged, origin, [n for part in parts for n in part])


def test_tasks_of_a_merge_are_united_by_sentence(tmp_path):
    one = support.write(tmp_path / "one", [1, 3])  # odd, last
    two = support.write(tmp_path / "two", [2, 5])  # even, last, odd
    merged = edit("merge", [one, two], tmp_path / "merged")
    assert merged.tasks == ["odd", "last", "even"]
    origins = [lerobot.open_dataset(path) for path in (one, two)]
    for new in range(4):
        theirs = support.episode(origins[new // 2], new % 2)
        support.check_same(support.episode(merged, new), theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 10}, "does not fit .*: fps is 10, and 20 there"),
        ({"robot_type": "leg"}, "robot_type is leg, and arm there"),
        ({"video": VIDEOS[:1]}, "feature 'observation.images.top' is "),
    ],
)
def test_different_robots_are_not_merged(source, tmp_path, options, message):
    other = support.write(tmp_path / "other", [0], **options)
    with pytest.raises(ValueError, match=message):
        edit("merge", [source, other], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("pictures", ["image", "video"])
def test_images_and_videos_are_merged_as_what_is_asked_for(source, pictures, tmp_path):
    other = support.write(tmp_path / "other", [2], video=VIDEOS[:1])
    merged = edit("merge", [source, other], tmp_path / "merged", pictures=pictures)
    assert [merged.features[name]["dtype"] for name in VIDEOS] == [pictures] * 2
    for number, path, old in ((1, source, 1), (7, other, 0)):
        mine, theirs = (
            support.episode(merged, number), support.episode(lerobot.open_dataset(path), old),
        )  # fmt: skip
        but = VIDEOS if pictures == "video" else ()
        support.check_same(*({k: v for k, v in d.items() if k not in but} for d in (mine, theirs)))


def test_codecs_may_differ_in_a_merge(tmp_path, capsys):
    """The second is encoded anew; the rest is the same to the last bit."""
    one = support.write(tmp_path / "one", [1, 3], video=VIDEOS, codec="h264")
    two = support.write(tmp_path / "two", [2], video=VIDEOS, codec="av1")
    merged = edit("merge", [one, two], tmp_path / "merged")
    assert f"merged: {VIDEOS[1]}: 1 of 3 episodes encoded anew" in capsys.readouterr().out
    assert merged.features[VIDEOS[0]]["info"]["video.codec"] == "h264"
    mine, theirs = support.episode(merged, 2), support.episode(lerobot.open_dataset(two), 0)
    support.check_same(*({k: v for k, v in d.items() if k not in VIDEOS} for d in (mine, theirs)))
    difference = mine[VIDEOS[0]].astype(int) - theirs[VIDEOS[0]]
    assert np.abs(difference).mean() < 8
    support.check_same(support.episode(merged, 1), support.episode(lerobot.open_dataset(one), 1))


@pytest.mark.parametrize("kind", ["source", "filmed"])
@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_deleted_episodes_are_gone_and_the_rest_stays(kind, version, tmp_path, request):
    source = request.getfixturevalue(kind)
    found = edit("delete", source, tmp_path / "out", episodes="0,2:4", version=version)
    assert found.version == version
    _check_same(found, lerobot.open_dataset(source), [1, 4, 5, 6])
    np.testing.assert_array_equal(found.column("index"), np.arange(14))


def test_episodes_without_frames_are_deleted(tmp_path):
    source = support.write(tmp_path / "source", version="v2.1")
    table = source / "meta" / "episodes.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows.append({"episode_index": 7, "tasks": ["odd"], "length": 0})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = json.loads((source / "meta/info.json").read_text()) | {"total_episodes": 8}
    (source / "meta/info.json").write_text(json.dumps(info))
    found = edit("delete", source, tmp_path / "out")
    origin = lerobot.open_dataset(source, empty_episodes=True)
    assert origin.num_episodes == 8
    _check_same(found, origin, range(7))


@pytest.mark.parametrize("name", ORIGINS)
def test_there_and_back(name, tmp_path, request):
    source = request.config.rootpath / "tests/testdata/lerobot" / name
    origin = lerobot.open_dataset(source)
    other = "v3.0" if origin.version == "v2.1" else "v2.1"
    there = edit("convert", source, tmp_path / "there", version=other)
    back = edit("convert", there.path, tmp_path / "back", version=origin.version)
    for found, version in ((there, other), (back, origin.version)):
        assert found.version == version
        assert found.tasks == origin.tasks
        _check_same(found, origin, range(8))


def test_the_old_version_2_0(tmp_path):
    """It differs from 2.1 in its statistics alone."""
    source = support.write(tmp_path / "source", version="v2.1")
    info = json.loads((source / "meta/info.json").read_text()) | {"codebase_version": "v2.0"}
    (source / "meta/info.json").write_text(json.dumps(info))
    (source / "meta/episodes_stats.jsonl").unlink()
    (source / "meta/stats.json").write_text("{}")
    found = edit("convert", source, tmp_path / "out", version="v3.0")
    _check_same(found, lerobot.open_dataset(source), range(7))
    support.check_statistics(found, _stats(found.path))
    assert _stats(found.path)[VIDEOS[0]]["q99"]


def test_pictures_become_videos_and_videos_pictures(source, tmp_path):
    origin = lerobot.open_dataset(source)
    film = edit("convert", source, tmp_path / "film", pictures="video", codec="h264")
    assert [film.features[name]["dtype"] for name in VIDEOS] == ["video", "video"]
    _check_same(film, origin, range(7), but=VIDEOS)
    for number in range(7):
        mine, theirs = support.episode(film, number), support.episode(origin, number)
        for name in VIDEOS:
            assert np.abs(mine[name].astype(int) - theirs[name]).mean() < 8
    stills = edit("convert", film.path, tmp_path / "stills", pictures="image")
    assert stills.features == origin.features
    _check_same(stills, film, range(7))  # PNG loses nothing
    assert _stats(stills.path)[VIDEOS[0]]["mean"]


def test_a_video_of_another_codec(filmed, tmp_path):
    found = edit("convert", filmed, tmp_path / "out", codec="h264")
    assert found.features[VIDEOS[0]]["info"]["video.codec"] == "h264"
    _check_same(found, lerobot.open_dataset(filmed), range(7), but=VIDEOS[:1])


def test_a_codec_that_info_json_has_wrong(tmp_path):
    """The files themselves say what they are, so that nothing is encoded again."""
    source = support.write(tmp_path / "source", video=VIDEOS, codec="h264", version="v2.1")
    info = json.loads((source / "meta/info.json").read_text())
    for name in VIDEOS:
        info["features"][name].pop("info")
    (source / "meta/info.json").write_text(json.dumps(info))
    found = edit("convert", source, tmp_path / "out", version="v3.0")
    assert found.features[VIDEOS[1]]["info"]["video.codec"] == "h264"
    _check_same(found, lerobot.open_dataset(source), range(7))


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_codec_is_known_without_the_first_video(damage, tmp_path, capsys):
    source = support.write(tmp_path / "source", video=VIDEOS, codec="h264", version="v2.1")
    for name in VIDEOS:
        path = lerobot.open_dataset(source).clip(name, 0)[0]
        content = path.read_bytes()
        path.unlink()
        if damage == "cut off":
            path.write_bytes(content[:500])
    found = edit("delete", source, tmp_path / "out", episodes="0")
    assert found.features[VIDEOS[0]]["info"]["video.codec"] == "h264"
    assert "encoded anew" not in capsys.readouterr().out
    _check_same(found, lerobot.open_dataset(source), range(1, 7))


def test_kept_pictures_keep_their_bytes(source, tmp_path):
    found = edit("recompute_stats", source, tmp_path / "out")
    for mine, theirs in zip(found.data_files, lerobot.open_dataset(source).data_files, strict=True):
        assert tables.read(mine, VIDEOS).equals(tables.read(theirs, VIDEOS))


@pytest.mark.parametrize("kind", ["source", "filmed"])
def test_statistics_are_computed_again(kind, tmp_path, request):
    """From damaged ones back to what the writer found."""
    source = request.getfixturevalue(kind)
    damaged = shutil.copytree(source, tmp_path / "damaged")
    (damaged / "meta" / "stats.json").write_text("{}")
    found = edit("recompute_stats", damaged, tmp_path / "out")
    support.check_statistics(found, _stats(found.path))
    expected = _stats(source)
    if kind == "filmed":  # what is in the video now, not what the encoder was given
        images = found.frames(VIDEOS[0]).get(np.arange(found.num_frames))
        counts = sum(statistics.histogram(image) for image in images)
        expected[VIDEOS[0]] = statistics.of_histogram(counts, len(images))
    for name, stats in expected.items():
        for stat, value in stats.items():
            np.testing.assert_allclose(_stats(found.path)[name][stat], value, atol=1e-12)


def test_deviations_of_zero_are_not_believed(tmp_path, request):
    """LeRobot 0.4.4 writes them for pictures."""
    source = request.config.rootpath / "tests/testdata/lerobot/pusht_v30_multifile_image"
    stored = lerobot.open_dataset(source).episode_stats()
    assert not any(np.any(stats["observation.image"]["std"]) for stats in stored)
    kept = edit("delete", source, tmp_path / "kept", episodes="7")
    anew = edit("recompute_stats", kept.path, tmp_path / "anew")
    mine, theirs = (_stats(d.path)["observation.image"]["std"] for d in (kept, anew))
    np.testing.assert_allclose(mine, theirs, rtol=1e-9)
    assert min(np.ravel(mine)) > 0.01


def test_rewards_take_the_place_of_others(source, tmp_path):
    found = edit(
        "label_rewards", source, tmp_path / "out", reward="success_at_end", episodes="1,3:5"
    )
    origin = lerobot.open_dataset(source)
    expected = label_rewards.rewards(origin, "success_at_end", [1, 3, 4])
    np.testing.assert_array_equal(found.column("next.reward"), expected)
    assert list(found.features) == list(origin.features)
    _check_same(found, origin, range(7), but=["next.reward"])
    support.check_statistics(found, _stats(found.path))
    again = edit(
        "label_rewards", found.path, tmp_path / "again", reward="success_at_end", episodes="1,3:5"
    )
    assert again.fingerprint() == found.fingerprint()


def test_no_successes_are_none(source, tmp_path):
    request = {"reward": "success_at_end", "episodes": ""}
    found = edit("label_rewards", source, tmp_path / "out", **request)
    assert not found.column("next.reward").any()


def test_rewards_are_added(filmed, tmp_path):
    found = edit("label_rewards", filmed, tmp_path / "out", reward="-1", feature="penalty")
    assert found.features["penalty"] == {"dtype": "float32", "shape": [1], "names": None}
    assert (found.column("penalty") == -1).all()
    _check_same(found, lerobot.open_dataset(filmed), range(7), but=["penalty"])
    assert _stats(found.path)["penalty"]["mean"] == [-1.0]


@pytest.mark.parametrize("operation", ["convert", "recompute_stats"])
def test_workers_change_nothing(source, operation, tmp_path):
    request = {"pictures": "video"} if operation == "convert" else {}
    outputs = []
    for workers in (1, 3):
        found = edit(operation, source, tmp_path / str(workers), num_workers=workers, **request)
        files = sorted(p for p in found.path.rglob("*") if p.is_file())
        outputs.append({p.relative_to(found.path): p.read_bytes() for p in files})
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("operation", "request_", "message"),
    [
        ("megre", {}, "operation 'megre' is unknown; did you mean 'merge'"),
        ("import_hdf", {}, "did you mean 'import_hdf5'"),
        ("x", {}, "operation 'x' is unknown; known are merge, delete"),
        ("merge", {}, "merge takes two or more sources, got 1"),
        ("convert", {}, "convert into what"),
        ("convert", {"version": "v4"}, "version is 'v4'; expected one of v3.0, v2.1"),
        ("convert", {"pictures": "gif"}, "pictures is 'gif'; expected one of image, video"),
        ("convert", {"codec": "mpeg"}, "codec is 'mpeg'; expected one of av1, h264"),
        ("delete", {}, "nothing to delete"),
        ("delete", {"episodes": "7"}, "'7' names episodes that .* it has 0..6"),
        ("delete", {"episodes": "0:7"}, "nothing would be left"),
        ("delete", {"episodes": "all"}, "'all' is neither a number nor a range"),
        ("delete", {"episodes": "1", "reward": "zero"}, "has no use for reward; .*, episodes"),
        ("recompute_stats", {"episodes": "1"}, "recompute_stats has no use for episodes"),
        ("recompute_stats", {"feature": "x"}, "recompute_stats has no use for feature"),
        ("label_rewards", {}, "label_rewards needs reward"),
        ("label_rewards", {"reward": "much"}, "'much' is no rule"),
        ("label_rewards", {"reward": "zero", "feature": "a/b"}, "a name is|text without '/'"),
    ],
)  # fmt: skip
def test_bad_requests(source, tmp_path, operation, request_, message):
    with pytest.raises(ValueError, match=message):
        edit(operation, source, tmp_path / "out", **request_)
    assert not list(tmp_path.iterdir())


def _command(*words):
    program = pathlib.Path(edit_dataset.__file__).parents[2] / "experiments/edit_dataset.py"
    return subprocess.run([sys.executable, program, *words], capture_output=True, text=True)


def test_pictures_of_an_unknown_kind_are_not_imported(tmp_path):
    done = _command("--operation=import_hdf5", "--source=a.hdf5", f"--output={tmp_path / 'out'}",
                    "--pictures=vidoe")  # fmt: skip
    assert done.returncode == 1
    assert "--pictures=vidoe: value should be one of <|image|video>" in done.stderr


def test_sources_may_be_named_one_by_one(source, tmp_path):
    done = _command("--operation=merge", f"--source={source}", f"--source={source},{source}",
                    f"--output={tmp_path / 'out'}", "--dry_run")  # fmt: skip
    assert "out: 21 episodes" in done.stdout


def test_a_dry_run_touches_nothing(filmed, tmp_path, capsys):
    edit_dataset.run(
        "delete", [filmed], tmp_path / "out", edit_dataset.Request(episodes="1"), dry_run=True
    )
    told = capsys.readouterr().out
    assert "out: 6 episodes, 22 frames, v3.0; observation.images.top: av1, copied" in told
    assert "nothing was written" in told
    assert not list(tmp_path.iterdir())


def test_inputs_are_not_written_to(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    for output in (copy, copy / "out", tmp_path):
        with pytest.raises(ValueError, match="overlaps the input"):
            edit("recompute_stats", copy, output, overwrite=True)
    edit("recompute_stats", copy, tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"):
        edit("recompute_stats", copy, tmp_path / "out")
    edit("recompute_stats", copy, tmp_path / "out", overwrite=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="not written by this command"):
        edit("recompute_stats", copy, tmp_path / "mine", overwrite=True)
    before, after = (
        {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()}
        for d in (source, copy)
    )
    assert before == after


def test_a_disk_without_room_is_told_before(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(OSError, match=r"needs up to .* MB, and its disk has 0.0 MB free"):
        edit("convert", source, tmp_path / "out", pictures="video")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pictures", ["video", "image"])
def test_a_damaged_video_is_told_by_its_episode(filmed, pictures, tmp_path):
    source = shutil.copytree(filmed, tmp_path / "source")
    path = next((source / "videos").rglob("*.mp4"))
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4  # behind it lies nothing but packets
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    told = rf"^{source}, episode 0: .*{path}.*(copy or download|declares)"
    with pytest.raises(ValueError, match=told):
        edit("convert", source, tmp_path / "out", pictures=pictures, codec="h264")
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_not_copied(tmp_path):
    source = support.write(tmp_path / "source", data_files_size_in_mb=100)
    path = source / "data/chunk-000/file-000.parquet"
    table = tables.pq.read_table(path)
    values = table["next.reward"].to_numpy().copy()
    values[support.LENGTHS[0] + 1] = np.nan
    place = table.schema.get_field_index("next.reward")
    tables.pq.write_table(table.set_column(place, "next.reward", [values]), path)
    with pytest.raises(ValueError, match=rf"^{source}, episode 1: 'next.reward', frame 1: nan"):
        edit("convert", source, tmp_path / "out", version="v2.1")
    _check_same(
        edit("delete", source, tmp_path / "out", episodes="1"),
        lerobot.open_dataset(source), [0, 2, 3, 4, 5, 6],
    )  # fmt: skip


@pytest.fixture
def small_files():
    """No file may grow beyond 20 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ORIGINS[::2])
def test_a_disk_that_fills_meanwhile(name, tmp_path, request, small_files):
    source = request.config.rootpath / "tests/testdata/lerobot" / name
    with pytest.raises(
        OSError, match=rf"cannot write {tmp_path / 'out'}, episode [0-9]+: File too"
    ):
        edit("recompute_stats", source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from policymix import files
from policymix.data import writer
from policymix.runs import edit_dataset

source, output, point = sys.argv[1:]

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def add(self, *args, add=writer.Writer.add, calls=[], **kwargs):
    calls.append(1)
    if len(calls) == 5:
        kill()
    add(self, *args, **kwargs)

if point == "episode":
    writer.Writer.add = add
elif point == "info":
    files.write_json = kill
else:
    import pathlib
    pathlib.Path.rename = kill
edit_dataset.run("recompute_stats", [source], output)
"""


@pytest.mark.parametrize("point", ["episode", "info", "rename"])
def test_a_killed_run_leaves_no_dataset(filmed, point, tmp_path):
    output = tmp_path / "out"
    program = [sys.executable, "-c", KILLED, str(filmed), str(output), point]
    assert subprocess.run(program, capture_output=True).returncode == -signal.SIGKILL
    assert not output.exists()
    assert [path.name[:13] for path in tmp_path.iterdir()] == [".out.partial-"]
    edit("recompute_stats", filmed, output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
