"""From a config to a chunk-level learner: sizes as the dataset has them, settings files of other
programs, and what a run recorded.
"""

import dataclasses
import difflib
from typing import Any

import ml_collections

from policymix import files
from policymix.data import opening
from policymix.rl.config import LearnerConfig
from policymix.runs import encoding, metadata
from policymix.transforms import normalize

# Of settings files: what rlvla's config.json calls them, and the fields here.
_RENAMED = {
    "gamma": "discount", "lr": "learning_rate", "log_interval": "log_every",
    "save_interval": "save_every",
}  # fmt: skip
_OF_THE_DATA = ("action_dim", "state_dim")  # which settings files say, and the dataset decides
_FIELDS = {field.name for field in dataclasses.fields(LearnerConfig)}


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of a run: its settings file read, its cameras those of the dataset where
    config.data names none.

    Raises:
      ValueError, OSError: a settings file that is not understood, or no dataset.
    """
    config = config.copy_and_resolve_references()
    if config.offline_rl.settings:
        _read_settings(config.offline_rl)
    config.data.tokenizer = config.offline_rl.tokenizer
    config.data.cameras = ml_collections.ConfigDict(
        _cameras(config) if config.offline_rl.pictures else {}
    )
    return config


def settings(config: ml_collections.ConfigDict) -> LearnerConfig:
    """The learner of a completed config, its sizes those of the dataset.

    Raises:
      ValueError: numbers that no learner can have, or no dataset.
    """
    found, _ = metadata.sizes(_dataset(config.data), encoding.wiring(config.data))
    return _settings(config, found["action_dim"], found["proprio_dim"])


def _cameras(config: ml_collections.ConfigDict) -> dict[str, str]:
    """{camera: picture feature}, as the config or its robot's table says; else all of the dataset,
    called by the end of their names.
    """
    said, wired = config.data.cameras, encoding.wiring(config.data).cameras
    if said or wired:
        named = {camera: wired.get(camera, "") for camera in (*said, *wired)}
        return {camera: f for camera, f in named.items() if f != encoding.ABSENT}
    return metadata.camera_names(_dataset(config.data).camera_keys)


def _dataset(data: ml_collections.ConfigDict) -> opening.Dataset:
    """The first of a config."""
    return opening.open_dataset(
        metadata.parts(data)[0].name,
        fps=data.fps,
        skip_unlabeled=data.skip_unlabeled,
        skip_bad=data.skip_bad_episodes,
    )


def _settings(config: ml_collections.ConfigDict, action_dim: int, proprio_dim: int):
    r = config.offline_rl
    if not r.language:
        r = r.copy_and_resolve_references()
        r.max_token_len = 0
    told = {name: r[name] for name in _FIELDS & set(r)}
    cameras = [camera for camera, f in config.data.cameras.items() if f != encoding.ABSENT]
    return LearnerConfig(
        **told, action_dim=action_dim, proprio_dim=proprio_dim, image_keys=tuple(cameras)
    )


def of_checkpoint(
    config: ml_collections.ConfigDict, checkpoint: str, norm_stats: normalize.Stats
) -> tuple[ml_collections.ConfigDict, LearnerConfig]:
    """(config with the data section of the run, learner) that a checkpoint belongs to: as its run
    recorded them, or else, as for the output of a mix, as `config` and the statistics say.
    """
    record = metadata.recorded(checkpoint)
    if "learner" in record:
        config = config.copy_and_resolve_references()
        for name, value in record["data"].items():
            if name in ("path", "repo_id", "norm_stats"):  # which acting does not look at
                continue
            config.data[name] = tuple(value) if isinstance(value, list) else value
        return config, LearnerConfig(**record["learner"])
    sizes = (len(norm_stats[key].mean) for key in ("actions", "state"))
    return config, _settings(config, *sizes)


def record(config: ml_collections.ConfigDict, learner: LearnerConfig) -> dict[str, Any]:
    """What a run keeps in its config.json."""
    sections = {name: config[name].to_dict() for name in ("data", "offline_rl")}
    return sections | {"learner": dataclasses.asdict(learner)}


def _read_settings(r: ml_collections.ConfigDict) -> None:
    """Takes the settings of a JSON file, in sections or flat, under our names or rlvla's."""
    path = files.local(r.settings)
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object of settings, found {type(content).__name__}")
    sections = {k: v for k, v in content.items() if isinstance(v, dict) and k != "description"}
    flat = {k: v for k, v in content.items() if k not in (*sections, "description")}
    for name, value in [pair for s in (flat, *sections.values()) for pair in s.items()]:
        if name in _OF_THE_DATA:
            continue
        if name == "beta":
            name, value = "temperature", 1 / value if value else 0.0
        elif name == "image_size":
            name, value = "image_resolution", (value, value)
        name = _RENAMED.get(name, name)
        if name not in r:
            near = difflib.get_close_matches(name, [*r, *_RENAMED, "beta", "image_size"], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}: {name!r} is no setting of config.offline_rl{hint}")
        try:
            r[name] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise ValueError(f"{path}: {name!r} is {value!r} ({error})") from error
        print(f"{path}: config.offline_rl.{name}={r[name]}")
    r.settings = ""  # what it says is said now
