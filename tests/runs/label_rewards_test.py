import json

import numpy as np
import pytest

from policymix.data import lerobot
from policymix.runs import label_rewards
from tests.runs import episodes_support as support

LAST = np.cumsum(support.LENGTHS) - 1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return lerobot.open_dataset(support.write(tmp_path_factory.mktemp("source") / "dataset"))


def _at(places, value=1.0):
    found = np.zeros(sum(support.LENGTHS), np.float32)
    found[list(places)] = value
    return found


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("success_at_end", _at(LAST)),
        ("zero", _at([])),
        ("-0.25", _at(range(27), -0.25)),
    ],
)
def test_rules(dataset, rule, expected):
    found = label_rewards.rewards(dataset, rule)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_successes_can_be_listed(dataset):
    found = label_rewards.rewards(dataset, "success_at_end", [1, 4])
    np.testing.assert_array_equal(found, _at(LAST[[1, 4]]))
    with pytest.raises(ValueError, match="only success_at_end takes a list"):
        label_rewards.rewards(dataset, "zero", [1])


def test_a_table_of_frames(dataset, tmp_path):
    path = tmp_path / "rewards.csv"
    path.write_text("reward,episode_index, frame_index\n0.5,1,0\n-2,6,2\n")
    found = label_rewards.rewards(dataset, str(path))
    np.testing.assert_array_equal(found, _at([3], 0.5) + _at([26], -2))


def test_a_table_of_returns(dataset, tmp_path):
    path = tmp_path / "rewards.csv"
    path.write_text("episode_index,reward\n1,0.5\n6,-2\n")
    found = label_rewards.rewards(dataset, str(path))
    np.testing.assert_array_equal(found, _at([7], 0.5) + _at([26], -2))


def test_sub_goals(dataset, tmp_path):
    path = tmp_path / "subgoals.json"
    path.write_text(json.dumps({"1": [0, 4], "6": [2], "3": []}))
    np.testing.assert_array_equal(label_rewards.rewards(dataset, str(path)), _at([3, 7, 26]))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("sucess", "is no rule: expected success_at_end, zero, a number, FILE.csv"),
        ("nan", "is no rule"),
        ("1e39", "is no rule"),
        ("/none/at/all.csv", "reward=/none/at/all.csv: no such file"),
    ],
)
def test_unknown_rules(dataset, rule, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        label_rewards.rewards(dataset, rule)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.csv", "", "r.csv is no table"),
        ("r.csv", "episode_index,value\n1,1\n", "expected the columns episode_index, frame_index"),
        ("r.csv", "episode_index,reward\n0,1\n7,1\n", r"line 3: .* has the episodes 0..6, not 7"),
        ("r.csv", "episode_index,reward\n-1,1\n", "line 2: .* not -1"),
        ("r.csv", "episode_index,frame_index,reward\n0,3,1\n", "frames 0..2, not 3"),
        ("r.csv", "episode_index,reward\n0,high\n", "line 2: could not convert"),
        ("r.csv", "episode_index,reward\n0,inf\n", "line 2: reward inf is not finite"),
        ("r.csv", "episode_index,reward\n0\n", "line 2: expected 2 values, found 1"),
        ("r.csv", "episode_index,reward\n0,1e39\n", r"line 2: reward 1e\+39 is not finite in"),
        ("r.csv", "episode_index,reward\n0,1\n0,1\n", "line 3: the frame has a reward already"),
        ("r.json", "[1, 2]", r"expected \{episode: \[frames\]\}, found list"),
        ("r.json", '{"1": 3}', "'1': expected a list of frames, found 3"),
        ("r.json", '{"1": [true]}', "expected a list of frames"),
        ("r.json", '{"one": [1]}', "'one': invalid literal"),
        ("r.json", '{"0": [3]}', "'0': episode 0 .* frames 0..2, not 3"),
        ("r.json", '{"0": [', "not readable JSON"),
    ],
)
def test_damaged_files(dataset, tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as told:
        label_rewards.rewards(dataset, str(path))
    assert str(path) in str(told.value)


def test_where_rewards_go(dataset):
    assert label_rewards.name(dataset) == "next.reward"
    assert label_rewards.name(dataset, "subgoal") == "subgoal"
    for taken in ("observation.state", "note", "observation.images.top", "index"):
        with pytest.raises(ValueError, match=f"'{taken}' is .* rewards cannot take the place of"):
            label_rewards.name(dataset, taken)
