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


def leave(path, text="", sleep=0.0):
    """Leaves where and when it ran."""
    begun = time.time()
    print(text)
    time.sleep(sleep)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    path.write_text(f"{os.getpid()} {begun} {time.time()} {','.join(map(str, cores))}")


def fail():
    raise ValueError("lower the learning rate")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def write_on(path):
    """Never ends by itself."""
    while True:
        path.write_text(str(time.time()))
        time.sleep(0.05)


def test_jobs_overlap_on_cores_of_their_own(tmp_path):
    names = ["a", "b", "c"]
    jobs = [(name, functools.partial(leave, tmp_path / name, sleep=1.0)) for name in names]
    costs = dict(lanes.run(jobs, 2))
    assert sorted(costs) == names
    assert all(1 <= cost.seconds < 30 and cost.peak_memory_bytes > 10e6 for cost in costs.values())
    told = {name: (tmp_path / name).read_text().split() for name in names}
    assert len({words[0] for words in told.values()}) == 2
    assert float(told["b"][1]) < float(told["a"][2])  # b began before a had ended
    if processes.num_cores() > 1 and len(told["a"]) == 4:
        assert not set(told["a"][3].split(",")) & set(told["b"][3].split(","))


def test_what_a_job_prints_comes_behind_its_name(tmp_path, capfd):
    dict(lanes.run([("mine", functools.partial(leave, tmp_path / "x", "one\ntwo"))], 1))
    assert capfd.readouterr().out == "mine: one\nmine: two\n"


def test_an_error_is_raised_and_stops_the_others(tmp_path):
    jobs = [("endless", functools.partial(write_on, tmp_path / "x")), ("bad", fail)]
    with pytest.raises(ValueError, match="lower the learning rate"):
        dict(lanes.run(jobs, 2))
    last = (tmp_path / "x").read_text() if (tmp_path / "x").exists() else ""
    time.sleep(0.3)
    assert last == ((tmp_path / "x").read_text() if (tmp_path / "x").exists() else "")


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
