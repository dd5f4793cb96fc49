"""One process that is to be told to stop, and what is said to several that cannot find each other.
What needs two real processes is in tests/runs/two_processes_test.py.
"""

import os
import signal
import sys
import threading

import jax
import pytest

from policymix import distributed


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
