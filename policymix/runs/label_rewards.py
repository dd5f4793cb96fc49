"""The reward of every frame of a dataset: as it was recorded, by a rule, or from a file; and with
which frames the task ended.
"""

import csv
import io
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from policymix import files
from policymix.data import lerobot, opening, writer

NAMES = ("next.reward", "reward")  # LeRobot's name, and that of the chunk-level datasets
# Where chunk-level offline RL looks for rewards, and what tells it that a task ended.
RECORDED = ("reward", "next.reward", "subgoal", "next.success", "success")
ENDS = ("auto", "success", "reward", "always", "never")
_ENDED = ("next.terminated", "terminated", "is_terminal")
_SUCCESS = ("next.success", "success")
_MASKS = "masks"  # 0 where the task has ended
_COMPARE = {
    ">=": np.greater_equal,
    "<=": np.less_equal,
    "==": np.equal,
    ">": np.greater,
    "<": np.less,
}
_COMPARED = re.compile(rf"([^<>=]+?)\s*({'|'.join(_COMPARE)})\s*([^<>=]+)")
_FRAMES = ("frame_index", "first_frame", "last_frame")  # columns of a table of rewards
_NAMED = ([], ["frame_index"], ["first_frame", "last_frame"])  # those that go together
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


def key(dataset: opening.Dataset) -> str:
    """The first of RECORDED that a dataset has; "" if it has none."""
    return next((name for name in RECORDED if name in dataset.features), "")


def recorded(dataset: opening.Dataset, feature: str = "") -> tuple[str, np.ndarray]:
    """(the feature of rewards, the reward of every frame: float64 [num_frames]): `feature`, or the
    first of RECORDED that the dataset has.

    Raises:
      ValueError: there is none, or it is something else than one number a frame.
    """
    if chosen := feature or key(dataset):
        return chosen, _number(dataset, chosen)
    raise ValueError(
        f"{dataset.path} has no rewards, none of {', '.join(RECORDED)}: name another feature with "
        f"config.offline_rl.reward_key, of {_numbers(dataset)}, or get them from {_how(dataset)}"
    )


def ends(dataset: opening.Dataset, rule: str, rewards: np.ndarray) -> tuple[np.ndarray, str]:
    """Whether the task ended with the action of each frame: bool [num_frames]; and what says so.

    Args:
      rule: one of ENDS. "success": where next.success or success is true; "reward": at an episode's
        last frame, if its reward is above 0; "always": at every last frame; "never"; "auto": as
        next.terminated, terminated or is_terminal say, else OGBench's masks, else "success" if
        there is such a feature, else "reward".
      rewards: [num_frames].

    Raises:
      ValueError: no feature for the rule, or something else than one number a frame.
    """
    found = np.zeros(dataset.num_frames, bool)
    if rule == "never":
        return found, "never, as is said"
    numbers = _numbers(dataset)
    success = next((name for name in _SUCCESS if name in numbers), "")
    if rule == "auto":
        for name in (*_ENDED, _MASKS):
            if name in numbers:  # masks of pictures are others
                values = _number(dataset, name)
                return (values == 0 if name == _MASKS else values > 0), f"as {name!r} says"
        rule = "success" if success else "reward"
    if rule == "success":
        if not success:
            raise ValueError(
                f"config.offline_rl.terminals is 'success', and {dataset.path} has none of "
                f"{', '.join(_SUCCESS)}; it has {numbers}"
            )
        return _number(dataset, success) > 0, f"as {success!r} says"
    # Where an episode's last frame is there to be seen alone, its last action is before that.
    last = dataset.episode_to - 1 - getattr(dataset, "ends_seen", False)
    found[last] = True if rule == "always" else rewards[last] > 0
    why = "with every last frame" if rule == "always" else "its last reward is above 0"
    return found, why


def _number(dataset: opening.Dataset, name: str) -> np.ndarray:
    """A feature of one number a frame, float64 [num_frames]; ValueError for another."""
    if name in dataset.features and name not in _numbers(dataset):
        declared = dataset.features[name]
        raise ValueError(
            f"{dataset.path}: {name!r} is {declared['dtype']} {list(declared['shape'])}; one "
            f"number a frame is needed, as are {_numbers(dataset)}"
        )
    return np.asarray(dataset.column(name), np.float64).reshape(-1)


def _numbers(dataset: opening.Dataset) -> list[str]:
    """The features of one number a frame."""
    shapes = {name: list(dataset.features[name]["shape"]) for name in dataset.numeric_keys}
    return [name for name, shape in shapes.items() if shape in ([], [1])]


def _how(dataset: opening.Dataset) -> str:
    """How a dataset gets rewards."""
    if isinstance(dataset, lerobot.Dataset):
        return "edit_dataset.py --operation=label_rewards"
    return getattr(dataset, "no_rewards", "a LeRobot dataset, which edit_dataset.py can label")


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
        or, with first_frame and last_frame in its place, all frames from the one to the other,
        both included;
        FILE.json: {"episode": [frames]}: 1 in these frames, 0 elsewhere, as the sub-goals that
        chunk-level rewards are made of;
        "FEATURE>=NUMBER,…", with >, >=, <, <= or ==: sub-goals, each of which gives 1 in the first
        frame of an episode where it holds, and nothing after that. Where several are first met in
        one frame, their rewards add up.
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
    elif any(sign in rule for sign in "<>="):
        for sub_goal in rule.split(","):
            values[_first_frames(dataset, sub_goal)] += 1
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
            "(episode_index,frame_index,reward), FILE.json ({episode: [frames]}) or sub-goals "
            "(FEATURE>=NUMBER,…)"
        )
    return value


def _first_frames(dataset: lerobot.Dataset, sub_goal: str) -> np.ndarray:
    """Where a sub-goal is first met, int [n], in the n episodes where it is."""
    parts = _COMPARED.fullmatch(sub_goal.strip())
    try:
        feature, sign, number = parts.groups() if parts else ("", "", "")
        bound = float(number)
    except ValueError:
        raise ValueError(
            f"{sub_goal.strip()!r} is no sub-goal: expected a feature, one of "
            f"{', '.join(_COMPARE)}, and a number, as next.success>=1"
        ) from None
    holds = _COMPARE[sign](_number(dataset, feature), bound)
    met = np.flatnonzero(holds)
    episodes = np.searchsorted(dataset.episode_to, met, side="right")
    _, first = np.unique(episodes, return_index=True)
    print(f"{sub_goal.strip()} is met in {len(first)} of {dataset.num_episodes} episodes")
    return met[first]


def _csv(path: pathlib.Path, dataset: lerobot.Dataset) -> list[tuple[int, float]]:
    """(frame of the dataset, reward) of every line."""
    found: dict[int, float] = {}
    try:
        lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True)
        names, *rows = [(lines.line_num, row) for row in lines if row]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table in CSV ({files.reason(error)})") from error
    names = [name.strip() for name in names[1]]
    which = [name for name in _FRAMES if name in names]
    if not {"episode_index", "reward"} <= set(names) or which not in _NAMED:
        raise ValueError(
            f"{path}: expected the columns episode_index, frame_index and reward in the first "
            f"line, or first_frame and last_frame for frame_index; found {names}"
        )
    for line, row in rows:
        try:
            if len(row) != len(names):
                raise ValueError(f"expected {len(names)} values, found {len(row)}")
            told = dict(zip(names, row, strict=True))
            episode, reward = int(told["episode_index"]), float(told["reward"])
            if not abs(reward) <= _LARGEST:
                raise ValueError(f"reward {reward} is not finite in float32")
            places = [_place(dataset, episode, int(told[name])) for name in which]
            places = places or [_place(dataset, episode, None)]
            if places[-1] < places[0]:
                raise ValueError(
                    f"first_frame is {told['first_frame']}, after last_frame {told['last_frame']}"
                )
            for place in range(places[0], places[-1] + 1):
                if place in found:
                    raise ValueError("the frame has a reward already")
                found[place] = reward
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
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
