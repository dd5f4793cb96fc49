"""From a config to a chunk-level learner: sizes as the dataset has them, settings files of other
programs, and what a run recorded.
"""

import dataclasses
import difflib
import json
import pathlib
from typing import Any

import ml_collections

from policymix import files, hub
from policymix.checkpoints import layout
from policymix.data import opening
from policymix.rl import config as rl_config
from policymix.rl.config import LearnerConfig
from policymix.runs import encoding, metadata
from policymix.transforms import normalize

# Of settings files: what rlvla's config.json calls them, and the fields here.
_RENAMED = {
    "gamma": "discount", "lr": "learning_rate", "log_interval": "log_every",
    "save_interval": "save_every", "beta": "temperature", "image_size": "image_resolution",
}  # fmt: skip
_OF_THE_DATA = ("action_dim", "state_dim")  # which settings files say, and the dataset decides
_FIELDS = {field.name for field in dataclasses.fields(LearnerConfig)}
# What every field of config.offline_rl holds, which a config whose references are resolved forgets.
_KINDS = {
    **dict.fromkeys(("seed", "batch_size", "num_steps", "num_epochs", "updates_per_call"), int),
    **dict.fromkeys(("log_every", "max_to_keep", "keep_period", "save_every"), int),
    **dict.fromkeys(("rollout_every", "num_proposals"), int),
    **dict.fromkeys(("discount", "reward_scale", "reward_shift"), float),
    **dict.fromkeys(("pictures", "language"), bool),
    **dict.fromkeys(("settings", "reward_key", "chunk_reward", "terminals", "tails"), str),
    **dict.fromkeys(("tokenizer", "proposals", "chunk_source", "init_from"), str),
    **{field.name: field.type for field in dataclasses.fields(LearnerConfig)},
}


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of a run: its settings file read, its cameras those of the dataset, if there is
    one, where config.data names none.

    Raises:
      ValueError, OSError: a settings file that is not understood, or a field of another kind.
    """
    config = config.copy_and_resolve_references()
    if config.offline_rl.settings:
        _read_settings(config.offline_rl)
    for name, value in config.offline_rl.items():
        if name in _KINDS and (words := rl_config.expected(_KINDS[name], value)):
            raise ValueError(f"config.offline_rl.{name} is {value!r}; expected {words}")
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
    if not (config.data.path or config.data.repo_id):  # as where a checkpoint only acts
        return {}
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
    recorded them, or the run of a mix's first input that is still there; else, as for a step that
    was copied out of its run, as `config` and the statistics say.

    Raises:
      ValueError: a record that is not as a run of this version writes it.
    """
    if found := _recorded(checkpoint):
        return _of_record(config, *found)
    config = complete(config)
    sizes = (len(norm_stats[key].mean) for key in ("actions", "state"))
    return config, _settings(config, *sizes)


def _recorded(
    checkpoint: str, above: tuple[pathlib.Path, ...] = ()
) -> tuple[pathlib.Path, dict[str, Any]] | None:
    """The config.json of a checkpoint's run and what it says; None where there is none. `above` are
    the mixes that it is an input of.
    """
    if hub.is_remote(checkpoint):
        return None
    directory = layout.directory_of(checkpoint).parent
    record = metadata.recorded(checkpoint)
    if {"learner", "offline_rl"} & record.keys():
        return directory / "config.json", record
    told = directory / "mix.json"
    content = files.read_json(told) if told.is_file() and told not in above else {}
    inputs = content.get("inputs") if isinstance(content, dict) else None
    for entry in inputs if isinstance(inputs, list) else ():
        path = entry.get("path") if isinstance(entry, dict) else None
        if isinstance(path, str) and (found := _recorded(path, (*above, told))):
            return found
    return None


def _of_record(
    config: ml_collections.ConfigDict, path: pathlib.Path, record: dict[str, Any]
) -> tuple[ml_collections.ConfigDict, LearnerConfig]:
    """What `of_checkpoint` returns, of what is in `path`."""
    config = config.copy_and_resolve_references()
    for name, known in (("learner", _FIELDS), ("data", set(config.data))):
        section = record.get(name)
        if not isinstance(section, dict):
            found = type(section).__name__ if name in record else "nothing"
            raise ValueError(f"{path}: expected an object {name!r} of settings, found {found}")
        if unknown := sorted(section.keys() - known):
            raise ValueError(
                f"{path}: {name!r} has {', '.join(map(repr, unknown))}, which are no settings "
                "here; another version of policymix wrote it"
            )
    try:
        for name, value in record["data"].items():
            if name in ("path", "repo_id", "norm_stats"):  # which acting does not look at
                continue
            config.data[name] = tuple(value) if isinstance(value, list) else value
        return config, LearnerConfig(**record["learner"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not as a run writes it: {files.reason(error)}") from error


def record(config: ml_collections.ConfigDict, learner: LearnerConfig) -> dict[str, Any]:
    """What a run keeps in its config.json. ValueError for what JSON has no word for."""
    sections = {name: config[name].to_dict() for name in ("data", "offline_rl")}
    sections["learner"] = dataclasses.asdict(learner)
    for section, fields in sections.items():
        for name, value in fields.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"config.{section}.{name} is {value!r}, which config.json cannot keep: {error}"
                ) from error
    return sections


def _read_settings(r: ml_collections.ConfigDict) -> None:
    """Takes the settings of a JSON file, in sections or flat, under our names or rlvla's."""
    path = files.local(r.settings)
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object of settings, found {type(content).__name__}")
    known = {name: _KINDS[name] for name in r if name in _KINDS and name != "settings"}
    known |= {name: _KINDS[field] for name, field in _RENAMED.items()} | {"image_size": int}
    known |= {"beta": float}
    sections = {k: v for k, v in content.items() if isinstance(v, dict) and k not in known}
    flat = {k: v for k, v in content.items() if k not in (*sections, "description")}
    sections.pop("description", None)
    for name, value in [pair for s in (flat, *sections.values()) for pair in s.items()]:
        if name in _OF_THE_DATA:
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}: {name!r} is no setting of config.offline_rl{hint}")
        words = rl_config.expected(known[name], value)
        if name == "beta" and not words and not value > 0:
            words = "a number above 0"
        if words:
            raise ValueError(f"{path}: {name!r} is {value!r}; expected {words}")
        value = 1 / value if name == "beta" else value
        value = (value, value) if name == "image_size" else value
        field = _RENAMED.get(name, name)
        r[field] = tuple(value) if isinstance(value, list) else value
        print(f"{path}: config.offline_rl.{field}={r[field]}")
    r.settings = ""  # what it says is said now
