"""What a config leaves open and its datasets say: which they are, and the sizes and cameras of a
policy for them.
"""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from policymix import files, hub
from policymix.checkpoints import layout
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
    named = [path.strip() for path in data.path.split(",") if path.strip()]
    if data.mixture:
        if data.repo_id or len(named) != 1:
            raise ValueError(
                f"config.data.mixture is {data.mixture!r}: config.data.path is then the one "
                f"folder that holds its datasets, not {data.repo_id or data.path!r}"
            )
        return [_of_mixture(data, named[0], name) for name, _ in oxe.mixture(data.mixture)]
    named += [f"hf://datasets/{name.strip()}" for name in data.repo_id.split(",") if name.strip()]
    if not named:
        raise ValueError(
            "config.data.path is empty: pass --config.data.path=DIRECTORY of a LeRobot or RLDS "
            "dataset, or several, as a,b; or --config.data.repo_id=ORG/NAME"
        )
    return [Part(name, data, data.asset_id) for name in named]


def _of_mixture(data: ml_collections.ConfigDict, root: str, name: str) -> Part:
    own = data.copy_and_resolve_references()
    own.robot = _ROBOTS[oxe.DATASETS[name].robot]
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
    numbers = all(isinstance(s, int | float | np.number) and 0 < s < math.inf for s in shares)
    if len(shares) != len(num_frames) or not numbers:
        raise ValueError(
            f"config.data.fractions is {given}; expected a positive number for each of "
            f"the {len(num_frames)} datasets of config.data.path, or () to go by their frames"
        )
    return np.asarray(shares, np.float64) / np.sum(shares)


def complete(
    config: ml_collections.ConfigDict, *, rate: bool = False, checkpoints: Sequence[str] = ()
) -> ml_collections.ConfigDict:
    """The config with config.model's action_dim, proprio_dim and image_keys, and the cameras of
    config.data, as its first dataset says, where the config leaves them to it (None); or as the
    run's own config.json says beside one of `checkpoints`.

    Unless the robot's table names its cameras, every camera of the dataset becomes one of the
    model, called by the end of its name.

    Args:
      rate: whether config.data.fps, if it is 0, becomes the first dataset's too.

    Raises:
      ValueError: something is left open, and there is nothing that says it.
    """
    data, model = config.data, config.model
    lacking = [f for f in ("action_dim", "image_keys") if f in model and model[f] is None]
    rate = rate and not (data.fps or data.mixture)  # whose robots differ
    named = bool(data.path or data.repo_id)
    if not lacking and not (rate and named):
        return config
    if lacking and (known := next(filter(None, map(_run_of, checkpoints)), None)):
        return _filled(config, known["model"], known["data"]["cameras"])
    if not named:
        raise ValueError(
            f"config.model leaves {' and '.join(lacking)} to the dataset: name it with "
            "--config.data.path=DIRECTORY, or set them as they are in the run's config.json"
        )
    part = parts(data)[0]
    dataset = opening.open_dataset(
        part.name,
        fps=data.fps,
        skip_unlabeled=data.skip_unlabeled,
        skip_bad=data.skip_bad_episodes,
    )
    config = _filled(config, *sizes(dataset, encoding.wiring(part.data))) if lacking else config
    config = config.copy_and_resolve_references()
    if rate:
        config.data.fps = int(dataset.fps)
    if lacking:
        model = config.model
        print(
            f"of {dataset.path}: action_dim {model.action_dim}, proprio_dim {model.proprio_dim}, "
            f"cameras {json.dumps(list(model.image_keys))}, {dataset.fps} frames per second"
        )
    return config


def sizes(dataset: opening.Dataset, wired: encoding.Wiring) -> tuple[dict, dict]:
    """The model's fields, and its cameras' features, for a dataset."""

    def size(keys: Sequence[str]) -> int:
        return sum(int(np.prod(dataset.column(key).shape[1:])) for key in keys)

    cameras = dict(wired.cameras) or camera_names(dataset.camera_keys)
    fields = {"action_dim": size(wired.action_keys), "proprio_dim": size(wired.state_keys)}
    return fields | {"image_keys": tuple(cameras)}, cameras


def _filled(config: ml_collections.ConfigDict, fields: dict, cameras: dict):
    """The config with those of `fields` that are None, and cameras to go with new image_keys."""
    config = config.copy_and_resolve_references()
    if config.model.get("image_keys", ()) is None:
        config.model.image_keys = tuple(fields["image_keys"])
        config.data.cameras = ml_collections.ConfigDict(cameras)
    if config.model.action_dim is None:
        config.model.action_dim = fields["action_dim"]
        if config.model.get("proprio_dim") is None:
            config.model.proprio_dim = fields["proprio_dim"]
    return config


def recorded(checkpoint: str) -> dict:
    """config.json of the run that a checkpoint is a step of; {} where there is none."""
    if not checkpoint or hub.is_remote(checkpoint):
        return {}
    path = layout.directory_of(checkpoint).parent / "config.json"
    content = files.read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _run_of(checkpoint: str) -> dict | None:
    """What that says of a π0, where it says all."""
    content = recorded(checkpoint)
    model, data = (content.get(section) for section in ("model", "data"))
    if not (isinstance(model, dict) and isinstance(data, dict)):
        return None
    needed = [model.get(field) for field in ("action_dim", "proprio_dim", "image_keys")]
    whole = None not in needed and isinstance(data.get("cameras"), dict)
    return content if whole else None


def camera_names(features: Sequence[str]) -> dict[str, str]:
    """{a short name: feature}: the end of each that no other shares, "left_rgb" of "a.left.rgb"."""
    for count in range(1, max((f.count(".") + 2 for f in features), default=2)):
        names = ["_".join(feature.split(".")[-count:]) for feature in features]
        if len(set(names)) == len(names):
            return dict(zip(names, features, strict=True))
    raise ValueError(f"the cameras {list(features)} cannot be told apart by their names")
