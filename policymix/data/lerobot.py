"""LeRobot datasets, versions 3.0, 2.1 and 2.0, read with pyarrow and PyAV alone.

A dataset is a folder: `meta/info.json` declares the features, an episode table gives the length of
every episode, and `data/*/*.parquet` holds one row per frame. A frame is addressed by its global
index; an episode is a contiguous range of frames. Pictures lie in the rows (dtype image) or in
`videos/` (dtype video).
"""

import collections
import concurrent.futures
import difflib
import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from policymix.data import columns, frames, pictures, places, tables

TOLERANCE_S = 1e-4  # how far a time may lie from a whole frame, in seconds; LeRobot's default
_PICTURES = ("image", "video")
_DATA_PATH_V3 = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_DATA_PATH_V2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_ORDER = ("index", "episode_index")
_TIMES = ("frame_index", "timestamp")


def open_dataset(path: str | pathlib.Path, *, empty_episodes: bool = False) -> "Dataset":
    """Opens the LeRobot dataset in the folder `path` and checks that it is complete.

    Video files are looked at when frames are asked for.

    Args:
      path: the folder.
      empty_episodes: whether episodes without frames are accepted, as to delete them.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file is unreadable, the version unknown, row counts contradict each other, an
        episode has no frames, or a path in info.json leads out of the folder.
    """
    path = pathlib.Path(path).expanduser()
    info_path = path / "meta" / "info.json"
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory; give the one with meta/ and data/")
    if not info_path.is_file():
        found = sorted(child.name for child in path.iterdir())[:8]
        raise FileNotFoundError(
            f"{info_path}: no such file; {path} holds {found}. Give one with meta/ and data/"
        )
    info = tables.read_info(info_path)
    tasks = tables.tasks(tables.meta_files(path, info["codebase_version"])[1])
    lengths, expected = _read_lengths(path, info, empty_episodes)
    if len(lengths) != info["total_episodes"]:
        raise ValueError(
            f"{info_path} announces total_episodes = {info['total_episodes']}, but the episode "
            f"table has {len(lengths)} rows; {tables.AGAIN}"
        )
    data_files = _checked_files(path, info, int(lengths.sum()), expected)
    return Dataset(path, info, tasks, lengths, data_files)


class Dataset:
    """A LeRobot dataset, made by `open_dataset`.

    Attributes:
      path: its folder.
      info: meta/info.json as it stands; version: "v2.0", "v2.1" or "v3.0"; fps: frames per second;
        robot_type: text or None.
      features: {name: {"dtype", "shape", ...}} as declared in info.json.
      num_frames, num_episodes: totals.
      tasks: sentences; the position in the list is the task_index.
      episode_from, episode_to: int64 [num_episodes], the episodes' frames, `to` exclusive.
      camera_keys: features of dtype image or video; numeric_keys: features of numbers and bools.
      data_files: the parquet files of its rows, in order.
    """

    def __init__(self, path, info: dict, tasks: list[str], lengths: np.ndarray, data_files: list):
        self.path = path
        self.info = info
        self.version: str = info["codebase_version"]
        self.fps = int(info["fps"])
        self.robot_type: str | None = info.get("robot_type")
        self.features: dict[str, dict] = info["features"]
        self.num_frames = int(info["total_frames"])
        self.num_episodes = len(lengths)
        self.tasks = tasks
        self.episode_to = np.cumsum(lengths, dtype=np.int64)
        self.episode_from = self.episode_to - lengths
        self.camera_keys = [k for k, f in self.features.items() if f["dtype"] in _PICTURES]
        self.numeric_keys = [k for k, f in self.features.items() if _numpy_dtype(f) is not None]
        self.data_files: list[pathlib.Path] = data_files
        self._readable = [k for k, f in self.features.items() if _is_readable(f)]
        self._columns: dict[str, np.ndarray] = {}
        self._frames: dict[str, frames.Frames] = {}
        self._offsets: dict[tuple, np.ndarray] = {}
        self._fingerprint: str | None = None

    def column(self, name: str) -> np.ndarray:
        """One feature of all frames: [num_frames, *shape], or [num_frames] where shape is [1].

        It has the declared dtype (text: object). Only this column is read, once; do not write to
        it, it is kept.

        Raises:
          ValueError: no such feature, pictures, or values that contradict info.json; frames out of
            order, or at other times than frame_index / fps.
        """
        if name not in self._columns:
            feature = self._feature(name)
            if name not in self._readable:
                raise ValueError(
                    f"{self.path}: {name!r} has dtype {feature['dtype']}; columns are "
                    f"numbers and text: {self._readable}; pictures are read as frames"
                )
            if "index" in self._columns:
                self._columns |= self._load([name])
            else:
                self._columns |= self._load_in_order(name)
        return self._columns[name]

    def frames(self, key: str) -> frames.Frames:
        """The pictures of a feature of dtype image or video; the same object each time.

        Raises:
          ValueError: no such feature, or one without colour pictures; video files that the
            metadata does not name, or outside the folder.
        """
        if key not in self._frames:
            frames.check_is_image(self, key)
            where, feature = f"{self.path}: {key!r}", self.features[key]
            shape = pictures.size(feature, where)
            if feature["dtype"] == "image":
                made = frames.PictureFrames(where, key, shape, self.data_files, self.episode_to)
            else:
                place = places.on_video(self.path, self.info, key)
                bounds = self.episode_from, self.episode_to
                made = frames.VideoFrames(where, key, shape, self.fps, *place, *bounds)
            self._frames[key] = made
        return self._frames[key]

    def clip(self, key: str, episode: int) -> tuple[pathlib.Path, int]:
        """(the video file of an episode, the number of its first frame there); raises as `frames`,
        and for features of dtype image.
        """
        found = self.frames(key)
        if not isinstance(found, frames.VideoFrames):
            raise ValueError(f"{self.path}: {key!r} is no video: its pictures lie in the rows")
        return found.clip(episode)

    def item(
        self, index: int, delta_timestamps: Mapping[str, Sequence[float]] | None = None
    ) -> dict[str, Any]:
        """The frame `index` as LeRobot gives it, but for pictures, which are uint8 here.

        Args:
          index: 0..num_frames-1.
          delta_timestamps: {feature: T offsets in seconds}.

        Returns:
          {feature: [*shape]} and `task`, the frame's sentence; pictures are [3, hh, ww]. A feature
          in `delta_timestamps` is [T, *shape]: beyond the episode its first or last frame is
          repeated, and `<feature>_is_pad` [T] is true there. For T = 1 LeRobot leaves out the
          axis of videos, and so does this.

        Raises:
          IndexError: no such frame.
          ValueError: an offset is no whole number of frames, or of a feature that has no values;
            pictures that cannot be read.
        """
        if not 0 <= index < self.num_frames:
            raise IndexError(f"{self.path} has frames 0..{self.num_frames - 1}, not {index}")
        deltas = delta_timestamps or {}
        offsets = {key: self._in_frames(key, seconds) for key, seconds in deltas.items()}
        episode = np.searchsorted(self.episode_to, index, side="right")
        first, last = self.episode_from[episode], self.episode_to[episode] - 1
        fields: dict[str, Any] = {}
        for key, feature in self.features.items():
            if key in offsets:
                wanted = index + offsets[key]
                inside = np.minimum(np.maximum(wanted, first), last)
                fields[key] = self._values(key, inside)
                if feature["dtype"] == "video" and len(wanted) == 1:
                    fields[key] = fields[key][0]
                fields[f"{key}_is_pad"] = inside != wanted
            elif key in self.camera_keys:
                fields[key] = self._values(key, np.array([index]))[0]
            elif key in self._readable:
                value = self.column(key)[index]
                fields[key] = value.copy() if isinstance(value, np.ndarray) else value
        fields["task"] = self.tasks[self.column("task_index")[index]]
        return fields

    def fingerprint(self) -> str:
        """SHA-256 (hex) of info.json, the episode table and all data files, wherever they lie."""
        if self._fingerprint is None:
            total = hashlib.sha256()
            info, _, *table = tables.meta_files(self.path, self.version)
            for path in [info, *table, *self.data_files]:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                total.update(f"{path.relative_to(self.path).as_posix()} {digest}\n".encode())
            self._fingerprint = total.hexdigest()
        return self._fingerprint

    def check_episodes(self, keys: Iterable[str]) -> dict[int, str]:
        """{episode: what is wrong with it}: no frames, or numbers of the features `keys` that are
        not finite. Empty where all is well.
        """
        values = ((key, self.column(key)) for key in keys)
        return columns.bad_episodes(values, self.episode_from, self.episode_to)

    def episode_stats(
        self, keys: Sequence[str] | None = None
    ) -> list[dict[str, dict[str, np.ndarray]]] | None:
        """The statistics of every episode, {feature: {stat: array}}, as the dataset has them, of
        the features `keys` or all; None where it has none, as v2.0. Deviations of pictures may be
        wrong in v3.0, see `statistics.of_pictures`.
        """
        return tables.episode_stats(tables.meta_files(self.path, self.version)[2:], keys)

    def _feature(self, name: str) -> dict:
        if name in self.features:
            return self.features[name]
        near = difflib.get_close_matches(name, self.features, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{self.path} has no {name!r}{hint} It has {list(self.features)}")

    def _values(self, key: str, indices: np.ndarray) -> np.ndarray:
        """Of these frames, int [n]: [n, *shape], pictures uint8 [n, 3, hh, ww]."""
        if key in self.camera_keys:
            return np.ascontiguousarray(np.moveaxis(self.frames(key).get(indices), -1, 1))
        return self.column(key)[indices]

    def _load_in_order(self, name: str) -> dict[str, np.ndarray]:
        """A column and those of `_ORDER`: a frame is found by its row, so that must be right before
        any column is handed out. All are read at once, since files may be many.
        """
        times = _TIMES if all(key in self.features for key in _TIMES) else ()
        found = self._load(list(dict.fromkeys([*_ORDER, *times, name])))
        lengths = self.episode_to - self.episode_from
        episodes = np.repeat(np.arange(self.num_episodes), lengths)
        expected = {"episode_index": episodes, "index": np.arange(self.num_frames)}
        if times and any(self.features[key]["dtype"] == "video" for key in self.camera_keys):
            # LeRobot finds a frame on video by its timestamp, this by its place in the episode.
            expected["frame_index"] = expected["index"] - self.episode_from[episodes]
        for key, values in expected.items():
            if (wrong := np.flatnonzero(found[key] != values)).size:
                raise ValueError(
                    f"{self.path / 'data'}, out of order: row {wrong[0]} should have {key} "
                    f"{values[wrong[0]]}, found {found[key][wrong[0]]}; rewrite the dataset with "
                    "LeRobot"
                )
        if times:
            self._check_times(found["frame_index"], found["timestamp"], episodes)
        return {key: found[key] for key in (*_ORDER, name)}

    def _check_times(self, numbers: np.ndarray, times: np.ndarray, episodes: np.ndarray) -> None:
        expected = numbers / self.fps
        # Stored as float32, which for hours is coarser than the tolerance.
        allowed = TOLERANCE_S + np.spacing(np.abs(expected).astype(np.float32))
        wrong = np.flatnonzero(~(np.abs(times - expected) <= allowed))
        if wrong.size:
            row, counts = wrong[0], tables.num_rows(self.data_files)
            file = self.data_files[np.searchsorted(np.cumsum([*counts.values()]), row, "right")]
            raise ValueError(
                f"{file}: episode {episodes[row]}, frame {numbers[row]}, has timestamp "
                f"{times[row]:.6g} s, expected frame_index / fps = {numbers[row]} / {self.fps} = "
                f"{expected[row]:.6g} s (within {TOLERANCE_S} s); correct fps in "
                f"{self.path / 'meta' / 'info.json'}, or the timestamps"
            )

    def _load(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        for name in names:
            if name not in self.features:
                raise ValueError(f"{self.path / 'meta' / 'info.json'} declares no feature {name!r}")

        def part(path: pathlib.Path) -> list[np.ndarray]:
            read = tables.read(path, names)
            return [_to_numpy(read[n], self.features[n], f"{path}: {n!r}") for n in names]

        with concurrent.futures.ThreadPoolExecutor(pictures.THREADS) as pool:
            parts = zip(*pool.map(part, self.data_files), strict=True)
            found = {name: np.concatenate(p) for name, p in zip(names, parts, strict=True)}
        for name, values in found.items():
            if len(values) != self.num_frames:
                raise ValueError(
                    f"{self.path / 'data'}: expected {self.num_frames} rows, found {len(values)}; "
                    f"{tables.AGAIN}"
                )
            values.setflags(write=False)
            if name == "task_index" and (values.min() < 0 or values.max() >= len(self.tasks)):
                raise ValueError(
                    f"{self.path / 'data'}: task_index goes from {values.min()} to {values.max()}, "
                    f"but the table of tasks in {self.path / 'meta'} has {len(self.tasks)} rows"
                )
        return found

    def _in_frames(self, key: str, seconds: Sequence[float]) -> np.ndarray:
        """Offsets in seconds [T] → in frames, int64 [T]."""
        known = (key, *seconds)
        if known not in self._offsets:
            if self._feature(key)["dtype"] not in _PICTURES:
                self.column(key)  # one of other values ends here
            exact = np.asarray(seconds, np.float64) * self.fps
            whole = np.rint(exact)
            wrong = ~(np.abs(exact - whole) / self.fps <= TOLERANCE_S)
            if wrong.any():
                raise ValueError(
                    f"delta_timestamps[{key!r}]: {np.asarray(seconds)[wrong].tolist()} s are no "
                    f"whole frames of {self.path} (within {TOLERANCE_S} s); use multiples of "
                    f"1/{self.fps} s"
                )
            self._offsets[known] = whole.astype(np.int64)
        return self._offsets[known]


def _numpy_dtype(feature: Mapping[str, Any]) -> np.dtype | None:
    """The dtype of a feature of numbers or bools, None for others."""
    try:
        dtype = np.dtype(feature["dtype"])
    except TypeError:
        return None
    return dtype if dtype.kind in "biuf" else None


def _is_readable(feature: Mapping[str, Any]) -> bool:
    return feature["dtype"] == "string" or _numpy_dtype(feature) is not None


def _to_numpy(column: Any, feature: Mapping[str, Any], where: str) -> np.ndarray:
    shape = [int(size) for size in feature["shape"]]
    return tables.to_numpy(column, _numpy_dtype(feature), shape, where)


def _read_lengths(
    path: pathlib.Path, info: Mapping[str, Any], empty_episodes: bool
) -> tuple[np.ndarray, dict[pathlib.Path, int]]:
    """Lengths in frames, int64 [num_episodes], and {data file: rows} as far as the table tells."""
    version, where = info["codebase_version"], ["data/chunk_index", "data/file_index"]
    table = tables.meta_files(path, version)[2:]
    rows = tables.episodes(table, ["length"], where)
    least = 0 if empty_episodes else 1
    for number, row in enumerate(rows):
        if type(row["length"]) is not int or row["length"] < least:
            raise ValueError(
                f"{table[0]}: episode {number} has length {row['length']}, expected {least} or "
                "more frames; delete it with experiments/edit_dataset.py"
            )
    expected = collections.Counter()
    template = info.get("data_path") or (_DATA_PATH_V3 if version == "v3.0" else _DATA_PATH_V2)
    says = f"{path / 'meta' / 'info.json'}: data_path"
    for number, row in enumerate(rows):
        if version != "v3.0":
            chunk = number // int(info.get("chunks_size") or 1000)
            values = {"episode_chunk": chunk, "episode_index": number}
        else:
            values = {"chunk_index": row.get(where[0], 0), "file_index": row.get(where[1], 0)}
        file = path / tables.place(path, template, says, values)
        if version != "v3.0" or all(name in row for name in where):
            expected[file] += row["length"]
    return np.array([row["length"] for row in rows], np.int64), expected


def _checked_files(path: pathlib.Path, info: dict, tabled: int, expected: dict) -> list:
    """The data files in order of frames, once their rows are known to add up to total_frames."""
    # LeRobot finds them by these names, whatever the episode table says; else by data_path.
    pattern = re.sub(r"\{[^}]*\}", "*", info.get("data_path") or "data/")
    pattern = "data/*/*.parquet" if pattern.startswith("data/") else pattern
    found = tables.find(path, pattern, next(iter(expected), None))
    rows = tables.num_rows(found)
    total = sum(rows.values())
    if total == info["total_frames"] == tabled:
        return found
    # What the table says of them only explains.
    for file, length in expected.items():
        if file not in rows:
            raise FileNotFoundError(f"{file}: no such file, expected {length} rows; {tables.AGAIN}")
        if rows[file] != length:
            raise ValueError(f"{file}: expected {length} rows, found {rows[file]}; {tables.AGAIN}")
    raise ValueError(
        f"{path / 'meta' / 'info.json'}: total_frames is {info['total_frames']}, but data files "
        f"have {total} rows and the episode table counts {tabled}; {tables.AGAIN}"
    )
