"""PushT starts where gym-pusht starts, and renders what gym-pusht renders."""

import numpy as np
import pytest

from policymix.sim import envs

pusht = pytest.importorskip("policymix.sim.pusht", exc_type=ImportError)

TASK = envs.parse("pusht", "PushT-v0")


def _official():
    from gym_pusht.envs import pusht as original

    return original.PushTEnv(obs_type="pixels_agent_pos")


@pytest.mark.parametrize("seed", [0, 7])
def test_an_episode_is_that_of_gym_pusht_with_the_same_seed(seed):
    theirs, ours = _official(), envs.make(TASK)
    want, _ = theirs.reset(seed=seed)
    found = ours.reset(seed)
    actions = np.random.default_rng(seed).uniform(0, 512, (6, 2)).astype(np.float32)
    for action in [None, *actions]:
        if action is not None:
            want, reward, done, _, _ = theirs.step(action)
            found, score, success = ours.step(action)
            assert score == pytest.approx(reward, abs=1e-8)
            assert success == done
        np.testing.assert_array_equal(found["observation.image"], want["pixels"])
        np.testing.assert_array_equal(
            found["observation.state"], want["agent_pos"].astype(np.float32)
        )


def test_steps_without_an_observation_do_not_change_the_episode():
    runs = []
    for observe in (True, False):
        env = envs.make(TASK)
        env.reset(3)
        for _ in range(5):
            env.step(np.array([300, 200]), observe)
        runs.append(env.step(np.array([300, 200]))[0])
    for key in runs[0]:
        np.testing.assert_array_equal(runs[0][key], runs[1][key])


def test_scores_repeat_to_the_last_digit():
    scores = []
    for _ in range(8):
        env = envs.make(TASK)
        env.reset(0)
        actions = np.random.default_rng([3, 0]).uniform(0, 512, (4, 2))
        scores.append([env.step(action, observe=False)[1] for action in actions])
    assert all(score == scores[0] for score in scores)


def test_only_asked_for_pictures_are_drawn(monkeypatch):
    drawn = []
    real = pusht.World._draw
    monkeypatch.setattr(pusht.World, "_draw", lambda self: drawn.append(1) or real(self))
    env = envs.make(TASK)
    env.reset(0)
    for observe in (False, False, True):
        env.step(np.array([256, 256]), observe)
    assert len(drawn) == 2


def test_the_block_starts_in_the_chosen_part():
    xs = {}
    for part in ((0.0, 1.0), (0.9, 1.0)):
        env = envs.make(envs.Task("pusht", "PushT-v0", *part))
        xs[part] = []
        for seed in range(40):
            env.reset(seed)
            block = env.world.block
            touched = np.linalg.norm(np.array(env.world.agent.position) - block.position) < 160
            if not touched:  # a disc that starts inside the block pushes it out
                xs[part].append(block.local_to_world(block.center_of_gravity).x)
    assert len(xs[0.9, 1.0]) > 10
    assert all(370 - 1 < x < 400 + 1 for x in xs[0.9, 1.0])
    assert min(xs[0.0, 1.0]) < 250
