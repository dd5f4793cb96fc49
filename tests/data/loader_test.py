import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from policymix.data import lerobot, loader

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata" / "lerobot"
TASK = "Push the T-shaped block onto the T-shaped target."


@pytest.fixture(scope="module")
def dataset():
    return lerobot.open_dataset(TESTDATA / "pusht_v30_video")


@hypothesis.given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 2**40), st.integers(2, 12))
@hypothesis.settings(deadline=None)
def test_batches_in_a_row_are_whole_epochs(num_items, batch_size, seed, steps):
    batches = [loader.batch_indices(num_items, batch_size, seed, step) for step in range(steps)]
    assert all(batch.shape == (batch_size,) and batch.dtype == np.int64 for batch in batches)
    drawn = np.concatenate(batches)
    for start in range(0, len(drawn) - num_items + 1, num_items):
        assert sorted(drawn[start : start + num_items]) == list(range(num_items))
    tail = drawn[len(drawn) // num_items * num_items :].tolist()
    assert len(set(tail)) == len(tail)


@hypothesis.given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 9), st.integers(0, 10**9))
@hypothesis.settings(deadline=None)
def test_a_batch_depends_on_its_arguments_alone(num_items, batch_size, seed, step):
    first = loader.batch_indices(num_items, batch_size, seed, step)
    first_again = first.copy()
    first[:] = -1  # whoever writes to a batch writes to no cache
    loader.batch_indices(num_items + 1, batch_size, seed + 1, step + 5)
    loader._permutation.cache_clear()
    np.testing.assert_array_equal(
        loader.batch_indices(num_items, batch_size, seed, step), first_again
    )


def test_batch_size_only_cuts_the_same_sequence():
    whole = loader.batch_indices(10, 60, seed=3, step=0)
    pieces = [loader.batch_indices(10, 4, seed=3, step=step) for step in range(15)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_seeds_and_epochs_differ():
    orders = [tuple(loader.batch_indices(50, 50, s, step)) for s in range(3) for step in range(3)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_batch_indices_refuses(arguments):
    with pytest.raises(ValueError, match="expected num_items >= 1"):
        loader.batch_indices(*arguments)


@hypothesis.given(st.integers(2, 200), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32))
def test_split_is_disjoint_sorted_and_seeded(num_episodes, fraction, seed):
    train, held_out = loader.split_episodes(num_episodes, fraction, seed)
    assert sorted(train + held_out) == list(range(num_episodes))
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert len(train) >= 1
    assert (len(held_out) >= 1) == (fraction > 0)
    assert abs(len(held_out) - fraction * num_episodes) <= 1
    assert loader.split_episodes(num_episodes, fraction, seed) == (train, held_out)


def test_splits_differ_by_seed():
    assert len({tuple(loader.split_episodes(50, 0.2, seed)[1]) for seed in range(20)}) > 15
    assert loader.split_episodes(1, 0.0, 0) == ([0], [])


@pytest.mark.parametrize(("n", "fraction"), [(8, 1.0), (8, -0.1), (1, 0.2), (0, 0.0)])
def test_split_refuses(n, fraction):
    with pytest.raises(ValueError, match=f"{fraction}"):
        loader.split_episodes(n, fraction, 0)


def test_chunks_equal_the_datasets_own_items(dataset):
    chunks = loader.ActionChunks(dataset, horizon=8)
    assert len(chunks) == 753
    positions = np.array([752, 0, 77, 78, 400, 745, 71])
    got = chunks.get(positions)
    deltas = {"action": [step / 10 for step in range(8)]}
    items = [dataset.item(index, deltas) for index in positions]
    np.testing.assert_array_equal(got["state"], [item["observation.state"] for item in items])
    np.testing.assert_array_equal(got["actions"], [item["action"] for item in items])
    np.testing.assert_array_equal(got["action_is_pad"], [item["action_is_pad"] for item in items])
    np.testing.assert_array_equal(got["episode_index"], [item["episode_index"] for item in items])
    np.testing.assert_array_equal(got["frame_index"], [item["frame_index"] for item in items])
    assert got["prompt"] == [TASK] * 7
    assert {key: got[key].dtype for key in got if key != "prompt"} == {
        "state": np.float32,
        "actions": np.float32,
        "action_is_pad": bool,
        "episode_index": np.int64,
        "frame_index": np.int64,
    }


def test_goldens_of_lerobot(dataset):
    golden = np.load(TESTDATA / "golden_pusht_v30_video.npz")
    indices = sorted({int(entry.split("/")[0]) for entry in golden.files})
    got = loader.ActionChunks(dataset, horizon=8).get(indices)
    np.testing.assert_array_equal(got["actions"], [golden[f"{i}/action"] for i in indices])
    np.testing.assert_array_equal(
        got["action_is_pad"], [golden[f"{i}/action_is_pad"] for i in indices]
    )


def test_chosen_episodes_and_prompt(dataset):
    chunks = loader.ActionChunks(dataset, 3, episodes=[5, 1], default_prompt="push")
    lengths = dataset.episode_to - dataset.episode_from
    assert len(chunks) == lengths[5] + lengths[1]
    got = chunks.get(np.arange(len(chunks)))
    assert got["episode_index"].tolist() == [5] * lengths[5] + [1] * lengths[1]
    assert got["frame_index"].tolist() == [*range(lengths[5]), *range(lengths[1])]
    assert set(got["prompt"]) == {"push"}
    np.testing.assert_array_equal(got["state"], chunks.frame_values()["state"])
    np.testing.assert_array_equal(got["actions"][:, 0], chunks.frame_values()["actions"])
    assert chunks.lengths() == [lengths[5], lengths[1]]


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_blocks_are_all_examples_in_order(dataset, size):
    chunks = loader.ActionChunks(dataset, 5, episodes=[2, 0])
    everything = chunks.get(np.arange(len(chunks)))
    blocks = list(chunks.blocks(size))
    assert len(blocks) == -(-len(chunks) // size)
    for key in ("state", "actions"):
        found = np.concatenate([block[key] for block in blocks])
        np.testing.assert_array_equal(found, everything[key])
    assert everything["action_is_pad"].sum() == 2 * (1 + 2 + 3 + 4)


def test_a_window_is_the_states_up_to_the_frame(dataset):
    plain, window = (loader.ActionChunks(dataset, 2, window=w) for w in (1, 3))
    positions = np.array([0, 1, 2, 100, int(dataset.episode_from[3])])
    found = window.get(positions)
    assert found["state"].shape == (5, 3, 2)
    for back in range(3):
        first = dataset.episode_from[found["episode_index"]]
        expected = plain.get(np.maximum(positions - back, first))["state"]
        np.testing.assert_array_equal(found["state"][:, 2 - back], expected)
        assert found["state_is_pad"][:, 2 - back].tolist() == (positions - back < first).tolist()


def test_several_features_are_one_vector(dataset):
    both = loader.ActionChunks(dataset, 2, state_key=("observation.state", "action"))
    found, plain = both.get([3, 8]), loader.ActionChunks(dataset, 2).get([3, 8])
    np.testing.assert_array_equal(found["state"][:, :2], plain["state"])
    np.testing.assert_array_equal(found["state"][:, 2:], plain["actions"][:, 0])


def _squared(step):
    return {"step": step, "square": np.full(3, step**2)}


def _refuses(step):
    if step == 4:
        raise ValueError("/data/d: episode 7 cannot be read")
    return step


@pytest.mark.parametrize(
    "settings",
    [
        {"num_threads": 1},
        {"num_threads": 3, "buffered": 1},
        pytest.param({"num_threads": 1, "num_processes": 2}, marks=pytest.mark.slow),
    ],
)
def test_elements_made_ahead_are_those_made_one_by_one(settings):
    made = list(loader.ahead(_squared, 5, 40, **settings))
    assert [element["step"] for element in made] == list(range(5, 40))
    assert all((element["square"] == element["step"] ** 2).all() for element in made)


def test_what_goes_wrong_ahead_is_told_where_its_element_is_asked_for():
    made = loader.ahead(_refuses, 0, 9, num_threads=2)
    assert [next(made) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="episode 7 cannot be read"):
        next(made)


@pytest.mark.parametrize("buffered", [0, 1, 5, 50])
def test_batches_are_placed_before_they_are_asked_for(buffered):
    placed = []

    def place(batch):
        placed.append(batch)
        return -batch

    taken = loader.placed(range(9), place, buffered=buffered)
    assert next(taken) == 0
    assert placed == list(range(min(9, buffered + 1)))
    assert list(taken) == [-k for k in range(1, 9)]


def test_a_single_number_is_a_vector_of_one(dataset):
    chunks = loader.ActionChunks(dataset, 2, action_key="next.reward")
    assert chunks.get([0, 1])["actions"].shape == (2, 2, 1)


@pytest.mark.parametrize("episodes", [[8], [-1], [0, 0], [], [1.5]])
def test_episodes_that_are_not_there(dataset, episodes):
    with pytest.raises(ValueError, match=r"pusht_v30_video.*0\.\.7"):
        loader.ActionChunks(dataset, 2, episodes=episodes)


@pytest.mark.parametrize("positions", [[-1], [0, 753]])
def test_positions_out_of_range(dataset, positions):
    with pytest.raises(IndexError, match=r"0\.\.752"):
        loader.ActionChunks(dataset, 2).get(positions)


def test_keys_that_do_not_serve(dataset):
    with pytest.raises(ValueError, match=r"'observation\.stat'.*did you mean"):
        loader.ActionChunks(dataset, 2, state_key="observation.stat")
    with pytest.raises(ValueError, match=r"action_key='observation\.image'.*video.*'action'"):
        loader.ActionChunks(dataset, 2, action_key="observation.image")
    with pytest.raises(ValueError, match="horizon"):
        loader.ActionChunks(dataset, 0)
