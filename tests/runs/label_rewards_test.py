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


def test_a_table_of_ranges(dataset, tmp_path):
    path = tmp_path / "rewards.csv"
    path.write_text("episode_index,first_frame,last_frame,reward\n1,1,3,0.5\n1,4,4,2\n6,0,0,-1\n")
    found = label_rewards.rewards(dataset, str(path))
    np.testing.assert_array_equal(found, _at([4, 5, 6], 0.5) + _at([7], 2) + _at([24], -1))


def test_sub_goals_of_what_was_recorded(dataset, capsys):
    """next.reward is the episode's number, and next.done is true in last frames."""
    found = label_rewards.rewards(dataset, "next.reward>=5, next.done == 1")
    np.testing.assert_array_equal(found, _at(LAST) + _at(LAST[4:6] + 1))
    assert "next.reward>=5 is met in 2 of 7 episodes" in capsys.readouterr().out
    at_once = label_rewards.rewards(dataset, "next.reward>5,frame_index<1")
    np.testing.assert_array_equal(at_once, _at(np.r_[0, LAST[:-1] + 1]) + _at([LAST[5] + 1]))
    assert not label_rewards.rewards(dataset, "next.reward>100").any()
    np.testing.assert_array_equal(
        label_rewards.rewards(dataset, "next.reward<=0"), _at([0])
    )  # once in an episode, though it holds in all its frames


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("next.done=>1", "'next.done=>1' is no sub-goal: expected a feature, one of >=, <=, =="),
        ("next.done>=1,next.reward", "'next.reward' is no sub-goal"),
        ("next.done>=high", "is no sub-goal"),
        ("next.sucess>=1", "has no 'next.sucess'"),
        ("observation.state>=1", r"is float32 \[2\]; one number a frame is needed, as are \['next"),
        ("observation.images.top>=1", "one number a frame is needed"),
    ],
)
def test_sub_goals_that_are_none(dataset, rule, message):
    with pytest.raises(ValueError, match=message):
        label_rewards.rewards(dataset, rule)


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
        ("r.csv", "episode_index,first_frame,reward\n0,1,1\n", "or first_frame and last_frame for"),
        (
            "r.csv",
            "episode_index,first_frame,last_frame,reward\n0,0,1,1\n0,1,2,1\n",
            "line 3: the frame has a reward already",
        ),
        (
            "r.csv",
            "episode_index,first_frame,last_frame,reward\n0,2,1,1\n",
            "line 2: first_frame is 2, after last_frame 1",
        ),
        (
            "r.csv",
            "episode_index,first_frame,last_frame,reward\n0,1,3,1\n",
            "line 2: .* frames 0..2, not 3",
        ),
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


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("next.success", "success"), "next.success"),
        (("next.success", "subgoal"), "subgoal"),
        (("subgoal", "next.reward"), "next.reward"),
        (("next.reward", "reward"), "reward"),
    ],
)
def test_which_rewards_are_read(names, chosen):
    found, values = label_rewards.recorded(_Columns(**{name: [0, 1] for name in names}))
    assert found == chosen
    np.testing.assert_array_equal(values, [0.0, 1.0])
    assert values.dtype == np.float64


def test_no_rewards(dataset):
    class Small(_Columns):
        path = "small"

    with pytest.raises(ValueError, match="small has no rewards, none of reward, next.reward"):
        label_rewards.recorded(Small(speed=[1, 2]))
    with pytest.raises(ValueError, match=r"config.offline_rl.reward_key, of \['speed'\]"):
        label_rewards.recorded(Small(speed=[1, 2]))
    with pytest.raises(ValueError, match="'pose' is float64 .2.; one number a frame is needed"):
        label_rewards.recorded(Small(pose=[[1, 2], [3, 4]]), "pose")
    with pytest.raises(ValueError, match="has no 'rewards'; did you mean"):
        label_rewards.recorded(dataset, "rewards")


class _Columns:
    """Two episodes, of as many frames as there are values, but for one in the first."""

    path = "columns"

    def __init__(self, **values):
        self._values = {name.replace("__", "."): np.array(v) for name, v in values.items()}
        shapes = {name: list(v.shape[1:]) or [1] for name, v in self._values.items()}
        self.features = {
            name: {"dtype": "float64", "shape": shape} for name, shape in shapes.items()
        }
        self.numeric_keys = list(self.features)
        self.num_frames = len(next(iter(self._values.values())))
        self.episode_from, self.episode_to = np.array([0, 1]), np.array([1, self.num_frames])

    def column(self, name):
        return self._values[name]


@pytest.mark.parametrize(
    ("rule", "columns", "expected", "why"),
    [
        ("auto", {"next.terminated": [0, 1, 0, 0], "success": [1, 1, 1, 1]}, [1], "terminated"),
        ("auto", {"is_terminal": [1, 0, 0, 1]}, [0, 3], "is_terminal"),
        ("auto", {"masks": [1, 0, 0, 1], "success": [1, 1, 1, 1]}, [1, 2], "masks"),
        ("auto", {"next.success": [0, 0, 1, 0]}, [2], "next.success"),
        ("auto", {"masks": [[1, 0]] * 4, "next.success": [0, 0, 1, 0]}, [2], "next.success"),
        ("auto", {"success": [1, 0, 1, 1]}, [0, 2, 3], "success"),
        ("auto", {"reward": [0, 0, 0, 0]}, [3], "its last reward is above 0"),
        ("reward", {"masks": [0, 0, 0, 0]}, [3], "its last reward is above 0"),
        ("success", {"success": [0, 1, 0, 0], "terminated": [1, 1, 1, 1]}, [1], "success"),
        ("always", {"success": [0, 1, 0, 0]}, [0, 3], "every last frame"),
        ("never", {"success": [0, 1, 0, 0]}, [], "never"),
    ],
)
def test_where_tasks_end(rule, columns, expected, why):
    dataset = _Columns(**columns)
    found, told = label_rewards.ends(dataset, rule, np.array([0.0, 1.0, 1.0, 2.0]))
    np.testing.assert_array_equal(np.flatnonzero(found), expected)
    assert why in told


def test_where_last_frames_are_only_seen():
    dataset = _Columns(reward=[0, 0, 0, 0])
    dataset.ends_seen, dataset.episode_from = True, np.array([0, 2])
    dataset.episode_to = np.array([2, 4])
    found, _ = label_rewards.ends(dataset, "reward", np.array([1.0, 0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(found, [True, False, False, False])
    found, _ = label_rewards.ends(dataset, "always", np.zeros(4))
    np.testing.assert_array_equal(found, [True, False, True, False])


def test_no_success_to_end_by():
    with pytest.raises(ValueError, match="'success', and columns has none of next.success"):
        label_rewards.ends(_Columns(reward=[0, 1]), "success", np.zeros(2))
