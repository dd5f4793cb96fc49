"""The benchmark's rows: each runs, both sides of it, and the table has a line for each."""

import re

import pytest

from configs import pi0_libero, pi0_metaworld
from policymix.runs import benchmark, data_rows, measurements, memory_rows, policies, soft_rows
from tests.runs import optimizer_rows_test, rl_rows_test

pytest.importorskip("metaworld")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(measurements, "REPEATS", 1)
    monkeypatch.setattr(benchmark, "_STEPS", 2)
    monkeypatch.setattr(benchmark, "_EPISODES", 2)
    monkeypatch.setattr(benchmark, "_EPISODE_STEPS", 8)
    for name, value in (("_WIDTH", 64), ("_SMALL", 32), ("_DEPTH", 2)):
        monkeypatch.setattr(memory_rows, name, value)
    kept = list(memory_rows._WAYS.items())[::3]  # each takes two processes
    monkeypatch.setattr(memory_rows, "_WAYS", dict(kept))


def run(rows):
    config = policies.model_config(pi0_libero.get_config("debug"), why="a test")
    models = dict.fromkeys(("float32", "bfloat16", "sampled", "trained"), config)
    models["data"] = data_rows.Sizes(2, 40, 64, 4000, 4000, 2)
    models["rl"], models["soft"] = rl_rows_test.TINY, soft_rows.Sizes(4, 32, 16, 2)
    models["optimizer"] = optimizer_rows_test.TINY
    return benchmark.run(config, pi0_metaworld.get_config("debug"), rows, models)


@pytest.mark.slow
@pytest.mark.parametrize("row", list(benchmark.ROWS))
def test_every_row_measures_both_sides(tiny, row):
    lines = [line for line in run([row]).splitlines() if " × " in f"{line} " and " / " in line]
    assert lines
    for line in lines:
        numbers = [float(word) for word in re.findall(r"[\d.]+(?= /)|(?<=/ )[\d.]+", line)]
        assert len(numbers) in (4, 6)  # wall and CPU seconds, and memory where it is known
        assert min(numbers) >= 0


def test_a_row_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="'avarage' is not a row; there are float32, bfloat16"):
        run(["avarage"])


def test_a_side_that_dies_is_named():
    with pytest.raises(OSError, match="the process of os:_exit died"):
        measurements.apart("os:_exit", 9)()
