"""What the tests of roll-outs share: the smallest config, and policies that nobody trained."""

import pathlib

import jax
import numpy as np

from configs import pi0_metaworld
from policymix.checkpoints import store
from policymix.models import pi0
from policymix.runs import policies
from policymix.sim import envs
from policymix.transforms import normalize

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'configs/pi0_metaworld.py'}:debug"
REACH, HANDLE, PUSH = (
    envs.parse("metaworld", f"{name}-v3") for name in ("reach", "handle-press", "push")
)


def debug_config(**evaluate):
    """Episodes of 36 steps, a chunk of 8 actions at a time."""
    config = pi0_metaworld.get_config("debug")
    config.evaluate.update({"max_steps": 36, "num_flow_steps": 2} | evaluate)
    return config


def write_policy(path, seed=0, *, mean=(0, 0, -0.8, 0), std=0.2, silent=False) -> str:
    """A fresh network whose actions lie around `mean`: downwards presses a handle, now and then.

    Args:
      silent: its velocity is zero, so that its actions are the noise they began as.
    """
    model = policies.model_config(debug_config(), why="the test")
    params = jax.device_get(pi0.init(model, jax.random.key(seed)))
    if silent:
        params["action_out_proj"] = jax.tree.map(np.zeros_like, params["action_out_proj"])
    stats = {
        "state": normalize.NormStats(np.zeros(39), np.full(39, 0.3)),
        "actions": normalize.NormStats(np.array(mean, float), np.full(4, float(std))),
    }
    store.save_params(params, path, stats, "sawyer")
    return str(path)
