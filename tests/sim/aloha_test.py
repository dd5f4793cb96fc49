"""ALOHA moves, scores and looks as gym-aloha does; experts solve its tasks."""

import subprocess
import sys

import numpy as np
import pytest

from policymix.sim import envs, experts

aloha = pytest.importorskip("policymix.sim.aloha", exc_type=ImportError)
bimanual = pytest.importorskip("policymix.sim.bimanual", exc_type=ImportError)

TASKS = tuple(envs.parse("aloha_fast", name) for name in envs.TASKS["aloha_fast"])
TRANSFER, INSERTION = TASKS
THEIRS = {TRANSFER: "transfer_cube", INSERTION: "insertion"}
both = pytest.mark.parametrize("task", TASKS, ids=["transfer", "insertion"])


@pytest.fixture(scope="module", autouse=True)
def original():
    """gym-aloha's own environments. They come first: whose OpenGL is loaded first ends it last."""
    try:
        library = aloha._gl().__name__.rpartition(".")[2]
    except OSError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUJOCO_GL", library)
        from gym_aloha import env

    try:
        envs.make(TRANSFER).reset(0)
    except OSError as error:
        pytest.skip(str(error))
    return env


def _official(original, task):
    """gym-aloha's environment; it renders the one camera that it observes, in place of three."""
    env = original.AlohaEnv(THEIRS[task], obs_type="pixels_agent_pos")
    inner = env._env.task
    inner.get_observation = lambda physics: {
        "qpos": inner.get_qpos(physics),
        "images": {"top": physics.render(height=480, width=640, camera_id="top")},
    }
    return env


def _actions(count, scale=0.2, seed=0):
    start = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.1] * 2)
    return np.float32(start + scale * np.random.default_rng(seed).normal(size=(count, 14)))


def _same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@both
def test_an_episode_is_that_of_gym_aloha_with_the_same_seed(original, task):
    actions, theirs = _actions(1), _official(original, task)
    want = [(theirs.reset(seed=7)[0], 0, False)]
    want += [theirs.step(np.float64(action))[:3] for action in actions]
    theirs._env.physics.free()  # before ours renders: it takes whatever is current for its own
    ours = envs.make(envs.Task("aloha", task.name))
    found = [(ours.reset(7), 0.0, False), *map(ours.step, actions)]
    for (seen, reward, done), (observation, score, success) in zip(want, found, strict=True):
        assert (4 * score, success) == (reward, done)
        np.testing.assert_allclose(observation["observation.state"], seen["agent_pos"], atol=1e-6)
        picture = observation["observation.images.top"].astype(int)
        assert np.abs(picture - seen["pixels"]["top"]).max() <= 1


@both
def test_many_steps_are_those_of_gym_aloha_up_to_rounding(original, task):
    """Which contact amplifies: the first touch of a hand is among them in one of the tasks."""
    theirs, ours = original.AlohaEnv(THEIRS[task], obs_type="pixels_agent_pos"), envs.make(task)
    inner = theirs._env.task
    nothing = {"images": {"top": np.zeros(0)}}  # rather than pictures
    inner.get_observation = lambda physics: {"qpos": inner.get_qpos(physics)} | nothing
    theirs.reset(seed=0)
    ours.reset(0)
    plan = bimanual.plan(task.name, ours.start)[:110]
    apart = []
    for action in plan:
        _, score, _ = ours.step(action, observe=False)
        assert theirs.step(np.float64(action))[1] == 4 * score
        found, want = ours._simulation._data.qpos, theirs._env.physics.data.qpos
        apart.append(np.abs(found - want).max())
    assert max(apart[:80]) < 1e-9
    assert max(apart) < 0.01
    theirs._env.physics.free()


@both
def test_rewards_are_those_of_gym_aloha_and_the_expert_gets_all_of_them(original, task):
    theirs, ours = _official(original, task)._env, aloha.Env(task.name, fast=True)
    ours.reset(0)
    rewards = []
    for step, action in enumerate(bimanual.plan(task.name, ours.start)):
        _, score, success = ours.step(action, observe=False)
        if success or step % 10 == 0 or 4 * score != rewards[-1]:
            theirs.physics.data.qpos[:] = ours._simulation._data.qpos
            theirs.physics.forward()
            assert theirs.task.get_reward(theirs.physics) == 4 * score
        rewards.append(4 * score)
        if success:
            break
    assert ours.info == {"reward": 4}
    assert {0, 1, 2, 4} <= set(rewards)
    theirs.physics.free()


def test_fast_pictures_show_the_same_scene_in_a_sixteenth_of_the_pixels():
    places = []
    for simulator, size in (("aloha", (480, 640)), ("aloha_fast", (120, 160))):
        picture = envs.make(envs.Task(simulator, TRANSFER.name)).reset(3)["observation.images.top"]
        assert picture.shape == (*size, 3)
        red = np.argwhere((picture[..., 0] > 200) & (picture[..., 1] < 80))
        places.append(red.mean(axis=0) / size)
    np.testing.assert_allclose(*places, atol=0.5 / 120)


@both
def test_observations_and_actions_are_as_declared(task):
    env = envs.make(task)
    observation = env.reset(0)
    assert env.prompt in aloha.PROMPTS.values()
    assert env.fps == 50
    assert observation.keys() | {"action"} == env.features.keys()
    assert observation["observation.images.top"].dtype == np.uint8
    assert observation["observation.images.top"].shape == (120, 160, 3)
    assert observation["observation.state"].dtype == np.float32
    start = [0, -0.96, 1.16, 0, -0.3, 0, 0.1]
    np.testing.assert_allclose(observation["observation.state"], start * 2, atol=1e-3)
    assert len(env.features["action"]["names"]) == 14


def test_actions_are_radians_clipped_to_the_actuators_and_not_to_one():
    low, high = aloha.ACTION_RANGE
    limits = aloha.load("transfer_cube").actuator_ctrlrange
    arms = np.delete(np.arange(16), (6, 7, 14, 15))  # each has two actuators of fingers
    found = np.transpose([np.delete(low, aloha.GRIPPERS), np.delete(high, aloha.GRIPPERS)])
    np.testing.assert_allclose(found, limits[arms], atol=1e-6)
    # A finger's actuator stops a little before its joint's ends, which are what 0 and 1 mean.
    for joint, finger in zip(aloha.GRIPPERS, (6, 14), strict=True):
        ends = [aloha.constants.unnormalize_puppet_gripper_position(x[joint]) for x in (low, high)]
        np.testing.assert_allclose(ends, limits[finger], atol=0.003)
    found = []
    for elbow in (1.0, 1.4, high[2], 9.0):
        env = envs.make(TRANSFER)
        env.reset(0)
        action = _actions(1, scale=0)[0]
        action[2] = elbow
        for _ in range(5):
            env.step(action, observe=False)
        found.append(aloha.joints(env._simulation._data.qpos)[2])
    assert found[0] < found[1] - 0.01
    assert found[2] == found[3]


@both
def test_episodes_of_a_process_do_not_disturb_one_another(task):
    other = INSERTION if task is TRANSFER else TRANSFER
    actions = _actions(6)
    alone = envs.make(task)
    first = alone.reset(5)
    for action in actions[:-1]:
        alone.step(action, observe=False)
    want = alone.step(actions[-1])
    several = [envs.make(task), envs.make(other), envs.make(task)]
    for seed, env in zip((5, 5, 6), several, strict=True):
        env.reset(seed)
    for action in actions[:-1]:
        for env in several:
            env.step(action, observe=False)
    found = several[0].step(actions[-1])
    assert _same(found[0], want[0])
    assert found[1:] == want[1:]
    assert _same(several[2].reset(5), first)
    assert not _same(several[2].reset(6), first)


def test_observing_changes_nothing():
    runs = []
    for observe in (True, False):
        env = envs.make(TRANSFER)
        env.reset(3)
        for action in _actions(4):
            env.step(action, observe)
        runs.append(env.step(action)[0])
    assert _same(*runs)


@pytest.mark.parametrize(
    ("task", "ranges"), [(TRANSFER, [(0, 0.2)]), (INSERTION, [(0.1, 0.2), (-0.2, -0.1)])], ids=str
)
def test_objects_start_in_the_chosen_part(task, ranges):
    whole, part = (
        np.stack([aloha.starts(task.name, seed, *part) for seed in range(40)])
        for part in ((0, 1), (0.5, 0.6))
    )
    np.testing.assert_array_equal(whole[..., 1:], part[..., 1:])
    for k, (low, high) in enumerate(ranges):
        width = high - low
        assert np.ptp(whole[:, k, 0]) > 0.8 * width
        assert (part[:, k, 0] >= low + 0.5 * width).all()
        assert (part[:, k, 0] <= low + 0.6 * width).all()


def test_mujocos_warnings_are_left_alone_until_aloha_is_simulated():
    program = (
        "import mujoco\nfrom policymix.sim import aloha\nprint(mujoco.get_mju_user_warning())\n"
        f"aloha.Env({TRANSFER.name!r}, True)\nprint(mujoco.get_mju_user_warning())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    before, after = result.stdout.splitlines()
    assert before == "None"
    assert "lambda" in after
    assert "Traceback" not in result.stderr


def test_only_its_experts_attempt_it():
    for task in TASKS:
        assert experts.skills(task.simulator) == ("expert",)
        with pytest.raises(ValueError, match="aloha_fast has no skill 'noisy'; choose of expert"):
            experts.attempt(task, 0, 5, "noisy")


def test_osmesa_takes_the_place_of_an_egl_without_a_driver(monkeypatch):
    monkeypatch.setattr(aloha, "_LIBRARIES", {"egl": "libEGL.so.1", "osmesa": "libm.so.6"})
    monkeypatch.setattr(aloha, "_has_driver", lambda egl: False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    chosen = []

    def imported(name):
        chosen.append(name)
        raise ImportError(name)

    monkeypatch.setattr(aloha.importlib, "import_module", imported)
    with pytest.raises(OSError, match=r"this system cannot \(ImportError: mujoco.osmesa\)"):
        aloha._gl()
    assert chosen == ["mujoco.osmesa"]


def test_a_step_needs_a_reset():
    with pytest.raises(ValueError, match="AlohaTransferCube-v0: reset the environment before"):
        envs.make(TRANSFER).step(np.zeros(14))


@pytest.mark.parametrize(("asked", "libraries"), [("", {"egl": "libno.so"}), ("nothing", {})])
def test_a_system_without_opengl_is_told_what_to_install(monkeypatch, asked, libraries):
    monkeypatch.setenv("MUJOCO_GL", asked)
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    monkeypatch.setattr(aloha, "_LIBRARIES", libraries)
    aloha._simulation.cache_clear()
    with pytest.raises(OSError, match="apt install libegl1 libegl-mesa0 libgl1-mesa-dri"):
        envs.make(TRANSFER)


@both
def test_forearms_turn_one_way_whatever_the_start(task):
    """Near its start a wrist has two ways to the same pose; experts that took either teach none."""
    plans = [bimanual.plan(task.name, aloha.starts(task.name, seed)) for seed in (8, 10)]
    for plan in plans:
        assert np.abs(plan[:, [3, 5, 10, 12]]).max() < 2
        assert np.abs(np.diff(plan[:, :6], axis=0)).max() < 0.15
    np.testing.assert_array_equal(plans[0], bimanual.plan(task.name, aloha.starts(task.name, 8)))


@pytest.mark.slow
@both
def test_a_demonstration_played_again_succeeds_ten_frames_before_its_end(task):
    episode = experts.demonstrate(task, 1, 400)
    env = envs.make(task)
    observation = env.reset(1)
    successes = []
    for k, action in enumerate(episode["action"]):
        assert _same(observation, {key: episode[key][k] for key in observation})
        observation, _, success = env.step(action)
        successes.append(success)
    assert successes.index(True) == len(successes) - 11
    assert experts.demonstrate(task, 1, 100) is None


@pytest.mark.slow
@both
def test_the_expert_solves_its_task(task):
    env = aloha.Env(task.name, fast=True)
    solved = 0
    for seed in range(40):
        env.reset(seed)
        plan = bimanual.plan(task.name, env.start)
        solved += any(env.step(action, observe=False)[2] for action in plan)
    assert solved >= 38
