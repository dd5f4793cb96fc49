"""One process that is to be told to stop, and what is said to several that cannot find each other.
What needs two real processes is in tests/runs/two_processes_test.py.
"""

import atexit
import os
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from policymix import distributed, metrics
from tests import commands


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("127.0.0.1:12345,0/2", ("127.0.0.1:12345", 2, 0)),
        ("node-7.cluster:1,15/16", ("node-7.cluster:1", 16, 15)),
        ("[::1]:65535,0/1", ("[::1]:65535", 1, 0)),
    ],
)
def test_a_spec_says_where_how_many_and_which(spec, found):
    assert distributed.parse(spec) == found


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("127.0.0.1,0/2", r"HOST:PORT,INDEX/COUNT.*as in 10\.0\.0\.1:12345,0/2"),
        ("127.0.0.1:12345", "'127.0.0.1:12345'; expected \"auto\""),
        ("127.0.0.1:12345,0-2", "expected"),
        ("::1:12345,0/2", "expected"),
        (" ", "expected"),
        ("host:0,0/2", "port is 0; expected 1 to 65535"),
        ("host:70000,0/2", "port is 70000"),
        ("host:12345,2/2", "of 2 processes, INDEX is 0 to 1"),
        ("host:12345,0/0", "at least one process"),
    ],
)
def test_a_spec_that_cannot_be_is_said_at_once(spec, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(spec)
    assert not jax.distributed.is_initialized()


def test_a_process_that_is_alone_waits_for_nobody_and_prints(capsys):
    distributed.initialize("")
    distributed.sync("nobody")
    distributed.quiet_others()
    print("heard")
    assert distributed.is_first()
    assert capsys.readouterr().out == "heard\n"
    with pytest.raises(KeyError), distributed.failing_at_once():
        raise KeyError


def test_the_others_are_quiet(capsys, monkeypatch):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # and back
    distributed.quiet_others()
    print("lost")
    sys.stdout.close()
    monkeypatch.undo()
    assert capsys.readouterr().out == ""


def test_the_others_show_no_progress(capsys, monkeypatch):
    def shown() -> str:
        for terminal in (False, True):
            monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
            assert list(metrics.progress([1, 2], "counting")) == [1, 2]
        return capsys.readouterr().err

    assert "counting: 2/2" in shown()
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    assert shown() == ""


@pytest.fixture
def several(monkeypatch):
    """This process believes that it has others."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "_LEAD_S", 0)


@pytest.fixture
def ask(several, monkeypatch):
    """The errors of `agreed` in threads that take the part of processes, each with its value."""

    def ask(*values) -> list[str | None]:
        rows, all_are_here = {}, threading.Barrier(len(values), timeout=10)

        def gather(row: np.ndarray) -> np.ndarray:
            rows[threading.current_thread().name] = row
            all_are_here.wait()
            told = np.stack([rows[str(process)] for process in range(len(values))])
            all_are_here.wait()
            return told

        def run(process: int) -> None:
            threading.current_thread().name = str(process)
            try:
                distributed.agreed(values[process], "the step")
            except ValueError as error:
                errors[process] = str(error)

        monkeypatch.setattr(multihost_utils, "process_allgather", gather)
        errors = dict.fromkeys(range(len(values)))
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(values))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [errors[process] for process in range(len(values))]

    return ask


@pytest.mark.parametrize("values", [(3, 3, 3), ("π0", "π0"), (None, None), ("", "")])
def test_processes_that_agree_go_on(values, ask):
    assert ask(*values) == [None] * len(values)


LONG = "all the same, " * 100


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((24, None), "24 in process 0, None in process 1;"),
        ((8, 8, 16, 8), "8 in process 0, 16 in process 2;"),
        (("", "a"), "nothing in process 0, a in process 1;"),
        ((2**40, 2**40 + 1), "1099511627776 in process 0, 1099511627777 in process 1;"),
        ((f"{LONG}seed 1", f"{LONG}seed 2, {LONG}"), "same, all the same, seed 1 in process 0, …"),
        ((f"{LONG}seed 1", f"{LONG}seed 2, {LONG}"), "seed 2, all the same, all "),
        (range(9), "3 in process 3 and others;"),
    ],
)
def test_processes_that_differ_all_hear_how(values, told, ask):
    errors = ask(*values)
    assert len(set(errors)) == 1
    assert errors[0].startswith("the step is not the same in all processes: ")
    assert told in errors[0]


def test_a_process_that_is_alone_agrees(tmp_path):
    distributed.agreed(1, "the step")
    distributed.seen_by_all(tmp_path / "nothing")


def test_a_file_that_a_slow_disk_shows_late_is_seen(tmp_path, several, monkeypatch):
    seen = []
    monkeypatch.setattr(distributed, "agreed", lambda value, what: seen.append((value, what)))
    path = tmp_path / "late"
    late = threading.Timer(0.1, path.touch)
    late.start()
    distributed.seen_by_all(path)
    monkeypatch.setattr(distributed, "_SEEN_S", 0.1)
    distributed.seen_by_all(tmp_path / "never")
    assert seen == [("there", str(path)), ("missing", str(tmp_path / "never"))]


@pytest.mark.parametrize(
    ("spec", "error", "kind", "message"),
    [
        ("h:1,0/2", ValueError("bad address"), ValueError, "is 'h:1,0/2': bad address"),
        ("auto", ValueError("no cluster"), ValueError, "auto found no cluster (no cluster)"),
        ("h:1,0/2", RuntimeError(), OSError, "cannot be joined: RuntimeError"),
        ("h:1,0/2", RuntimeError("\nport taken\nmore"), OSError, "cannot be joined: port taken"),
    ],
)
def test_what_jax_says_at_the_start_is_passed_on(spec, error, kind, message, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(kind) as found:
        distributed.initialize(spec)
    assert str(found.value).split("; expected")[0].endswith(message)


@pytest.fixture
def leave(several, monkeypatch):
    """The exit codes that failing_at_once prepares."""
    codes = []
    monkeypatch.setattr(atexit, "register", lambda _, code: codes.append(code))
    return codes


@pytest.mark.parametrize(
    "text",
    [
        "FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1",
        "UNAVAILABLE: failed to connect to all addresses",
        "DEADLINE_EXCEEDED: Barrier timed out",
    ],
)
def test_an_error_by_another_process_names_its_log(text, leave):
    told = pytest.raises(OSError, match="its own log says why")
    with told as found, distributed.failing_at_once():
        raise jax.errors.JaxRuntimeError(f"{text}\nand more")
    assert str(found.value).endswith(text)
    assert leave == [1]


def test_an_error_of_its_own_stays(leave):
    told = pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory")
    with told, distributed.failing_at_once():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    assert leave == [1]


def test_ctrl_c_among_several_is_one_of_130():
    """In a process of its own, which it ends."""
    program = """
import jax
from policymix import app, distributed
jax.distributed.is_initialized = lambda: True
def main():
    with distributed.failing_at_once():
        raise KeyboardInterrupt
app.run(main)
"""
    words = [sys.executable, "-c", program]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, env=commands.ONE_DEVICE
    )
    assert done.returncode == 130
    assert done.stderr == "error: interrupted; nothing half-written was left\n"


@pytest.fixture
def heard():
    """What SIGTERM does outside the block: it is noted down."""
    signals = []
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    yield signals
    signal.signal(signal.SIGTERM, before)


def test_sigterm_asks_for_the_end_and_the_earlier_handler_comes_back(heard):
    with distributed.Stop() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(2)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers send several
        assert stop.requested(3)
    assert not heard
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    with distributed.Stop(3) as stop:  # the next run begins without
        assert not stop.requested(4)


def test_the_handler_comes_back_after_an_error(heard):
    with pytest.raises(ZeroDivisionError), distributed.Stop():
        raise ZeroDivisionError
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard


def test_outside_the_main_thread_nobody_is_asked(heard):
    found = []

    def train():
        with distributed.Stop() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            found.append(stop.requested(1))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [False]
    assert heard  # by the handler that was there
