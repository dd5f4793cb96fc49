import io

import h5py
import numpy as np
import pytest
from PIL import Image

from policymix.data import hdf5, recordings
from tests.data import hdf5_support as samples


def read_one(path, *, as_files=False, **options):
    found = recordings.scan(path, recordings.Options(**options))
    return found, [recordings.read(found, demo, as_files=as_files) for demo in found.demos]


def test_libero_state_pictures_and_outcome(tmp_path):
    demos = samples.libero(tmp_path / samples.LIBERO_NAME)
    found, episodes = read_one(tmp_path / samples.LIBERO_NAME)
    assert (found.layout, found.fps, found.robot_type) == ("libero", 20, "panda")
    assert list(found.fields) == ["image", "wrist_image", "state", "actions", "reward", "done"]
    assert {demo.task for demo in found.demos} == {samples.LIBERO_TASK}
    for stored, episode in zip(demos.values(), episodes, strict=True):
        turned = np.rot90(stored["obs/agentview_rgb"], 2, axes=(1, 2))
        np.testing.assert_array_equal(episode["image"], turned)
        turned = np.rot90(stored["obs/eye_in_hand_rgb"], 2, axes=(1, 2))
        np.testing.assert_array_equal(episode["wrist_image"], turned)
        parts = [stored[f"obs/{key}"] for key in ("ee_pos", "ee_ori", "gripper_states")]
        np.testing.assert_array_equal(episode["state"], np.hstack(parts).astype(np.float32))
        np.testing.assert_array_equal(episode["actions"], np.float32(stored["actions"]))
        np.testing.assert_array_equal(episode["reward"].ravel(), np.float32(stored["rewards"]))
        np.testing.assert_array_equal(episode["done"].ravel(), stored["dones"] == 1)
        assert (episode["state"].dtype, episode["done"].dtype) == (np.float32, bool)
    assert found.left_out == [
        *("obs/ee_states", "obs/joint_states", "robot_states", "states"),
    ]


def test_pictures_that_stand_upright_are_only_mirrored(tmp_path):
    demos = samples.libero(tmp_path / "x_demo.hdf5", (2,), convention="opencv")
    _, (episode,) = read_one(tmp_path / "x_demo.hdf5")
    stored = demos["demo_0"]["obs/agentview_rgb"]
    np.testing.assert_array_equal(episode["image"], np.flip(stored, 2))


def test_ee_states_serve_where_their_parts_are_missing(tmp_path):
    path = tmp_path / "x_demo.hdf5"
    demos = samples.libero(path, (3,))
    with h5py.File(path, "r+") as file:
        del file["data/demo_0/obs/ee_pos"], file["data/demo_0/obs/ee_ori"]
    _, (episode,) = read_one(path)
    parts = [demos["demo_0"][f"obs/{key}"] for key in ("ee_states", "gripper_states")]
    np.testing.assert_array_equal(episode["state"], np.float32(np.hstack(parts)))


def test_demos_and_files_are_in_the_order_of_their_numbers(tmp_path):
    samples.libero(tmp_path / "b_demo.hdf5", (2,) * 12)
    samples.libero(tmp_path / "a_demo.hdf5", (1,))
    (tmp_path / "._a_demo.hdf5").write_bytes(b"what some systems put beside a file")
    found = recordings.scan(tmp_path)
    names = [demo.group for demo in found.demos]
    assert names == ["data/demo_0", *(f"data/demo_{i}" for i in range(12))]
    for i in (0, 2, 10):
        (tmp_path / "aloha").mkdir(exist_ok=True)
        samples.aloha(tmp_path / "aloha" / f"episode_{i}.hdf5", 2 + i)
    lengths = [demo.length for demo in recordings.scan(tmp_path / "aloha").demos]
    assert lengths == [2, 4, 12]


@pytest.mark.parametrize(
    ("name", "says", "task"),
    [
        (samples.LIBERO_NAME, "close it", samples.LIBERO_TASK),
        ("LIVING_ROOM_SCENE5_put_the_red_mug_on_the_left_plate_demo.hdf5", "", None),
        ("pick_up_the_black_bowl_demo.hdf5", "pick the akita black bowl", "pick up the black bowl"),
        ("task3.hdf5", '"open the drawer"', "open the drawer"),
        ("open_it.hdf5", "", "open it"),
    ],
)
def test_libero_instruction(tmp_path, name, says, task):
    samples.libero(tmp_path / name, (1,), says=says)
    found = recordings.scan(tmp_path / name)
    assert found.demos[0].task == (task or "put the red mug on the left plate")
    assert bool(found.notes) == (bool(says) and name.endswith("_demo.hdf5"))
    given = recordings.scan(tmp_path / name, recordings.Options(task="wave"))
    assert given.demos[0].task == "wave"
    assert not given.notes


def test_robomimic_with_pictures_and_two_arms(tmp_path):
    path = tmp_path / "image.hdf5"
    demos = samples.robomimic(path, cameras=("agentview", "robot0_eye_in_hand"), arms=2)
    found, episodes = read_one(path)
    assert (found.layout, found.fps, found.robot_type) == ("robomimic", 20, "panda_panda")
    assert sorted(found.fields) == [
        "action",
        "next.done",
        "next.reward",
        "observation.images.agentview",
        "observation.images.robot0_eye_in_hand",
        "observation.object",
        "observation.robot0_joint_pos",
        "observation.robot1_joint_pos",
        "observation.state",
    ]
    for stored, episode in zip(demos.values(), episodes, strict=True):
        parts = ("eef_pos", "eef_quat", "gripper_qpos")
        state = [stored[f"obs/robot{arm}_{part}"] for arm in (0, 1) for part in parts]
        np.testing.assert_array_equal(episode["observation.state"], np.float32(np.hstack(state)))
        image = episode["observation.images.robot0_eye_in_hand"]
        np.testing.assert_array_equal(image, stored["obs/robot0_eye_in_hand_image"])
        np.testing.assert_array_equal(
            episode["observation.object"], np.float32(stored["obs/object"])
        )
        np.testing.assert_array_equal(episode["action"], np.float32(stored["actions"]))
        np.testing.assert_array_equal(episode["next.reward"][:, 0], np.float32(stored["rewards"]))
        np.testing.assert_array_equal(episode["next.done"][:, 0], stored["dones"] == 1)
    assert "obs/agentview_depth" in found.left_out
    assert "next_obs/object" in found.left_out
    assert found.demos[0].task == "NutAssemblySquare"
    assert "unless a task is given" in found.notes[0]


def test_filter_keys_become_lists_of_episodes(tmp_path):
    samples.robomimic(tmp_path / "low_dim.hdf5", (1,) * 11, cameras=())
    with h5py.File(tmp_path / "low_dim.hdf5", "r+") as file:
        file["mask/valid"] = np.array([b"demo_10", b"demo_2"])
        file["mask/train"] = np.array(["demo_0", "demo_1"], h5py.string_dtype())
    splits = recordings.scan(tmp_path / "low_dim.hdf5").splits
    assert splits == {"train": [0, 1], "valid": [2, 10]}
    with h5py.File(tmp_path / "low_dim.hdf5", "r+") as file:
        file["mask/other"] = np.array([b"demo_11"])
    with pytest.raises(ValueError, match=r"mask/other names \['demo_11'\].*no such demo"):
        recordings.scan(tmp_path / "low_dim.hdf5")


def test_other_observations_keep_their_kind_or_are_left_out(tmp_path):
    path = tmp_path / "d.hdf5"
    samples.robomimic(path, (3,), cameras=())
    kept = {"contact": np.array([True, False, True]), "phase": np.arange(3)}
    kept |= {"code": np.arange(600, dtype=np.uint8).reshape(3, 200)}
    left = {"empty": np.zeros((3, 0)), "grey": np.zeros((3, 4, 4), np.uint8), "text": [b"a"] * 3}
    with h5py.File(path, "r+") as file:
        samples.write(file, "data/demo_0/obs", kept | left | {"more/deep": np.zeros((3, 2))})
        file["data/demo_0/obs/big"] = np.full(3, 2**63, np.uint64)
    found = recordings.scan(path)
    assert {*found.left_out} >= {f"obs/{name}" for name in (*left, "more/deep")}
    with pytest.raises(ValueError, match="'obs/big', frame 0: 9223372036854775808 does not fit"):
        recordings.read(found, found.demos[0], as_files=False)
    with h5py.File(path, "r+") as file:
        file["data/demo_0/obs/big"][...] = 7
    episode = recordings.read(found, found.demos[0], as_files=False)
    for name, array in kept.items():
        values = episode[f"observation.{name}"]
        np.testing.assert_array_equal(values, array.reshape(3, -1))
        assert (values.dtype, found.fields[f"observation.{name}"].dtype) == (array.dtype,) * 2
    np.testing.assert_array_equal(episode["observation.big"], np.full((3, 1), 7))


def test_pictures_in_one_large_piece(tmp_path):
    path = tmp_path / "d.hdf5"
    demos = samples.robomimic(path, (50,), next_obs=False)
    with h5py.File(path, "r+") as file:
        obs = file["data/demo_0/obs"]
        images = demos["demo_0"]["obs/agentview_image"]
        del obs["agentview_image"]
        obs.create_dataset("agentview_image", data=images, chunks=images.shape, compression="gzip")
    _, (episode,) = read_one(path)
    np.testing.assert_array_equal(episode["observation.images.agentview"], images)


def test_an_instruction_of_an_episode_is_found(tmp_path):
    samples.robomimic(tmp_path / "d.hdf5", (1, 1), cameras=())
    with h5py.File(tmp_path / "d.hdf5", "r+") as file:
        file["data/demo_1"].attrs["ep_meta"] = '{"lang": "close the door"}'
    tasks = [demo.task for demo in recordings.scan(tmp_path / "d.hdf5").demos]
    assert tasks == ["NutAssemblySquare", "close the door"]


@pytest.mark.parametrize("compress", ["", "jpeg"])
def test_aloha(tmp_path, compress):
    folder = tmp_path / "sim_transfer_cube"
    folder.mkdir()
    cameras = ("cam_high", "cam_left_wrist")
    stored = samples.aloha(folder / "episode_0.hdf5", cameras=cameras, compress=compress, base=True)
    found, (episode,) = read_one(folder)
    assert (found.layout, found.fps, found.robot_type) == ("aloha", 50, "aloha")
    assert found.demos[0].task == "sim transfer cube"
    images = {f"observation.images.{c}": f"observations/images/{c}" for c in cameras}
    numbers = {"state": "qpos", "velocity": "qvel", "effort": "effort"}
    keys = {f"observation.{name}": f"observations/{key}" for name, key in numbers.items()}
    keys |= images | {"action": "action", "base_action": "base_action"}
    assert found.fields.keys() == keys.keys()
    for name, key in keys.items():
        if compress and name in images:
            assert episode[name] == stored[key]  # the files themselves, without what fills them up
        else:
            np.testing.assert_array_equal(episode[name], stored[key])
    assert found.features("video")["observation.images.cam_high"] == {
        "dtype": "video",
        "shape": [24, 32, 3],
        "names": ["height", "width", "channel"],
    }


def test_swapped_channels(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    plain = samples.aloha(folder / "episode_0.hdf5", compress="jpeg")["observations/images/top"]
    _, (episode,) = read_one(folder, swap_channels=True)
    for image, data in zip(episode["observation.images.top"], plain, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(data)))[..., ::-1])
    samples.libero(tmp_path / "x_demo.hdf5", (1,))
    _, (same,) = read_one(tmp_path / "x_demo.hdf5")
    _, (swapped,) = read_one(tmp_path / "x_demo.hdf5", swap_channels=True)
    np.testing.assert_array_equal(same["image"], swapped["image"][..., ::-1])


def test_jpeg_of_rows_that_differ_in_length(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    rows = samples.aloha(folder / "episode_0.hdf5", compress="jpeg")["observations/images/top"]
    with h5py.File(folder / "episode_0.hdf5", "r+") as file:
        del file["observations/images/top"]
        lines = file.create_dataset("observations/images/top", (4,), h5py.vlen_dtype(np.uint8))
        for i, data in enumerate(rows):
            lines[i] = np.frombuffer(data, np.uint8)
    _, (episode,) = read_one(folder)
    assert episode["observation.images.top"] == rows


def test_pictures_as_files_are_without_loss(tmp_path):
    samples.libero(tmp_path / "x_demo.hdf5", (70,))  # more than are read at a time
    _, (arrays,) = read_one(tmp_path / "x_demo.hdf5")
    _, (coded,) = read_one(tmp_path / "x_demo.hdf5", as_files=True)
    assert len(coded["image"]) == 70
    for data, image in zip(coded["image"], arrays["image"], strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_reading_ahead_keeps_the_order(tmp_path, num_workers, monkeypatch):
    samples.robomimic(tmp_path / "d.hdf5", range(1, 9))
    found = recordings.scan(tmp_path / "d.hdf5")
    for ahead in (2**30, 1):  # as many as there are threads; one at a time
        monkeypatch.setattr(recordings, "_AHEAD", ahead)
        read = list(recordings.read_all(found, as_files=True, num_workers=num_workers))
        assert [demo for demo, _ in read] == found.demos
        assert [len(arrays["action"]) for _, arrays in read] == list(range(1, 9))


def test_what_is_no_hdf5_or_not_whole(tmp_path):
    path = tmp_path / "x_demo.hdf5"
    samples.libero(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x_demo.hdf5 cannot be read as HDF5: .*truncated file"):
        recordings.scan(path)
    for content in (b"", b"no" * 500):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x_demo.hdf5 is no HDF5 file"):
            recordings.scan(path)
    with pytest.raises(FileNotFoundError, match="does not exist; expected an HDF5 file"):
        recordings.scan(tmp_path / "none")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "readme.txt").write_text("")
    with pytest.raises(ValueError, match=r"no .hdf5 or .h5 file in it; there are \['readme.txt'\]"):
        recordings.scan(tmp_path / "e")


def test_damage_inside_a_file_is_told(tmp_path):
    """Bytes of compressed pictures changed: the file opens, its numbers can be read."""
    path = tmp_path / "d.hdf5"
    samples.robomimic(path, (40,))
    with h5py.File(path, "r+") as file:
        images = file["data/demo_0/obs/agentview_image"][()]
        del file["data/demo_0/obs/agentview_image"]
        array = file.create_dataset(
            "data/demo_0/obs/agentview_image", data=images, chunks=(40, 8, 12, 3), fletcher32=True
        )
        offset = array.id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 100] ^= 1
    path.write_bytes(content)
    found = recordings.scan(path)
    with pytest.raises(ValueError, match=r"d.hdf5 cannot be read as HDF5.*damaged"):
        recordings.read(found, found.demos[0], as_files=False)


def damage(path, *names):
    """Makes the headers of groups or arrays unreadable."""
    with h5py.File(path) as file:
        places = [h5py.h5o.get_info(file[name].id).addr for name in names]
    content = bytearray(path.read_bytes())
    for place in places:
        content[place : place + 16] = b"\xff" * 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "data/demo_1: it cannot be read; the file may be damaged"),
        ("/obs", "data/demo_1: 'obs': it cannot be read"),
        ("/obs/object", "data/demo_1: 'obs/object': it cannot be read"),
        ("/rewards", "data/demo_1: 'rewards': it cannot be read"),
    ],
)
def test_damaged_demos_and_arrays_are_told_or_skipped(tmp_path, name, said):
    path = tmp_path / "d.hdf5"
    samples.robomimic(path, (2, 3, 4), cameras=())
    damage(path, f"data/demo_1{name}")
    with pytest.raises(ValueError, match=said):
        recordings.scan(path)
    found = recordings.scan(path, recordings.Options(skip_bad=True))
    assert [demo.length for demo in found.demos] == [2, 4]
    assert len(found.bad) == 1
    assert said in found.bad[0]


def test_a_damaged_camera_is_not_left_out(tmp_path):
    path = tmp_path / "a" / "episode_0.hdf5"
    path.parent.mkdir()
    samples.aloha(path, cameras=("top", "wrist"))
    damage(path, "observations/images/wrist")
    with pytest.raises(ValueError, match="'observations/images/wrist': it cannot be read"):
        recordings.scan(path)


def test_a_first_demo_that_is_odd_is_the_one_that_is_skipped(tmp_path):
    path = tmp_path / "d.hdf5"
    samples.robomimic(path, (2, 3, 4, 5), cameras=())
    with h5py.File(path, "r+") as file:
        del file["data/demo_0/obs/object"], file["data/demo_3/obs"]
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
    with pytest.raises(ValueError, match="data/demo_1 differs from .*data/demo_0: 'observation.ob"):
        recordings.scan(path)
    found = recordings.scan(path, recordings.Options(skip_bad=True))
    assert [demo.length for demo in found.demos] == [3, 4]
    assert found.splits == {"train": [1]}
    assert "observation.object" in found.fields
    assert "data/demo_3: no arrays in 'obs'" in found.bad[0]
    assert "dataset_states_to_obs.py" in found.bad[0]
    assert "data/demo_0 differs from" in found.bad[1]
    with h5py.File(path, "r+") as file:
        for number in range(3):
            del file[f"data/demo_{number}/obs"]
    with pytest.raises(ValueError, match=r"in data/demo_0 \['actions.*dataset_states_to_obs.py"):
        recordings.scan(path)


def spoil(key, value):
    def change(demo):
        del demo[key]
        if value is not None:
            demo[key] = value

    return change


WRONG = {
    "missing": (
        spoil("obs/agentview_rgb", None),
        r"x_demo.hdf5, data/demo_1: no array 'obs/agentview_rgb'; in obs there are \['ee_ori'",
    ),
    "length": (
        spoil("actions", np.zeros((2, 7))),
        r"data/demo_1: expected as many frames of every array, found .*'actions': 2",
    ),
    "nothing": (spoil("actions", None), r"data/demo_1: no array 'actions'; it holds \['dones'"),
    "text": (spoil("actions", [b"a"] * 4), r"'actions' is object .*expected numbers"),
    "grey": (
        spoil("obs/agentview_rgb", np.zeros((4, 16, 24), np.uint8)),
        r"'obs/agentview_rgb' is uint8 \[4, 16, 24\], expected pictures",
    ),
    "size": (
        spoil("obs/agentview_rgb", np.zeros((4, 8, 8, 3), np.uint8)),
        r"demo_1 differs from .*demo_0: 'image' is uint8 \[16, 24, 3\].*here uint8 \[8, 8, 3\]",
    ),
    "state": (
        spoil("obs/gripper_states", np.zeros((4, 1))),
        r"obs/ee_pos \+ obs/ee_ori \+ obs/gripper_states have 7 numbers a frame, expected 8",
    ),
    "not finite": (
        spoil("actions", np.full((4, 7), np.nan)),
        r"data/demo_1: 'actions', frame 0: nan at \[0\] is not a finite float32",
    ),
    "too large": (
        spoil("rewards", np.array([0, 1e39, 0, 0])),
        r"'rewards', frame 1: 1e\+39 is not a finite",
    ),
    "flag": (spoil("dones", np.array([0, 0, 2, 1])), r"'dones', frame 2: 2 is no flag"),
    "rewards": (
        spoil("rewards", None),
        r"differs from .*'reward' is float32 \[1\] from rewards, here not there",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_demos_are_named_or_skipped(tmp_path, kind):
    path = tmp_path / "x_demo.hdf5"
    samples.libero(path, (4, 4, 4))
    change, message = WRONG[kind]
    with h5py.File(path, "r+") as file:
        change(file["data/demo_1"])
    with pytest.raises(ValueError, match=message):
        read_one(path)
    found = recordings.scan(path, recordings.Options(skip_bad=True))
    bad = list(found.bad)
    for demo, arrays in recordings.read_all(found, as_files=False, num_workers=1):
        if isinstance(arrays, ValueError):
            assert demo.group == "data/demo_1"
            bad.append(str(arrays))
    assert len(bad) == 1
    assert "demo_1" in bad[0]


def test_a_demo_without_frames(tmp_path):
    samples.libero(tmp_path / "x_demo.hdf5", (2, 0))
    with pytest.raises(ValueError, match="data/demo_1: no frames"):
        recordings.scan(tmp_path / "x_demo.hdf5")
    found = recordings.scan(tmp_path / "x_demo.hdf5", recordings.Options(skip_bad=True))
    assert [demo.group for demo in found.demos] == ["data/demo_0"]
    samples.libero(tmp_path / "x_demo.hdf5", (0,))
    with pytest.raises(ValueError, match="no demonstration to import; skipped: .*no frames"):
        recordings.scan(tmp_path / "x_demo.hdf5", recordings.Options(skip_bad=True))


@pytest.mark.parametrize("cut", [0, 40, -2])
def test_a_jpeg_that_is_cut_off(tmp_path, cut):
    path = tmp_path / "a" / "episode_0.hdf5"
    path.parent.mkdir()
    rows = samples.aloha(path, compress="jpeg")["observations/images/top"]
    rows[2] = rows[2][:cut]
    with h5py.File(path, "r+") as file:
        del file["observations/images/top"]
        file["observations/images/top"] = samples.padded(rows)
    found = recordings.scan(path)
    with pytest.raises(ValueError, match="episode_0.hdf5: 'observations/images/top', frame 2"):
        recordings.read(found, found.demos[0], as_files=True)


def test_layouts_that_are_not_known(tmp_path):
    path = tmp_path / "d.hdf5"
    with h5py.File(path, "w") as file:
        file["episodes/0/action"] = np.zeros((3, 7))
    with pytest.raises(ValueError, match=r"not the layout of libero or .*it holds \['episodes'\]"):
        recordings.scan(path)
    samples.libero(path)
    with pytest.raises(ValueError, match="not the layout of aloha.*data/demo_0"):
        recordings.scan(path, recordings.Options(layout="aloha"))
    with pytest.raises(ValueError, match="no array 'obs/robot0_eef_pos'; in obs there are"):
        recordings.scan(path, recordings.Options(layout="robomimic"))
    with pytest.raises(ValueError, match="layout='droid'.*libero, robomimic, aloha"):
        recordings.Options(layout="droid")
    for fps in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"fps={fps}"):
            recordings.Options(fps=fps)


def test_files_of_one_source_agree(tmp_path):
    samples.libero(tmp_path / "a_demo.hdf5", (1,))
    samples.robomimic(tmp_path / "b.hdf5", (1,))
    with pytest.raises(ValueError, match=r"b.hdf5 looks like robomimic, and .*a_demo.hdf5 like"):
        recordings.scan(tmp_path, recordings.Options(skip_bad=True))
    (tmp_path / "b.hdf5").unlink()
    samples.libero(tmp_path / "b_demo.hdf5", (1,), hz=10)
    with pytest.raises(ValueError, match=r"rate of all files, found \{20: .*10: .*say which fps"):
        recordings.scan(tmp_path)
    assert recordings.scan(tmp_path, recordings.Options(fps=5)).fps == 5
    samples.libero(tmp_path / "b_demo.hdf5", (1,), hz=12.5)
    with pytest.raises(ValueError, match=r"one whole number .* found \{12.5: .*say which fps"):
        recordings.scan(tmp_path / "b_demo.hdf5")
    assert recordings.scan(tmp_path, recordings.Options(fps=5)).fps == 5


def test_nothing_outside_a_file_is_followed(tmp_path):
    other, path = tmp_path / "other.h5", tmp_path / "source" / "x_demo.hdf5"
    path.parent.mkdir()
    with h5py.File(other, "w") as file:
        file["actions"] = np.zeros((4, 7))
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4 * 7 * 8))
    layout = h5py.VirtualLayout((4, 7), float)
    layout[:] = h5py.VirtualSource(str(other), "actions", (4, 7))

    def link(demo):
        demo["actions"] = h5py.ExternalLink(str(other), "/actions")

    def raw(demo):
        demo.create_dataset("actions", (4, 7), float, external=[(str(secret), 0, 224)])

    def virtual(demo):
        demo.create_virtual_dataset("actions", layout)

    for outside in (link, raw, virtual):
        samples.libero(path, (4,))
        with h5py.File(path, "r+") as file:
            del file["data/demo_0/actions"]
            outside(file["data/demo_0"])
        with pytest.raises(ValueError, match="'actions' lies outside the file"):
            recordings.scan(path)


def test_natural_order():
    names = ["demo_10", "demo_2", "demo_1", "a", "demo_"]
    assert sorted(names, key=hdf5.natural) == ["a", "demo_", "demo_1", "demo_2", "demo_10"]
