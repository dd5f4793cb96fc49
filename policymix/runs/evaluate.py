"""Evaluation: any number of checkpoints, rolled out on the same starts with the same noise."""

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from policymix import files, intervals, memory, processes
from policymix.checkpoints import provenance
from policymix.data import validation as validation_lib
from policymix.reports import evaluations, tables
from policymix.runs import chunk_policies, metadata, policies, rollouts
from policymix.runs import judge as judge_lib
from policymix.sim import envs, workers

RESULT = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for; empty fields fall back to the config.

    Attributes:
      names: what the report calls each checkpoint; (): their paths, as far as they differ.
      validation: batches to report losses on, beside the successes.
    """

    checkpoints: tuple[str, ...]
    output: pathlib.Path
    env: str = ""
    names: tuple[str, ...] = ()
    validation: str = ""
    overwrite: bool = False
    dry_run: bool = False


def evaluate(
    config: ml_collections.ConfigDict, request: Request, pool: workers.Pool | None = None
) -> dict[str, Any]:
    """Writes OUTPUT/{evaluation.json, report.png, report.html} and returns what the first says.

    Every policy meets the same starts, with the same noise in its actions.

    Args:
      pool: environments to use; its own, config.evaluate.num_workers, where none are given.

    Raises:
      ValueError, OSError: bad config, checkpoints or output, or a missing simulator.
    """
    started = time.monotonic()
    config = metadata.complete(config, checkpoints=request.checkpoints)
    tasks = envs.parse_all(request.env or config.evaluate.env)
    _check(config, request)
    envs.limit(tasks[0].simulator, config.evaluate.max_steps)
    names = _names(request)
    files.check_apart(
        request.output,
        [p for p in (*request.checkpoints, request.validation) if pathlib.Path(p or "?").exists()],
    )
    files.check_output(request.output, overwrite=request.overwrite, ours=_is_evaluation)
    candidates = [_policy(config, name) for name in request.checkpoints]
    judge = _judge(config, request, candidates[0])
    made = {task: envs.make(task) for task in tasks}
    for policy in candidates:
        _check_chunk(config, policy)
        _check_robot(config, policy, made[tasks[0]])
    prompts = {task: env.prompt for task, env in made.items()}
    e = config.evaluate
    episodes = [(task, e.seed + k) for task in tasks for k in range(e.num_episodes)]
    print(
        f"{len(candidates)} policies, {len(episodes)} episodes each: {e.num_episodes} of "
        f"{', '.join(map(str, tasks))} in {tasks[0].simulator}, seeds from {e.seed}; output "
        f"{request.output}"
    )
    if request.dry_run:
        print("dry run: nothing was computed, nothing was written")
        return {}

    memory.keep_freed()
    told = []
    own = contextlib.nullcontext(pool)
    if pool is None:
        own = workers.Pool(e.num_workers or min(processes.num_cores(), len(episodes)))
    with own as pool:
        for name, policy in zip(names, candidates, strict=True):
            begun = time.monotonic()
            results = rollouts.roll_out(policy, pool, episodes, config, prompts)
            told.append(_describe(name, policy, judge, results))
            told[-1]["seconds"] = time.monotonic() - begun
            print(evaluations.line(told[-1]))
            policy.unload()
        environments = pool.peak_memory_bytes()
    report = {
        "version": 1,
        "policymix": importlib.metadata.version("policymix"),
        "jax": jax.__version__,
        "simulator": {"name": tasks[0].simulator, "versions": envs.versions(tasks[0].simulator)},
        "tasks": [str(task) for task in tasks],
        "settings": e.to_dict() | {"env": request.env or e.env},
        "validation": judge.describe() if judge else None,
        "warnings": judge.warnings if judge else [],
        "policies": told,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": {"policy": memory.peak_bytes(), "environments": environments},
    }
    with files.whole_directory(request.output, overwrite=request.overwrite) as partial:
        files.write_json(partial / RESULT, report)
        evaluations.draw(report, partial / "report.png")
        evaluations.write_page(report, partial / "report.html")
    print(evaluations.table(report))
    print(f"written to {request.output}")
    return report


def _policy(
    config: ml_collections.ConfigDict, name: str
) -> policies.Policy | chunk_policies.ChunkPolicy:
    if chunk_policies.is_chunk_policy(name):
        return chunk_policies.ChunkPolicy(config, name)
    return policies.Policy(config, policies.model_config(config, why="evaluation"), name)


def _check(config: ml_collections.ConfigDict, request: Request) -> None:
    """ValueError for settings that no evaluation can have."""
    e = config.evaluate
    if not request.checkpoints:
        raise ValueError("--checkpoints is empty: give what to evaluate, as --checkpoints=a,b,c")
    for name, least in (
        ("num_episodes", 1), ("seed", 0), ("max_steps", 0), ("replan_steps", 0),
        ("num_flow_steps", 1), ("num_workers", 0),
    ):  # fmt: skip
        if e[name] < least:
            raise ValueError(f"config.evaluate.{name} is {e[name]}; at least {least} is needed")
    if e.seed + e.num_episodes > 2**32:
        raise ValueError(f"config.evaluate.seed is {e.seed}; seeds end at {2**32 - 1}")


def _check_chunk(config: ml_collections.ConfigDict, policy) -> None:
    """ValueError if a policy's chunks are shorter than what is to be played of them."""
    asked, horizon = config.evaluate.replan_steps, policy.model.action_horizon
    if asked > horizon:
        raise ValueError(
            f"config.evaluate.replan_steps is {asked}, but a chunk of {policy.name} has {horizon} "
            "actions; 0 plays whole chunks"
        )


def _names(request: Request) -> list[str]:
    if request.names and len(request.names) != len(request.checkpoints):
        raise ValueError(
            f"{len(request.names)} names for {len(request.checkpoints)} checkpoints; give one each"
        )
    names = list(request.names) or tables.labels(request.checkpoints)
    if len(set(names)) < len(names):
        raise ValueError(f"checkpoints are named twice: {names}")
    return names


def _check_robot(config: ml_collections.ConfigDict, policy, env: envs.Env) -> None:
    """ValueError if a policy reads or does what the environment does not have."""
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


def _judge(
    config: ml_collections.ConfigDict, request: Request, policy: policies.Policy
) -> judge_lib.Judge | None:
    if not request.validation:
        return None
    path = pathlib.Path(request.validation)
    validation = validation_lib.load(path, config.mix.held_out)
    judge = judge_lib.Judge(policy.model, path, validation, config.mix.seed)
    judge.check(policy.name, policy.header)  # before the roll-outs, not after
    judge.warnings += provenance.leaks(request.checkpoints, validation.meta)
    judge.warnings += judge.normalised_otherwise(request.checkpoints)
    for warning in judge.warnings:
        print(f"WARNING: {warning}")
    return judge


def _describe(
    name: str,
    policy: policies.Policy,
    judge: judge_lib.Judge | None,
    results: Sequence[rollouts.Result],
) -> dict[str, Any]:
    """What evaluation.json says of a policy: all episodes together, and task by task."""
    by_task: dict[str, list[rollouts.Result]] = {}
    for result in results:
        by_task.setdefault(str(result.task), []).append(result)
    return {
        "name": name,
        **provenance.describe(policy.name),
        "loss": judge.losses(policy.name, policy.load()) if judge else None,
        **_counts(results),
        "by_task": {task: _counts(mine) for task, mine in by_task.items()},
        "seeds": [result.seed for result in results],
        "outcomes": [int(result.success) for result in results],
        "steps": [result.steps for result in results],
        "scores": [round(result.score, 4) for result in results],
    }


def _counts(results: Sequence[rollouts.Result]) -> dict[str, Any]:
    successes = sum(result.success for result in results)
    return {
        "episodes": len(results),
        "successes": successes,
        "interval": list(intervals.wilson(successes, len(results))),
        "mean_score": sum(result.score for result in results) / len(results),
    }


def _is_evaluation(path: pathlib.Path) -> bool:
    """Whether this command wrote that directory; an empty one is as good."""
    if not path.is_dir() or not any(path.iterdir()):
        return path.is_dir()
    return (path / RESULT).is_file()
