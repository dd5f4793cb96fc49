"""Processes of environments; one that dies is replaced, and its episodes are played again."""

import collections
import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection as connections
from typing import Any

import numpy as np

from policymix import memory, processes
from policymix.sim import envs, experts
from policymix.sim.worker import Outcome

MAX_DEATHS = 3  # of one process, without an answer in between
_AHEAD = 8  # demonstrations per process that may wait for an earlier, slower one
_ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENCV_FOR_THREADS_NUM",
        "VECLIB_MAXIMUM_THREADS",
        "LP_NUM_THREADS",  # Mesa's, that renders where there is no GPU
    ),
    "1",
)


@dataclasses.dataclass
class _Episode:
    """A live episode, and all that is needed to play it again."""

    task: envs.Task
    seed: int
    chunks: list[np.ndarray] = dataclasses.field(default_factory=list)


class Pool:
    """Environments in processes of their own. Results do not depend on how many there are.

    A process that dies is replaced: the new one plays the live episodes of the old one again, with
    the same seeds and actions and so to the same end, and a line on stderr says so.
    """

    def __init__(self, num_workers: int):
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; at least one process is needed")
        self._processes = [_Process() for _ in range(num_workers)]
        self._episodes: dict[int, _Episode] = {}
        self._demonstrating = self._closed = False
        for process in self._processes:
            process.start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._closed = True
        for process in self._processes:
            process.stop()

    @property
    def pids(self) -> tuple[int, ...]:
        """Ids of the processes."""
        return tuple(process.pid for process in self._processes)

    def reset(self, episodes: Sequence[tuple[envs.Task, int]]) -> list[dict[str, np.ndarray]]:
        """Starts episodes in place of all earlier ones.

        Args:
          episodes: task and seed of each. The k-th lives in process k modulo their number.

        Returns:
          Their first observations.
        """
        self._check_free()
        self._episodes = {k: _Episode(task, seed) for k, (task, seed) in enumerate(episodes)}
        # Also those without a new episode, for them to drop their old ones.
        answers = self._ask({w: self._fresh(w) for w in range(len(self._processes))})
        return [answers[self._home(k)][k] for k in range(len(episodes))]

    def step(self, chunks: Mapping[int, np.ndarray]) -> dict[int, Outcome]:
        """Plays a chunk of actions in each of some episodes, in order, up to the first success.

        Args:
          chunks: by number of a live episode, its next actions [k, a]. An episode lives from
            `reset` to its success. An error in any environment ends them all.
        """
        self._check_free()
        checked = {number: self._checked(number, chunk) for number, chunk in chunks.items()}
        requests: dict[int, tuple[str, tuple]] = {}
        for number, chunk in checked.items():
            _, (theirs,) = requests.setdefault(self._home(number), ("step", ({},)))
            theirs[number] = chunk
        outcomes = {}
        for answer in self._ask(requests).values():
            outcomes.update(answer)
        for number, outcome in outcomes.items():
            self._episodes[number].chunks.append(checked[number])
            if outcome.success:
                del self._episodes[number]
        return {number: outcomes[number] for number in chunks}

    def map_demonstrations(
        self, jobs: Iterable[tuple[envs.Task, int]], max_steps: int, noise: float = 0.0
    ) -> Iterator[experts.Episode | None]:
        """`experts.demonstrate` of each job, a task and a seed: in the order of the jobs.

        They are made a little ahead of their use. Live episodes stay as they are, but the pool can
        do nothing else before the iterator ends or is closed.
        """
        jobs = ((task, seed, max_steps, noise) for task, seed in jobs)
        return self._map("demonstrate", jobs)

    def map_attempts(
        self, jobs: Iterable[tuple[envs.Task, int, str]], max_steps: int
    ) -> Iterator[experts.Episode]:
        """The same for `experts.attempt`: task, seed and skill of each."""
        jobs = ((task, seed, max_steps, skill) for task, seed, skill in jobs)
        return self._map("attempt", jobs)

    def _map(self, method: str, jobs: Iterable[tuple]) -> Iterator[Any]:
        self._check_free()
        self._demonstrating = True
        waiting = [collections.deque() for _ in self._processes]  # (number, request) in each
        requests = ((number, (method, job)) for number, job in enumerate(jobs))
        try:
            yield from self._in_order(requests, waiting)
        except KeyboardInterrupt:  # perhaps in the middle of an answer
            self.close()
            raise
        finally:
            self._drop(waiting)
            self._demonstrating = False

    def peak_memory_bytes(self) -> int:
        """The most memory one of those that live has held; 0 where Linux's /proc is missing."""
        return max(process.peak_memory_bytes() for process in self._processes)

    def _home(self, number: int) -> int:
        return number % len(self._processes)

    def _fresh(self, w: int) -> tuple[str, tuple]:
        mine = self._of(w).items()
        return "reset", ([(number, episode.task, episode.seed) for number, episode in mine],)

    def _of(self, w: int) -> dict[int, _Episode]:
        return {k: episode for k, episode in self._episodes.items() if self._home(k) == w}

    def _names(self, w: int) -> str:
        return f"episodes {_listed(mine)}" if (mine := self._of(w)) else ""

    def _check_free(self) -> None:
        if self._closed:
            raise ValueError("the pool of simulators is closed; open a new one")
        if self._demonstrating:
            raise ValueError("the pool is busy with demonstrations; exhaust or close them first")

    def _checked(self, number: int, chunk: np.ndarray) -> np.ndarray:
        if number not in self._episodes:
            raise ValueError(
                f"episode {number} is not live: it was never reset, or has ended; live are "
                f"{_listed(self._episodes) or 'none'}"
            )
        chunk = np.array(chunk, np.float32)
        if chunk.ndim != 2 or not len(chunk):
            raise ValueError(
                f"episode {number}: a chunk of actions is an array [k, a] with k > 0; found shape "
                f"{list(chunk.shape)}"
            )
        if not np.isfinite(chunk).all():
            raise ValueError(
                f"episode {number} ({self._episodes[number].task}): an action is not finite; its "
                "policy may have diverged"
            )
        return chunk

    def _ask(self, requests: Mapping[int, tuple[str, tuple]]) -> dict[int, Any]:
        """Answers by process. Raises the error of an environment once all have answered."""
        answers: dict[int, tuple[bool, Any]] = {}
        try:
            for w, request in requests.items():
                self._processes[w].send(request)
            while missing := [w for w in requests if w not in answers]:
                for w in self._ready(missing):
                    try:
                        answers[w] = self._processes[w].receive()
                    except _DeadError:
                        self._revive(w, self._names(w))
                        self._processes[w].send(requests[w])
        except BaseException:  # also Ctrl-C: answers still to come would be taken for later ones
            self.close()
            raise
        for _, (fine, answer) in sorted(answers.items()):
            if not fine:
                self._episodes = {}
                raise processes.unpacked(*answer)
        return {w: answer for w, (_, answer) in answers.items()}

    def _in_order(
        self, requests: Iterator[tuple[int, tuple]], waiting: list[collections.deque]
    ) -> Iterator[experts.Episode | None]:
        """Results of requests in their order, made by whichever process is free."""
        done: dict[int, experts.Episode | None] = {}
        turn = given = 0
        more = True
        while True:
            least = min(range(len(waiting)), key=lambda w: len(waiting[w]))
            if more and len(waiting[least]) < 2 and given - turn < _AHEAD * len(waiting):
                if more := (request := next(requests, None)) is not None:
                    waiting[least].append(request)
                    self._processes[least].send(request[1])
                    given += 1
            elif turn in done:
                yield done.pop(turn)
                turn += 1
            elif not any(waiting):
                return
            else:
                for w in self._ready([w for w, queue in enumerate(waiting) if queue]):
                    self._collect(w, waiting[w], done)

    def _collect(self, w: int, queue: collections.deque, done: dict[int, Any]) -> None:
        """Moves a process's next answer to what is done, or has a dead one's work done again."""
        try:
            fine, answer = self._processes[w].receive()
        except _DeadError:
            self._revive(w, f"demonstrations {_listed(number for number, _ in queue)}")
            for _, request in queue:
                self._processes[w].send(request)
            return
        number, _ = queue.popleft()
        if not fine:
            raise processes.unpacked(*answer)
        done[number] = answer

    def _drop(self, waiting: list[collections.deque]) -> None:
        """Takes the answers that nobody waits for any more, or ends those who would be long."""
        for w, queue in enumerate(waiting):
            process = self._processes[w]
            try:
                while queue and not self._closed:
                    if not process.connection.poll(1.0):
                        process.start()
                        self._play_again(w)
                        break
                    process.receive()
                    queue.popleft()
            except _DeadError:
                self._revive(w, self._names(w))

    def _ready(self, ws: Sequence[int]) -> list[int]:
        """Those of some processes that have answered, or died; waits for the first."""
        ready = connections.wait([self._processes[w].connection for w in ws])
        return [w for w in ws if self._processes[w].connection in ready]

    def _revive(self, w: int, again: str) -> None:
        """Puts a new process in the place of a dead one, and its live episodes where they were."""
        process = self._processes[w]
        while True:
            end = process.end()
            if process.deaths >= MAX_DEATHS:
                self.close()
                raise OSError(
                    f"a simulator process {end}, {process.deaths} times in a row over "
                    f"{again or 'nothing'}; fewer processes need less memory, and what it wrote on "
                    "stderr may say more"
                )
            then = f"a new one runs {again} again" if again else "a new one takes its place"
            print(f"a simulator process {end}; {then}", file=sys.stderr)
            process.start()
            with contextlib.suppress(_DeadError):
                self._play_again(w)
                return

    def _play_again(self, w: int) -> None:
        process, episodes = self._processes[w], self._of(w)
        played = {k: np.concatenate(e.chunks) for k, e in episodes.items() if e.chunks}
        for request in (self._fresh(w), ("step", (played, False))):
            process.send(request)
            fine, answer = process.receive(progress=False)
            if not fine:
                raise processes.unpacked(*answer)


class _DeadError(Exception):
    """The other end of a connection is gone."""


class _Process:
    """The pool's end of one process."""

    connection: connections.Connection

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self.deaths = 0  # since the last answer to something new

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Starts a process, in place of the one before."""
        self.stop()
        self._process, self.connection = processes.start(
            "policymix.sim.worker.serve", _ONE_THREAD, quiet=True
        )

    def stop(self) -> None:
        """Ends the process; nothing where there is none."""
        if self._process is not None:
            processes.stop(self._process, self.connection)
            self._process = None

    def send(self, request: tuple[str, tuple]) -> None:
        """Sends a request; that the process is dead shows when its answer is received."""
        with contextlib.suppress(OSError):
            self.connection.send(request)

    def receive(self, progress: bool = True) -> tuple[bool, Any]:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise _DeadError from None
        if progress:
            self.deaths = 0
        return answer

    def end(self) -> str:
        """How a process ended that no longer answers."""
        self.deaths += 1
        return processes.end(self._process)

    def peak_memory_bytes(self) -> int:
        return memory.peak_bytes(self.pid)


def _listed(numbers: Iterable[int]) -> str:
    """1, 2, 3 and so on: at most ten numbers."""
    numbers = sorted(numbers)
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return ", ".join(map(str, numbers[:10])) + more
