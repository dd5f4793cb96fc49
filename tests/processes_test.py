"""Other interpreters: how they start, how they end, what their errors become."""

import itertools
import os
import signal

import pytest

from policymix import processes


def echo(connection):
    """Answers what it is sent, with its own environment's word."""
    while True:
        try:
            connection.send((connection.recv(), os.environ.get("WORD"), os.getpid()))
        except EOFError:
            return


@pytest.fixture
def echoing():
    process, connection = processes.start("tests.processes_test.echo", {"WORD": "hello"})
    yield process, connection
    processes.stop(process, connection)


def test_a_process_answers_and_has_its_own_environment(echoing):
    process, connection = echoing
    connection.send([1, 2])
    assert connection.recv() == ([1, 2], "hello", process.pid)
    assert process.pid != os.getpid()
    assert "WORD" not in os.environ


def test_it_ends_when_our_end_is_closed(echoing):
    process, connection = echoing
    connection.send(0)
    connection.recv()
    connection.close()
    assert process.wait(timeout=20) == 0


def test_how_it_ended_is_told(echoing):
    process, _ = echoing
    process.send_signal(signal.SIGKILL)
    assert processes.end(process) == "was killed by SIGKILL (out of memory?)"


def test_ctrl_c_is_not_its_business(echoing):
    process, connection = echoing
    connection.send(0)
    connection.recv()
    process.send_signal(signal.SIGINT)
    connection.send(1)
    assert connection.recv()[0] == 1


def test_cores_are_dealt_out_without_remainder():
    assert 1 <= processes.num_cores() <= os.cpu_count()
    for count in (1, 2, 3):
        shared = processes.shared_cores(count)
        assert len(shared) == count
        if hasattr(os, "sched_getaffinity"):
            assert sorted(itertools.chain(*shared)) == sorted(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("no"), ValueError, "no"),
        (FileNotFoundError(2, "No such file", "a"), OSError, "No such file: 'a'"),
        (FloatingPointError("nan"), FloatingPointError, "nan"),
        (KeyError("a"), RuntimeError, "KeyError: 'a'"),
    ],
)
def test_errors_keep_their_kind_if_it_is_one_to_be_told_in_a_line(error, kind, message):
    try:
        raise error
    except Exception as raised:
        found = processes.unpacked(*processes.packed(raised))
    assert type(found) is kind
    assert message in str(found)
    assert "test_errors_keep" in found.__notes__[0]
