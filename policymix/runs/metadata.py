"""What a config leaves open and its datasets say: which they are, and the sizes and cameras of a
policy for them.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from policymix.data import opening, oxe
from policymix.runs import encoding

_ROBOTS = {"widowx": "bridge", "google_robot": "fractal", "franka": "droid_rlds"}  # of oxe's names


class Part(NamedTuple):
    """A dataset of a run.

    Attributes:
      name: its path or URL.
      data: config.data as it is for this dataset.
      asset_id: what its normalisation is called; "": the folder of the first dataset.
    """

    name: str
    data: ml_collections.ConfigDict
    asset_id: str


def parts(data: ml_collections.ConfigDict) -> list[Part]:
    """The datasets of config.data. Those of a mixture are of several robots, each with its own
    normalisation.

    Raises:
      ValueError: there are none, or config.data says two things of them.
    """
    named = [path for path in data.path.split(",") if path]
    if data.mixture:
        if data.repo_id or len(named) != 1:
            raise ValueError(
                f"config.data.mixture is {data.mixture!r}: config.data.path is then the one "
                f"folder that holds its datasets, not {data.repo_id or data.path!r}"
            )
        return [_of_mixture(data, named[0], name) for name, _ in oxe.mixture(data.mixture)]
    named += [f"hf://datasets/{name}" for name in data.repo_id.split(",") if name]
    if not named:
        raise ValueError(
            "config.data.path is empty: pass --config.data.path=DIRECTORY of a LeRobot or RLDS "
            "dataset, or several, as a,b; or --config.data.repo_id=ORG/NAME"
        )
    return [Part(name, data, data.asset_id) for name in named]


def _of_mixture(data: ml_collections.ConfigDict, root: str, name: str) -> Part:
    own = data.copy_and_resolve_references()
    own.robot = data.robot or _ROBOTS[oxe.DATASETS[name].robot]
    return Part(f"{root.rstrip('/')}/{name}", own, name)


def fractions(data: ml_collections.ConfigDict, num_frames: Sequence[int]) -> np.ndarray:
    """What each dataset of config.data has of a batch: [n], summing to 1.

    Args:
      num_frames: that are trained on, of each.

    Raises:
      ValueError: config.data.fractions has a wrong count, or a number that is not positive.
    """
    given = tuple(data.fractions)
    if data.mixture and not given:
        return oxe.fractions([w for _, w in oxe.mixture(data.mixture)], num_frames)
    shares = given or num_frames
    if len(shares) != len(num_frames) or not all(share > 0 for share in shares):
        raise ValueError(
            f"config.data.fractions is {given}; expected a positive number for each of "
            f"the {len(num_frames)} datasets of config.data.path, or () to go by their frames"
        )
    return np.asarray(shares, np.float64) / np.sum(shares)


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with what its first dataset says where it is left open: config.model's action_dim,
    proprio_dim and image_keys if they are None, config.data.fps if it is 0.

    Unless the robot's table names its cameras, every camera of the dataset becomes one of the
    model, called by the last part of its name. Without a dataset the config is given back as it is.

    Raises:
      ValueError: sizes or cameras are left open, and there is no dataset that says them.
    """
    data, model = config.data, config.model
    lacking = [f for f in ("action_dim", "image_keys") if f in model and model[f] is None]
    if not (data.path or data.repo_id):
        if lacking:
            raise ValueError(
                f"config.model leaves {' and '.join(lacking)} to the dataset: name it with "
                "--config.data.path=DIRECTORY, or set them as they are in the run's config.json"
            )
        return config
    if not lacking and (data.fps or data.mixture):
        return config
    part = parts(data)[0]
    wired = encoding.wiring(part.data)
    dataset = opening.open_dataset(
        part.name,
        fps=data.fps,
        skip_unlabeled=data.skip_unlabeled,
        skip_bad=data.skip_bad_episodes,
    )
    config = config.copy_and_resolve_references()
    data, model = config.data, config.model
    if not data.mixture:  # whose robots differ
        data.fps = int(dataset.fps)

    def size(keys: Sequence[str]) -> int:
        return sum(int(np.prod(dataset.column(key).shape[1:])) for key in keys)

    if "action_dim" in lacking:
        model.action_dim = size(wired.action_keys)
        if model.get("proprio_dim") is None:
            model.proprio_dim = size(wired.state_keys)
    if "image_keys" in lacking:
        cameras = dict(wired.cameras) or {k.rpartition(".")[2]: k for k in dataset.camera_keys}
        model.image_keys = tuple(cameras)
        data.cameras = ml_collections.ConfigDict(cameras)
    if lacking:
        print(
            f"of {dataset.path}: action_dim {model.action_dim}, proprio_dim {model.proprio_dim}, "
            f"cameras {json.dumps(list(model.image_keys or ()))}, {dataset.fps} frames per second"
        )
    return config
