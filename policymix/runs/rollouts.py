"""Many episodes of one policy at once: one call of the policy for all that are still alive."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ml_collections
import numpy as np

from policymix import intervals, metrics, processes
from policymix.runs import encoding
from policymix.sim import envs, workers

_LEAST_ROWS = 32  # smaller calls than this save less than compiling them costs


@dataclasses.dataclass(frozen=True)
class Result:
    """One episode: steps up to success or the end, the best score on the way in [0, 1]."""

    task: envs.Task
    seed: int
    success: bool
    steps: int
    score: float


class Policy(Protocol):
    """What plays: `policies.Policy`, or a chunk-level learner's.

    Attributes:
      name: for messages; model: its configuration, of which sizes are looked at; encoder: what it
        reads.
    """

    name: str
    model: Any
    encoder: encoding.Encoder

    def act(
        self, raw: Mapping[str, Any], *, seeds: Sequence[int], call: int, num_flow_steps: int
    ) -> np.ndarray: ...


def check(config: ml_collections.ConfigDict, tasks: Sequence[envs.Task]) -> None:
    """ValueError for settings of config.evaluate that no roll-outs of these tasks can have."""
    e = config.evaluate
    for name, least in (
        ("num_episodes", 1), ("seed", 0), ("max_steps", 0), ("replan_steps", 0),
        ("num_flow_steps", 1), ("num_workers", 0),
    ):  # fmt: skip
        if e[name] < least:
            raise ValueError(f"config.evaluate.{name} is {e[name]}; at least {least} is needed")
    if e.seed + e.num_episodes > 2**32:
        raise ValueError(f"config.evaluate.seed is {e.seed}; seeds end at {2**32 - 1}")
    envs.limit(tasks[0].simulator, e.max_steps)


def check_policy(config: ml_collections.ConfigDict, policy: Policy, env: envs.Env) -> None:
    """ValueError if a policy's chunks are shorter than what is to be played of them, or if it reads
    or does what the environment does not have.
    """
    asked, horizon = config.evaluate.replan_steps, policy.model.action_horizon
    if asked > horizon:
        raise ValueError(
            f"config.evaluate.replan_steps is {asked}, but a chunk of {policy.name} has {horizon} "
            "actions; 0 plays whole chunks"
        )
    _check_robot(policy, env)


def _check_robot(policy: Policy, env: envs.Env) -> None:
    seen = {name: f["shape"] for name, f in env.features.items() if name != "action"}
    states = policy.encoder.wiring.state_keys
    cameras = {f"cameras.{camera}": name for camera, name in policy.encoder.cameras.items()}
    for field, name in [*(("state_key", key) for key in states), *cameras.items()]:
        if len(seen.get(name, ())) != (1 if field == "state_key" else 3):
            raise ValueError(
                f"config.data.{field} is {name!r}; the environments observe "
                + ", ".join(f"{key} {list(shape)}" for key, shape in seen.items())
            )
    stats, model = policy.encoder.norm_stats, policy.model
    p, (a,) = sum(seen[key][0] for key in states), env.features["action"]["shape"]
    for key, size, most in (("state", p, model.proprio_dim), ("actions", a, model.action_dim)):
        known = len(stats[key].mean) if key in stats else 0
        if size > min(known, most) or (key == "actions" and size < known):
            raise ValueError(
                f"{policy.name} has norm stats for {known} numbers of {key!r} and room for {most}; "
                f"the environments have {size}: it belongs to another robot"
            )


def environments(
    config: ml_collections.ConfigDict, tasks: Sequence[envs.Task], policies: Sequence[Policy]
) -> dict[envs.Task, envs.Env]:
    """One environment of each task, against every one of which every policy was checked.

    Raises:
      ValueError, OSError: as `check_policy`; no simulator, or nothing that renders for it.
    """
    made = {task: envs.make(task) for task in tasks}
    for env in made.values():
        for policy in policies:
            check_policy(config, policy, env)
    return made


def prompts_of(
    config: ml_collections.ConfigDict, made: Mapping[envs.Task, envs.Env]
) -> dict[envs.Task, str]:
    """What each task is told: config.data.default_prompt, or else what its environment says."""
    return {task: config.data.default_prompt or env.prompt for task, env in made.items()}


def check_playable(config: ml_collections.ConfigDict, policy: Policy) -> None:
    """ValueError or OSError, before any work, where `play` could not play: bad settings, a policy
    that the environments do not fit, or no simulator.
    """
    tasks = envs.parse_all(config.evaluate.env)
    check(config, tasks)
    environments(config, tasks, [policy])


def play(policy: Policy, config: ml_collections.ConfigDict) -> dict[str, float]:
    """How a policy does in the tasks of config.evaluate, in its own processes: rollout/success with
    its 95 % interval rollout/low and rollout/high (`intervals.wilson`); and rollout/score, the mean
    best, with rollout/score_low and rollout/score_high (`intervals.mean`).
    """
    e = config.evaluate
    tasks = envs.parse_all(e.env)
    prompts = prompts_of(config, environments(config, tasks, [policy]))
    episodes = [(task, e.seed + k) for task in tasks for k in range(e.num_episodes)]
    with workers.Pool(e.num_workers or min(processes.num_cores(), len(episodes))) as pool:
        results = roll_out(policy, pool, episodes, config, prompts)
    successes = sum(result.success for result in results)
    low, high = intervals.wilson(successes, len(results))
    scores = [result.score for result in results]
    score_low, score_high = intervals.mean(scores)
    return {
        "rollout/success": successes / len(results),
        "rollout/low": low,
        "rollout/high": high,
        "rollout/score": float(np.mean(scores)),
        "rollout/score_low": score_low,
        "rollout/score_high": score_high,
    }


def roll_out(
    policy: Policy,
    pool: workers.Pool,
    episodes: Sequence[tuple[envs.Task, int]],
    config: ml_collections.ConfigDict,
    prompts: Mapping[envs.Task, str],
) -> list[Result]:
    """Plays every episode until its first success or its last step.

    The rows of a call are decided by which episodes are alive, never by which process plays them,
    so results do not depend on the number of processes.

    Args:
      episodes: task and seed of each; the seed decides its start and its noise.
      config: of the run; sections data and evaluate are read.
      prompts: what each task is told, as `prompts_of` says.
    """
    e, num_episodes = config.evaluate, len(episodes)
    limit = envs.limit(episodes[0][0].simulator, e.max_steps)
    replan_steps = e.replan_steps or policy.model.action_horizon
    observations = dict(enumerate(pool.reset(episodes)))
    steps, scores = np.zeros(num_episodes, int), np.zeros(num_episodes)
    success = np.zeros(num_episodes, bool)
    with metrics.Progress("episodes", num_episodes, lines=0) as shown:
        for call in range(-(-limit // replan_steps)):
            live = sorted(observations)
            rows = live + [live[-1]] * (_rows(num_episodes, len(live)) - len(live))
            chunks = policy.act(
                _raw([observations[k] for k in rows], [episodes[k][0] for k in rows], policy,
                     config, prompts),
                seeds=[episodes[k][1] for k in rows],
                call=call,
                num_flow_steps=e.num_flow_steps,
            )  # fmt: skip
            kept = min(replan_steps, limit - call * replan_steps)
            outcomes = pool.step({k: chunks[row, :kept] for row, k in enumerate(live)})
            for k, outcome in outcomes.items():
                steps[k] += outcome.steps
                scores[k] = max(scores[k], outcome.score)
                success[k] = outcome.success
                observations[k] = outcome.observation
                if outcome.success or steps[k] >= limit:
                    del observations[k]
                    shown.step()
            if not observations:
                break
    return [
        Result(task, seed, bool(success[k]), int(steps[k]), float(scores[k]))
        for k, (task, seed) in enumerate(episodes)
    ]


def _rows(num_episodes: int, live: int) -> int:
    """Rows of a call: all, or as many halvings fewer as the live ones leave; few shapes compile."""
    rows = num_episodes
    while rows // 2 >= max(live, _LEAST_ROWS):
        rows = -(-rows // 2)
    return rows


def _raw(
    observations: Sequence[Mapping[str, np.ndarray]],
    tasks: Sequence[envs.Task],
    policy: Policy,
    config: ml_collections.ConfigDict,
    prompts: Mapping[envs.Task, str],
) -> dict[str, Any]:
    """Observations of environments as the encoder takes them."""
    states = policy.encoder.wiring.state_keys
    return {
        "state": np.stack([np.concatenate([o[key] for key in states]) for o in observations]),
        "prompt": [config.data.default_prompt or prompts[task] for task in tasks],
        "images": {
            camera: np.stack([o[feature] for o in observations])
            for camera, feature in policy.encoder.cameras.items()
        },
    }
