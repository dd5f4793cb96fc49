"""A job of many stages: what is reused, what is refused, what is removed."""

import functools
import json
import os
import pathlib
import time

import pytest

from policymix.runs import stages


class Work:
    """A stage's function that counts how often it is called."""

    def __init__(self, error: Exception | None = None):
        self.calls, self.error = 0, error

    def __call__(self):
        self.calls += 1
        if self.error:
            raise self.error


def plan(*stages_):
    return [stages.Stage(*stage) for stage in stages_]


SETTINGS = {"steps": 4, "data": ("a", "b"), "path": pathlib.Path("here")}


@pytest.fixture
def directory(tmp_path):
    """That of a job whose first stage is done."""
    stages.Stages(tmp_path / "job").run(plan(("first", SETTINGS, Work())))
    return tmp_path / "job"


def test_a_stage_that_is_done_is_reused_and_keeps_its_cost(directory, capsys):
    capsys.readouterr()
    again, first, second = stages.Stages(directory), Work(), Work()
    again.run(plan(("first", SETTINGS, first), ("second", {}, second)))
    assert (first.calls, second.calls) == (0, 1)
    out = capsys.readouterr().out
    assert "[1/2] first: reused" in out
    assert "[2/2] second" in out
    recorded = json.loads((directory / "stages" / "first.json").read_text())["cost"]
    assert again.told[0] == {"name": "first", **recorded, "reused": True}
    assert again.told[1]["reused"] is False
    assert again.told[1]["peak_memory_bytes"] > 10e6
    assert again.told[1]["seconds"] >= 0


def test_other_settings_are_refused_by_name(directory):
    work = Work()
    with pytest.raises(
        ValueError, match=r"first in .*other settings \(steps: 4 then, 5 now\).*FRESH=1"
    ):
        stages.Stages(directory).run(plan(("first", SETTINGS | {"steps": 5}, work)))
    with pytest.raises(ValueError, match="data: .'a', 'b'. then, None now; extra: None then, 1"):
        stages.Stages(directory).run(
            plan(("first", {"steps": 4, "path": "here", "extra": 1}, work))
        )
    assert work.calls == 0


def test_a_stage_that_fails_is_not_recorded_and_runs_again(directory):
    job, broken = stages.Stages(directory), Work(RuntimeError("no"))
    with pytest.raises(RuntimeError, match="no"):
        job.run(plan(("first", SETTINGS, Work()), ("second", {}, broken)))
    assert [p.name for p in (directory / "stages").glob("*.json")] == ["first.json"]
    mended = Work()
    stages.Stages(directory).run(plan(("second", {}, mended)))
    assert mended.calls == 1


def test_a_stage_is_recorded_only_once_it_is_whole(directory):
    def look():
        assert not (directory / "stages" / "second.json").exists()

    stages.Stages(directory).run(plan(("second", {}, look)))
    assert (directory / "stages" / "second.json").exists()


def test_fresh_removes_its_own_directory_and_nothing_else(directory):
    beside = directory.parent / "notes.txt"
    beside.write_text("precious")
    (directory / "demos").mkdir()
    work = Work()
    stages.Stages(directory, fresh=True).run(plan(("first", SETTINGS, work)))
    assert work.calls == 1
    assert not (directory / "demos").exists()
    assert beside.read_text() == "precious"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "stages/hero.json"])
def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path, fresh, name):
    path = tmp_path / "project" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="holds something else; choose another --output"):
        stages.Stages(tmp_path / "project", fresh=fresh)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_a_directory_that_is_empty_or_absent_will_do(tmp_path):
    for fresh in (False, True):
        for name in ("absent", "empty"):
            directory = tmp_path / f"{name}{fresh}"
            if name == "empty":
                directory.mkdir()
            stages.Stages(directory, fresh=fresh).run(plan(("only", {}, Work())))
            assert (directory / "stages" / "only.json").is_file()


def test_a_record_that_is_torn_is_named(directory):
    (directory / "stages" / "first.json").write_text('{"settings": ')
    with pytest.raises(ValueError, match="first.json is not readable JSON"):
        stages.Stages(directory).run(plan(("first", SETTINGS, Work())))


def leave(path):
    """A stage's function for another process: leaves the number of that process."""
    path.write_text(str(os.getpid()))


def leave_late(other, path, error):
    """The same, but fails, well after another has left its own."""
    while not other.exists():
        time.sleep(0.05)
    time.sleep(0.5)
    leave(path)
    raise error


def test_stages_that_are_apart_run_beside_each_other(directory, monkeypatch, capfd):
    monkeypatch.setattr(stages.lanes, "count", lambda jobs: min(jobs, 2))
    names = ["one", "two", "three"]
    todo = [
        stages.Stage(name, {}, functools.partial(leave, directory / name), apart=True)
        for name in names
    ]
    job = stages.Stages(directory)
    job.run([stages.Stage("first", SETTINGS, Work()), *todo, stages.Stage("last", {}, Work())])
    assert [stage["name"] for stage in job.told] == ["first", *names, "last"]
    pids = {(directory / name).read_text() for name in names}
    assert len(pids) <= 2
    assert str(os.getpid()) not in pids
    assert "2 side by side: [2/5] one, [3/5] two, [4/5] three" in capfd.readouterr().out
    again = stages.Stages(directory)
    again.run([stages.Stage("first", SETTINGS, Work()), *todo])
    assert all(stage["reused"] for stage in again.told)


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_of_stages_that_are_apart_those_that_are_whole_are_kept(directory, monkeypatch, num_lanes):
    monkeypatch.setattr(stages.lanes, "count", lambda jobs: min(jobs, num_lanes))
    good, bad = directory / "good", directory / "bad"
    first = stages.Stage("good", {}, functools.partial(leave, good), apart=True)
    error = functools.partial(leave_late, good, bad, ValueError("bad steps"))
    with pytest.raises(ValueError, match="bad steps"):
        stages.Stages(directory).run([first, stages.Stage("bad", {}, error, apart=True)])
    assert not (directory / "stages" / "bad.json").exists()
    again = stages.Stages(directory)
    again.run([first])
    assert again.told[0]["reused"]
