"""Demonstrations of a simulator's experts, or attempts of mixed quality, as a LeRobot dataset."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from policymix import files, metrics, processes
from policymix.data import writer
from policymix.sim import envs, experts, workers

SOURCE = "collected.json"
_MOST_ATTEMPTS = 10  # for each demonstration wanted, before the expert is given up on


def collect(
    env: str,
    output: pathlib.Path,
    *,
    num_episodes: int,
    seed: int = 0,
    max_steps: int = 0,
    noise: float = 0.0,
    skills: Sequence[str] = (),
    num_workers: int = 0,
    pool: workers.Pool | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Writes `num_episodes` successful episodes of every task into one dataset, task after task.

    Starts are drawn from the seeds `seed`, `seed` + 1, …; those that the expert fails are left out
    and later seeds take their place. The dataset does not depend on the number of processes.

    With `skills` it writes what reinforcement learning needs: every episode, failures too, the
    actions that were executed, and what came of them.

    Args:
      env: SIMULATOR/TASK,TASK, each task as `envs.parse` reads it.
      max_steps: after how many an episode has failed; 0: as `envs.MAX_STEPS` says.
      noise: on the executed actions, see `experts.demonstrate`.
      skills: some of `experts.skills`; see `experts.attempt`. Seeds take turns: seed s is played
        with skill s modulo their number.
      num_workers: processes with environments; 0: one per core. pool: one to use in their place.

    Raises:
      ValueError, OSError: bad arguments, a missing simulator, output that exists, or an expert that
        fails ten times as often as it is needed.
    """
    tasks = envs.parse_all(env)
    if num_episodes < 1 or seed < 0 or max_steps < 0 or not noise >= 0:
        raise ValueError(
            "collecting needs num_episodes of at least 1 and no negative seed, max_steps or noise; "
            f"got {num_episodes}, {seed}, {max_steps} and {noise}"
        )
    _check_skills(tasks[0].simulator, skills, noise)
    output = files.local(output)
    files.check_output(output, overwrite=overwrite, ours=_is_collected)
    max_steps = envs.limit(tasks[0].simulator, max_steps)
    made = {task: envs.make(task) for task in tasks}
    what = f"attempts ({', '.join(skills)})" if skills else "demonstrations"
    print(
        f"{num_episodes} {what} of each of {', '.join(map(str, tasks))} in "
        f"{tasks[0].simulator}, at most {max_steps} steps, seeds from {seed}; into {output}"
    )
    if dry_run:
        print("dry run: nothing was written")
        return
    wanted = num_episodes * len(tasks)
    own = contextlib.nullcontext(pool)
    if pool is None:
        own = workers.Pool(num_workers or min(processes.num_cores(), wanted))
    first, frames = next(iter(made.values())), 0
    told = {"env": env, "num_episodes": num_episodes, "seed": seed}
    told |= {"max_steps": max_steps, "noise": noise}
    if skills:
        told["skills"] = list(skills)
        told["successes"] = {str(task): {skill: [0, 0] for skill in skills} for task in tasks}
    with (
        own as pool,
        writer.Writer(
            output,
            fps=first.fps,
            features=first.features | (experts.outcomes(first) if skills else {}),
            robot_type=tasks[0].simulator,
            overwrite=overwrite,
        ) as dataset,
        metrics.Progress("attempts" if skills else "demonstrations", wanted) as shown,
    ):
        for task in tasks:
            if skills:
                counts = told["successes"][str(task)]
                episodes = _attempts(pool, task, num_episodes, seed, max_steps, counts)
            else:
                episodes = _successes(pool, task, num_episodes, seed, max_steps, noise)
            for episode in episodes:
                dataset.add_episode(episode, made[task].prompt)
                frames += len(episode["action"])
                shown.step()
        told["versions"] = envs.versions(tasks[0].simulator)
        files.write_json(dataset.folder / SOURCE, told)
    for task, counts in told.get("successes", {}).items():
        shares = ", ".join(f"{skill} {n} of {of}" for skill, (n, of) in counts.items())
        print(f"{task}: {sum(n for n, _ in counts.values())} successes: {shares}")
    print(f"{wanted} episodes, {frames} frames written to {output}")


def _check_skills(simulator: str, skills: Sequence[str], noise: float) -> None:
    known = experts.skills(simulator)
    if not set(skills) <= set(known) or len(set(skills)) < len(skills):
        raise ValueError(
            f"skills={','.join(skills)}: expected some of {','.join(known)}, each once, which are "
            f"those that {simulator} has"
        )
    if skills and noise:
        raise ValueError(
            f"noise={noise} is of demonstrations; attempts with skills have the skill noisy for it"
        )


def _attempts(
    pool: workers.Pool,
    task: envs.Task,
    num_episodes: int,
    seed: int,
    max_steps: int,
    counts: dict[str, list[int]],
) -> Iterator[experts.Episode]:
    """All attempts; adds to the successes and the attempts of each skill in `counts`."""
    skills = list(counts)
    jobs = [(task, s, skills[s % len(skills)]) for s in range(seed, seed + num_episodes)]
    for (_, _, skill), episode in zip(jobs, pool.map_attempts(jobs, max_steps), strict=True):
        counts[skill][0] += int(episode["next.success"][-1])
        counts[skill][1] += 1
        yield episode


def _successes(
    pool: workers.Pool,
    task: envs.Task,
    num_episodes: int,
    seed: int,
    max_steps: int,
    noise: float,
) -> Iterator[experts.Episode]:
    """Rounds of attempts, each of as many as are still lacking, so that few are made in vain."""
    found, last = 0, seed
    while found < num_episodes:
        seeds = range(last, last + num_episodes - found)
        last = seeds.stop
        for episode in pool.map_demonstrations([(task, s) for s in seeds], max_steps, noise):
            if episode is not None:
                found += 1
                yield episode
        if last - seed >= _MOST_ATTEMPTS * num_episodes and found < num_episodes:
            raise ValueError(
                f"the expert of {task} succeeded in {found} of {last - seed} episodes of at most "
                f"{max_steps} steps: allow more steps, or less noise"
            )


def _is_collected(path: pathlib.Path) -> bool:
    """Whether this command wrote that dataset."""
    return (path / SOURCE).is_file()
