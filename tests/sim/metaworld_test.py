"""Episodes that share a simulation are those of environments of their own."""

import time

import numpy as np
import pytest

from policymix.sim import envs, experts

env_dict = pytest.importorskip("metaworld.env_dict")

SOME = ("push-v3", "disassemble-v3", "hammer-v3", "shelf-place-v3", "drawer-close-v3")


def _official(name, seed, actions):
    """States [t + 1, 39] and success flags [t] of Meta-World's own environment, newly built."""
    env = env_dict.ALL_V3_ENVIRONMENTS[name]()
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)
    env._set_task_called = True
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env.seed(seed)
    states, scores, flags = [env.reset()[0]], [], []
    for action in actions:
        state, reward, _, _, info = env.step(action)
        states.append(state)
        scores.append(min(max(reward / 10, 0), 1))
        flags.append(bool(info["success"]))
    return np.float32(states), np.array(scores), flags


def _interleaved(name, seeds, actions, piece=8):
    """The same of our episodes, all started first and then stepped piece by piece in turn."""
    players = [envs.make(envs.parse("metaworld", name)) for _ in seeds]
    states = [[env.reset(s)["observation.state"]] for env, s in zip(players, seeds, strict=True)]
    scores, flags = [[] for _ in seeds], [[] for _ in seeds]
    for start in range(0, len(actions[0]), piece):
        for k, env in enumerate(players):
            for action in actions[k][start : start + piece]:
                observation, score, success = env.step(action)
                states[k].append(observation["observation.state"])
                scores[k].append(score)
                flags[k].append(success)
    return [(np.stack(s), np.array(r), f) for s, r, f in zip(states, scores, flags, strict=True)]


def _check(name, steps):
    rng = np.random.default_rng(0)
    seeds = (3, 4)
    actions = [rng.uniform(-1, 1, (steps, 4)).astype(np.float32) for _ in seeds]
    found = _interleaved(name, seeds, actions)
    for k, seed in enumerate(seeds):
        states, scores, flags = _official(name, seed, actions[k])
        np.testing.assert_array_equal(found[k][0], states)
        np.testing.assert_array_equal(found[k][1], scores)
        assert found[k][2] == flags


@pytest.mark.parametrize("name", SOME)
def test_episodes_in_turn_are_those_of_environments_of_their_own(name):
    _check(name, 24)


@pytest.mark.slow
@pytest.mark.parametrize("name", envs.TASKS["metaworld"])
def test_episodes_of_every_task_in_turn_are_those_of_environments_of_their_own(name):
    _check(name, 40)


def test_an_episode_without_its_own_physics_would_not_be_the_same(monkeypatch):
    """That the tests above can fail: the swap is what makes them pass."""
    from policymix.sim import metaworld

    monkeypatch.setattr(metaworld._Simulation, "give_to", lambda *_: None)
    with pytest.raises(AssertionError):
        _check("push-v3", 16)


def _starts(text, seeds):
    env = envs.make(envs.parse("metaworld", text))
    return np.stack([env.reset(seed)["observation.state"] for seed in seeds])


def _episode(env, first, actions):
    """States of an episode that was just reset, its scores and successes."""
    states, rest = [first["observation.state"]], []
    for action in actions:
        observation, *told = env.step(action)
        states.append(observation["observation.state"])
        rest.append(told)
    return np.stack(states), rest


def _check_remembered(name, steps):
    """A start is computed once, and restored from memory from then on."""
    task, rng = envs.parse("metaworld", name), np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (steps, 4)).astype(np.float32)
    first, alive, later, other = (envs.make(task) for _ in range(4))
    simulation = first._simulation
    simulation.starts.clear()
    expected = _episode(first, first.reset(7), actions)
    assert len(simulation.starts) == 1
    first.reset(8)
    begun = alive.reset(7)  # stays alive while the others play
    half = _episode(alive, begun, actions[: steps // 2])
    _episode(other, other.reset(9), actions)
    restored = _episode(later, later.reset(7), actions)
    rest = _episode(alive, {"observation.state": half[0][-1]}, actions[steps // 2 :])
    assert len(simulation.starts) == 3
    _same_episode(restored, expected)
    _same_episode((np.vstack([half[0], rest[0][1:]]), half[1] + rest[1]), expected)
    _same_episode(_episode(first, first.reset(7), actions), expected)
    assert np.abs(expected[0][-1] - expected[0][0]).max() > 1e-3


def _same_episode(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize("name", SOME)
def test_a_start_from_memory_gives_the_same_episode(name):
    _check_remembered(name, 24)


@pytest.mark.slow
@pytest.mark.parametrize("name", envs.TASKS["metaworld"])
def test_a_start_of_every_task_from_memory_gives_the_same_episode(name):
    _check_remembered(name, 40)


def test_an_observation_from_memory_is_the_callers_own():
    env = envs.make(envs.parse("metaworld", "push-v3"))
    first = env.reset(11)["observation.state"]
    expected = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(env.reset(11)["observation.state"], expected)


def test_parts_of_the_range_have_starts_of_their_own():
    everywhere, part = (_starts(text, [5, 5]) for text in ("push-v3", "push-v3@0.8:1"))
    assert (everywhere[0] != part[0]).any()
    assert (everywhere[0] == everywhere[1]).all()
    assert (part[0] == part[1]).all()


def test_the_oldest_start_is_forgotten_for_a_new_one(monkeypatch):
    from policymix.sim import metaworld

    env = envs.make(envs.parse("metaworld", "reach-v3"))
    env._simulation.starts.clear()
    monkeypatch.setattr(metaworld, "_MOST_STARTS", 2)
    first = env.reset(0)["observation.state"]
    for seed in (1, 2):
        env.reset(seed)
    assert [seed for _, _, seed in env._simulation.starts] == [1, 2]
    np.testing.assert_array_equal(env.reset(0)["observation.state"], first)


def test_starts_lie_in_the_chosen_part():
    everywhere, part = _starts("push-v3", range(12)), _starts("push-v3@0.8:1", range(12))
    for x in (4, 36):  # of the puck and of the goal, both from -0.1 to 0.1
        assert (everywhere[:, x] < 0.05).any()
        # The puck sinks in, and may slide a little, before the first observation.
        assert (part[:, x] > 0.06 - 1e-3).all()
        assert (part[:, x] < 0.1 + 1e-3).all()


def test_a_goal_is_told_also_after_a_step():
    env = envs.make(envs.parse("metaworld", "plate-slide-v3@0:0.2"))
    first = env.reset(0)["observation.state"]
    later = env.step(np.zeros(4))[0]["observation.state"]
    assert -0.1 <= first[36] <= -0.06
    np.testing.assert_array_equal(first[36:], later[36:])


def test_a_task_that_always_starts_at_one_x_has_no_part_of_it():
    with pytest.raises(ValueError, match="window-close-v3@0:0.2: every start .* the same x"):
        envs.make(envs.parse("metaworld", "window-close-v3@0:0.2"))
    envs.make(envs.parse("metaworld", "plate-slide-v3@0:0.2"))  # its goal moves, its plate not


def test_meta_worlds_own_limit_of_steps_is_told():
    env = envs.make(envs.parse("metaworld", "reach-v3"))
    env.reset(0)
    env._env.curr_path_length = 500
    with pytest.raises(ValueError, match="reach-v3: Meta-World ends an episode after 500 steps"):
        env.step(np.zeros(4))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in envs.TASKS["metaworld"] if n != "window-close-v3"])
def test_every_task_starts_in_a_narrow_part(name):
    """Tasks draw again while object and goal are too close; that must come to an end."""
    begin = time.monotonic()
    for low in (0.0, 0.49, 0.98):
        env = envs.make(envs.Task("metaworld", name, low, low + 0.02))
        for seed in range(3):
            env.reset(seed)
    assert time.monotonic() - begin < 60


def test_a_grasp_is_what_meta_world_calls_one():
    """The touch of both pads, along an expert's episode in which the object is lifted."""
    task = envs.parse("metaworld", "pick-place-v3")
    env, found = envs.make(task), []
    observation = env.reset(0)
    act = experts.expert(task, env, 0)
    for _ in range(120):
        observation, _, _ = env.step(act(observation))
        official = env_dict.ALL_V3_ENVIRONMENTS[task.name].touching_object
        ours = env._env
        found.append(ours.touching_main_object)
        assert found[-1] == official(ours, ours._get_id_main_object())
    assert 10 < sum(found) < 110
