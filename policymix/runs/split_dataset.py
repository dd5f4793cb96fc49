"""One LeRobot dataset into several that share no episode."""

import contextlib
import itertools
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from policymix import files, metrics
from policymix.data import columns, lerobot, pictures, writer

SPLITS = "splits.json"
_WHERE = re.compile(r".*?, episode \d+: ")  # of a split that is not there yet
_PLACE = re.compile(r"(?P<feature>.+?)(\[(?P<dimension>\d+)\])?")


def split(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    num_splits: int = 4,
    seed: int = 42,
    sort_by: str = "",
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[pathlib.Path]:
    """Writes OUTPUT/split_0, split_1, …: complete datasets of version 3.0, and splits.json.

    Episodes are dealt out in the order that `seed` shuffles them into, so that sizes differ by one
    at most; within a split they keep the source's order and are numbered anew, as are frames and
    tasks. Timestamps are frame_index / fps.

    Args:
      sort_by: "observation.state[4]", or the name of a single number: episodes are ordered by
        what it is in their first frame instead, and cut into contiguous parts of that order.
        Every split then holds a region of its own.
      dry_run: whether to print the plan alone.

    Returns:
      The folders of the splits.

    Raises:
      ValueError: too few or too many splits, nothing to sort by, or features that cannot be
        written, as videos.
      OSError: output that exists, or a disk without room.
    """
    source, output = files.local(source), files.local(output)
    dataset = lerobot.open_dataset(source)
    features = _features(dataset)
    parts = assign(dataset, num_splits, seed, sort_by)
    files.check_apart(output, [source])
    files.check_output(output, overwrite=overwrite, ours=lambda path: (path / SPLITS).is_file())
    size = sum(path.stat().st_size for path in (source / "data").glob("*/*.parquet"))
    files.check_space(output, size)
    names = [f"split_{i}" for i in range(num_splits)]
    for name, episodes in zip(names, parts, strict=True):
        lengths = dataset.episode_to[episodes] - dataset.episode_from[episodes]
        print(f"{name}: {len(episodes)} episodes, {lengths.sum():,} frames: {_brief(episodes)}")
    if dry_run:
        print("dry run: nothing was written")
        return [output / name for name in names]
    with files.whole_directory(output, overwrite=overwrite) as folder:
        _write(dataset, features, {folder / n: p for n, p in zip(names, parts, strict=True)})
        files.write_json(
            folder / SPLITS,
            {
                "source": {"path": str(source), "fingerprint": dataset.fingerprint()},
                "seed": seed,
                "sort_by": sort_by,
                "episodes": dict(zip(names, parts, strict=True)),
            },
        )
    print(f"written to {output}")
    return [output / name for name in names]


def assign(
    dataset: lerobot.Dataset, num_splits: int, seed: int = 42, sort_by: str = ""
) -> list[list[int]]:
    """The episodes of every split, ascending; each is in exactly one. Arguments as for `split`."""
    if not 2 <= num_splits <= dataset.num_episodes:
        raise ValueError(
            f"num_splits is {num_splits}; {dataset.path} has {dataset.num_episodes} episodes, so "
            f"2..{dataset.num_episodes} are possible"
        )
    if sort_by:
        order = np.argsort(_first_values(dataset, sort_by), kind="stable")
        return [sorted(part.tolist()) for part in np.array_split(order, num_splits)]
    order = np.random.default_rng(seed).permutation(dataset.num_episodes)
    return [sorted(order[i::num_splits].tolist()) for i in range(num_splits)]


def _first_values(dataset: lerobot.Dataset, sort_by: str) -> np.ndarray:
    """What `sort_by` names in the first frame of every episode: [num_episodes]."""
    place = _PLACE.fullmatch(sort_by)
    feature, dimension = place["feature"], place["dimension"]
    if feature not in dataset.numeric_keys:
        raise ValueError(
            f"sort_by={sort_by!r}: {dataset.path} has no numbers called {feature!r}; it has "
            f"{dataset.numeric_keys}"
        )
    values = dataset.column(feature)[dataset.episode_from]
    if values.ndim == 1 and dimension in (None, "0"):
        return values
    shape = list(values.shape[1:])
    if len(shape) != 1 or dimension is None or int(dimension) >= shape[0]:
        hint = f"write {feature}[0] to {feature}[{shape[0] - 1}]" if len(shape) == 1 else ""
        hint = hint if shape else f"write {feature}"
        raise ValueError(
            f"sort_by={sort_by!r}: {feature!r} of {dataset.path} has shape {shape or [1]}; "
            f"{hint or 'choose a feature that is one number or a vector'}"
        )
    return values[:, int(dimension)]


def _features(dataset: lerobot.Dataset) -> dict[str, dict]:
    """What the splits have, without what every dataset has. ValueError for videos."""
    given = {name: f for name, f in dataset.features.items() if name not in writer.AUTOMATIC}
    if videos := [name for name, feature in given.items() if feature["dtype"] == "video"]:
        raise ValueError(
            f"{dataset.path} has the videos {videos}, and videos are not split yet; record or "
            "convert the dataset with pictures (dtype image)"
        )
    for name, feature in given.items():
        columns.check_feature(name, feature, str(dataset.path))
    return given


def _write(
    dataset: lerobot.Dataset, features: dict[str, dict], parts: dict[pathlib.Path, list[int]]
) -> None:
    """All splits in one pass over the source."""
    of_episode = {episode: path for path, episodes in parts.items() for episode in episodes}
    cameras = {name: pictures.stored(dataset, name) for name in dataset.camera_keys}
    with contextlib.ExitStack() as stack:
        writers = {path: stack.enter_context(_writer(path, dataset, features)) for path in parts}
        episodes = range(dataset.num_episodes)
        for episode in metrics.progress(episodes, f"splitting {dataset.path}"):
            arrays, tasks = _episode(dataset, features, episode, cameras)
            try:
                writers[of_episode[episode]].add_episode(arrays, tasks)
            except ValueError as error:
                what = _WHERE.sub("", str(error), count=1)
                raise ValueError(f"{dataset.path}, episode {episode}: {what}") from error


def _writer(path: pathlib.Path, dataset: lerobot.Dataset, features: dict) -> writer.Writer:
    robot = dataset.info.get("robot_type")
    return writer.Writer(path, fps=dataset.fps, features=features, robot_type=robot)


def _episode(
    dataset: lerobot.Dataset, features: dict, episode: int, cameras: dict[str, Iterator[bytes]]
) -> tuple[dict, list[str]]:
    """(values of every feature, the task of every frame); `cameras` stand at its first frame."""
    frames = slice(dataset.episode_from[episode], dataset.episode_to[episode])
    length = int(frames.stop - frames.start)
    arrays = {
        name: list(itertools.islice(cameras[name], length))
        if name in cameras
        else dataset.column(name)[frames]
        for name in features
    }
    return arrays, [dataset.tasks[task] for task in dataset.column("task_index")[frames]]


def _brief(episodes: list[int]) -> str:
    shown = ", ".join(map(str, episodes[:12]))
    return shown + (f", … {episodes[-1]}" if len(episodes) > 12 else "")
