"""Jobs side by side: their cores, their output, and how they end."""

import functools
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from policymix import processes
from policymix.runs import lanes
from tests.runs.sim_support import ROOT


def leave(path, other=None):
    """Leaves where it ran, and ends when another has left that too."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    path.write_text(f"{os.getpid()} {','.join(map(str, cores))}")
    if other:
        wait_for(other)


def wait_for(path):
    while not path.exists():
        time.sleep(0.02)


def talk():
    print("one\ntwo")
    print("three", file=sys.stderr)


def fail(other):
    wait_for(other)
    raise ValueError("lower the learning rate")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def write_on(path):
    """Never ends by itself."""
    while True:
        path.write_text(str(time.time()))
        time.sleep(0.05)


def test_jobs_overlap_on_cores_of_their_own(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    jobs = [
        ("a", functools.partial(leave, a, b)),
        ("b", functools.partial(leave, b, a)),
        ("c", functools.partial(leave, c)),
    ]
    costs = dict(lanes.run(jobs, 2))
    assert sorted(costs) == ["a", "b", "c"]
    assert all(cost.peak_memory_bytes > 10e6 for cost in costs.values())
    told = [path.read_text().split(" ") for path in (a, b, c)]
    assert len({pid for pid, _ in told}) == 2
    if processes.num_cores() > 1 and told[0][1]:
        assert not set(told[0][1].split(",")) & set(told[1][1].split(","))


def test_what_a_job_prints_comes_behind_its_name(capfd):
    dict(lanes.run([("mine", talk)], 1))
    out, err = capfd.readouterr()
    assert out == "mine: one\nmine: two\n"
    assert err == "mine: three\n"


def test_an_error_is_raised_and_stops_the_others(tmp_path):
    x = tmp_path / "x"
    jobs = [("endless", functools.partial(write_on, x)), ("bad", functools.partial(fail, x))]
    with pytest.raises(ValueError, match="bad: lower the learning rate"):
        dict(lanes.run(jobs, 2))
    last = x.read_text()
    time.sleep(0.3)
    assert x.read_text() == last


def test_a_job_that_exits_is_an_error_not_a_wait():
    with pytest.raises(RuntimeError, match="SystemExit: mine: 3"):
        dict(lanes.run([("mine", functools.partial(sys.exit, 3))], 1))


def test_a_job_whose_process_dies_is_named():
    with pytest.raises(OSError, match="the process of mine was killed by SIGKILL .out of memory"):
        dict(lanes.run([("mine", die)], 1))


def test_jobs_end_at_once_when_who_asked_is_killed(tmp_path):
    program = (
        "import functools, pathlib\n"
        "from policymix.runs import lanes\n"
        "from tests.runs import lanes_test\n"
        f"job = functools.partial(lanes_test.write_on, pathlib.Path({str(tmp_path / 'x')!r}))\n"
        "dict(lanes.run([('endless', job)], 1))\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], env=env) as process:
        while not (tmp_path / "x").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    time.sleep(0.5)
    last = (tmp_path / "x").read_text()
    time.sleep(0.5)
    assert (tmp_path / "x").read_text() == last


def test_an_accelerator_has_one_lane(monkeypatch):
    assert lanes.count(1) == 1
    assert 1 <= lanes.count(9) <= processes.num_cores()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lanes.count(9) == 1
