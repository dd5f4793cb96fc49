import pickle

import numpy as np
import pytest

from policymix.data import loader, ogbench, opening

LENGTHS = (4, 2, 3)  # transitions of every episode
SIZE = 3


def transitions(pictures=False):
    """Episodes of states s_0..s_T and actions a_0..a_{T-1}, told apart by their numbers."""
    found = []
    for number, length in enumerate(LENGTHS):
        values = 100 * number + np.arange(length + 1)
        if pictures:
            states = np.broadcast_to(values[:, None, None, None], (length + 1, 4, 5, 3))
            states = states.astype(np.uint8)
        else:
            states = np.repeat(values[:, None], SIZE, axis=1).astype(np.float32)
        actions = np.stack([values, -values], axis=1).astype(np.float32)[:-1]
        found.append((states, actions))
    return found


def as_downloaded(pictures=False):
    """One row a state; the last action is there, and never had an effect."""
    parts = transitions(pictures)
    waste = np.full((1, 2), 7e7, np.float32)
    observations = np.concatenate([states for states, _ in parts])
    actions = np.concatenate([np.concatenate([a, waste]) for _, a in parts])
    terminals = np.concatenate([np.arange(n + 1) == n for n in LENGTHS])
    qpos = np.arange(len(terminals), dtype=np.float64)
    return {"observations": observations, "actions": actions, "terminals": terminals, "qpos": qpos}


def compact(pictures=False):
    found = as_downloaded(pictures)
    last = found["terminals"]
    before = np.concatenate([last[1:], [True]])
    rewards = np.arange(len(last), dtype=np.float32)
    return found | {
        "valids": 1.0 - last,
        "terminals": (last | before).astype(np.float32),
        "rewards": rewards,
        "masks": (rewards != 3).astype(np.float32),
    }


def regular(pictures=False):
    found, parts = compact(pictures), transitions(pictures)
    kept = found.pop("valids") > 0
    found = {name: values[kept] for name, values in found.items()}
    following = np.concatenate([states[1:] for states, _ in parts])
    return found | {"next_observations": following}


FORMS = [as_downloaded, compact, regular]


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["mapped", "compressed"])
def save(request, tmp_path):
    def saved(arrays, name="play.npz"):
        request.param(tmp_path / name, **arrays)
        return tmp_path / name

    return saved


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_one(save, form):
    path = save(form())
    dataset = opening.open_dataset(str(path))
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (3, 12, 0)
    np.testing.assert_array_equal(dataset.episode_from, [0, 5, 8])
    np.testing.assert_array_equal(dataset.episode_to, [5, 8, 12])
    parts = transitions()
    states = np.concatenate([states for states, _ in parts])
    np.testing.assert_array_equal(dataset.column("observation.state"), states)
    # The last frame's numbers are those before: nothing was done in it.
    actions = np.concatenate([np.concatenate([a, a[-1:]]) for _, a in parts])
    np.testing.assert_array_equal(dataset.column("action"), actions)
    np.testing.assert_array_equal(
        np.flatnonzero(~dataset.column("is_kept")), dataset.episode_to - 1
    )
    if form is not as_downloaded:
        rewards = [0, 1, 2, 3, 3, 5, 6, 6, 8, 9, 10, 10]
        np.testing.assert_array_equal(dataset.column("reward"), rewards)
        np.testing.assert_array_equal(np.flatnonzero(dataset.column("masks") == 0), [3, 4])
    assert dataset.camera_keys == []
    assert "terminals" not in dataset.features
    assert dataset.features["observation.state"] == {
        "dtype": "float32",
        "shape": [SIZE],
        "names": None,
    }
    np.testing.assert_array_equal(dataset.column("episode_index"), np.repeat([0, 1, 2], [5, 3, 4]))
    np.testing.assert_array_equal(dataset.column("frame_index")[3:8], [3, 4, 0, 1, 2])
    assert dataset.column("qpos").shape == (12,)
    assert dataset.check_episodes(["observation.state", "action"]) == {}


@pytest.mark.parametrize("form", FORMS)
def test_pictures(save, form):
    dataset = ogbench.open_dataset(save(form(pictures=True)), fps=10)
    assert dataset.camera_keys == ["observation.image"]
    frames = dataset.frames("observation.image")
    assert (frames.shape, frames.num_frames) == ((4, 5), 12)
    expected = np.concatenate([states for states, _ in transitions(pictures=True)])
    np.testing.assert_array_equal(frames.all(), expected)
    chosen = np.array([11, 4, 4, 0])
    np.testing.assert_array_equal(frames.get(chosen), expected[chosen])
    np.testing.assert_array_equal(dataset.column("observation.state"), np.zeros(12))
    with pytest.raises(IndexError, match=r"frames 0..11, got 0..12"):
        frames.get(np.array([0, 12]))
    with pytest.raises(ValueError, match="has no camera 'observation.images.top'"):
        dataset.frames("observation.images.top")


def test_it_is_read_as_any_dataset(save):
    dataset = ogbench.open_dataset(save(compact()))
    chunks = loader.ActionChunks(dataset, 3, [0, 2])
    assert len(chunks) == LENGTHS[0] + LENGTHS[2]
    assert chunks.shapes == {"state": (SIZE,), "actions": (3, 2)}
    found = chunks.get(np.array([2, 4]))
    np.testing.assert_array_equal(found["actions"][0, :, 0], [2, 3, 3])
    np.testing.assert_array_equal(found["actions"][1, :, 0], [200, 201, 202])
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again.column("action"), dataset.column("action"))
    assert again.fingerprint() == dataset.fingerprint()


def test_what_is_not_compressed_is_mapped(tmp_path):
    np.savez(tmp_path / "play.npz", **as_downloaded())
    dataset = ogbench.open_dataset(tmp_path / "play.npz")
    assert isinstance(dataset.column("observation.state"), np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        dataset.column("observation.state")[0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": None}, r"is no dataset of OGBench: it lacks \['actions'\], and has \['observ"),
        ({"actions": np.zeros((3, 2))}, r"actions has the shape \[3, 2\], and terminals 12 rows"),
        ({"terminals": np.zeros(12)}, "the last of its 12 rows ends no episode"),
        ({"terminals": np.arange(12) > 9}, "episode 1 has one frame"),
        ({"observations": np.zeros((12, 4, 4, 1), np.uint8)}, r"observations are uint8 \[12, 4, 4"),
    ],
)
def test_other_files(tmp_path, change, message):
    arrays = {k: v for k, v in (as_downloaded() | change).items() if v is not None}
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match=message) as told:
        ogbench.open_dataset(tmp_path / "other.npz")
    assert str(tmp_path / "other.npz") in str(told.value)


def test_damaged_files(tmp_path):
    path = tmp_path / "play.npz"
    np.savez_compressed(path, **as_downloaded())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="play.npz is no file of numpy.savez"):
        ogbench.open_dataset(path)
    with pytest.raises(FileNotFoundError, match="play.npz"):
        opening.open_dataset(str(tmp_path / "none" / "play.npz"))


def test_no_such_feature(save):
    dataset = ogbench.open_dataset(save(as_downloaded()))
    with pytest.raises(ValueError, match="found no 'actions'; did you mean 'action'"):
        dataset.column("actions")
