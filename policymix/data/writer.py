"""LeRobot datasets of version 3.0, written so that LeRobot opens them.

Numbers, bools, text and pictures (PNG inside the data files); videos are not encoded here.
`timestamp`, `frame_index`, `episode_index`, `index` and `task_index` are added to every frame. The
same episodes give the same bytes.
"""

import concurrent.futures
import contextlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from policymix import files
from policymix.data import columns, lerobot, pictures, statistics

_MB = 2**20
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
_SCALAR = {"shape": [1], "names": None}
AUTOMATIC = {"timestamp": {"dtype": "float32"} | _SCALAR} | {
    name: {"dtype": "int64"} | _SCALAR
    for name in ("frame_index", "episode_index", "index", "task_index")
}


class Writer:
    """Writes one dataset; at the end of its `with` block the dataset is there, whole, or nothing.

      with writer.Writer(path, fps=10, features=features) as w:
          w.add_episode({"observation.state": states, "action": actions}, task="open the drawer")

    Args:
      path: the dataset's folder, which appears at the end.
      fps: frames per second, a whole number.
      features: {name: {"dtype", "shape", "names"}} without the automatic ones. Shape [1] is a
        single number or a text; pictures are [height, width, 3], or [3, height, width] with names.
      robot_type: what info.json says of the robot.
      overwrite: whether a dataset in that folder is replaced.
      data_files_size_in_mb, chunks_size: a data file stays below the one, a folder of data files
        has at most the other.

    Raises:
      ValueError: a feature that cannot be written, or no episodes at the end of the block.
      OSError: the folder exists or cannot be written.
    """

    def __init__(
        self,
        path: Any,
        *,
        fps: int,
        features: Mapping[str, Mapping[str, Any]],
        robot_type: str | None = None,
        overwrite: bool = False,
        data_files_size_in_mb: float = 100,
        chunks_size: int = 1000,
    ):
        self.path = files.local(path)
        if fps != int(fps) or fps < 1 or chunks_size < 1:
            raise ValueError(
                f"{self.path}: fps and chunks_size are whole numbers, 1 or more; got {fps=}, "
                f"{chunks_size=}"
            )
        self._fps, self._robot_type, self._overwrite = int(fps), robot_type, overwrite
        self._limit, self._chunks_size = data_files_size_in_mb, int(chunks_size)
        self._given = {name: dict(feature) for name, feature in features.items()}
        for name, feature in self._given.items():
            columns.check_feature(name, feature, str(self.path))
            if name in AUTOMATIC:
                raise ValueError(f"{self.path}: {name!r} is written by itself; leave it out")
        self.features = self._given | AUTOMATIC
        self._schema = columns.schema(self.features)
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._histograms: dict[str, list[np.ndarray]] = {}
        self._num_frames = 0
        self._failed = False

    def __enter__(self) -> "Writer":
        files.check_output(self.path, overwrite=self._overwrite, ours=_is_dataset)
        self._whole = files.whole_directory(self.path, overwrite=self._overwrite)
        self._folder = self._whole.__enter__()
        self._files = _DataFiles(self._folder, self._schema, self._limit, self._chunks_size)
        self._pool = concurrent.futures.ThreadPoolExecutor(pictures.THREADS)
        return self

    def __exit__(self, *raised) -> None:
        self._pool.shutdown()
        try:
            if raised[0] is None:
                self._files.close()
                self._finish()
            else:
                self._files.abandon()
        except BaseException:
            self._whole.__exit__(*sys.exc_info())
            raise
        self._whole.__exit__(*raised)

    @property
    def folder(self) -> pathlib.Path:
        """Where the dataset is in the making: for files of one's own beside it."""
        return self._folder

    def add_episode(self, arrays: Mapping[str, Any], task: str | Sequence[str]) -> None:
        """Writes one episode of T frames.

        Args:
          arrays: {feature: [T, *shape]} of every feature given at the start; shape [1] may be left
            out; pictures are uint8 or T PNG or JPEG files as bytes.
          task: the instruction, or one for each frame.

        Raises:
          ValueError: a feature is missing or unknown, or its values are not as declared; nothing
            of the episode is written then.
        """
        number = len(self._episodes)
        where = f"{self.path}, episode {number}"
        values = self._checked(arrays, where)
        length = len(next(iter(values.values())))
        sentences = _checked_tasks(task, length, where)
        histograms = {
            name: self._histogram(name, values[name], where)
            for name, feature in self._given.items()
            if feature["dtype"] == "image"
        }
        # From here on nothing is wrong with the episode; the disk may still be.
        for sentence in sentences:
            self._tasks.setdefault(sentence, len(self._tasks))
        frames = np.arange(length)
        values |= {
            "timestamp": (frames / self._fps).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(length, number),
            "index": self._num_frames + frames,
            "task_index": np.array([self._tasks[sentence] for sentence in sentences]),
        }
        stats = self._episode_stats(values, histograms)
        try:
            chunk, file = self._files.write(columns.table(self.features, values, self._schema))
        except BaseException:
            self._failed = True
            raise
        for name, counted in histograms.items():
            self._histograms.setdefault(name, []).append(counted)
        row = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(sentences)),
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": self._num_frames,
            "dataset_to_index": self._num_frames + length,
        }
        self._episodes.append(row | stats)
        self._num_frames += length

    def _checked(self, arrays: Mapping[str, Any], where: str) -> dict[str, Any]:
        missing, extra = self._given.keys() - arrays.keys(), arrays.keys() - self._given.keys()
        if missing or extra:
            raise ValueError(
                f"{where}: expected the features {list(self._given)}; missing {sorted(missing)}, "
                f"unknown {sorted(extra)}"
            )
        values = {
            name: columns.checked(feature, arrays[name], f"{where}: {name!r}", self._pool.map)
            for name, feature in self._given.items()
        }
        lengths = {name: len(column) for name, column in values.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(
                f"{where}: expected one or more frames, as many of every feature; found {lengths}"
            )
        return values

    def _histogram(self, name: str, images: list[bytes], where: str) -> tuple[np.ndarray, int]:
        """(how often each value occurs in the sampled pictures, int64 [3, 256]; their number)"""
        shape = pictures.size(self._given[name], where)

        def count(frame: int) -> np.ndarray:
            image = pictures.decode(images[frame], shape, f"{where}: {name!r}, frame {frame}")
            return statistics.histogram(image)

        chosen = statistics.sampled(len(images)).tolist()
        return sum(self._pool.map(count, chosen)), len(chosen)

    def _episode_stats(self, values: Mapping[str, Any], histograms: Mapping[str, Any]) -> dict:
        """{"stats/<feature>/<stat>": nested lists}."""
        row = {}
        for name, feature in self.features.items():
            if feature["dtype"] == "string":
                continue
            if name in histograms:
                stats = statistics.of_histogram(*histograms[name])
            else:
                stats = statistics.of_numbers(values[name])
            row |= {f"stats/{name}/{stat}": stats[stat].tolist() for stat in statistics.NAMES}
        return row

    def _finish(self) -> None:
        """The tables of the folder meta; info.json, without which nothing is a dataset, last."""
        if self._failed:
            raise ValueError(f"{self.path}: an episode could not be written, so nothing is kept")
        if not self._episodes:
            raise ValueError(f"{self.path}: no episodes were added; a dataset has one or more")
        info = self._info()
        (self._folder / _EPISODES_PATH).parent.mkdir(parents=True)
        place = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        rows = [row | place for row in self._episodes]
        schema = columns.episodes_schema(self.features)
        pq.write_table(pa.Table.from_pylist(rows, schema), self._folder / _EPISODES_PATH)
        pq.write_table(_tasks_table(list(self._tasks)), self._folder / "meta" / "tasks.parquet")
        files.write_json(self._folder / "meta" / "stats.json", self._stats(info))
        files.write_json(self._folder / "meta" / "info.json", info)

    def _stats(self, info: dict) -> dict[str, dict[str, list]]:
        """Of all frames, read back from the data files one feature at a time."""
        lengths = np.array([row["length"] for row in self._episodes])
        found = {}
        for name, feature in self.features.items():
            if feature["dtype"] == "string":
                continue
            if name in self._histograms:
                counts, numbers = zip(*self._histograms[name], strict=True)
                found[name] = statistics.of_histogram(sum(counts), sum(numbers))
            else:
                # A new object each time: it would keep every column it has read.
                written = lerobot.Dataset(
                    self._folder, info, list(self._tasks), lengths, self._files.paths
                )
                found[name] = statistics.of_numbers(written.column(name))
        return {
            name: {stat: stats[stat].tolist() for stat in statistics.NAMES}
            for name, stats in found.items()
        }

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": "v3.0",
            "robot_type": self._robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": self._chunks_size,
            "data_files_size_in_mb": self._limit,
            "video_files_size_in_mb": 200,
            "fps": self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": _DATA_PATH,
            "video_path": None,
            "features": self.features,
        }


class _DataFiles:
    """The data files of one dataset, a row group per episode; the next begins when one is full."""

    def __init__(self, folder, schema: pa.Schema, limit: float, chunks_size: int):
        self._folder, self._schema, self._limit = folder, schema, limit * _MB
        self._chunks_size = chunks_size
        self._sink = self._parquet = None
        self._rows = 0
        self.paths: list = []

    def write(self, table: pa.Table) -> tuple[int, int]:
        """Appends an episode; returns the indices of chunk and file it lies in."""
        if self._parquet is not None:
            size = self._sink.tell()
            if size + size / self._rows * len(table) >= self._limit:
                self.close()
        if self._parquet is None:
            self._open()
        self._parquet.write_table(table, row_group_size=len(table))
        self._rows += len(table)
        return divmod(len(self.paths) - 1, self._chunks_size)

    def _open(self) -> None:
        chunk, file = divmod(len(self.paths), self._chunks_size)
        path = self._folder / _DATA_PATH.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._sink = path.open("wb")
        self._parquet = pq.ParquetWriter(self._sink, self._schema)
        self._rows = 0
        self.paths.append(path)

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()  # writes the footer
            self._sink.close()
            self._sink = self._parquet = None

    def abandon(self) -> None:
        """Closes what will be deleted, so that what went wrong before is the error that is told."""
        with contextlib.suppress(Exception):
            self.close()


def _is_dataset(path) -> bool:
    return (path / "meta" / "info.json").is_file()


def _checked_tasks(task: str | Sequence[str], length: int, where: str) -> list[str]:
    """One sentence per frame."""
    sentences = [task] * length if isinstance(task, str) else list(task)
    if len(sentences) != length or not all(isinstance(s, str) for s in sentences):
        raise ValueError(
            f"{where}: task is one text, or {length} of them, one per frame; got "
            f"{len(sentences)}: {sentences[:3]}"
        )
    return sentences


def _tasks_table(tasks: list[str]) -> pa.Table:
    """tasks.parquet: for pandas, a frame whose index is the sentence; that is what LeRobot reads.

    The description of the index is the one that pandas 2 writes itself.
    """
    index = "__index_level_0__"
    kinds = {
        "task_index": {"pandas_type": "int64", "numpy_type": "int64"},
        None: {"pandas_type": "unicode", "numpy_type": "object"},
    }
    described = {
        "index_columns": [index],
        "column_indexes": [
            {"name": None, "field_name": None} | kinds[None] | {"metadata": {"encoding": "UTF-8"}}
        ],
        "columns": [
            {"name": name, "field_name": name or index} | kind | {"metadata": None}
            for name, kind in kinds.items()
        ],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: tasks})
    return table.replace_schema_metadata({"pandas": json.dumps(described)})
