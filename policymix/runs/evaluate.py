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
from policymix.checkpoints import layout, provenance
from policymix.data import validation as validation_lib
from policymix.reports import evaluations, tables
from policymix.runs import chunk_policies, metadata, policies, replays, rollouts
from policymix.runs import judge as judge_lib
from policymix.sim import envs, workers

RESULT = "evaluation.json"

Candidate = policies.Policy | chunk_policies.ChunkPolicy | replays.Replay


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for; empty fields fall back to the config.

    Attributes:
      checkpoints: paths, or patterns of local ones; nearest:DATASET is no checkpoint, but replays
        the nearest demonstration.
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
    request = dataclasses.replace(request, checkpoints=layout.expand(request.checkpoints))
    if not request.checkpoints:
        raise ValueError("--checkpoints is empty: give what to evaluate, as --checkpoints=a,b,c")
    real = [name for name in request.checkpoints if not replays.is_replay(name)]
    config = metadata.complete(config, checkpoints=real)
    tasks = envs.parse_all(request.env or config.evaluate.env)
    rollouts.check(config, tasks)
    names = _names(request)
    read = [*map(replays.dataset_of, request.checkpoints), request.validation]
    files.check_apart(request.output, [p for p in read if pathlib.Path(p or "?").exists()])
    files.check_output(request.output, overwrite=request.overwrite, ours=_is_evaluation)
    candidates = [_policy(config, name) for name in request.checkpoints]
    judge = _judge(config, request, candidates)
    made = rollouts.environments(config, tasks, candidates)
    prompts = rollouts.prompts_of(config, made)
    for policy in candidates:
        if isinstance(policy, replays.Replay):
            policy.check(made[tasks[0]], prompts)  # tasks of a simulator are one robot's
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


def _policy(config: ml_collections.ConfigDict, name: str) -> Candidate:
    if replays.is_replay(name):
        return replays.Replay(config, name)
    if chunk_policies.is_chunk_policy(name):
        return chunk_policies.ChunkPolicy(config, name)
    return policies.Policy(config, policies.model_config(config, why="evaluation"), name)


def _names(request: Request) -> list[str]:
    if request.names and len(request.names) != len(request.checkpoints):
        raise ValueError(
            f"{len(request.names)} names for {len(request.checkpoints)} checkpoints; give one each"
        )
    names = list(request.names) or tables.labels(request.checkpoints)
    if len(set(names)) < len(names):
        raise ValueError(f"checkpoints are named twice: {names}")
    return names


def _judge(
    config: ml_collections.ConfigDict, request: Request, candidates: Sequence[Candidate]
) -> judge_lib.Judge | None:
    if not request.validation:
        return None
    candidates = [c for c in candidates if not isinstance(c, replays.Replay)]
    if not candidates:
        raise ValueError("--validation is of checkpoints' losses, and there is none: leave it out")
    for candidate in candidates:
        if isinstance(candidate, chunk_policies.ChunkPolicy):
            raise ValueError(
                f"{candidate.name} is a chunk-level learner, which has no validation loss here: "
                "leave out --validation, and judge it by its roll-outs"
            )
    policy = candidates[0]
    path = pathlib.Path(request.validation)
    validation = validation_lib.load(path, config.mix.held_out)
    judge = judge_lib.Judge(policy.model, path, validation, config.mix.seed)
    judge.check(policy.name, policy.header)  # before the roll-outs, not after
    names = [candidate.name for candidate in candidates]
    judge.warnings += provenance.leaks(names, validation.meta)
    judge.warnings += judge.normalised_otherwise(names)
    for warning in judge.warnings:
        print(f"WARNING: {warning}")
    return judge


def _describe(
    name: str,
    policy: Candidate,
    judge: judge_lib.Judge | None,
    results: Sequence[rollouts.Result],
) -> dict[str, Any]:
    """What evaluation.json says of a policy: all episodes together, and task by task."""
    by_task: dict[str, list[rollouts.Result]] = {}
    for result in results:
        by_task.setdefault(str(result.task), []).append(result)
    replay = isinstance(policy, replays.Replay)
    return {
        "name": name,
        **(policy.describe() if replay else provenance.describe(policy.name)),
        "loss": judge.losses(policy.name, policy.load()) if judge and not replay else None,
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
        "score_interval": list(intervals.mean([result.score for result in results])),
    }


def _is_evaluation(path: pathlib.Path) -> bool:
    """Whether this command wrote that directory; an empty one is as good."""
    if not path.is_dir() or not any(path.iterdir()):
        return path.is_dir()
    return (path / RESULT).is_file()
