"""Settings files of chunk-level learners, and what a config may hold."""

import json

import pytest

from configs import common
from policymix.runs import learners
from tests.runs import rl_support


def completed(tmp_path, content):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(content))
    return learners.complete(rl_support.debug_config("", settings=str(path)))


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ({"beta": "x"}, "beta", "a finite number"),
        ({"beta": None}, "beta", "a finite number"),
        ({"beta": 0}, "beta", "a number above 0"),
        ({"beta": {}}, "beta", "a finite number"),
        ({"image_size": "a"}, "image_size", "a whole number"),
        ({"image_size": None}, "image_size", "a whole number"),
        ({"image_size": [64, 64]}, "image_size", "a whole number"),
        ({"image_size": 1.5}, "image_size", "a whole number"),
        ({"image_resolution": ["a", 2]}, "image_resolution", "two whole numbers"),
        ({"image_resolution": [1, 2, 3]}, "image_resolution", "two whole numbers"),
        ({"image_resolution": 64}, "image_resolution", "two whole numbers"),
        ({"batch_size": None}, "batch_size", "a whole number"),
        ({"batch_size": {}}, "batch_size", "a whole number"),
        ({"learning_rate": None}, "learning_rate", "a finite number"),
        ({"training": {"lr": "1e-3"}}, "lr", "a finite number"),
        ({"gamma": float("inf")}, "gamma", "a finite number"),
        ({"temperature": 10**400}, "temperature", "a finite number"),
        ({"num_critics": 1.5}, "num_critics", "a whole number"),
        ({"max_weight": "a"}, "max_weight", "a finite number"),
        ({"normalize_weights": 1}, "normalize_weights", "true or false"),
        ({"pictures": None}, "pictures", "true or false"),
        ({"num_epochs": True}, "num_epochs", "a whole number"),
        ({"algorithm": 3}, "algorithm", "a text"),
    ],
)
def test_a_value_of_another_kind_is_named(tmp_path, content, name, expected):
    message = rf"settings\.json: '{name}' is .*; expected {expected}$"
    with pytest.raises(ValueError, match=message) as caught:
        completed(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_settings_file_names_no_other(tmp_path):
    with pytest.raises(ValueError, match=r"settings\.json: 'settings' is no setting"):
        completed(tmp_path, {"settings": "other.json"})


def test_what_is_of_its_kind_is_taken(tmp_path):
    content = {
        "beta": 4, "image_size": 64, "temper": {"max_weight": 3, "num_critics": None},
        "normalize_weights": True, "learning_rate": 1, "reward_key": "subgoal",
    }  # fmt: skip
    r = completed(tmp_path, content).offline_rl
    assert (r.temperature, r.image_resolution, r.max_weight) == (0.25, (64, 64), 3)
    assert (r.num_critics, r.normalize_weights, r.learning_rate) == (None, True, 1)
    assert (r.reward_key, r.settings) == ("subgoal", "")


def test_every_field_has_a_kind():
    fields = set(common.get_config().offline_rl)
    assert fields <= set(learners._KINDS)
    assert learners._KINDS.keys() - fields == {"action_dim", "proprio_dim", "image_keys"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 1.5}, r"config\.offline_rl\.hidden_dim is 1\.5; expected a whole number"),
        ({"max_weight": float("nan")}, r"max_weight is nan; expected a finite number"),
        ({"tails": None}, r"tails is None; expected a text"),
    ],
)
def test_a_config_of_another_kind_is_refused(options, message):
    config = rl_support.debug_config("")
    with config.offline_rl.ignore_type():
        config.offline_rl.update(options)
    with pytest.raises(ValueError, match=message):
        learners.complete(config)
