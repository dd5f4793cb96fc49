"""LeRobot datasets, versions 3.0, 2.1 and 2.0, read with pyarrow alone.

A dataset is a folder: `meta/info.json` declares the features, an episode table gives the length of
every episode, and `data/*/*.parquet` holds one row per frame. A frame is addressed by its global
index; an episode is a contiguous range of frames. Numbers, bools and text are read here; features
of dtype image and video are listed in `camera_keys`.
"""

import collections
import contextlib
import difflib
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from policymix import files

VERSIONS = ("v2.0", "v2.1", "v3.0")
TOLERANCE_S = 1e-4  # how far an offset may lie from a whole frame, in seconds; LeRobot's default
_PICTURES = ("image", "video")
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_EPISODES_V2 = "episodes.jsonl"
_AGAIN = "copy or download the dataset again"


class _Episodes(NamedTuple):
    """What the episode table says."""

    lengths: np.ndarray  # int64 [num_episodes], in frames
    data_files: list[pathlib.Path]  # each episode's; empty where the table does not tell


def open_dataset(path: str | pathlib.Path) -> "Dataset":
    """Opens the LeRobot dataset in the folder `path` and checks that it is complete.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file is unreadable, the version unknown, or row counts contradict each other.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such directory; give one that contains meta/ and data/"
        )
    info_path = path / "meta" / "info.json"
    if not info_path.is_file():
        found = sorted(child.name for child in path.iterdir())[:8]
        raise FileNotFoundError(
            f"{info_path}: no such file, so {path} is no LeRobot dataset; it holds {found}. "
            "Give the directory that contains meta/ and data/"
        )
    info = _read_info(info_path)
    tasks = _read_tasks(path, info)
    episodes = _read_episodes(path, info)
    data_files = _checked_files(path, info, episodes)
    if len(episodes.lengths) != info["total_episodes"]:
        raise ValueError(
            f"{info_path} announces total_episodes = {info['total_episodes']}, but the episode "
            f"table has {len(episodes.lengths)} rows; {_AGAIN}"
        )
    return Dataset(path, info, tasks, episodes.lengths, data_files)


class Dataset:
    """A LeRobot dataset, made by `open_dataset`.

    Attributes:
      path: its folder.
      info: meta/info.json as it stands.
      version: "v2.0", "v2.1" or "v3.0".
      fps: frames per second.
      features: {name: {"dtype", "shape", ...}} as declared in info.json.
      num_frames, num_episodes: totals.
      tasks: sentences; the position in the list is the task_index.
      episode_from, episode_to: int64 [num_episodes], the episodes' frames, `to` exclusive.
      camera_keys: features of dtype image or video.
      numeric_keys: features of numbers and bools.
    """

    def __init__(
        self,
        path: pathlib.Path,
        info: dict,
        tasks: Sequence[str],
        lengths: np.ndarray,
        data_files: Sequence[pathlib.Path],
    ):
        self.path = path
        self.info = info
        self.version: str = info["codebase_version"]
        self.fps = int(info["fps"])
        self.features: dict[str, dict] = info["features"]
        self.num_frames = int(info["total_frames"])
        self.num_episodes = len(lengths)
        self.tasks = list(tasks)
        self.episode_to = np.cumsum(lengths, dtype=np.int64)
        self.episode_from = self.episode_to - lengths
        self.camera_keys = [k for k, f in self.features.items() if f["dtype"] in _PICTURES]
        self.numeric_keys = [k for k, f in self.features.items() if _numpy_dtype(f) is not None]
        self._data_files = list(data_files)
        self._columns: dict[str, np.ndarray] = {}

    def column(self, name: str) -> np.ndarray:
        """One feature of all frames: [num_frames, *shape], or [num_frames] where shape is [1].

        It has the declared dtype (text: object). Only this column is read, once; do not write to
        it, it is kept.

        Raises:
          ValueError: no such feature, pictures, or values that contradict info.json.
        """
        if name not in self._columns:
            if name not in self.features:
                near = difflib.get_close_matches(name, self.features, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise ValueError(
                    f"{self.path} has no feature {name!r}{hint} It has {list(self.features)}"
                )
            if not _is_readable(self.features[name]):
                readable = [key for key, other in self.features.items() if _is_readable(other)]
                raise ValueError(
                    f"{self.path}: {name!r} has dtype {self.features[name]['dtype']}; this version "
                    f"reads numeric and text features: {readable}"
                )
            self._check_order()
            self._columns[name] = self._load(name)
        return self._columns[name]

    def item(
        self, index: int, delta_timestamps: Mapping[str, Sequence[float]] | None = None
    ) -> dict[str, Any]:
        """The frame `index` as LeRobot gives it, without pictures.

        Args:
          index: 0..num_frames-1.
          delta_timestamps: {feature: T offsets in seconds}.

        Returns:
          {feature: [*shape]} and `task`, the frame's sentence. A feature in `delta_timestamps`
          is [T, *shape]: beyond the episode its first or last frame is repeated, and
          `<feature>_is_pad` [T] is true there.

        Raises:
          IndexError: no such frame.
          ValueError: an offset is no whole number of frames, or of a feature that has no values.
        """
        if not 0 <= index < self.num_frames:
            raise IndexError(f"{self.path} has frames 0..{self.num_frames - 1}, not {index}")
        deltas = delta_timestamps or {}
        offsets = {key: self._offsets(key, seconds) for key, seconds in deltas.items()}
        episode = np.searchsorted(self.episode_to, index, side="right")
        first, last = self.episode_from[episode], self.episode_to[episode] - 1
        fields: dict[str, Any] = {}
        for key in filter(lambda key: _is_readable(self.features[key]), self.features):
            if key in offsets:
                frames = index + offsets[key]
                fields[key] = self.column(key)[np.clip(frames, first, last)]
                fields[f"{key}_is_pad"] = (frames < first) | (frames > last)
            else:
                value = self.column(key)[index]
                fields[key] = value.copy() if isinstance(value, np.ndarray) else value
        fields["task"] = self.tasks[self.column("task_index")[index]]
        return fields

    def fingerprint(self) -> str:
        """SHA-256 (hex) of info.json, the episode table and all data files, wherever they lie."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        meta = self.path / "meta"
        table = _parquet_files(meta / "episodes") if _is_v3(self.info) else [meta / _EPISODES_V2]
        total = hashlib.sha256()
        for path in [meta / "info.json", *table, *self._data_files]:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(self.path).as_posix()} {digest}\n".encode())
        return total.hexdigest()

    def _check_order(self) -> None:
        """A frame is found by its row: that must be right before any column is handed out."""
        if "index" in self._columns:
            return
        lengths = self.episode_to - self.episode_from
        expected = {
            "episode_index": np.repeat(np.arange(self.num_episodes), lengths),
            "index": np.arange(self.num_frames),
        }
        for name, values in expected.items():
            found = self._load(name)
            wrong = np.flatnonzero(found != values)
            if wrong.size:
                row = wrong[0]
                raise ValueError(
                    f"{self.path / 'data'}: the frames are out of order: row {row} should have "
                    f"{name} {values[row]}, found {found[row]}; rewrite the dataset with LeRobot"
                )
            self._columns[name] = found

    def _load(self, name: str) -> np.ndarray:
        if name not in self.features:
            raise ValueError(f"{self.path / 'meta' / 'info.json'} declares no feature {name!r}")
        feature = self.features[name]
        parts = [
            _to_numpy(_read_parquet(path, [name])[name], feature, f"{path}: {name!r}")
            for path in self._data_files
        ]
        values = np.concatenate(parts)
        if name == "task_index" and (values.min() < 0 or values.max() >= len(self.tasks)):
            raise ValueError(
                f"{self.path / 'data'}: task_index goes from {values.min()} to {values.max()}, but "
                f"the table of tasks in {self.path / 'meta'} has {len(self.tasks)} rows"
            )
        values.setflags(write=False)
        return values

    def _offsets(self, key: str, seconds: Sequence[float]) -> np.ndarray:
        """Offsets in seconds [T] → in frames, int64 [T]."""
        self.column(key)  # an unknown feature, or one of pictures, ends here
        exact = np.asarray(seconds, np.float64) * self.fps
        frames = np.rint(exact)
        wrong = np.abs(exact - frames) / self.fps > TOLERANCE_S
        if wrong.any():
            raise ValueError(
                f"delta_timestamps[{key!r}]: {np.asarray(seconds)[wrong].tolist()} s are no whole "
                f"frames of {self.path} at {self.fps} fps (to {TOLERANCE_S} s); use multiples of "
                f"1/{self.fps} s"
            )
        return frames.astype(np.int64)


def _numpy_dtype(feature: Mapping[str, Any]) -> np.dtype | None:
    """The dtype of a feature of numbers or bools, None for others."""
    try:
        dtype = np.dtype(feature["dtype"])
    except TypeError:
        return None
    return dtype if dtype.kind in "biuf" else None


def _is_readable(feature: Mapping[str, Any]) -> bool:
    return feature["dtype"] == "string" or _numpy_dtype(feature) is not None


def _to_numpy(column: pa.ChunkedArray, feature: Mapping[str, Any], where: str) -> np.ndarray:
    """An arrow column, lists of any kind and depth → [rows, *shape], or [rows] for shape [1]."""
    array, dtype, shape = column.combine_chunks(), _numpy_dtype(feature), []
    while True:
        array = array.storage if isinstance(array, pa.ExtensionArray) else array
        if array.null_count and dtype is not None:
            raise ValueError(f"{where} has {array.null_count} empty values; fill them in")
        if not any(is_a(array.type) for is_a in _LISTS):
            break
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) > 1:
            raise ValueError(f"{where} holds lists of several lengths: {sorted(lengths)[:8]}")
        shape += lengths
        array = array.flatten()
    declared = [int(size) for size in feature["shape"]]
    if len(column) and (shape or [1]) != (declared or [1]):
        raise ValueError(f"{where} holds values of shape {shape}, info.json declares {declared}")
    values = array.to_numpy(zero_copy_only=False)
    try:
        values = values.astype(dtype or object, casting="same_kind")
    except (TypeError, ValueError):
        raise ValueError(
            f"{where} holds {array.type}, info.json declares {feature['dtype']}"
        ) from None
    return values.reshape(len(column), *([] if declared == [1] else declared))


def _read_info(path: pathlib.Path) -> dict:
    """meta/info.json, its keys that matter here checked. Unknown keys are left alone."""
    info = files.read_json(path)
    needed = {"codebase_version", "data_path", "features", "fps", "total_episodes", "total_frames"}
    if not isinstance(info, dict) or not needed <= info.keys():
        found = sorted(info) if isinstance(info, dict) else type(info).__name__
        raise ValueError(f"{path}: expected an object with {sorted(needed)}, found {found}")
    if info["codebase_version"] not in VERSIONS:
        raise ValueError(
            f"{path}: codebase_version is {info['codebase_version']!r}, expected one of "
            f"{', '.join(VERSIONS)}; convert the dataset with LeRobot's own scripts"
        )
    for key in ("fps", "total_frames", "total_episodes"):
        value = info[key]
        if type(value) not in (int, float) or value != value // 1 or value < 1:
            raise ValueError(f"{path}: {key} is {value!r}, expected a whole number, 1 or more")
    features = info["features"]
    for key, feature in features.items() if isinstance(features, dict) else [("?", features)]:
        found = feature if isinstance(feature, dict) else {}
        if not isinstance(found.get("dtype"), str) or not isinstance(found.get("shape"), list):
            raise ValueError(
                f"{path}: feature {key!r} is {feature!r}, expected an object with dtype and shape"
            )
    return info


def _is_v3(info: Mapping[str, Any]) -> bool:
    return info["codebase_version"] == "v3.0"


def _read_tasks(path: pathlib.Path, info: Mapping[str, Any]) -> list[str]:
    file = path / "meta" / ("tasks.parquet" if _is_v3(info) else "tasks.jsonl")
    # In parquet a pandas frame whose index is the sentence: "task", with older writers nameless.
    names = ["task", "__index_level_0__"]
    rows = _in_order(_read_rows(file, ["task_index"], names), "task_index", file)
    column = next((name for name in names if rows and all(name in row for row in rows)), None)
    if column is None:
        raise ValueError(f"{file}: expected rows with task_index and task, found {rows[:2]}")
    return [row[column] for row in rows]


def _read_episodes(path: pathlib.Path, info: Mapping[str, Any]) -> _Episodes:
    needed, where = ["episode_index", "length"], ["data/chunk_index", "data/file_index"]
    v3 = _is_v3(info)
    table = path / "meta" / ("episodes" if v3 else _EPISODES_V2)
    # Order and types of other columns vary between the files of a table: take what is needed.
    parts = [_read_rows(file, needed, where) for file in (_parquet_files(table) if v3 else [table])]
    rows = _in_order([row for part in parts for row in part], "episode_index", table)
    per_chunk, data_files = int(info.get("chunks_size") or 1000), []
    for number, row in enumerate(rows):
        if not v3:
            fields = {"episode_chunk": number // per_chunk, "episode_index": number}
        elif all(name in row for name in where):
            fields = {"chunk_index": row[where[0]], "file_index": row[where[1]]}
        else:
            continue
        data_files.append(path / info["data_path"].format(**fields))
    return _Episodes(np.array([row["length"] for row in rows], np.int64), data_files)


def _in_order(rows: list[dict], key: str, path: pathlib.Path) -> list[dict]:
    """Rows sorted by `key`, which must number them 0, 1, 2, ..."""
    found = [row[key] for row in rows]
    if set(found) != set(range(len(rows))):
        raise ValueError(f"{path}: expected {key} 0..{len(rows) - 1}, once each, found {found}")
    return sorted(rows, key=lambda row: row[key])


def _checked_files(path: pathlib.Path, info: dict, episodes: _Episodes) -> list[pathlib.Path]:
    """The data files in order of frames, once their rows are known to add up to total_frames."""
    expected = collections.Counter()
    for file, length in zip(episodes.data_files, episodes.lengths.tolist(), strict=False):
        expected[file] += length
    found = _parquet_files(path / "data", example=next(iter(expected), None))
    rows = {}
    for file in found:
        with _parquet(file) as opened:
            rows[file] = opened.metadata.num_rows
    total, tabled = sum(rows.values()), int(episodes.lengths.sum())
    if total == info["total_frames"] == tabled:
        return found
    # LeRobot finds data files by their names, so what the table says of them only explains.
    for file, length in expected.items():
        if file not in rows:
            raise FileNotFoundError(f"{file}: no such file, expected {length} rows; {_AGAIN}")
        if rows[file] != length:
            raise ValueError(f"{file}: expected {length} rows, found {rows[file]}; {_AGAIN}")
    raise ValueError(
        f"{path / 'meta' / 'info.json'} announces total_frames = {info['total_frames']}, but the "
        f"data files have {total} rows and the episode table counts {tabled}; {_AGAIN}"
    )


def _parquet_files(folder: pathlib.Path, example: pathlib.Path | None = None) -> list[pathlib.Path]:
    """folder/*/*.parquet sorted, numbers of any width as numbers; hidden files are passed over."""
    found = [file for file in folder.glob("*/*.parquet") if not file.name.startswith(".")]
    if not found:
        example = example or folder / "chunk-000" / "file-000.parquet"
        raise FileNotFoundError(f"{example}: no such file, nor another parquet file; {_AGAIN}")
    return sorted(found, key=lambda f: (len(f.parent.name), f.parent.name, len(f.name), f.name))


@contextlib.contextmanager
def _parquet(path: pathlib.Path) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file; what pyarrow cannot read becomes one ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_AGAIN}")
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: expected a whole parquet file, found {path.stat().st_size} bytes that "
            f"cannot be read ({reason}); {_AGAIN}"
        ) from error


def _read_parquet(
    path: pathlib.Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> pa.Table:
    """The columns `needed`, and those of `optional` that the file has."""
    with _parquet(path) as file:
        have = file.schema_arrow.names
        if missing := [name for name in needed if name not in have]:
            raise ValueError(f"{path} lacks the columns {missing}; it has {have[:16]}")
        names = [*needed, *(name for name in optional if name in have)]
        # The reader takes "a" for "a.b" too: select once more, by the whole name.
        return file.read(columns=names).select(names)


def _read_rows(path: pathlib.Path, needed: Sequence[str], optional: Sequence[str]) -> list[dict]:
    """The rows of a table in parquet or JSON lines, with at least the columns `needed`."""
    if path.suffix == ".parquet":
        return _read_parquet(path, needed, optional).to_pylist()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_AGAIN}")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}, is not JSON ({error}); {_AGAIN}"
                ) from None
            if not isinstance(row, dict) or any(key not in row for key in needed):
                raise ValueError(f"{path}, line {number}: expected {list(needed)}, found {row!r}")
            rows.append(row)
    return rows
