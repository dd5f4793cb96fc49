import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from policymix.data import lerobot, writer
from policymix.runs import import_hdf5
from tests.data import hdf5_support as samples


def imported(source, output, **options):
    import_hdf5.run(source, output, **options)
    return lerobot.open_dataset(output)


def images(dataset, key):
    return dataset.frames(key).get(np.arange(dataset.num_frames))


def check_times(dataset, lengths, fps):
    assert (dataset.fps, dataset.num_episodes, dataset.num_frames) == (
        *(fps, len(lengths)),
        sum(lengths),
    )
    assert (dataset.episode_to - dataset.episode_from).tolist() == list(lengths)
    frames = np.concatenate([np.arange(length) for length in lengths])
    np.testing.assert_array_equal(dataset.column("timestamp"), np.float32(frames / fps))


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_libero(tmp_path, version):
    source = tmp_path / "libero_10"
    source.mkdir()
    first = samples.libero(source / samples.LIBERO_NAME, (3, 4))
    second = samples.libero(source / "open_the_drawer_demo.hdf5", (2,) * 11, seed=1)
    demos = [*first.values(), *second.values()]
    dataset = imported(source, tmp_path / "out", video=False, version=version)
    check_times(dataset, [3, 4, *[2] * 11], 20)
    assert (dataset.version, dataset.robot_type) == (version, "panda")
    assert dataset.tasks == [samples.LIBERO_TASK, "open the drawer"]
    assert dataset.column("task_index").tolist() == [0] * 7 + [1] * 22

    def stored(*keys):
        parts = [np.concatenate([demo[key] for demo in demos]) for key in keys]
        return np.hstack(parts) if len(parts) > 1 else parts[0]

    state = stored("obs/ee_pos", "obs/ee_ori", "obs/gripper_states")
    np.testing.assert_array_equal(dataset.column("state"), state.astype(np.float32))
    np.testing.assert_array_equal(dataset.column("actions"), np.float32(stored("actions")))
    np.testing.assert_array_equal(dataset.column("reward"), np.float32(stored("rewards")))
    np.testing.assert_array_equal(dataset.column("done"), stored("dones") == 1)
    assert dataset.column("reward").sum() == 13
    for name, key in {"image": "agentview_rgb", "wrist_image": "eye_in_hand_rgb"}.items():
        np.testing.assert_array_equal(images(dataset, name), stored(f"obs/{key}")[:, ::-1, ::-1])
    told = json.loads((tmp_path / "out" / "imported.json").read_text())
    assert told["episodes"][12] == {
        "file": str(source / "open_the_drawer_demo.hdf5"),
        "demo": "data/demo_10",
    }


def test_robomimic_with_its_splits(tmp_path):
    source = tmp_path / "image.hdf5"
    demos = samples.robomimic(source, (3, 2, 4), next_obs=False)
    with h5py.File(source, "r+") as file:
        file["mask/valid"] = np.array([b"demo_2"])
        file["mask/train"] = np.array([b"demo_1", b"demo_0"])
    dataset = imported(source, tmp_path / "out", video=False, task="fit the nut", fps=10)
    check_times(dataset, [3, 2, 4], 10)
    assert dataset.tasks == ["fit the nut"]
    stored = {
        key: np.concatenate([demo[key] for demo in demos.values()]) for key in demos["demo_0"]
    }
    keys = {
        "action": "actions",
        "next.reward": "rewards",
        "observation.object": "obs/object",
        "observation.robot0_joint_pos": "obs/robot0_joint_pos",
    }
    for name, key in keys.items():
        np.testing.assert_array_equal(dataset.column(name), np.float32(stored[key]))
    np.testing.assert_array_equal(dataset.column("next.done"), stored["dones"] == 1)
    state = [stored[f"obs/robot0_{key}"] for key in ("eef_pos", "eef_quat", "gripper_qpos")]
    np.testing.assert_array_equal(dataset.column("observation.state"), np.float32(np.hstack(state)))
    found = images(dataset, "observation.images.agentview")
    np.testing.assert_array_equal(found, stored["obs/agentview_image"])
    told = json.loads((tmp_path / "out" / "imported.json").read_text())
    assert told["splits"] == {"train": [0, 1], "valid": [2]}


@pytest.mark.parametrize("compress", ["", "jpeg"])
@pytest.mark.parametrize("video", [False, True])
def test_aloha(tmp_path, compress, video):
    source = tmp_path / "transfer_cube"
    source.mkdir()
    lengths = {0: 3, 2: 2, 10: 4}
    episodes = [
        samples.aloha(source / f"episode_{i}.hdf5", n, cameras=("top", "low"), compress=compress)
        for i, n in lengths.items()
    ]
    dataset = imported(source, tmp_path / "out", video=video, codec="h264")
    check_times(dataset, list(lengths.values()), 50)
    assert (dataset.tasks, dataset.robot_type) == (["transfer cube"], "aloha")
    keys = {"observation.state": "qpos", "observation.velocity": "qvel"}
    keys |= {"observation.effort": "effort"}
    keys = {"action": "action"} | {name: f"observations/{key}" for name, key in keys.items()}
    for name, key in keys.items():
        both = np.concatenate([episode[key] for episode in episodes])
        np.testing.assert_array_equal(dataset.column(name), both)
    for camera in ("top", "low"):
        name = f"observation.images.{camera}"
        assert dataset.features[name]["dtype"] == ("video" if video else "image")
        stored = [picture for e in episodes for picture in e[f"observations/images/{camera}"]]
        pixels = np.stack([samples.decoded(p) if compress else p for p in stored])
        off = np.abs(images(dataset, name).astype(int) - pixels)
        if not video:
            assert off.max() == 0
        else:  # blocks of random colours, half of whose colour the codec throws away
            shuffled = np.abs(pixels[::-1].astype(int) - pixels).mean()
            assert off.mean() < shuffled / 5


def test_a_smooth_video_of_libero_stands_upright(tmp_path):
    """The default: AV1. A gradient that no turn or mirroring leaves as it is."""
    source = tmp_path / "x_demo.hdf5"
    samples.libero(source, (6, 5))
    high, wide = np.mgrid[0:64, 0:96]
    upright = np.stack([high * 3, wide * 2, high + wide], -1).astype(np.uint8)
    with h5py.File(source, "r+") as file:
        for demo in file["data"].values():
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                shift = len(demo["actions"])
                del demo[f"obs/{camera}"]
                turned = (upright + shift)[::-1, ::-1]
                demo[f"obs/{camera}"] = np.repeat(turned[None], shift, 0)
    dataset = imported(source, tmp_path / "out")
    check_times(dataset, [6, 5], 20)
    expected = np.stack([upright + n for n in (6, 5) for _ in range(n)]).astype(int)
    for key in ("image", "wrist_image"):
        off = np.abs(images(dataset, key) - expected)
        assert off.mean() < 3, off.mean()


def test_the_plan_is_told_and_a_dry_run_writes_nothing(tmp_path, capsys):
    source = tmp_path / samples.LIBERO_NAME
    samples.libero(source, (3, 4), says="close the drawer")
    import_hdf5.run(source, tmp_path / "out", dry_run=True)
    told = capsys.readouterr().out
    for line in (
        "libero, 1 file, 2 episodes, 7 frames, 20 a second",
        "  image: video: uint8 [16, 24, 3] from obs/agentview_rgb, turned by 180 degrees",
        "  state: float32 [8] from obs/ee_pos + obs/ee_ori + obs/gripper_states",
        f"  task {samples.LIBERO_TASK!r}: 2 episodes",
        "its problem_info 'close the drawer'; the name holds",
        "left out: obs/ee_states, obs/joint_states",
        "dry run: nothing was written",
    ):
        assert line in told
    assert [path.name for path in tmp_path.iterdir()] == [samples.LIBERO_NAME]


def test_bad_demonstrations_stop_the_import_or_are_counted(tmp_path, capsys):
    source = tmp_path / "d.hdf5"
    demos = samples.robomimic(source, (3, 2, 4, 2), cameras=())
    with h5py.File(source, "r+") as file:
        file["data/demo_1/actions"][1, 3] = np.inf  # seen when it is read
        del file["data/demo_2/obs/object"]  # seen before
        file["mask/train"] = np.array([b"demo_0", b"demo_1", b"demo_3"])
    with pytest.raises(ValueError, match="data/demo_2 differs from"):
        imported(source, tmp_path / "out")
    with h5py.File(source, "r+") as file:
        file["data/demo_2/obs/object"] = demos["demo_2"]["obs/object"]
    with pytest.raises(ValueError, match="data/demo_1: 'actions', frame 1: inf at"):
        imported(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["d.hdf5"]
    with h5py.File(source, "r+") as file:
        del file["data/demo_2/obs/object"]
    dataset = imported(source, tmp_path / "out", skip_bad=True)
    check_times(dataset, [3, 2], 20)
    expected = np.concatenate([demos[name]["actions"] for name in ("demo_0", "demo_3")])
    np.testing.assert_array_equal(dataset.column("action"), np.float32(expected))
    assert "2 episodes, 5 frames written" in (told := capsys.readouterr().out)
    assert "; 2 skipped" in told
    record = json.loads((tmp_path / "out" / "imported.json").read_text())
    assert record["splits"] == {"train": [0, 1]}
    assert len(record["skipped"]) == 2
    with h5py.File(source, "r+") as file:
        for demo in file["data"].values():
            demo["actions"][0] = np.nan
    with pytest.raises(ValueError, match="no demonstration could be imported"):
        imported(source, tmp_path / "none", skip_bad=True)
    assert not (tmp_path / "none").exists()


def test_output_that_is_there(tmp_path):
    source = tmp_path / "in" / "d.hdf5"
    source.parent.mkdir()
    samples.robomimic(source, (2,), cameras=())
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="not written by this command"):
        import_hdf5.run(source, tmp_path / "mine", overwrite=True)
    with pytest.raises(ValueError, match="overlaps the input"):
        import_hdf5.run(source.parent, source.parent / "out")
    imported(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        import_hdf5.run(source, tmp_path / "out", dry_run=True)
    samples.robomimic(source, (5,), cameras=())
    assert imported(source, tmp_path / "out", overwrite=True).num_frames == 5


def test_the_same_files_give_the_same_dataset(tmp_path):
    samples.robomimic(tmp_path / "d.hdf5", (3,) * 6)
    contents = []
    for workers in (1, 4):
        out = tmp_path / f"out{workers}"
        import_hdf5.run(tmp_path / "d.hdf5", out, video=False, num_workers=workers)
        contents.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*.*")})
    assert contents[0] == contents[1]


@pytest.mark.parametrize("video", [False, True])
def test_killed_half_way_it_leaves_no_dataset(tmp_path, video):
    samples.robomimic(tmp_path / "d.hdf5", (200,) * 40)
    call = f"({str(tmp_path / 'd.hdf5')!r}, {str(tmp_path / 'out')!r}, video={video})"
    program = f"from policymix.runs import import_hdf5; import_hdf5.run{call}"
    begun = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(import_hdf5.__file__).parents[2],
    )
    line = begun.stderr.readline()  # of the progress: a tenth is done
    os.kill(begun.pid, signal.SIGKILL)
    assert begun.wait() == -signal.SIGKILL
    assert line == "importing: 4/40\n"
    left = [path.name for path in tmp_path.iterdir() if path.name != "d.hdf5"]
    assert left == [f".out.partial-{begun.pid}"]
    with pytest.raises((ValueError, OSError)):
        lerobot.open_dataset(tmp_path / left[0])
    samples.robomimic(tmp_path / "d.hdf5", (2,))
    assert imported(tmp_path / "d.hdf5", tmp_path / "out", video=video).num_frames == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.hdf5", "out"]


def test_a_disk_without_room_is_told_before_the_work(tmp_path):
    source = tmp_path / "d.hdf5"
    samples.robomimic(source, (2,), cameras=())
    with h5py.File(source, "r+") as file:  # frames that no disk holds; none of them is stored
        for name in file["data/demo_0/obs"]:
            array = file[f"data/demo_0/obs/{name}"]
            shape, dtype = array.shape[1:], array.dtype
            del file[f"data/demo_0/obs/{name}"]
            file.create_dataset(
                f"data/demo_0/obs/{name}", (2**40, *shape), dtype, chunks=(9, *shape)
            )
        for key, shape in {"actions": (7,), "rewards": (), "dones": ()}.items():
            del file[f"data/demo_0/{key}"]
            file.create_dataset(f"data/demo_0/{key}", (2**40, *shape), "u1", chunks=(9, *shape))
    with pytest.raises(OSError, match="MB free: make room"):
        import_hdf5.run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_fault_of_the_writer_reaches_the_caller(tmp_path, monkeypatch):
    samples.robomimic(tmp_path / "d.hdf5", (3,) * 9, cameras=())
    add, calls = writer.Writer.add, []

    def fails(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("disk gone")
        return add(self, *args, **options)

    monkeypatch.setattr(writer.Writer, "add", fails)
    before = time.monotonic()
    with pytest.raises(OSError, match="disk gone"):
        import_hdf5.run(tmp_path / "d.hdf5", tmp_path / "out")
    assert time.monotonic() - before < 30
    assert [path.name for path in tmp_path.iterdir()] == ["d.hdf5"]
