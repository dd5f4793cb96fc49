"""Demonstrations on disk: they succeed when played again, and nothing but the request decides."""

import json

import numpy as np
import pytest

from policymix.data import lerobot, writer
from policymix.runs import collect_demos
from policymix.sim import envs, experts, workers
from tests.runs.sim_support import PUSH, REACH

pytest.importorskip("metaworld")

ENV = "metaworld/reach-v3,button-press-v3"


@pytest.fixture(scope="module")
def pool():
    with workers.Pool(2) as shared:
        yield shared


@pytest.fixture(scope="module")
def demos(pool, tmp_path_factory):
    path = tmp_path_factory.mktemp("demos") / "two"
    collect_demos.collect(ENV, path, num_episodes=3, seed=5, pool=pool)
    return path


def collect(env, path, pool, **options):
    collect_demos.collect(env, path, pool=pool, **{"num_episodes": 2, **options})
    return lerobot.open_dataset(path)


def content(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def episodes_of(dataset):
    """(state [t, 39], action [t, 4], sentence) of each."""
    for start, end in zip(dataset.episode_from, dataset.episode_to, strict=True):
        (task,) = set(dataset.column("task_index")[start:end].tolist())
        yield (
            dataset.column("observation.state")[start:end],
            dataset.column("action")[start:end],
            dataset.tasks[task],
        )


def seed_of(task, state):
    """The seed whose start a recorded state is."""
    env = envs.make(task)
    for seed in range(100):
        if (env.reset(seed)["observation.state"] == state).all():
            return seed
    raise AssertionError(f"no seed below 100 starts {task} like this")


def test_the_dataset_opens_and_says_how_it_was_made(demos):
    dataset = lerobot.open_dataset(demos)
    assert (dataset.num_episodes, dataset.fps) == (6, 80)
    assert dataset.tasks == ["reach", "button press"]
    assert dataset.info["robot_type"] == "metaworld"
    told = json.loads((demos / "collected.json").read_text())
    assert told["env"] == ENV
    assert (told["num_episodes"], told["seed"], told["noise"]) == (3, 5, 0.0)
    assert told["max_steps"] == 150
    assert told["versions"] == envs.versions("metaworld")


def test_every_demonstration_succeeds_when_it_is_played_again(demos):
    tasks, seeds = envs.parse_all(ENV), []
    for number, (states, actions, prompt) in enumerate(episodes_of(lerobot.open_dataset(demos))):
        task = tasks[number // 3]  # one task after the other
        env = envs.make(task)
        assert prompt == env.prompt
        seeds.append(seed_of(task, states[0]))
        observation = env.reset(seeds[-1])
        for k, action in enumerate(actions):
            np.testing.assert_array_equal(observation["observation.state"], states[k])
            observation, _, success = env.step(action)
            assert success == (k == len(actions) - 1)
    assert seeds[0] == seeds[3] == 5
    for mine in (seeds[:3], seeds[3:]):
        assert mine == sorted(set(mine))


def test_one_process_writes_the_same_bytes(demos, tmp_path):
    with workers.Pool(1) as single:
        collect(ENV, tmp_path / "again", single, num_episodes=3, seed=5)
    assert content(tmp_path / "again") == content(demos)


def test_other_seeds_give_other_demonstrations(demos, pool, tmp_path):
    other = collect(ENV, tmp_path / "other", pool, num_episodes=3, seed=50)
    assert other.fingerprint() != lerobot.open_dataset(demos).fingerprint()
    starts = [
        {states[0].tobytes() for states, _, _ in episodes_of(dataset)}
        for dataset in (other, lerobot.open_dataset(demos))
    ]
    assert not starts[0] & starts[1]


def test_seeds_that_the_expert_fails_are_replaced_by_later_ones(pool, tmp_path):
    episodes = [experts.demonstrate(REACH, seed, 150) for seed in range(12)]
    lengths = [len(episode["action"]) for episode in episodes]
    limit = sorted(lengths)[6]  # half of the starts are too far for that
    in_time = [seed for seed, length in enumerate(lengths) if length <= limit]
    assert in_time[:3] != [0, 1, 2]
    dataset = collect("metaworld/reach-v3", tmp_path / "d", pool, num_episodes=3, max_steps=limit)
    for (states, actions, _), seed in zip(episodes_of(dataset), in_time, strict=False):
        np.testing.assert_array_equal(states, episodes[seed]["observation.state"])
        np.testing.assert_array_equal(actions, episodes[seed]["action"])


def test_noise_leads_elsewhere(pool, tmp_path):
    quiet, noisy = (
        collect("metaworld/reach-v3", tmp_path / str(noise), pool, noise=noise)
        for noise in (0.0, 0.3)
    )
    first, second = (next(episodes_of(dataset))[0] for dataset in (quiet, noisy))
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1] != second[1]).any()


@pytest.fixture(scope="module")
def attempts(pool, tmp_path_factory):
    path = tmp_path_factory.mktemp("attempts") / "mixed"
    options = {"num_episodes": 6, "seed": 7, "max_steps": 60}
    collect_demos.collect(ENV, path, pool=pool, skills=("expert", "slow", "wandering"), **options)
    return path


def test_attempts_of_every_skill_are_kept_with_what_came_of_them(attempts):
    dataset, told = (
        lerobot.open_dataset(attempts),
        json.loads((attempts / "collected.json").read_text()),
    )
    assert dataset.num_episodes == 12
    assert told["skills"] == ["expert", "slow", "wandering"]
    success, done, info = (
        dataset.column(key) for key in ("next.success", "next.done", "info.obj_to_target")
    )
    assert (success.dtype, done.dtype, info.dtype) == (bool, bool, np.float32)
    counts = {
        str(task): {skill: [0, 0] for skill in told["skills"]} for task in envs.parse_all(ENV)
    }
    for number, (states, actions, _) in enumerate(episodes_of(dataset)):
        task, seed = envs.parse_all(ENV)[number // 6], 7 + number % 6
        skill = told["skills"][seed % 3]
        want = experts.attempt(task, seed, 60, skill)
        np.testing.assert_array_equal(states, want["observation.state"])
        np.testing.assert_array_equal(actions, want["action"])
        part = slice(dataset.episode_from[number], dataset.episode_to[number])
        for key in ("next.reward", "next.success", "next.done", "info.near_object"):
            np.testing.assert_array_equal(np.ravel(dataset.column(key)[part]), want[key])
        counts[str(task)][skill][0] += int(want["next.success"][-1])
        counts[str(task)][skill][1] += 1
    assert told["successes"] == counts
    assert 0 < sum(n for task in counts.values() for n, _ in task.values()) < 12


def test_one_process_writes_the_same_attempts(attempts, tmp_path):
    skills = ("expert", "slow", "wandering")
    with workers.Pool(1) as single:
        collect(ENV, tmp_path / "one", single, num_episodes=6, seed=7, max_steps=60, skills=skills)
    assert content(tmp_path / "one") == content(attempts)


def test_starts_lie_in_the_part_asked_for(pool, tmp_path):
    dataset = collect("metaworld/push-v3@0.8:1", tmp_path / "part", pool)
    starts = dataset.column("observation.state")[dataset.episode_from]
    low, high = 0.06 - 1e-3, 0.1 + 1e-3  # of -0.1 to 0.1; the puck may slide a little
    for x in (4, 36):  # of the puck and of the goal
        assert ((starts[:, x] > low) & (starts[:, x] < high)).all()
    whole = envs.make(PUSH).reset(0)["observation.state"]
    assert (starts[0] != whole).any()


def test_an_expert_that_never_succeeds_is_given_up_on_by_name(pool, tmp_path):
    message = "expert of reach-v3 succeeded in 0 of 20 episodes of at most 3 steps: allow more"
    with pytest.raises(ValueError, match=message):
        collect("metaworld/reach-v3", tmp_path / "never", pool, max_steps=3)
    assert not list(tmp_path.iterdir())
    collect("metaworld/reach-v3", tmp_path / "then", pool)  # the pool goes on


def test_only_a_dataset_of_this_command_is_replaced(demos, pool, tmp_path):
    vector = {"dtype": "float32", "shape": [2], "names": None}
    with writer.Writer(tmp_path / "mine", fps=10, features={"action": vector}) as opened:
        opened.add_episode({"action": np.zeros((3, 2))}, "push")
    before = content(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="not written by this command"):
        collect(ENV, tmp_path / "mine", pool, overwrite=True)
    assert content(tmp_path / "mine") == before
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        collect(ENV, demos, pool)
    collect("metaworld/reach-v3", tmp_path / "own", pool)
    replaced = collect("metaworld/reach-v3", tmp_path / "own", pool, seed=9, overwrite=True)
    assert seed_of(REACH, next(episodes_of(replaced))[0][0]) >= 9


def test_dry_run_starts_no_process_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "Pool", None)
    collect_demos.collect(ENV, tmp_path / "d", num_episodes=3, dry_run=True)
    assert "3 demonstrations of each of reach-v3, button-press-v3" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("metaworld/reach-v3", {"num_episodes": 0}, "num_episodes of at least 1"),
        ("metaworld/reach-v3", {"noise": float("nan")}, "no negative seed, max_steps or noise"),
        ("metaworld/reach-v3", {"seed": -1}, "no negative seed"),
        ("metaworld/reach-v3", {"skills": ["exprt"]}, "skills=exprt: expected some of expert,slow"),
        ("metaworld/reach-v3", {"skills": ["slow", "slow"]}, "skills=slow,slow: .* each once"),
        (
            "aloha_fast/AlohaInsertion-v0",
            {"skills": ["expert", "noisy"]},
            "skills=expert,noisy: expected some of expert, each once, which .* aloha_fast has",
        ),
        (
            "metaworld/reach-v3",
            {"skills": ["slow"], "noise": 0.1},
            "noise=0.1 is of demonstrations",
        ),
        ("metaworld/reech-v3", {}, "no task 'reech-v3'.*did you mean reach-v3"),
        ("", {}, "expected SIMULATOR/TASK"),
        ("metaworld/reach-v3", {"max_steps": 501}, "max_steps is 501; metaworld ends .* after 500"),
    ],
)
def test_bad_requests_leave_nothing(pool, env, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        collect(env, tmp_path / "d", pool, **options)
    assert not list(tmp_path.iterdir())
