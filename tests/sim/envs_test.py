"""Tasks by name, and environments whose episodes depend on the seed alone."""

import builtins
import ctypes.util
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from policymix.sim import envs

needs_simulators = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("metaworld", "gym_pusht", "gym_aloha")),
    reason="the simulators are not installed",
)
PUSH = envs.parse("metaworld", "push-v3")
PUSHT = envs.parse("pusht", "PushT-v0")
ALOHA = envs.parse("aloha_fast", "AlohaTransferCube-v0")


@pytest.mark.parametrize(
    ("simulator", "text", "task"),
    [
        ("metaworld", "push-v3", envs.Task("metaworld", "push-v3")),
        ("metaworld", "push-v3@0:0.2", envs.Task("metaworld", "push-v3", 0, 0.2)),
        ("pusht", "PushT-v0@0.3:1", envs.Task("pusht", "PushT-v0", 0.3, 1)),
        ("aloha_fast", "AlohaInsertion-v0", envs.Task("aloha_fast", "AlohaInsertion-v0")),
    ],
)
def test_a_task_is_read_from_its_text_and_written_back(simulator, text, task):
    assert envs.parse(simulator, text) == task
    assert str(task) == text


def test_a_task_writes_fractions_as_exactly_as_it_has_them():
    task = envs.Task("metaworld", "push-v3", 0.1 + 0.2, 1 - 1e-12)
    assert envs.parse("metaworld", str(task)) == task


@pytest.mark.parametrize(
    ("simulator", "text", "message"),
    [
        ("mujoco", "push-v3", "unknown simulator 'mujoco'; choose one of metaworld, pusht, aloha"),
        ("metaworld", "psh-v3", "no task 'psh-v3' among its 50.*did you mean push-v3"),
        ("pusht", "pusht", "no task 'pusht' among its 1: PushT-v0"),
        ("metaworld", "push-v3@", "'push-v3@': after @ stand two fractions"),
        ("metaworld", "push-v3@0.2", "after @ stand two fractions .*push-v3@0:0.2"),
        ("metaworld", "push-v3@a:b", "after @ stand two fractions"),
        ("metaworld", "push-v3@0.2:0.2", "push-v3@0.2:0.2: .*0 <= LOW < HIGH <= 1"),
        ("metaworld", "push-v3@-1:0.2", "0 <= LOW < HIGH <= 1"),
        ("metaworld", "push-v3@0:1.1", "0 <= LOW < HIGH <= 1"),
        ("metaworld", "push-v3@nan:1", "0 <= LOW < HIGH <= 1"),
    ],
)
def test_a_wrong_task_is_refused_by_what_is_wrong(simulator, text, message):
    with pytest.raises(ValueError, match=message):
        envs.parse(simulator, text)


def test_the_known_tasks_are_those_of_meta_world():
    env_dict = pytest.importorskip("metaworld.env_dict")
    assert set(envs.TASKS["metaworld"]) == set(env_dict.ALL_V3_ENVIRONMENTS)


@needs_simulators
def test_the_tested_versions_are_installed():
    for simulator, tested in envs.TESTED.items():
        assert envs.versions(simulator) == tested


@needs_simulators
def test_prompts_are_words():
    assert envs.make(envs.parse("metaworld", "button-press-v3")).prompt == "button press"
    assert envs.make(PUSHT).prompt == "Push the T-shaped block onto the T-shaped target."


@needs_simulators
@pytest.mark.parametrize("task", [PUSH, PUSHT], ids=str)
def test_observations_are_as_declared(task):
    env = envs.make(task)
    first = env.reset(0)
    action = np.full(env.features["action"]["shape"], 0.5, np.float32)
    later, score, success = env.step(action)
    for observation in (first, later):
        assert observation.keys() | {"action"} == env.features.keys()
        for key, value in observation.items():
            dtype, shape = env.features[key]["dtype"], env.features[key]["shape"]
            assert value.dtype == (np.uint8 if dtype == "image" else dtype)
            assert value.shape == shape
    assert 0 <= score <= 1
    assert success is False
    assert tuple(env.info) == env.info_keys
    assert all(type(value) is float for value in env.info.values())
    assert env.step(action, observe=False)[0] is None


@needs_simulators
@pytest.mark.parametrize("task", [PUSH, PUSHT], ids=str)
def test_the_seed_decides_the_start_whatever_was_played_before(task):
    env = envs.make(task)
    first, other = env.reset(5), env.reset(6)
    for _ in range(7):
        env.step(np.ones(env.features["action"]["shape"], np.float32), observe=False)
    np.random.seed(1)  # simulators may look at it
    again = env.reset(5)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["observation.state"], other["observation.state"])


@needs_simulators
@pytest.mark.parametrize("task", [PUSH, PUSHT], ids=str)
def test_actions_are_clipped_to_what_the_task_allows(task):
    limits = [1.0] * 4 if task is PUSH else [512.0] * 2
    assert envs.make(task).action_range[1] == limits[0]
    found = []
    for scale in (1, 7):
        env = envs.make(task)
        env.reset(0)
        found.append(env.step(scale * np.array(limits, np.float32))[0])
    assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0])


@needs_simulators
@pytest.mark.parametrize("task", [PUSH, PUSHT], ids=str)
def test_a_step_needs_a_reset(task):
    env = envs.make(task)
    with pytest.raises(ValueError, match="reset the environment before"):
        env.step(np.zeros(env.features["action"]["shape"]))


@pytest.mark.parametrize(
    ("task", "reason", "message"),
    [
        (PUSH, "No module named 'mujoco'", "metaworld is not installed.*make venv EXTRAS=sim"),
        (PUSHT, "libGL.so.1: cannot open", "apt install libgl1 libglib2.0-0"),
        (ALOHA, "No module named 'gym_aloha'", "aloha_fast is not installed.*EXTRAS=sim"),
    ],
    ids=["metaworld", "pusht", "aloha"],
)
def test_what_is_missing_is_said_with_the_command_that_installs_it(
    monkeypatch, task, reason, message
):
    real = builtins.__import__

    def absent(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "policymix.sim" and set(fromlist or ()) & {"metaworld", "pusht", "aloha"}:
            raise ImportError(reason)
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    with pytest.raises(OSError, match=message):
        envs.make(task)


MADE = """
from policymix.sim import envs
for task in (envs.parse("metaworld", "reach-v3"), envs.parse("aloha_fast", "AlohaInsertion-v0")):
    try:
        envs.make(task)
        print("made")
    except OSError as error:
        print(error)
"""


def _made(**variables):
    """What `envs.make` says in a process with environment variables: a line of each simulator."""
    unset = {"MUJOCO_GL", "PYOPENGL_PLATFORM"} - variables.keys()
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MADE],
        capture_output=True, text=True, check=True, env=inherited | variables,
    )  # fmt: skip
    assert "Traceback" not in result.stderr
    return result.stdout.splitlines()


@needs_simulators
@pytest.mark.skipif(sys.platform != "linux", reason="values of MUJOCO_GL are Linux's")
@pytest.mark.parametrize("library", ["osmesa", "cgl"])
def test_an_opengl_that_mujoco_cannot_load_is_named(library):
    if ctypes.util.find_library(library):
        pytest.skip("it is there")
    for simulator, line in zip(("metaworld", "aloha_fast"), _made(MUJOCO_GL=library), strict=True):
        assert line.startswith(f"{simulator} cannot be imported with MUJOCO_GL={library} (")
        assert "unset that, or set it to an OpenGL that this system has: egl or osmesa" in line


@needs_simulators
@pytest.mark.skipif(sys.platform != "linux", reason="values of MUJOCO_GL are Linux's")
@pytest.mark.parametrize("asked", [{}, {"MUJOCO_GL": "egl"}], ids=["unset", "egl"])
def test_an_opengl_without_a_driver_is_found_before_an_episode(asked):
    if not ctypes.util.find_library("EGL") or ctypes.util.find_library("OSMesa"):
        pytest.skip("it would not be EGL")
    first, second = _made(__EGL_VENDOR_LIBRARY_DIRS="/nowhere", **asked)
    assert first == "made"
    assert second.startswith("ALOHA renders with OpenGL off screen, by EGL or OSMesa (MUJOCO_GL=")
    assert ("; now it is egl)" in second) == bool(asked)
    assert "this system cannot" in second


@needs_simulators
def test_simulators_do_without_jax():
    program = (
        "import sys\n"
        "from policymix.sim import aloha, bimanual, envs, experts, metaworld, pushes\n"
        "from policymix.sim import pusht, worker, workers\n"
        "print('jax' in sys.modules, 'jaxlib' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "False"]


def test_an_episode_has_no_more_steps_than_its_simulator():
    assert (envs.limit("metaworld"), envs.limit("metaworld", 500)) == (150, 500)
    assert (envs.limit("pusht"), envs.limit("pusht", 9999)) == (300, 9999)
    assert envs.limit("aloha") == envs.limit("aloha_fast") == 400
    with pytest.raises(ValueError, match="max_steps is 501; metaworld ends .* after 500"):
        envs.limit("metaworld", 501)


@needs_simulators
def test_the_most_steps_are_those_of_the_simulator():
    from policymix.sim import metaworld

    assert envs.limit("metaworld", metaworld.MAX_STEPS) == metaworld.MAX_STEPS
    with pytest.raises(ValueError, match=f"after {metaworld.MAX_STEPS}"):
        envs.limit("metaworld", metaworld.MAX_STEPS + 1)
