"""Where the episodes of a LeRobot dataset are on video: the file, and the first frame there."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from policymix.data import tables

_OFF = 0.1  # how far an episode may begin from a frame, in frames: writers add up durations
_LARGEST = 2**53  # that float64 counts to


def on_video(
    path: pathlib.Path, info: Mapping[str, Any], key: str
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Where the episodes of a LeRobot dataset are on video.

    Args:
      path: its folder. info: its meta/info.json. key: a feature of dtype video.

    Returns:
      The video files, which of these every episode is in, int64 [num_episodes], and the number of
      its first frame there, int64 [num_episodes].

    Raises:
      ValueError: metadata that does not say where, contradicts itself, or leads out of the folder.
    """
    version, where = info["codebase_version"], f"{path / 'meta' / 'info.json'}: video_path"
    table = tables.meta_files(path, version)[2:]
    if version == "v3.0":
        chunks, numbers, first_frames = _of_table(table, info["fps"], f"videos/{key}")
        values = [{"chunk_index": c, "file_index": n} for c, n in zip(chunks, numbers, strict=True)]
    else:
        size, count = int(info.get("chunks_size") or 1000), int(info["total_episodes"])
        values = [{"episode_chunk": n // size, "episode_index": n} for n in range(count)]
        first_frames = np.zeros(count, np.int64)
    template = info.get("video_path")
    names = [tables.place(path, template, where, {"video_key": key, **v}) for v in values]
    numbered = {name: number for number, name in enumerate(dict.fromkeys(names))}
    of_episode = np.array([numbered[name] for name in names], np.int64)
    return [str(path / name) for name in numbered], of_episode, first_frames


def _of_table(
    table: Sequence[pathlib.Path], fps: int, prefix: str
) -> tuple[list[int], list[int], np.ndarray]:
    """(indices of chunks, indices of files, numbers of the first frames) of version 3.0."""
    columns = [f"{prefix}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    end = f"{prefix}/to_timestamp"
    rows = tables.episodes(table, [*columns, "length"], [end])
    found = np.array([[row[name] for name in columns] for row in rows], np.float64)
    empty = np.array([row["length"] == 0 for row in rows])
    found = np.where(empty[:, None] & ~np.isfinite(found), 0, found)
    if (wrong := np.flatnonzero(~((found >= 0) & (found < _LARGEST)).all(axis=1))).size:
        raise ValueError(
            f"{table[0]}: episode {wrong[0]} has {columns} = {found[wrong[0]].tolist()}, "
            f"expected numbers from 0 to {_LARGEST}; {tables.AGAIN}"
        )
    exact = found[:, 2] * fps
    first_frames = np.rint(exact)
    if (wrong := np.flatnonzero((np.abs(exact - first_frames) > _OFF) & ~empty)).size:
        raise ValueError(
            f"{table[0]}: episode {wrong[0]} has {columns[2]} {found[wrong[0], 2]:.6f} s, "
            f"expected a multiple of 1 / fps = 1 / {fps} s; correct it, or fps in meta/info.json"
        )
    for episode, row in enumerate(rows):
        if row.get(end) is not None and not empty[episode]:
            _check_end(table[0], episode, row[end] - found[episode, 2], row["length"], fps, end)
    chunks, numbers = found[:, :2].astype(np.int64).T.tolist()
    return chunks, numbers, first_frames.astype(np.int64)


def _check_end(
    file: pathlib.Path, episode: int, seconds: float, length: int, fps: int, name: str
) -> None:
    """ValueError unless an episode lasts on video as long as its frames do."""
    if not abs(seconds * fps - length) <= 0.5:
        raise ValueError(
            f"{file}: episode {episode} has {length} frames, {length / fps:.6f} s, but {name} is "
            f"{seconds:.6f} s after from_timestamp; correct what is wrong there, or fps "
            f"in meta/info.json, or {tables.AGAIN}"
        )
