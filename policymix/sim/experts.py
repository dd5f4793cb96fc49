"""Experts that come with the simulators, or are made from them, and what they demonstrate."""

import functools
import itertools
from collections.abc import Callable

import numpy as np

from policymix.sim import envs

Episode = dict[str, np.ndarray]
Expert = Callable[[dict[str, np.ndarray]], np.ndarray]

# Ways to act on what the expert says. How strong they are is drawn for every episode. They are
# fractions of the range of actions, which of ALOHA's joints is a whole turn: there none but the
# expert is of any use.
SKILLS = ("expert", "slow", "biased", "noisy", "wandering")
_SPEEDS = (0.2, 0.6)  # of slow, as fractions of the expert's
_BIAS = 0.4  # deviation of biased's constant, in halves of the action's range, like the next
_NOISE = (0.3, 1.0)  # deviation of noisy's
_WANDERS_FROM = 60  # wandering is the expert for fewer steps than that
_HOLD = 10  # steps for which it then does the same

_AFTERWARDS = 10  # steps that demonstrations of ALOHA go on: a hand that touches goes on to grasp

_SCALAR = {"shape": [1], "names": None}


def expert(task: envs.Task, env: envs.Env, seed: int) -> Expert:
    """From an observation of `env` to the next action [a], float32.

    Meta-World's experts look at the observation alone. The others' look into the environment, and
    are to be asked once before every step: PushT's plans as it goes, ALOHA's does from the start.
    """
    if task.simulator == "metaworld":
        return functools.partial(_scripted, _policy(task.name))
    if task.simulator == "pusht":
        from policymix.sim import pushes

        actions = pushes.plan(env.world, np.random.default_rng([seed, 1]))
        return lambda _: next(actions).astype(np.float32)
    from policymix.sim import bimanual

    targets = bimanual.plan(env.name, env.start)
    held = itertools.chain(targets, itertools.repeat(targets[-1]))
    return lambda _: next(held)


def demonstrate(task: envs.Task, seed: int, max_steps: int, noise: float = 0.0) -> Episode | None:
    """An episode of a task's expert up to its first success, or None where there is none.

    In ALOHA, where success is a touch, it goes on for 10 steps more, as long as there are any.

    Args:
      task: what is demonstrated.
      seed: of the start, of the expert where it draws, and of the noise.
      max_steps: after how many it has failed.
      noise: deviation of Gaussian noise on the executed actions, in halves of the action's range.
        Noise leads where the expert alone would not come; recorded are the expert's actions.

    Returns:
      Arrays [t, …] of the observations before each action and, as "action", what the expert did.
    """
    env = envs.make(task)
    observation = env.reset(seed)
    act = expert(task, env, seed)
    rng = np.random.default_rng([seed, 2])
    low, high = env.action_range
    half = (high - low) / 2
    frames, end = [], None
    for step in range(max_steps):
        action = act(observation)
        frames.append({**observation, "action": action})
        executed = action + noise * half * rng.standard_normal(action.shape)
        observation, _, success = env.step(executed)
        if success and end is None:
            end = step + _AFTERWARDS * _is_aloha(task)
        if step == end:
            break
    return None if end is None else _stacked(frames)


def skills(simulator: str) -> tuple[str, ...]:
    """Those of SKILLS that a simulator's tasks can be attempted with."""
    return SKILLS[:1] if simulator.startswith("aloha") else SKILLS


def attempt(task: envs.Task, seed: int, max_steps: int, skill: str) -> Episode:
    """An episode played with one of `skills` up to its first success, or to the end of its time.

    expert: what the expert says. slow: its moves, 0.2 to 0.6 as large. biased: a constant added to
    them. noisy: Gaussian noise added to all it says. wandering: at first the expert, from a step
    before the 60th on random actions, each held for 10 steps.

    Args:
      seed: of the start, and of whatever is drawn.

    Returns:
      Arrays [t, …] of the observations before each action; as "action" what was executed, clipped
      to the range of actions; and what came of it, see `outcomes`.

    Raises:
      ValueError: a skill that the simulator's tasks are not attempted with.
    """
    known = skills(task.simulator)
    if skill not in known:
        raise ValueError(f"{task.simulator} has no skill {skill!r}; choose of {','.join(known)}")
    env = envs.make(task)
    observation = env.reset(seed)
    act = _skilled(skill, task, env, seed)
    frames = []
    for step in range(1, max_steps + 1):
        action = np.clip(act(observation), *env.action_range).astype(np.float32)
        seen = observation
        observation, score, success = env.step(action)
        told = {
            "next.reward": np.float32(score),
            "next.success": success,
            "next.done": success or step == max_steps,
        }
        told |= {f"info.{key}": np.float32(value) for key, value in env.info.items()}
        frames.append({**seen, "action": action} | told)
        if success:
            break
    return _stacked(frames)


def outcomes(env: envs.Env) -> dict[str, dict]:
    """Features of an attempt beside those of `env`, all of them of the step from a frame on."""
    told = {"next.reward": "float32", "next.success": "bool", "next.done": "bool"}
    told |= {f"info.{key}": "float32" for key in env.info_keys}
    return {name: {"dtype": dtype} | _SCALAR for name, dtype in told.items()}


def _skilled(skill: str, task: envs.Task, env: envs.Env, seed: int) -> Expert:
    act, rng = expert(task, env, seed), np.random.default_rng([seed, 3])
    low, high = env.action_range
    half = (high - low) / 2
    size = env.features["action"]["shape"][0]
    # Where actions are places, standing still is going to where one is; a gripper stays out of it.
    at_places = task.simulator == "pusht"
    still = (lambda seen: seen["observation.state"]) if at_places else lambda _: 0
    moves = np.array([not name.endswith("gripper") for name in env.features["action"]["names"]])
    if skill == "slow":
        speed = np.where(moves, rng.uniform(*_SPEEDS), 1)
        return lambda seen: still(seen) + speed * (act(seen) - still(seen))
    if skill == "biased":
        bias = half * _BIAS * moves * rng.standard_normal(size)
        return lambda seen: act(seen) + bias
    if skill == "noisy":
        noise = half * rng.uniform(*_NOISE)
        return lambda seen: act(seen) + noise * rng.standard_normal(size)
    if skill == "wandering":
        return _Wanderer(act, rng, lambda: rng.uniform(low, high, size))
    return act


class _Wanderer:
    """An expert that loses interest."""

    def __init__(self, act: Expert, rng: np.random.Generator, drawn: Callable[[], np.ndarray]):
        self._act, self._drawn = act, drawn
        self._left = int(rng.integers(_WANDERS_FROM))  # steps of the expert
        self._step = 0

    def __call__(self, seen: dict[str, np.ndarray]) -> np.ndarray:
        wandered = self._step - self._left
        self._step += 1
        if wandered < 0:
            return self._act(seen)
        if wandered % _HOLD == 0:
            self._held = self._drawn()
        return self._held


def _is_aloha(task: envs.Task) -> bool:
    return task.simulator.startswith("aloha")


def _stacked(frames: list[dict[str, np.ndarray]]) -> Episode:
    return {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}


def _policy(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Meta-World's scripted policy of a task."""
    from metaworld import policies

    return getattr(policies, _policy_name(name))().get_action


def _policy_name(name: str) -> str:
    """Class of a task's policy: SawyerButtonPressV3Policy of "button-press-v3"."""
    words = name.removesuffix("-v3").replace("peg-insert-", "peg-insertion-").split("-")
    return f"Sawyer{''.join(word.capitalize() for word in words)}V3Policy"


def _scripted(
    policy: Callable[[np.ndarray], np.ndarray], observation: dict[str, np.ndarray]
) -> np.ndarray:
    # From the recorded, rounded state, so that a demonstration is a function of what it holds.
    state = observation["observation.state"].astype(np.float64)
    return np.clip(policy(state), -1, 1).astype(np.float32)
