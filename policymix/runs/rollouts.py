"""Many episodes of one policy at once: one call of the policy for all that are still alive."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ml_collections
import numpy as np

from policymix import metrics
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
      model: its configuration, of which action_horizon is looked at; encoder: what it reads.
    """

    model: Any
    encoder: encoding.Encoder

    def act(
        self, raw: Mapping[str, Any], *, seeds: Sequence[int], call: int, num_flow_steps: int
    ) -> np.ndarray: ...


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
      prompts: what each task is told.
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
