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


@pytest.mark.parametrize("skill", experts.SKILLS)
def test_an_attempt_played_again_has_the_outcomes_that_it_tells(skill):
    task, seed = _task("pick-place-v3"), 3
    episode = experts.attempt(task, seed, 60, skill)
    env = envs.make(task)
    assert episode.keys() == env.features.keys() | experts.outcomes(env).keys()
    observation = env.reset(seed)
    for k, action in enumerate(episode["action"]):
        np.testing.assert_array_equal(
            episode["observation.state"][k], observation["observation.state"]
        )
        assert np.abs(action).max() <= 1
        observation, score, success = env.step(action)
        assert episode["next.reward"][k] == np.float32(score)
        assert episode["next.success"][k] == success
        for key in env.info_keys:
            assert episode[f"info.{key}"][k] == np.float32(env.info[key])
    assert success or len(episode["action"]) == 60
    assert episode["next.done"].tolist() == [False] * k + [True]


def test_the_skill_decides_what_is_done_of_what_the_expert_says():
    task = _task("reach-v3")
    played = {skill: experts.attempt(task, 1, 150, skill) for skill in experts.SKILLS}
    alone = experts.demonstrate(task, 1, 150)
    for key, values in alone.items():
        np.testing.assert_array_equal(played["expert"][key], values)
    say = experts.expert(task, envs.make(task), 1)
    done = {skill: episode["action"] for skill, episode in played.items()}
    said = {
        skill: np.stack([say({"observation.state": s}) for s in episode["observation.state"]])
        for skill, episode in played.items()
    }
    moving = np.abs(said["slow"][:, :3]) > 1e-3
    speeds = (done["slow"][:, :3] / np.where(moving, said["slow"][:, :3], 1))[moving]
    np.testing.assert_allclose(speeds, speeds[0], rtol=1e-3)
    assert 0.2 <= speeds[0] <= 0.6
    np.testing.assert_array_equal(done["slow"][:, 3], said["slow"][:, 3])  # the gripper
    free = np.abs(done["biased"]) < 1
    bias = (done["biased"] - said["biased"])[free[:, 0], 0]
    np.testing.assert_allclose(bias, bias[0], atol=1e-6)
    assert bias[0] != 0
    np.testing.assert_array_equal(done["biased"][:, 3], said["biased"][:, 3])
    assert len(np.unique(done["noisy"] - said["noisy"], axis=0)) > len(done["noisy"]) / 2
    apart = (done["wandering"] != said["wandering"]).any(axis=1)
    first = int(apart.argmax())
    assert apart.any()
    assert first < 60
    held = done["wandering"][first:]
    for start in range(0, len(held), 10):
        assert (held[start : start + 10] == held[start]).all()


def test_an_attempt_depends_on_the_seed_alone():
    first, again, other = (experts.attempt(_task("reach-v3"), s, 40, "noisy") for s in (2, 2, 3))
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
    assert not np.array_equal(first["action"][:9], other["action"][:9])


def test_a_slow_disc_goes_part_of_the_way_from_where_it_is():
    slow, whole = (experts.attempt(PUSHT, 5, 3, skill) for skill in ("slow", "expert"))
    start = slow["observation.state"][0]
    fractions = (slow["action"][0] - start) / (whole["action"][0] - start)
    np.testing.assert_allclose(fractions, fractions[0], rtol=1e-4)
    assert 0.2 <= fractions[0] <= 0.6
    assert 0 <= slow["info.coverage"][-1] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", envs.TASKS["metaworld"])
def test_every_task_tells_of_its_sub_goals(name):
    episode = experts.attempt(_task(name), 0, 150, "expert")
    for key in ("near_object", "grasp_success", "in_place_reward"):
        assert np.isfinite(episode[f"info.{key}"]).all()
    assert (episode["info.obj_to_target"] >= 0).all()


@pytest.mark.slow
def test_the_planner_solves_pusht():
    lengths = []
    for seed in range(12):
        episode = experts.demonstrate(PUSHT, seed, 300)
        lengths.append(0 if episode is None else len(episode["action"]))
    assert sum(length > 0 for length in lengths) >= 11, lengths
