import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.data import loader, oxe, rlds
from tests.data import rlds_support as support

COMMANDS = st.lists(st.sampled_from([0.0, 0.02, 0.05, 0.3, 0.95, 0.97, 1.0]), min_size=1)


@pytest.fixture(scope="module")
def golden():
    """What open-pi-zero (c3df7fb) and OpenPI (15a9616) compute, under tensorflow 2.21.

    To renew: `bridge_dataset_transform`, `rt1_dataset_transform`, `binarize_gripper_actions`,
    `rel2abs_gripper_actions` and `chunk_act_obs` of open-pi-zero's src/data, and the ranges minus
    `filter_last_n_in_ranges` of OpenPI's examples/droid/compute_droid_nonidle_ranges.py, are called
    with the inputs that are stored here beside the outputs; `rlds_support.pack` writes them.
    """
    arrays = support.unpack(support.TESTDATA / "golden_oxe.npz")
    tree = {}
    for key, values in arrays.items():
        *path, last = key.split("/")
        place = tree
        for name in path:
            place = place.setdefault(name, {})
        place[last] = values
    return tree


def _words(length, text=b"do it"):
    words = np.empty(length, object)
    words[:] = [text] * length
    return words


def _bridge(case, first=0):
    length = len(case["action"])
    padded = np.concatenate([np.full((first, 7), 9, np.float32), case["state"]])
    action = np.concatenate([np.full((first, 7), 0.5, np.float32), case["action"]])
    images = np.arange(-first, length)
    return {
        "observation": {"state": padded, "image_0": images, "image_1": images + 100},
        "action": action,
        "language_instruction": _words(first + length),
    }


def test_binarized_gripper_equals_octos(golden):
    for case in golden["binarize"].values():
        found = oxe.binarized_gripper(case["in"])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, case["out"])


def test_absolute_gripper_equals_octos(golden):
    for case in golden["relative"].values():
        np.testing.assert_array_equal(oxe.absolute_gripper(case["in"]), case["out"])


def test_bridge_equals_open_pi_zeros(golden):
    for case in golden["bridge"].values():
        found = oxe.standardize("bridge_dataset", _bridge(case))
        np.testing.assert_array_equal(found[oxe.STATE], case["out"]["proprio"])
        np.testing.assert_array_equal(found[oxe.ACTION], case["out"]["action"])
        primary = found["observation.images.primary"]
        np.testing.assert_array_equal(primary, case["out"]["image_0"])
        np.testing.assert_array_equal(found["observation.images.secondary"], primary + 100)
        assert len(found[oxe.INSTRUCTION]) == len(found[oxe.ACTION]) == len(case["action"]) - 1


def test_variants_of_bridge_drop_the_first_step(golden):
    for case in golden["bridge"].values():
        wanted = oxe.standardize("bridge_dataset", _bridge(case))
        found = oxe.standardize("bridge_orig", _bridge(case, first=1))
        for key in wanted:
            np.testing.assert_array_equal(found[key], wanted[key], err_msg=key)
        of_oxe = _bridge(case, first=1)
        open_gripper = np.append(False, oxe.binarized_gripper(case["action"][:, 6]) > 0.5)
        of_oxe["action"] = {
            "world_vector": of_oxe["action"][:, :3],
            "rotation_delta": of_oxe["action"][:, 3:6],
            "open_gripper": open_gripper,
        }
        of_oxe["observation"]["image"] = of_oxe["observation"].pop("image_0")
        of_oxe["observation"]["natural_language_instruction"] = of_oxe["language_instruction"]
        found = oxe.standardize("bridge", of_oxe)
        assert found.keys() == wanted.keys() - {"observation.images.secondary"}
        np.testing.assert_array_equal(found[oxe.ACTION][:, :6], wanted[oxe.ACTION][:, :6])
        np.testing.assert_array_equal(found[oxe.ACTION][:, 6], open_gripper[1:-1])
        np.testing.assert_array_equal(found[oxe.STATE], wanted[oxe.STATE])


def test_fractal_equals_open_pi_zeros(golden):
    for case in golden["fractal"].values():
        names = ("gripper_closedness_action", "world_vector", "rotation_delta")
        length = len(case["image"])
        observation = {key: case[key] for key in case.keys() - {*names, "out"}}
        observation["natural_language_instruction"] = _words(length)
        trajectory = {"action": {key: case[key] for key in names}, "observation": observation}
        found = oxe.standardize("fractal20220817_data", trajectory)
        np.testing.assert_array_equal(found[oxe.STATE], case["out"]["proprio"])
        np.testing.assert_array_equal(found[oxe.ACTION], case["out"]["action"])
        assert found[oxe.STATE].dtype == found[oxe.ACTION].dtype == np.float32
        assert found[oxe.STATE].shape == (length, 8)


def test_moving_steps_of_droid_are_openpis(golden):
    counts = []
    for case in golden["droid"].values():
        np.testing.assert_array_equal(oxe.moving(case["joint_velocity"]), case["kept"])
        counts.append(int(case["kept"].sum()))
    assert max(counts) > 0 == min(counts)


@given(COMMANDS)
@settings(max_examples=100, deadline=None)
def test_binarized_gripper_is_the_loop_of_its_definition(commands):
    commands, carry = np.array(commands), commands[-1]
    wanted = []
    for command in commands[::-1]:
        if command > oxe.OPEN or command < oxe.CLOSED:
            carry = float(command > oxe.OPEN)
        wanted.append(np.float32(carry))
    np.testing.assert_array_equal(oxe.binarized_gripper(commands), wanted[::-1])


@pytest.mark.parametrize("gripper", [oxe.binarized_gripper, oxe.absolute_gripper])
def test_commands_that_are_no_numbers_stay_so(gripper):
    commands = np.array([0.0, 0.08, -1, 1, 0, 1])
    wanted = gripper(commands)
    commands[[1, 4]] = np.nan, np.inf
    np.testing.assert_array_equal(gripper(commands)[[1, 4]], [np.nan, np.inf])
    np.testing.assert_array_equal(gripper(commands)[[0, 2, 3, 5]], wanted[[0, 2, 3, 5]])
    assert gripper(commands).dtype == np.float32
    assert gripper(np.zeros(0)).shape == (0,)


def _droid(length=40, texts=(b"one", b"two", b"three")):
    rng = np.random.default_rng(0)
    names = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    observation = {name: np.full(length, number) for number, name in enumerate(names)}
    observation |= {
        "joint_position": rng.normal(size=(length, 7)),
        "gripper_position": rng.uniform(size=(length, 1)),
    }
    commands = {
        "joint_position": rng.normal(size=(length, 7)),
        "joint_velocity": rng.normal(size=(length, 7)),
        "gripper_position": rng.uniform(size=(length, 1)),
    }
    words = {
        f"language_instruction{end}": _words(length, text)
        for end, text in zip(("", "_2", "_3"), texts, strict=True)
    }
    return {"observation": observation, "action_dict": commands} | words


@pytest.mark.parametrize("name", ["droid", "droid_joint_velocity"])
def test_droid_has_joints_then_gripper(name):
    trajectory = _droid()
    found = oxe.standardize(name, trajectory, {"file_path": b"/success/1"})
    command = "joint_position" if name == "droid" else "joint_velocity"
    commands, observation = trajectory["action_dict"], trajectory["observation"]
    np.testing.assert_array_equal(found[oxe.ACTION][:, :7], commands[command].astype(np.float32))
    gripper = commands["gripper_position"][:, 0].astype(np.float32)
    np.testing.assert_array_equal(found[oxe.ACTION][:, 7], gripper)
    joints = observation["joint_position"].astype(np.float32)
    np.testing.assert_array_equal(found[oxe.STATE][:, :7], joints)
    assert found[oxe.IS_KEPT].sum() == 30  # all move: the last ten are left out
    assert found["observation.images.wrist"][0] == 2


def test_droids_choices_belong_to_the_episode():
    paths = [b"/lab/success/%d" % number for number in range(60)]
    found = [oxe.standardize("droid", _droid(), {"file_path": path}) for path in paths]
    texts = [one[oxe.INSTRUCTION][0] for one in found]
    cameras = [int(one["observation.images.primary"][0]) for one in found]
    assert set(texts) == {b"one", b"two", b"three"}
    assert set(cameras) == {0, 1}
    assert all(
        int(one["observation.images.secondary"][0]) == 1 - c
        for one, c in zip(found, cameras, strict=True)
    )
    again = [oxe.standardize("droid", _droid(), {"file_path": path}) for path in paths]
    assert [one[oxe.INSTRUCTION][0] for one in again] == texts


def test_droid_draws_only_from_instructions_that_say_something():
    for number in range(20):
        metadata = {"file_path": b"/success/%d" % number}
        found = oxe.standardize("droid", _droid(texts=(b"", b"two", b"")), metadata)
        assert found[oxe.INSTRUCTION][0] == b"two"
    empty = oxe.standardize("droid", _droid(texts=(b"", b"", b"")))
    assert oxe.is_unlabeled(empty[oxe.INSTRUCTION])


def test_failures_of_droid_are_refused():
    refuses = oxe.find("droid").refuses
    assert refuses({}, {"file_path": b"/lab/failure/2023"}) == "the attempt failed"
    assert refuses({}, {"file_path": b"/lab/success/2023"}) == ""
    assert refuses({}, {}) == ""
    assert refuses({}, {"file_path": "/lab/failure"}) == "the attempt failed"
    assert refuses({}, {"file_path": "/lab/success"}) == ""
    assert oxe.find("bridge_dataset").refuses({}, {"file_path": b"/failure"}) == ""


def test_wrong_datasets_are_explained():
    with pytest.raises(ValueError, match="no standardisation is called 'bridg'.*bridge_dataset"):
        oxe.find("bridg")
    with pytest.raises(
        ValueError, match="'bridge_dataset' does not fit .*'action'.*observation/state"
    ):
        oxe.standardize("bridge_dataset", {"observation": {"state": np.zeros((3, 7))}})


def test_masks_spare_the_gripper_and_fit_the_actions(golden):
    case = golden["bridge"]["0"]
    found = oxe.standardize("bridge_dataset", _bridge(case))
    assert len(oxe.find("bridge_dataset").normalized) == found[oxe.ACTION].shape[1]
    assert len(oxe.find("droid").normalized) == 8
    for standard in oxe.DATASETS.values():
        assert [i for i, used in enumerate(standard.normalized) if not used] == [
            len(standard.normalized) - 1
        ]


def test_mixtures_are_of_known_datasets():
    assert {"bridge", "fractal", "oxe_simple", "droid"} <= oxe.MIXTURES.keys()
    for name in oxe.MIXTURES:
        assert all(dataset in oxe.DATASETS for dataset, _ in oxe.mixture(name))
    with pytest.raises(ValueError, match="no mixture is called 'rtx'"):
        oxe.mixture("rtx")


def test_fractions_are_weights_times_sizes():
    np.testing.assert_allclose(oxe.fractions([1, 1], [300, 100]), [0.75, 0.25])
    np.testing.assert_allclose(oxe.fractions([1, 3], [300, 100]), [0.5, 0.5])
    for weights, sizes in (([], []), ([0, 0], [1, 1]), ([1, -1], [1, 1])):
        with pytest.raises(ValueError, match="weights and sizes"):
            oxe.fractions(weights, sizes)


def test_the_loaders_windows_are_octos(golden, tmp_path, monkeypatch):
    monkeypatch.setenv("POLICYMIX_CACHE", str(tmp_path / "cache"))
    tree = {"steps": {"state": ("float32", 1), "action": ("float32", 1)}}
    for name, case in golden["windows"].items():
        length, window, horizon = map(int, name.split("_"))
        # Behind another episode, whose frames must not be seen.
        every = [
            {f"steps/{key}": np.arange(length, dtype=np.float32) + start for key in tree["steps"]}
            for start in (100, 0)
        ]
        dataset = rlds.open_dataset(support.written(tmp_path / name, tree, every))
        chunks = loader.ActionChunks(dataset, horizon, [1], state_key="state", window=window)
        found = chunks.get(np.arange(length))
        state = found["state"].reshape(length, window)
        np.testing.assert_array_equal(state, case["observation"])
        if window > 1:
            np.testing.assert_array_equal(~found["state_is_pad"], case["mask"])
        np.testing.assert_array_equal(found["actions"][..., 0], case["action"][:, -1])
