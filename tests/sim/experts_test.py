"""Experts solve their tasks, and what they demonstrate leads to the same end when played again."""

import numpy as np
import pytest

from policymix.sim import envs, experts

pytest.importorskip("metaworld")
pytest.importorskip("gym_pusht")

TAUGHT = (
    "reach",
    "button-press",
    "button-press-topdown",
    "window-open",
    "window-close",
    "drawer-close",
    "door-open",
    "faucet-open",
    "handle-press",
    "coffee-button",
    "push",
    "plate-slide",
    "faucet-close",
)
PUSHT = envs.parse("pusht", "PushT-v0")


def _task(text):
    return envs.parse("metaworld", text)


@pytest.mark.parametrize("name", TAUGHT)
def test_the_expert_solves_its_task(name):
    task = _task(f"{name}-v3")
    solved = [experts.demonstrate(task, seed, 150) for seed in range(3)]
    assert sum(episode is not None for episode in solved) >= 2


def test_every_task_has_an_expert():
    env = envs.make(_task("reach-v3"))
    for name in envs.TASKS["metaworld"]:
        assert callable(experts.expert(_task(name), env, 0))


@pytest.mark.parametrize(("task", "seed"), [(_task("push-v3"), 1), (PUSHT, 5)], ids=str)
def test_a_demonstration_played_again_succeeds_at_its_last_frame(task, seed):
    episode = experts.demonstrate(task, seed, 150)
    env = envs.make(task)
    observation = env.reset(seed)
    frames = len(episode["action"])
    for k, action in enumerate(episode["action"]):
        for key, value in observation.items():
            np.testing.assert_array_equal(episode[key][k], value)
        observation, _, success = env.step(action)
        assert success == (k == frames - 1)
    for key, declared in env.features.items():
        assert episode[key].shape == (frames, *declared["shape"])
        assert episode[key].dtype == (
            np.uint8 if declared["dtype"] == "image" else declared["dtype"]
        )


def test_a_demonstration_depends_on_the_seed_alone():
    first, again, other = (experts.demonstrate(_task("reach-v3"), s, 150, 0.1) for s in (2, 2, 3))
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
    assert not np.array_equal(first["observation.state"][0], other["observation.state"][0])


def test_an_expert_that_does_not_arrive_demonstrates_nothing():
    assert experts.demonstrate(_task("push-v3"), 0, 5) is None


def test_noise_moves_the_arm_and_is_not_recorded():
    task = _task("reach-v3")
    noisy = experts.demonstrate(task, 0, 150, noise=0.3)
    env = envs.make(task)
    env.reset(0)
    policy = experts.expert(task, env, 0)
    replayed = []
    for k, action in enumerate(noisy["action"]):
        state = {"observation.state": noisy["observation.state"][k]}
        np.testing.assert_array_equal(policy(state), action)  # the expert's word on what it saw
        replayed.append(env.step(action)[0]["observation.state"])
    assert not np.allclose(replayed[:-1], noisy["observation.state"][1:], atol=1e-3)


@pytest.mark.slow
def test_the_planner_solves_pusht():
    lengths = []
    for seed in range(12):
        episode = experts.demonstrate(PUSHT, seed, 300)
        lengths.append(0 if episode is None else len(episode["action"]))
    assert sum(length > 0 for length in lengths) >= 11, lengths
