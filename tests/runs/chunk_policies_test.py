"""Chunk-level policies in a real simulator: from attempts to a success rate, by the commands."""

import json

import pytest

from configs import rl_metaworld
from policymix import metrics
from policymix.runs import collect_demos, evaluate, offline_rl

pytest.importorskip("metaworld")


@pytest.mark.slow
def test_attempts_train_a_policy_whose_roll_outs_are_those_of_evaluate(tmp_path):
    """On the same seeds; the run that is going on and the checkpoint that it left act alike."""
    config = rl_metaworld.get_config("debug")
    config.evaluate.update({"env": "metaworld/handle-press-v3", "num_episodes": 4, "max_steps": 40})
    collect_demos.collect(
        "metaworld/handle-press-v3",
        tmp_path / "attempts",
        num_episodes=4,
        max_steps=60,
        skills=("expert", "noisy"),
        num_workers=1,
    )
    config.data.path = str(tmp_path / "attempts")
    config.offline_rl.update({"algorithm": "cloning", "num_steps": 60, "learning_rate": 3e-3})
    config.offline_rl.update({"log_every": 20, "save_every": 60, "rollout_every": 30})
    config.offline_rl.updates_per_call = 10
    offline_rl.train(config, tmp_path / "run")
    rows = [r for r in metrics.read(tmp_path / "run/metrics.jsonl") if "rollout/success" in r]
    assert [row["step"] for row in rows] == [30, 60]
    for row in rows:
        assert 0 <= row["rollout/low"] <= row["rollout/success"] <= row["rollout/high"] <= 1
    request = evaluate.Request((str(tmp_path / "run/60"),), tmp_path / "evaluation")
    evaluate.evaluate(config, request)
    told = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    (policy,) = told["policies"]
    assert policy["successes"] / policy["episodes"] == rows[-1]["rollout/success"]
