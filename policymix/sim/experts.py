"""Experts that come with the simulators, or are made from them, and what they demonstrate."""

import functools
from collections.abc import Callable

import numpy as np

from policymix.sim import envs

Episode = dict[str, np.ndarray]
Expert = Callable[[dict[str, np.ndarray]], np.ndarray]


def expert(task: envs.Task, env: envs.Env, seed: int) -> Expert:
    """From an observation of `env` to the next action [a], float32.

    Meta-World's experts look at the observation alone. PushT's looks into the environment, and is
    to be asked once before every step.
    """
    if task.simulator == "metaworld":
        return functools.partial(_scripted, _policy(task.name))
    from policymix.sim import pushes

    actions = pushes.plan(env.world, np.random.default_rng([seed, 1]))
    return lambda _: next(actions).astype(np.float32)


def demonstrate(task: envs.Task, seed: int, max_steps: int, noise: float = 0.0) -> Episode | None:
    """An episode of a task's expert up to its first success, or None where there is none.

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
    half = 1.0 if task.simulator == "metaworld" else 256.0
    frames = []
    for _ in range(max_steps):
        action = act(observation)
        frames.append({**observation, "action": action})
        executed = action + noise * half * rng.standard_normal(action.shape)
        observation, _, success = env.step(executed)
        if success:
            return {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
    return None


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
