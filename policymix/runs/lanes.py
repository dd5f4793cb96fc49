"""Jobs side by side, each in a process with cores of its own that ends with this one.

A small network gains little from a second core: on two cores, two trainings with a core each do 58
steps a second together where one with both does 32.
"""

import contextlib
import io
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection as connections
from typing import Any

import jax

from policymix import app, metrics, processes

Job = tuple[str, Callable[[], Any]]


def count(num_jobs: int) -> int:
    """How many lanes are worth having: a core each; one where an accelerator does the work, or
    where the system deals out no cores.
    """
    if jax.default_backend() != "cpu" or not processes.shared_cores(1)[0]:
        return 1
    return max(1, min(num_jobs, processes.num_cores()))


def run(jobs: Sequence[Job], num_lanes: int) -> Iterator[tuple[str, metrics.Cost]]:
    """Runs named jobs, each on the next free lane, and yields name and cost of each that ends.

    Args:
      jobs: what to call must be picklable. Its result is dropped; what it prints is passed on,
        behind its name.

    Raises:
      What a job raises. The others are stopped then, as they are whenever the caller stops.
    """
    waiting, busy = deque(jobs), {}
    lanes = [_Lane(cores) for cores in processes.shared_cores(num_lanes)]
    free = list(lanes)
    try:
        while waiting or busy:
            while waiting and free:
                lane = free.pop()
                lane.begin(waiting.popleft())
                busy[lane.connection] = lane
            for connection in connections.wait(list(busy)):
                lane = busy.pop(connection)
                yield lane.name, lane.cost()
                free.append(lane)
    finally:
        for lane in lanes:
            processes.stop(lane.process, lane.connection)


class _Lane:
    """Our end of a process that takes one job after another."""

    name: str  # of the job it has

    def __init__(self, cores: Sequence[int]):
        cache = jax.config.jax_compilation_cache_dir
        env = {"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}
        self.process, self.connection = processes.start("policymix.runs.lanes.serve", env)
        self.connection.send(cores)

    def begin(self, job: Job) -> None:
        """Hands a job over."""
        self.name, _ = job
        with contextlib.suppress(BrokenPipeError):  # its death shows when the answer is missing
            self.connection.send(job)

    def cost(self) -> metrics.Cost:
        """What the job took; raises its error if it had one."""
        try:
            fine, answer = self.connection.recv()
        except (EOFError, OSError):
            raise OSError(
                f"the process of {self.name} {processes.end(self.process)}; the same command "
                "starts it again, and with fewer cores (taskset -c 0) needs less memory"
            ) from None
        if not fine:
            kind, message, trace = answer
            raise processes.unpacked(kind, f"{self.name}: {message}", trace)
        return answer


def serve(connection: connections.Connection) -> None:
    """Does the jobs that come, one at a time, until the other end is gone; then ends at once."""
    cores = connection.recv()
    if cores:  # before JAX counts them
        os.sched_setaffinity(0, cores)
    app.quiet()
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # also in the middle of a job: whoever asked for it is no more
        threading.Thread(target=_work, args=(connection, *job), daemon=True).start()


def _work(connection: connections.Connection, name: str, function: Callable[[], Any]) -> None:
    try:
        with (
            contextlib.redirect_stdout(_Named(name, sys.stdout)),
            contextlib.redirect_stderr(_Named(name, sys.stderr)),
            metrics.costing() as cost,
        ):
            function()
        answer = True, cost
    except BaseException as error:  # also an exit: someone waits for the answer
        answer = False, processes.packed(error)
    connection.send(answer)


class _Named(io.TextIOBase):
    """Passes whole lines on, behind a name."""

    def __init__(self, name: str, stream: io.TextIOBase):
        self._name, self._stream, self._line = name, stream, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._stream.write(f"{self._name}: {line}\n")
        self._stream.flush()
        return len(text)
