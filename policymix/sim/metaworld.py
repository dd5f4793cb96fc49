"""Meta-World's fifty tasks for a Sawyer arm; a process simulates each task once for all episodes.

Building an environment takes 0.1 s and 14 MB, most of it meshes that never change. So episodes of
a task share one MuJoCo model and its data. Each has Python attributes of its own, and keeps its
physics aside while another episode has the simulation.
"""

import functools
import warnings
from collections.abc import Hashable
from typing import Any, NamedTuple

import gymnasium
import mujoco
import numpy as np
from metaworld import env_dict

FPS = 80
MAX_STEPS = 500  # Meta-World refuses to go on after as many
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (39,), "names": None},
    "action": {"dtype": "float32", "shape": (4,), "names": ["dx", "dy", "dz", "gripper"]},
}

# What a step's sub-goals show in: whether the hand is at the object, whether it holds it, how far
# its way to the goal is done in [0, 1], and the distance that is left. Tasks differ in what they
# make of the first three.
INFO_KEYS = ("near_object", "grasp_success", "in_place_reward", "obj_to_target")

_STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # also the solver's warm start: steps repeat exactly
_PLACES = ("body_pos", "body_quat", "site_pos")  # where tasks put things: fields of the model
_MOST_STARTS = 2000  # remembered for each task, 30 kB each

# Scripted experts ask for larger actions than there are, and Meta-World says so at every step.
warnings.filterwarnings("ignore", "Constant.s. may be too high", UserWarning)


class Env:
    """One episode at a time of one task, sharing its simulation with the others of the process."""

    fps = FPS
    features = FEATURES
    action_range = (-1.0, 1.0)
    info_keys = INFO_KEYS

    def __init__(self, name: str, low: float = 0.0, high: float = 1.0):
        """A task whose objects and goals start in a part of their x-range.

        Args:
          name: one of Meta-World's names, like "push-v3".
          low: where the part begins, as a fraction of the range.
          high: where it ends.
        """
        self.prompt = name.rsplit("-v", 1)[0].replace("-", " ")
        self._name = name
        self._simulation = _simulation(name)
        self._starts = _part(self._simulation.start_space, name, low, high)
        self._env: Any = None
        self.info: dict[str, float] = {}  # of the last step
        self.physics: tuple[np.ndarray, ...] | None = None  # while another has the simulation

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Starts an episode that depends on the seed alone; returns its first observation."""
        key = (self._starts.low.tobytes(), self._starts.high.tobytes(), seed)
        if (start := self._simulation.starts.get(key)) is None:
            self._simulation.restart(self)
            self._env = self._simulation.twin()
            self._env._random_reset_space = self._starts
            self._env.seed(seed)
            state, _ = self._env.reset()
            start = _Start(_copied(self._env), self._simulation.physics(), state.astype(np.float32))
            self._simulation.keep(key, start)
        else:
            self._simulation.give_to(self, start.physics)
            self._env = _copied(start.env)
        return {"observation.state": start.state.copy()}

    def step(
        self, action: np.ndarray, observe: bool = True
    ) -> tuple[dict[str, np.ndarray] | None, float, bool]:
        """Moves by one action [4], clipped to [-1, 1].

        Returns:
          The observation, or None without `observe`; the reward as a fraction of the largest; and
          whether the task is solved.
        """
        if self._env is None:
            raise ValueError(f"{self._name}: reset the environment before its first step")
        if self._env.curr_path_length >= MAX_STEPS:
            raise ValueError(
                f"{self._name}: Meta-World ends an episode after {MAX_STEPS} steps; reset it, or "
                "choose fewer steps per episode"
            )
        self._simulation.give_to(self)
        state, reward, _, _, info = self._env.step(np.clip(np.float32(action), *self.action_range))
        self.info = {key: float(info[key]) for key in INFO_KEYS}
        observation = {"observation.state": state.astype(np.float32)} if observe else None
        return observation, float(np.clip(reward / 10, 0, 1)), bool(info["success"])


class _Start(NamedTuple):
    """An episode as its reset leaves it, which takes 50 steps twice: policies share starts."""

    env: Any
    physics: tuple[np.ndarray, ...]
    state: np.ndarray


def _copied(env: Any) -> Any:
    """Another Meta-World environment in the same state, over the same model and data."""
    twin = object.__new__(type(env))
    twin.__dict__.update(
        {
            # Views are of the shared data, and must go on following it.
            k: v.copy() if isinstance(v, np.ndarray) and v.base is None else v
            for k, v in env.__dict__.items()
        }
    )
    return twin


class _Touch:
    """Meta-World's test of a grasp, by arrays: contact by contact it is two fifths of a step."""

    def touching_object(self, object_geom_id: int) -> bool:
        """Whether both pads of the gripper press on an object."""
        contact = self.data.contact
        touched = (contact.geom == object_geom_id).any(axis=1)
        for pad in ("leftpad_geom", "rightpad_geom"):
            both = touched & (contact.geom == self.data.geom(pad).id).any(axis=1)
            if not sum(self.data.efc_force[contact.efc_address[both]]) > 0:
                return False
        return True


class _Simulation:
    """MuJoCo's model and data of a task, as they were when built, and the episode that has them."""

    def __init__(self, name: str):
        kind = env_dict.ALL_V3_ENVIRONMENTS[name]
        env = type(kind.__name__, (_Touch, kind), {})()
        env._partially_observable = False  # else goals are zeros
        env.__dict__.pop("sawyer_observation_space", None)  # cached while goals were hidden
        env._set_task_called = True
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True  # else starts come from NumPy's global generator
        self.start_space = env._random_reset_space
        self._env = env
        self._owner: Env | None = None
        self._built = self.physics()
        self.starts: dict[Hashable, _Start] = {}

    def twin(self) -> Any:
        """A Meta-World environment as newly built, over the shared model and data."""
        return _copied(self._env)

    def keep(self, key: Hashable, start: "_Start") -> None:
        """Remembers a start; the oldest is forgotten for it where there are many."""
        if len(self.starts) >= _MOST_STARTS:
            del self.starts[next(iter(self.starts))]
        self.starts[key] = start

    def restart(self, owner: Env) -> None:
        """Gives the simulation to an episode, with the physics of a newly built environment."""
        self._leave()
        self._load(self._built)
        # A reset reads positions that follow from the state; computing them moves the warm start.
        mujoco.mj_forward(self._env.model, self._env.data)
        self._load(self._built)
        self._owner = owner

    def give_to(self, owner: Env, physics: tuple[np.ndarray, ...] | None = None) -> None:
        """Puts the physics of the episode that had the simulation aside, and restores `owner`'s,
        or gives it `physics` to begin with.
        """
        if self._owner is not owner or physics is not None:
            self._leave()
            self._load(owner.physics if physics is None else physics)
            self._owner = owner

    def _leave(self) -> None:
        if self._owner is not None:
            self._owner.physics = self.physics()

    def physics(self) -> tuple[np.ndarray, ...]:
        """Of the episode that has the simulation now."""
        model, data = self._env.model, self._env.data
        state = np.empty(mujoco.mj_stateSize(model, _STATE))
        mujoco.mj_getState(model, data, state, _STATE)
        return (state, *(getattr(model, field).copy() for field in _PLACES))

    def _load(self, physics: tuple[np.ndarray, ...]) -> None:
        model, data = self._env.model, self._env.data
        for field, value in zip(_PLACES, physics[1:], strict=True):
            getattr(model, field)[:] = value
        mujoco.mj_setState(model, data, physics[0], _STATE)


@functools.cache
def _simulation(name: str) -> _Simulation:
    return _Simulation(name)


def _part(space: gymnasium.spaces.Box, name: str, low: float, high: float) -> gymnasium.spaces.Box:
    """Start states whose x, of an object and of a goal, lies in a part of its range."""
    if (low, high) == (0, 1):
        return space
    xs = [0, 3] if space.shape == (6,) else [0]
    width = space.high[xs] - space.low[xs]
    if not width.any():
        raise ValueError(
            f"{name}@{low:g}:{high:g}: every start of {name} has the same x, so there is no part "
            f"of its range to choose; write {name}, or choose another task"
        )
    lows, highs = space.low.copy(), space.high.copy()
    lows[xs], highs[xs] = space.low[xs] + low * width, space.low[xs] + high * width
    return gymnasium.spaces.Box(lows, highs, dtype=space.dtype)
