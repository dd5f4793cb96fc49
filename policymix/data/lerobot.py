"""LeRobot datasets, versions 3.0, 2.1 and 2.0, read with pyarrow alone.

A dataset is a folder: `meta/info.json` declares the features, an episode table gives the length of
every episode, and `data/*/*.parquet` holds one row per frame. A frame is addressed by its global
index; an episode is a contiguous range of frames. Numbers, bools and text are read here; features
of dtype image and video are listed in `camera_keys`.
"""

import collections
import contextlib
import difflib
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from policymix import files

VERSIONS = ("v2.0", "v2.1", "v3.0")
TOLERANCE_S = 1e-4  # how far an offset may lie from a whole frame, in seconds; LeRobot's default
_PICTURES = ("image", "video")
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_DATA_PATH_V3 = "data/chunk-{:03d}/file-{:03d}.parquet"
_DATA_PATH_V2 = "data/chunk-{:03d}/episode_{:06d}.parquet"
_AGAIN = "copy or download the dataset again"


def open_dataset(path: str | pathlib.Path) -> "Dataset":
    """Opens the LeRobot dataset in the folder `path` and checks that it is complete.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file is unreadable, the version unknown, or row counts contradict each other.
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
    info = _read_info(info_path)
    tasks = _read_tasks(path, info["codebase_version"])
    lengths, expected = _read_episodes(path, info)
    if len(lengths) != info["total_episodes"]:
        raise ValueError(
            f"{info_path} announces total_episodes = {info['total_episodes']}, but the episode "
            f"table has {len(lengths)} rows; {_AGAIN}"
        )
    data_files = _checked_files(path, info, int(lengths.sum()), expected)
    return Dataset(path, info, tasks, lengths, data_files)


class Dataset:
    """A LeRobot dataset, made by `open_dataset`.

    Attributes:
      path: its folder.
      info: meta/info.json as it stands; version: "v2.0", "v2.1" or "v3.0"; fps: frames per second.
      features: {name: {"dtype", "shape", ...}} as declared in info.json.
      num_frames, num_episodes: totals.
      tasks: sentences; the position in the list is the task_index.
      episode_from, episode_to: int64 [num_episodes], the episodes' frames, `to` exclusive.
      camera_keys: features of dtype image or video; numeric_keys: features of numbers and bools.
    """

    def __init__(self, path, info: dict, tasks: list[str], lengths: np.ndarray, data_files: list):
        self.path = path
        self.info = info
        self.version: str = info["codebase_version"]
        self.fps = int(info["fps"])
        self.features: dict[str, dict] = info["features"]
        self.num_frames = int(info["total_frames"])
        self.num_episodes = len(lengths)
        self.tasks = tasks
        self.episode_to = np.cumsum(lengths, dtype=np.int64)
        self.episode_from = self.episode_to - lengths
        self.camera_keys = [k for k, f in self.features.items() if f["dtype"] in _PICTURES]
        self.numeric_keys = [k for k, f in self.features.items() if _numpy_dtype(f) is not None]
        self._data_files = data_files
        self._columns: dict[str, np.ndarray] = {}
        self._fingerprint: str | None = None

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
                raise ValueError(f"{self.path} has no {name!r}{hint} It has {list(self.features)}")
            if not _is_readable(self.features[name]):
                readable = [key for key, other in self.features.items() if _is_readable(other)]
                raise ValueError(
                    f"{self.path}: {name!r} has dtype {self.features[name]['dtype']}; this "
                    f"version reads numeric and text features: {readable}"
                )
            self._check_order()
            self._columns[name] = self._load(name)
        return self._columns[name]

    def stored(self, name: str) -> Iterator[pa.ChunkedArray]:
        """A feature as it lies in the data files, pictures too: one arrow column per file."""
        return (_read_parquet(path, [name])[name] for path in self._data_files)

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
        if self._fingerprint is None:
            total = hashlib.sha256()
            info, _, *table = _meta_files(self.path, self.version)
            for path in [info, *table, *self._data_files]:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                total.update(f"{path.relative_to(self.path).as_posix()} {digest}\n".encode())
            self._fingerprint = total.hexdigest()
        return self._fingerprint

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
            if (wrong := np.flatnonzero(found != values)).size:
                raise ValueError(
                    f"{self.path / 'data'}, out of order: row {wrong[0]} should have {name} "
                    f"{values[wrong[0]]}, found {found[wrong[0]]}; rewrite the dataset with "
                    "LeRobot"
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
                f"{self.path / 'data'}: task_index goes from {values.min()} to {values.max()}, "
                f"but the table of tasks in {self.path / 'meta'} has {len(self.tasks)} rows"
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
                f"frames of {self.path} (within {TOLERANCE_S} s); use multiples of 1/{self.fps} s"
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
    text = values.dtype == object
    if text != (dtype is None) or not np.can_cast(values.dtype, dtype or object, "same_kind"):
        raise ValueError(f"{where} holds {array.type}, info.json declares {feature['dtype']}")
    values = values.astype(dtype or object)
    return values.reshape(len(column), *([] if declared == [1] else declared))


def _read_info(path: pathlib.Path) -> dict:
    """meta/info.json, its keys that matter here checked. Unknown keys are left alone."""
    info = files.read_json(path)
    needed = {"codebase_version", "features", "fps", "total_episodes", "total_frames"}
    if missing := needed - (info.keys() if isinstance(info, dict) else set()):
        raise ValueError(f"{path} lacks {sorted(missing)}; {_AGAIN}")
    if info["codebase_version"] not in VERSIONS:
        raise ValueError(
            f"{path}: codebase_version is {info['codebase_version']!r}, expected one of "
            f"{', '.join(VERSIONS)}; convert the dataset with LeRobot's own scripts"
        )
    for key in ("fps", "total_frames", "total_episodes"):
        value = info[key]
        if type(value) not in (int, float) or value != value // 1 or value < 1:
            raise ValueError(f"{path}: {key} is {value!r}, expected a whole number, 1 or more")
    features = info["features"] if isinstance(info["features"], dict) else {"?": info["features"]}
    for key, feature in features.items():
        if not isinstance(feature, dict) or not {"dtype", "shape"} <= feature.keys():
            raise ValueError(f"{path}: feature {key!r} needs dtype and shape, found {feature!r}")
    return info


def _meta_files(path: pathlib.Path, version: str) -> list[pathlib.Path]:
    """info.json, the table of tasks, and the file or files of the episode table."""
    if version == "v3.0":
        episodes = _parquet_files(path / "meta" / "episodes")
        return [path / "meta" / "info.json", path / "meta" / "tasks.parquet", *episodes]
    return [path / "meta" / name for name in ("info.json", "tasks.jsonl", "episodes.jsonl")]


def _read_tasks(path: pathlib.Path, version: str) -> list[str]:
    file = _meta_files(path, version)[1]
    # In parquet a pandas frame whose index is the sentence: "task", with older writers nameless.
    names = ["task", "__index_level_0__"]
    rows = _in_order(_read_rows(file, ["task_index"], names), "task_index", file)
    column = next((name for name in names if rows and all(name in row for row in rows)), None)
    if column is None:
        raise ValueError(f"{file}: expected rows with task_index and task, found {rows[:2]}")
    return [row[column] for row in rows]


def _read_episodes(path: pathlib.Path, info: Mapping[str, Any]) -> tuple[np.ndarray, dict]:
    """Lengths in frames, int64 [num_episodes], and {data file: rows} as far as the table tells."""
    needed, where = ["episode_index", "length"], ["data/chunk_index", "data/file_index"]
    table = _meta_files(path, info["codebase_version"])[2:]
    # Order and types of other columns vary between the files of a table: take what is needed.
    rows = [row for file in table for row in _read_rows(file, needed, where)]
    rows = _in_order(rows, "episode_index", table[0])
    lengths = np.array([row["length"] for row in rows], np.int64)
    expected = collections.Counter()
    for number, row in enumerate(rows):
        if info["codebase_version"] != "v3.0":
            chunk = number // int(info.get("chunks_size") or 1000)
            expected[path / _DATA_PATH_V2.format(chunk, number)] += row["length"]
        elif all(name in row for name in where):
            expected[path / _DATA_PATH_V3.format(*(row[name] for name in where))] += row["length"]
    return lengths, expected


def _in_order(rows: list[dict], key: str, path: pathlib.Path) -> list[dict]:
    """Rows sorted by `key`, which must number them 0, 1, 2, ..."""
    found = [row[key] for row in rows]
    if set(found) != set(range(len(rows))):
        raise ValueError(
            f"{path}: expected {key} 0..{len(rows) - 1}, once each, found {found[:16]}"
        )
    return sorted(rows, key=lambda row: row[key])


def _checked_files(path: pathlib.Path, info: dict, tabled: int, expected: dict) -> list:
    """The data files in order of frames, once their rows are known to add up to total_frames."""
    found = _parquet_files(path / "data", example=next(iter(expected), None))
    rows = {}
    for file in found:
        with _parquet(file) as opened:
            rows[file] = opened.metadata.num_rows
    total = sum(rows.values())
    if total == info["total_frames"] == tabled:
        return found
    # LeRobot finds data files by their names, so what the table says of them only explains.
    for file, length in expected.items():
        if file not in rows:
            raise FileNotFoundError(f"{file}: no such file, expected {length} rows; {_AGAIN}")
        if rows[file] != length:
            raise ValueError(f"{file}: expected {length} rows, found {rows[file]}; {_AGAIN}")
    raise ValueError(
        f"{path / 'meta' / 'info.json'}: total_frames is {info['total_frames']}, but data files "
        f"have {total} rows and the episode table counts {tabled}; {_AGAIN}"
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


def _read_parquet(path: pathlib.Path, needed: list[str], optional: Sequence[str] = ()) -> pa.Table:
    """The columns `needed`, and those of `optional` that the file has."""
    with _parquet(path) as file:
        have = file.schema_arrow.names
        if missing := [name for name in needed if name not in have]:
            raise ValueError(f"{path} lacks the columns {missing}; it has {have[:16]}")
        names = [*needed, *(name for name in optional if name in have)]
        return file.read(columns=names)


def _read_rows(path: pathlib.Path, needed: list[str], optional: Sequence[str]) -> list[dict]:
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
                raise ValueError(f"{path}, line {number}: expected {needed}, found {row!r}")
            rows.append(row)
    return rows
