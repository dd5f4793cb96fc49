"""The row about optimizers runs, small, and Adam with moments of 8 bits learns what Adam does."""

import dataclasses
import re

import pytest

from policymix.runs import measurements, optimizer_rows

_NETWORK = optimizer_rows._model(
    *(16, 2), vocab_size=64, action_dim=2, proprio_dim=3, action_horizon=2, max_token_len=0
)
TINY = optimizer_rows.Sizes(_NETWORK, 2, _NETWORK, num_updates=3, batch_size=4)


@pytest.mark.slow
def test_the_row_tells_bytes_and_losses_of_both(monkeypatch):
    monkeypatch.setattr(measurements, "REPEATS", 1)
    rows = optimizer_rows.adam_8bit_row(TINY)
    assert all(min(*row.ours[:2], *row.theirs[:2]) > 0 for row in rows)
    assert re.search(r"states of [\d.]+ / 8.00 bytes each; loss after 3 steps", rows[0].note)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "b2"), [(0, 0.95), (1, 0.95), (2, 0.95), (0, 0.999)])
def test_the_loss_after_two_hundred_steps_is_adams_within_two_percent(seed, b2):
    sizes = dataclasses.replace(optimizer_rows.Sizes(), batch_size=32)
    ours, theirs = (optimizer_rows.learned(n, sizes, seed, b2=b2) for n in ("adam_8bit", "adam"))
    assert ours == pytest.approx(theirs, rel=0.02)
