"""A process of environments: what it does with the commands that come through its connection."""

from collections.abc import Callable, Iterable, Mapping
from multiprocessing import connection as connections
from typing import Any, NamedTuple

import numpy as np

from policymix import processes
from policymix.sim import envs, experts


class Outcome(NamedTuple):
    """What a chunk of actions led to.

    Attributes:
      observation: after the last executed action; None after success, with nothing left to decide.
      steps: how many actions were executed: all, or those up to the first success.
      score: the best on the way, in [0, 1].
      success: whether the episode ended in success.
    """

    observation: dict[str, np.ndarray] | None
    steps: int
    score: float
    success: bool


class Worker:
    """The episodes of one process, by the numbers that the pool gave them."""

    def __init__(self):
        self._episodes: dict[int, tuple[envs.Env, str]] = {}

    def reset(
        self, episodes: Iterable[tuple[int, envs.Task, int]]
    ) -> dict[int, dict[str, np.ndarray]]:
        """Starts episodes of number, task and seed in place of all earlier ones."""
        self._episodes.clear()
        return {number: self._start(number, task, seed) for number, task, seed in episodes}

    def step(self, chunks: Mapping[int, np.ndarray], observe: bool = True) -> dict[int, Outcome]:
        """Plays a chunk of actions [k, a] in each of some episodes; success ends an episode."""
        outcomes = {}
        for number, chunk in chunks.items():
            env, name = self._episodes[number]
            outcomes[number] = _told(name, _play, env, chunk, observe)
            if outcomes[number].success:
                del self._episodes[number]
        return outcomes

    def demonstrate(
        self, task: envs.Task, seed: int, max_steps: int, noise: float
    ) -> experts.Episode | None:
        """See `experts.demonstrate`."""
        name = f"{task}, seed {seed}"
        return _told(name, experts.demonstrate, task, seed, max_steps, noise)

    def attempt(self, task: envs.Task, seed: int, max_steps: int, skill: str) -> experts.Episode:
        """See `experts.attempt`."""
        name = f"{task}, seed {seed}"
        return _told(name, experts.attempt, task, seed, max_steps, skill)

    def _start(self, number: int, task: envs.Task, seed: int) -> dict[str, np.ndarray]:
        name = f"episode {number} ({task}, seed {seed})"
        env = _told(name, envs.make, task)
        self._episodes[number] = env, name
        return _told(name, env.reset, seed)


def serve(connection: connections.Connection) -> None:
    """Answers (method, arguments) with (True, result) or (False, error), until the pool is gone."""
    worker = Worker()
    with connection:
        while True:
            try:
                method, arguments = connection.recv()
            except (EOFError, OSError):
                return
            answer: tuple[bool, Any]
            try:
                answer = True, getattr(worker, method)(*arguments)
            except Exception as error:  # whatever a simulator raises
                answer = False, processes.packed(error)
            try:
                connection.send(answer)
            except OSError:
                return


def _play(env: envs.Env, chunk: np.ndarray, observe: bool) -> Outcome:
    shape = env.features["action"]["shape"]
    if chunk.shape[1:] != shape:
        raise ValueError(
            f"actions of {shape[0]} numbers are expected, chunks [k, {shape[0]}]; found a chunk of "
            f"shape {list(chunk.shape)}"
        )
    best, last = 0.0, len(chunk)
    for steps, action in enumerate(chunk, 1):
        observation, score, success = env.step(action, observe=observe and steps == last)
        best = max(best, score)
        if success:
            return Outcome(None, steps, best, True)
    return Outcome(observation, last, best, False)


def _told(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function; its errors begin with a name."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except OSError as error:
        raise OSError(f"{name}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
