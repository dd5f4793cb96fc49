"""The rows about chunk-level learning run, small: both sides of each, and what they tell."""

import pytest

from policymix.rl.config import LearnerConfig
from policymix.runs import measurements, rl_rows

TINY = rl_rows.Sizes(
    LearnerConfig(action_dim=2, proprio_dim=3, action_horizon=2, hidden_dim=8, num_layers=2),
    batch_size=4,
    updates=2,
    steps=6,
)


@pytest.fixture(autouse=True)
def _once(monkeypatch):
    monkeypatch.setattr(measurements, "REPEATS", 1)


@pytest.mark.slow
@pytest.mark.parametrize("measure", [rl_rows.update_row, rl_rows.loop_row])
def test_updates_are_told_by_the_update(measure):
    (row,) = measure(TINY)
    assert min(*row.ours[:2], *row.theirs[:2]) > 0
    assert "CPU s for each update" in row.note


def test_a_policy_is_asked_once_a_chunk():
    (row,) = rl_rows.act_row(TINY)
    assert row.note == "3 calls of the policy in 6 steps, in place of 6"
