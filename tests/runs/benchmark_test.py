"""The benchmark's rows: each runs, both sides of it, and the table has a line for each."""

import os

import pytest

from configs import pi0_libero, pi0_metaworld
from policymix.runs import benchmark, policies

pytest.importorskip("metaworld")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(benchmark, "_REPEATS", 1)
    monkeypatch.setattr(benchmark, "_STEPS", 2)
    monkeypatch.setattr(benchmark, "_EPISODES", 2)
    monkeypatch.setattr(benchmark, "_EPISODE_STEPS", 8)
    monkeypatch.setattr(benchmark, "_ELEMENTS", 1000)


def run(rows):
    config = policies.model_config(pi0_libero.get_config("debug"), why="a test")
    return benchmark.run(config, pi0_metaworld.get_config("debug"), rows)


@pytest.mark.slow
@pytest.mark.parametrize("row", list(benchmark.ROWS))
def test_every_row_measures_both_sides(tiny, row):
    *_, line = run([row]).splitlines()
    name, ours, slash, theirs, *_ = line.split()
    assert (name, slash) == (row, "/")
    assert float(ours) >= 0
    assert float(theirs) >= 0
    assert line.rstrip().endswith("×") == (row != "average")  # which has a column more, of memory


def test_a_row_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="'avarage' is not a row; there are average, gradient"):
        run(["avarage"])


def test_a_side_that_dies_is_named(tiny):
    with pytest.raises(OSError, match="the process of _exit died"):
        benchmark._apart(os._exit, 9)()
