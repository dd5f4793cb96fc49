"""Roll-outs: whatever plays them, and whatever dies meanwhile, the results are the same."""

import contextlib
import os
import signal
import types

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from configs import common
from policymix import intervals
from policymix.runs import encoding, policies, rollouts
from policymix.sim import envs, workers
from tests.runs.sim_support import HANDLE, REACH, debug_config, write_policy

pytest.importorskip("metaworld")

EPISODES = [*((HANDLE, 1000 + k) for k in range(6)), (REACH, 3), (REACH, 4)]
PROMPTS = {HANDLE: "handle press", REACH: "reach"}


@pytest.fixture(scope="module")
def pool():
    with workers.Pool(2) as shared:
        yield shared


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policies") / "plain")


def open_policy(path):
    config = debug_config()
    return policies.Policy(config, policies.model_config(config, why="the test"), path)


@pytest.fixture(scope="module")
def policy(checkpoint):
    return open_policy(checkpoint)


def play(policy, pool, episodes=EPISODES, **settings):
    return rollouts.roll_out(policy, pool, episodes, debug_config(**settings), PROMPTS)


@pytest.fixture(scope="module")
def undisturbed(policy):
    with workers.Pool(1) as single:
        return play(policy, single)


class Watched:
    """A policy that tells what it is asked, or does something before it answers."""

    def __init__(self, policy, before=lambda call: None):
        self.policy, self.encoder, self.before = policy, policy.encoder, before
        self.asked = []

    def act(self, raw, *, seeds, call, num_flow_steps):
        self.before(call)
        self.asked.append({"raw": raw, "seeds": list(seeds), "call": call})
        return self.policy.act(raw, seeds=seeds, call=call, num_flow_steps=num_flow_steps)


class Spied:
    """A pool that tells which episodes are stepped, and by how much."""

    def __init__(self, pool):
        self.pool, self.steps = pool, []

    def reset(self, episodes):
        return self.pool.reset(episodes)

    def step(self, chunks):
        outcomes = self.pool.step(chunks)
        self.steps.append({k: (len(chunk), outcomes[k]) for k, chunk in chunks.items()})
        return outcomes


def test_results_are_those_of_a_plain_loop_over_environments(policy, undisturbed):
    """Eight environments in this process, asked and stepped by hand."""
    players = [envs.make(task) for task, _ in EPISODES]
    states = [env.reset(seed) for env, (_, seed) in zip(players, EPISODES, strict=True)]
    steps, best, success = [0] * 8, [0.0] * 8, [False] * 8
    for call in range(5):
        live = [k for k in range(8) if not success[k]]
        rows = (live + [live[-1]] * 8)[:8]
        raw = {
            "state": np.stack([states[k]["observation.state"] for k in rows]),
            "prompt": [PROMPTS[EPISODES[k][0]] for k in rows],
            "images": {},
        }
        seeds = [EPISODES[k][1] for k in rows]
        chunks = policy.act(raw, seeds=seeds, call=call, num_flow_steps=2)
        for row, k in enumerate(live):
            for action in chunks[row][: 36 - 8 * call]:
                states[k], score, success[k] = players[k].step(action)
                steps[k], best[k] = steps[k] + 1, max(best[k], score)
                if success[k]:
                    break
    assert [(r.success, r.steps, r.score) for r in undisturbed] == list(
        zip(success, steps, best, strict=True)
    )
    assert [(r.task, r.seed) for r in undisturbed] == EPISODES
    assert {r.success for r in undisturbed} == {False, True}  # else much of this says nothing
    assert len({r.steps for r in undisturbed}) > 2


def test_the_number_of_processes_does_not_matter(policy, pool, undisturbed):
    assert play(policy, pool) == undisturbed


def test_a_process_killed_in_the_middle_changes_nothing(policy, pool, undisturbed, capfd):
    def before(call):
        if call == 2:
            os.kill(pool.pids[0], signal.SIGKILL)

    assert play(Watched(policy, before), pool) == undisturbed
    told = capfd.readouterr().err
    assert "a simulator process was killed by SIGKILL" in told
    assert "a new one runs episodes 0, " in told


def test_every_episode_ends_at_its_success_or_at_the_limit(policy, pool):
    spied = Spied(pool)
    results = play(policy, spied)
    ended = set()
    for stepped in spied.steps:
        assert not ended & stepped.keys()
        ended |= {k for k, (_, outcome) in stepped.items() if outcome.success}
    assert ended == {k for k, result in enumerate(results) if result.success}
    assert [set(lengths) for lengths in _lengths(spied)] == [{8}, {8}, {8}, {8}, {4}]
    for k, result in enumerate(results):
        mine = [stepped[k][1] for stepped in spied.steps if k in stepped]
        assert result.steps == sum(outcome.steps for outcome in mine) <= 36
        assert result.steps == 36 or result.success
        assert result.score == max(outcome.score for outcome in mine)
        assert 0 <= result.score <= 1


def _lengths(spied):
    return [[length for length, _ in stepped.values()] for stepped in spied.steps]


@pytest.mark.parametrize(("limit", "replan"), [(36, 8), (36, 5), (7, 8), (8, 8), (9, 3)])
def test_a_policy_is_asked_no_more_often_than_its_chunks_last(policy, pool, limit, replan):
    watched, spied = Watched(policy), Spied(pool)
    results = play(watched, spied, [(REACH, 3), (REACH, 4)], max_steps=limit, replan_steps=replan)
    assert [asked["call"] for asked in watched.asked] == list(range(-(-limit // replan)))
    assert not any(result.success for result in results)  # else it may be asked less often
    assert [result.steps for result in results] == [limit, limit]
    assert sum(lengths[0] for lengths in _lengths(spied)) == limit


def test_nothing_is_asked_once_all_episodes_are_over(policy, pool, undisturbed):
    solved = [
        episode for episode, result in zip(EPISODES, undisturbed, strict=True) if result.success
    ]
    watched = Watched(policy)
    results = play(watched, pool, solved[:2], max_steps=150)
    assert all(result.success for result in results)
    last = max(result.steps for result in results)
    assert len(watched.asked) == -(-last // 8) < -(-150 // 8)


def test_fewer_rows_are_asked_as_episodes_end(policy, pool, undisturbed, monkeypatch):
    monkeypatch.setattr(rollouts, "_LEAST_ROWS", 2)
    watched, spied = Watched(policy), Spied(pool)
    results = play(watched, spied)
    sizes = [len(asked["seeds"]) for asked in watched.asked]
    live = [len(stepped) for stepped in spied.steps]
    assert sizes == [rollouts._rows(8, n) for n in live]
    assert sizes[0] == 8
    assert sizes[-1] < 8
    for result, expected in zip(results, undisturbed, strict=True):
        assert (result.success, result.steps) == (expected.success, expected.steps)
        assert result.score == pytest.approx(expected.score, abs=1e-3)


@hypothesis.given(st.integers(1, 500), st.data())
def test_rows_suffice_and_shrink_with_the_episodes_alive(num_episodes, data):
    live = data.draw(st.integers(1, num_episodes))
    fewer = data.draw(st.integers(1, live))
    rows = rollouts._rows(num_episodes, live)
    assert live <= rows <= num_episodes
    assert rollouts._rows(num_episodes, fewer) <= rows
    assert rows <= max(2 * live + 2, 64)
    assert rollouts._rows(num_episodes, num_episodes) == num_episodes


def test_few_numbers_of_rows_are_compiled():
    for num_episodes in (1, 33, 64, 100, 999):
        found = {rollouts._rows(num_episodes, live) for live in range(1, num_episodes + 1)}
        assert len(found) <= 1 + np.log2(max(num_episodes / 32, 1))


def test_every_task_is_checked_and_its_environment_made_once(policy, monkeypatch):
    made, real = [], envs.make
    odd = types.SimpleNamespace(prompt="odd", features={"action": {"shape": (4,)}})

    def make(task):
        made.append(task)
        return odd if task == HANDLE else real(task)

    monkeypatch.setattr(envs, "make", make)
    config = debug_config(env=f"metaworld/{REACH},{HANDLE}")
    with pytest.raises(ValueError, match="config.data.state_key is 'observation.state'; the env"):
        rollouts.check_playable(config, policy)
    with pytest.raises(ValueError, match="config.data.state_key"):
        rollouts.play(policy, config)
    made.clear()
    monkeypatch.setattr(envs, "make", lambda task: made.append(task) or real(task))
    found = rollouts.environments(config, [REACH, HANDLE], [policy, policy])
    assert made == [REACH, HANDLE]
    assert rollouts.prompts_of(config, found) == PROMPTS
    config.data.default_prompt = "tidy up"
    assert set(rollouts.prompts_of(config, found).values()) == {"tidy up"}


def test_playing_tells_success_and_scores_with_their_intervals(policy, monkeypatch):
    results = [rollouts.Result(REACH, k, k < 3, 9, 0.5 + 0.1 * k) for k in range(5)]
    monkeypatch.setattr(workers, "Pool", lambda n: contextlib.nullcontext())
    monkeypatch.setattr(rollouts, "roll_out", lambda *_: results)
    told = rollouts.play(policy, debug_config(env="metaworld/reach-v3", num_episodes=5))
    assert (told["rollout/success"], told["rollout/score"]) == pytest.approx((0.6, 0.7))
    assert (told["rollout/low"], told["rollout/high"]) == intervals.wilson(3, 5)
    scores = [0.5, 0.6, 0.7, 0.8, 0.9]
    found = told["rollout/score_low"], told["rollout/score_high"]
    assert found == pytest.approx(intervals.mean(scores))
    assert len(told) == 6


# The noise in the actions


def raw(size, seed=0):
    state = np.random.default_rng(seed).normal(size=(size, 39)).astype(np.float32)
    return {"state": state, "prompt": ["reach"] * size, "images": {}}


def test_every_policy_meets_the_same_noise(tmp_path):
    """Policies without a velocity act as their noise says, whatever they see."""
    one, two = (
        open_policy(write_policy(tmp_path / str(seed), seed, mean=(0,) * 4, std=1, silent=True))
        for seed in (0, 1)
    )

    def noise(policy, seeds, call, state=0):
        return policy.act(raw(len(seeds), state), seeds=seeds, call=call, num_flow_steps=2)

    first = noise(one, [5, 6, 7], 3)
    np.testing.assert_array_equal(first, noise(two, [5, 6, 7], 3, state=1))
    assert (first[0] != first[1]).any()
    assert (first != noise(one, [5, 6, 7], 4)).any(axis=(1, 2)).all()
    np.testing.assert_array_equal(first[[2, 0]], noise(one, [7, 5], 3))  # its row says nothing
    assert 0.7 < first.std() < 1.3


def test_policies_and_what_they_see_decide_their_actions(policy, tmp_path):
    arguments = {"seeds": [1, 2], "call": 0, "num_flow_steps": 2}
    first = policy.act(raw(2), **arguments)
    assert first.shape == (2, 8, 4)
    np.testing.assert_array_equal(first, policy.act(raw(2), **arguments))
    assert (first != policy.act(raw(2, seed=1), **arguments)).any()
    other = open_policy(write_policy(tmp_path / "other", 1))
    assert (first != other.act(raw(2), **arguments)).any()
    assert (first != policy.act(raw(2), **arguments | {"num_flow_steps": 3})).any()


def test_a_policy_forgets_its_parameters_and_reads_them_again(policy):
    arguments = {"seeds": [1], "call": 0, "num_flow_steps": 2}
    first = policy.act(raw(1), **arguments)
    policy.unload()
    assert policy._params is None
    np.testing.assert_array_equal(first, policy.act(raw(1), **arguments))


def test_an_instruction_of_the_config_replaces_those_of_the_tasks(policy, pool):
    watched, config = Watched(policy), debug_config(max_steps=8)
    rollouts.roll_out(watched, pool, EPISODES, config, PROMPTS)
    config.data.default_prompt = "tidy up"
    rollouts.roll_out(watched, pool, EPISODES, config, PROMPTS)
    first, second = (asked["raw"]["prompt"] for asked in watched.asked)
    assert first == [PROMPTS[task] for task, _ in EPISODES]
    assert set(second) == {"tidy up"}


class Still:
    """Does not move, and keeps what it saw."""

    encoder = types.SimpleNamespace(
        cameras={"base": "observation.image"}, wiring=encoding.wiring(common.get_config().data)
    )

    def __init__(self):
        self.seen = []

    def act(self, raw, *, seeds, call, num_flow_steps):
        self.seen.append(raw)
        return np.repeat(raw["state"][:, None], 8, axis=1)


def test_pictures_are_those_that_the_environments_show(pool):
    pytest.importorskip("gym_pusht")
    task, still = envs.parse("pusht", "PushT-v0"), Still()
    config = debug_config(max_steps=16)
    results = rollouts.roll_out(still, pool, [(task, 0), (task, 1)], config, {task: "push"})
    assert [result.steps for result in results] == [16, 16]
    for k in range(2):
        env = envs.make(task)
        observation = env.reset(k)
        for raw in still.seen:
            np.testing.assert_array_equal(
                raw["images"]["base"][k], observation["observation.image"]
            )
            np.testing.assert_array_equal(raw["state"][k], observation["observation.state"])
            target = observation["observation.state"]
            for _ in range(8):
                observation = env.step(target)[0]
    assert len(still.seen) == 2
