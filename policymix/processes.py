"""Cores, work that threads do ahead, fresh interpreters that answer over a connection, and the
errors that come back.
"""

import collections
import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection as connections
from typing import Any

_TOLD = (FloatingPointError, ValueError, OSError)  # errors that are told in a line


def num_cores() -> int:
    """How many cores this process may use."""
    return len(_cores()) or os.cpu_count() or 1


def shared_cores(count: int) -> list[Sequence[int]]:
    """The cores of this process dealt out to `count` others; empty where the system cannot say."""
    return [_cores()[k::count] for k in range(count)]


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def start(
    function: str, env: Mapping[str, str], *, quiet: bool = False
) -> tuple[subprocess.Popen, connections.Connection]:
    """Starts a process that calls `function`, a dotted name, with one end of a connection.

    Not a fork: a copy of a process with JAX's threads may hang. In a process group of its own, so
    that Ctrl-C in a terminal reaches only the one who started it.

    Args:
      env: environment variables that differ from ours.
      quiet: whether what it writes on stdout is lost.

    Returns:
      The process, and our end.
    """
    module, _, name = function.rpartition(".")
    ours, theirs = socket.socketpair()
    program = (  # Ctrl-C is not its business, from the first moment
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "from multiprocessing.connection import Connection; "
        f"from {module} import {name}; {name}(Connection({theirs.fileno()}))"
    )
    root = pathlib.Path(__file__).resolve().parents[1]
    paths = filter(None, (str(root), os.environ.get("PYTHONPATH")))
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            env={**os.environ, **env, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if quiet else None,
            process_group=0,
        )
    return process, connections.Connection(ours.detach())


def stop(process: subprocess.Popen, connection: connections.Connection) -> None:
    """Ends a process, whatever it is doing."""
    connection.close()
    process.kill()
    process.wait()


def end(process: subprocess.Popen) -> str:
    """How a process ended that no longer answers, in words."""
    try:
        code = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def packed(error: BaseException) -> tuple[str, str, str]:
    """An error as it can be sent: its kind, its message, its traceback."""
    kind = next((told.__name__ for told in _TOLD if isinstance(error, told)), type(error).__name__)
    return kind, str(error), traceback.format_exc()


def unpacked(kind: str, message: str, trace: str) -> Exception:
    """The error again: of the same kind if it is one to be told in a line, else a RuntimeError."""
    kinds: dict[str, Any] = {told.__name__: told for told in _TOLD}
    error = kinds[kind](message) if kind in kinds else RuntimeError(f"{kind}: {message}")
    error.add_note(trace)
    return error


def ahead(
    pool: concurrent.futures.Executor, function: Callable, items: Iterable, count: int
) -> Iterator:
    """function(item) of all items in order, up to `count` of them begun before they are needed."""
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
