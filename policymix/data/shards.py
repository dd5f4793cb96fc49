"""The same work for many shards, in processes of their own."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection as connections
from typing import Any

from policymix import processes

_SMALL = 1 << 26  # bytes: less work is not worth other processes


def over(
    function: Callable[[Any], Any], tasks: Sequence[Any], num_workers: int, num_bytes: int
) -> Iterator[Any]:
    """function(task) for all tasks, in order, in processes of their own where that pays.

    Args:
      function: at the top of a module; tasks and results pickle.
      num_workers: processes; 0 for one per core.
      num_bytes: of all tasks: less than 64 MiB are done here.

    Raises:
      What the function raises, of the earliest task that fails; the others are stopped.
    """
    count = min(num_workers or processes.num_cores(), len(tasks))
    if count < 2 or num_bytes < _SMALL:
        yield from map(function, tasks)
        return
    workers = [processes.start("policymix.data.shards.serve", {}) for _ in range(count)]
    waiting, done, busy, following = list(enumerate(tasks))[::-1], {}, {}, 0
    free = [connection for _, connection in workers]
    process_of = {connection: process for process, connection in workers}
    try:
        while following < len(tasks):
            # No further ahead than twice the workers, so that few results wait.
            while free and waiting and waiting[-1][0] < following + 2 * count:
                number, task = waiting.pop()
                connection = free.pop()
                with contextlib.suppress(BrokenPipeError):  # shows when the answer is missing
                    connection.send((function, task))
                busy[connection] = number
            for connection in connections.wait(list(busy)):
                done[busy.pop(connection)] = _answer(connection, process_of[connection])
                free.append(connection)
            while following in done:
                fine, answer = done.pop(following)
                if not fine:
                    raise processes.unpacked(*answer)
                yield answer
                following += 1
    finally:
        for process, connection in workers:
            processes.stop(process, connection)


def _answer(connection: connections.Connection, process: Any) -> tuple[bool, Any]:
    try:
        return connection.recv()
    except (EOFError, OSError):
        how = processes.end(process)
        advice = "; try fewer workers" if "SIGKILL" in how else ""
        return False, ("OSError", f"a process that reads shards {how}{advice}", "")


def serve(connection: connections.Connection) -> None:
    """Does the tasks that come, until the other end is gone."""
    while True:
        try:
            function, task = connection.recv()
            try:
                connection.send((True, function(task)))
            except BaseException as error:  # someone waits for the answer
                connection.send((False, processes.packed(error)))
        except (EOFError, OSError):
            os._exit(1)
