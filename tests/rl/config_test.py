"""What a learner's configuration refuses."""

import dataclasses
import json
import math

import pytest

from policymix.rl.config import ALGORITHMS, LearnerConfig

FUSED = {"network": "fused"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": math.inf}, "temperature is inf; expected a finite number"),
        ({"clip_norm": math.nan}, "clip_norm is nan; expected a finite number"),
        ({"max_weight": "a"}, "max_weight is 'a'; expected a finite number"),
        ({"learning_rate": None}, "learning_rate is None; expected a finite number"),
        ({"learning_rate": True}, "learning_rate is True; expected a finite number"),
        ({"num_critics": 1.5}, "num_critics is 1.5; expected a whole number"),
        ({"hidden_dim": False}, "hidden_dim is False; expected a whole number"),
        ({"layer_norm": 1}, "layer_norm is 1; expected true or false"),
        ({"image_resolution": (1, 2, 3)}, "is \\(1, 2, 3\\); expected two whole numbers"),
        ({"image_resolution": ("a", 2)}, "is \\('a', 2\\); expected two whole numbers"),
        ({"image_resolution": None}, "image_resolution is None; expected two whole numbers"),
        ({"image_resolution": (0, 64)}, "is \\(0, 64\\); expected height and width above 0"),
        ({"image_keys": (1,)}, "image_keys is \\(1,\\); expected texts"),
        ({"algorithm": None}, "algorithm is None; expected a text"),
        ({"network": 3}, "network is 3; expected a text"),
        ({"vocab_size": 0}, "vocab_size is 0; at least 1 is needed"),
        ({"max_token_len": -1}, "max_token_len is -1; not below 0"),
        ({"hidden_dim": 0}, "hidden_dim is 0; at least 1 is needed"),
        (FUSED | {"hidden_dim": 1}, "hidden_dim is 1; at least 2 is needed by fused networks"),
        (FUSED | {"feature_dim": 1}, "feature_dim is 1; at least 2 is needed by fused networks"),
        ({"num_candidates": 2}, "num_candidates is 2, .*gaussian.*; expected 1, or .*'flow'"),
    ],
)
def test_what_no_learner_can_have_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^config.offline_rl.*{message}$"):
        LearnerConfig(**options)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_record_in_json_is_the_same_learner(algorithm):
    config = LearnerConfig(algorithm=algorithm, image_keys=("top",), lambda_v=1, max_weight=0)
    told = json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))
    assert LearnerConfig(**told) == config


def test_only_a_flows_critic_has_candidates_to_choose_among():
    assert LearnerConfig(algorithm="qc").num_candidates == 32
    assert LearnerConfig(policy="flow").num_candidates == 1
    assert LearnerConfig(policy="flow", num_candidates=2).num_candidates == 2
    assert LearnerConfig(hidden_dim=1, feature_dim=1).network == "plain"
