"""What the tests of chunk-level learning share: a dataset with rewards, and a small learner."""

import pathlib

import numpy as np

from configs import common
from policymix.data import writer

STATE, ACTION = 3, 2
TASKS = ("push the block", "open the door")


def write_dataset(
    path: pathlib.Path, *, episodes=6, length=14, rewards=True, seed=0
) -> pathlib.Path:
    """Episodes of two tasks, of which every second succeeds at its last frame."""
    rng = np.random.default_rng(seed)
    features = {
        "observation.state": {"dtype": "float32", "shape": (STATE,), "names": None},
        "action": {"dtype": "float32", "shape": (ACTION,), "names": None},
    }
    if rewards:
        features["next.reward"] = {"dtype": "float32", "shape": (1,), "names": None}
        features["next.success"] = {"dtype": "bool", "shape": (1,), "names": None}
    with writer.Writer(path, fps=10, features=features, robot_type="test") as dataset:
        for number in range(episodes):
            steps = length + number % 3
            episode = {
                "observation.state": rng.normal(size=(steps, STATE)).astype(np.float32),
                "action": rng.uniform(-1, 1, size=(steps, ACTION)).astype(np.float32),
            }
            if rewards:
                won = np.zeros((steps, 1), bool)
                won[-1] = number % 2 == 0
                episode |= {"next.reward": won.astype(np.float32), "next.success": won}
            dataset.add_episode(episode, TASKS[number % 2])
    return path


def debug_config(path: pathlib.Path, **options):
    """Four updates of networks of 16 units on chunks of 4 actions."""
    config = common.get_config()
    config.data.update({"path": str(path), "held_out": 0.0})
    config.offline_rl.update({"action_horizon": 4, "hidden_dim": 16, "feature_dim": 16})
    config.offline_rl.update({"num_layers": 2, "batch_size": 8, "num_steps": 4, "log_every": 1})
    config.offline_rl.update({"save_every": 2, "max_to_keep": 5, "max_token_len": 4})
    config.offline_rl.update(options)
    return config
