"""PushT: a disc pushes a T-shaped block onto its target, seen in pictures of 96 × 96 pixels."""

import os
import warnings
from typing import Any

import numpy as np

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame greets on stdout

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from gym_pusht.envs import pusht

FPS = 10
SIZE = 512.0  # width and height of the world
FEATURES = {
    "observation.image": {
        "dtype": "image",
        "shape": (96, 96, 3),
        "names": ["height", "width", "channels"],
    },
    "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
}


class World(pusht.PushTEnv):
    """PushT that renders only when asked: a picture costs more than a step."""

    def __init__(self):
        super().__init__(obs_type="pixels_agent_pos")

    def get_obs(self) -> None:
        """Nothing, where gym-pusht renders at every step and reset."""

    def _get_coverage(self) -> float:
        # The area of an intersection is not the same to its last digit from call to call.
        return round(super()._get_coverage(), 9)

    def observation(self) -> dict[str, Any]:
        """What gym-pusht observes: pixels uint8 [96, 96, 3] and agent_pos float64 [2]."""
        return super().get_obs()


class Env:
    """One episode at a time; an action is where the disc shall go."""

    prompt = "Push the T-shaped block onto the T-shaped target."
    fps = FPS
    features = FEATURES
    action_range = (0.0, SIZE)
    info_keys = ("coverage",)  # of the target by the block, in [0, 1]

    def __init__(self, low: float = 0.0, high: float = 1.0):
        """PushT whose block starts in a part of its x-range.

        Args:
          low: where the part begins, as a fraction of the range.
          high: where it ends.
        """
        self.world = World()
        self._part = (low, high)
        self._started = False
        self.info: dict[str, float] = {}  # of the last step

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Starts an episode that depends on the seed alone; returns its first observation."""
        self.world.reset(options={"reset_to_state": _start(seed, *self._part)})
        self._started = True
        return self._observation()

    def step(
        self, action: np.ndarray, observe: bool = True
    ) -> tuple[dict[str, np.ndarray] | None, float, bool]:
        """Pulls the disc towards a point [2], clipped to the world, for a tenth of a second.

        Returns:
          The observation, or None without `observe`, which saves its picture; how much of the
          target is covered, 1 where it is enough; and whether it is enough.
        """
        if not self._started:
            raise ValueError("PushT-v0: reset the environment before its first step")
        _, reward, _, _, info = self.world.step(np.clip(np.float32(action), *self.action_range))
        self.info = {key: float(info[key]) for key in self.info_keys}
        observation = self._observation() if observe else None
        return observation, float(reward), bool(info["is_success"])

    def _observation(self) -> dict[str, np.ndarray]:
        found = self.world.observation()
        return {
            "observation.image": found["pixels"],
            "observation.state": found["agent_pos"].astype(np.float32),
        }


def _start(seed: int, low: float, high: float) -> np.ndarray:
    """Agent x, y and block x, y, angle; over the whole range, gym-pusht 0.1.8's of the same seed.

    gym-pusht places the block before it turns it about its centre of mass. So the x drawn here is
    that of the centre of mass, whatever the angle.
    """
    rng = np.random.default_rng(seed)
    agent_x, agent_y = rng.integers(50, 450), rng.integers(50, 450)
    block_x, block_y = rng.integers(100, 400), rng.integers(100, 400)
    block_x = 100 + 300 * low + (block_x - 100) * (high - low)
    return np.array([agent_x, agent_y, block_x, block_y, rng.uniform(-np.pi, np.pi)])
