"""Rewards for every frame of a dataset, by a rule or from a file."""

import csv
import io
import pathlib
from collections.abc import Sequence

import numpy as np

from policymix import files
from policymix.data import lerobot, writer

NAMES = ("next.reward", "reward")  # LeRobot's name, and that of the chunk-level datasets
_LARGEST = float(np.finfo(np.float32).max)
FEATURE = {"dtype": "float32", "shape": [1], "names": None}


def name(dataset: lerobot.Dataset, feature: str = "") -> str:
    """The feature that is to hold the rewards: `feature`, or what the dataset calls them already.

    Raises:
      ValueError: it is something else than one number a frame.
    """
    chosen = feature or next((name for name in NAMES if name in dataset.features), NAMES[0])
    declared = dataset.features.get(chosen, FEATURE)
    single = chosen in dataset.numeric_keys and list(declared["shape"]) in ([], [1])
    if chosen in writer.AUTOMATIC or (chosen in dataset.features and not single):
        raise ValueError(
            f"{dataset.path}: {chosen!r} is {declared['dtype']} {list(declared['shape'])}, which "
            "rewards cannot take the place of; choose another feature"
        )
    return chosen


def rewards(
    dataset: lerobot.Dataset, rule: str, successes: Sequence[int] | None = None
) -> np.ndarray:
    """The reward of every frame: float32 [num_frames].

    Args:
      rule: one of
        "success_at_end": 1 at the last frame of every episode in `successes`, 0 elsewhere;
        "zero", or a number: the same everywhere;
        FILE.csv with the columns episode_index, frame_index and reward; frames that are not named
        get 0. Without the column frame_index the last frame of the episode gets the reward, so
        that it is the episode's return;
        FILE.json: {"episode": [frames]}: 1 in these frames, 0 elsewhere, as the sub-goals that
        chunk-level rewards are made of.
      successes: numbers of episodes; None: all.

    Raises:
      FileNotFoundError, ValueError: no such rule or file, or frames that the dataset lacks.
    """
    values = np.zeros(dataset.num_frames, np.float32)
    if successes is not None and rule != "success_at_end":
        raise ValueError(f"reward={rule}: only success_at_end takes a list of episodes")
    if rule == "success_at_end":
        chosen = np.arange(dataset.num_episodes) if successes is None else np.array(successes, int)
        values[dataset.episode_to[chosen] - 1] = 1
    elif (path := files.local(rule)).suffix in (".csv", ".json"):
        if not path.is_file():
            raise FileNotFoundError(f"reward={rule}: no such file")
        for place, reward in (_csv if path.suffix == ".csv" else _json)(path, dataset):
            values[place] = reward
    else:
        values[:] = _constant(rule)
    return values


def say(dataset: lerobot.Dataset, values: np.ndarray, feature: str) -> None:
    """Prints how many frames and episodes have a reward."""
    ends = np.cumsum(values != 0)[dataset.episode_to - 1]
    rewarded = np.count_nonzero(np.diff(ends, prepend=0))
    print(
        f"{feature}: {np.count_nonzero(values):,} of {len(values):,} frames are not 0, in "
        f"{rewarded} of {dataset.num_episodes} episodes; sum {values.sum(dtype=np.float64):g}"
    )


def _constant(rule: str) -> float:
    try:
        value = 0.0 if rule == "zero" else float(rule)
    except ValueError:
        value = np.nan
    if not abs(value) <= _LARGEST:
        raise ValueError(
            f"reward={rule!r} is no rule: expected success_at_end, zero, a number, FILE.csv "
            "(episode_index,frame_index,reward) or FILE.json ({episode: [frames]})"
        )
    return value


def _csv(path: pathlib.Path, dataset: lerobot.Dataset) -> list[tuple[int, float]]:
    """(frame of the dataset, reward) of every line."""
    found: dict[int, float] = {}
    try:
        lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True)
        names, *rows = [(lines.line_num, row) for row in lines if row]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table in CSV ({files.reason(error)})") from error
    names = [name.strip() for name in names[1]]
    if not {"episode_index", "reward"} <= set(names):
        raise ValueError(
            f"{path}: expected the columns episode_index, frame_index and reward in the first "
            f"line, found {names}"
        )
    for line, row in rows:
        try:
            if len(row) != len(names):
                raise ValueError(f"expected {len(names)} values, found {len(row)}")
            told = dict(zip(names, row, strict=True))
            episode, reward = int(told["episode_index"]), float(told["reward"])
            frame = int(told["frame_index"]) if "frame_index" in told else -1
            if not abs(reward) <= _LARGEST:
                raise ValueError(f"reward {reward} is not finite in float32")
            place = _place(dataset, episode, None if "frame_index" not in told else frame)
            if place in found:
                raise ValueError("the frame has a reward already")
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        found[place] = reward
    return list(found.items())


def _json(path: pathlib.Path, dataset: lerobot.Dataset) -> list[tuple[int, float]]:
    """(frame of the dataset, 1) of every sub-goal."""
    told = files.read_json(path)
    if not isinstance(told, dict):
        raise ValueError(f"{path}: expected {{episode: [frames]}}, found {type(told).__name__}")
    found = []
    for episode, frames in told.items():
        try:
            if not isinstance(frames, list) or any(type(frame) is not int for frame in frames):
                raise ValueError(f"expected a list of frames, found {frames!r}")
            found += [(_place(dataset, int(episode), frame), 1.0) for frame in frames]
        except ValueError as error:
            raise ValueError(f"{path}, {episode!r}: {files.reason(error)}") from error
    return found


def _place(dataset: lerobot.Dataset, episode: int, frame: int | None) -> int:
    """The frame of the dataset that is `frame` of an episode; None: its last."""
    if not 0 <= episode < dataset.num_episodes:
        raise ValueError(
            f"{dataset.path} has the episodes 0..{dataset.num_episodes - 1}, not {episode}"
        )
    first, end = int(dataset.episode_from[episode]), int(dataset.episode_to[episode])
    if frame is None:
        return end - 1
    if not 0 <= frame < end - first:
        raise ValueError(
            f"episode {episode} of {dataset.path} has the frames 0..{end - first - 1}, not {frame}"
        )
    return first + frame
