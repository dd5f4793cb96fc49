"""Where a LeRobot dataset keeps what: the folders of version 3.0, and those of 2.1.

In 3.0 a file holds many episodes and tables are parquet; in 2.1 every episode has files of its own
and tables are JSON lines.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from policymix import files
from policymix.data import columns, statistics, tables, video_files

_MB = 2**20
_PACKED = 256  # rows of the episode table that are Python objects at a time: these are large
_DATA_V3 = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_V3 = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES_V3 = "meta/episodes/chunk-000/file-000.parquet"
_DATA_V21 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_VIDEO_V21 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


class _Layout:
    """What both versions share.

    Attributes:
      folder: the dataset's; features: with the automatic ones; schema: of the data files.
      data_files: written so far, in the order of frames.
      picture: how the pictures of a data file are called.
    """

    vector, picture = "List", "frame-{:06d}.png"

    def __init__(self, folder, features, fps: int, data_mb: float, video_mb: float, chunks: int):
        self.folder, self.features, self._fps = folder, features, fps
        self._data_mb, self._video_mb, self._chunks_size = data_mb, video_mb, chunks
        self.schema = columns.schema(features, self.vector)
        self.data_files: list[pathlib.Path] = []
        self._rows: list[dict[str, Any]] = []
        self._cameras = [name for name, f in features.items() if f["dtype"] == "video"]

    def column(self, name: str) -> np.ndarray:
        """A feature of numbers, read back: [num_frames, *shape]."""
        feature, dtype = self.features[name], np.dtype(self.features[name]["dtype"])
        return np.concatenate(
            [
                tables.to_numpy(
                    tables.read(path, [name])[name], dtype, list(feature["shape"]), str(path)
                )
                for path in self.data_files
            ]
        )

    def _path(self, template: str, **places: Any) -> pathlib.Path:
        path = self.folder / template.format(**places)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Version3(_Layout):
    """Version 3.0: data and videos in files of many episodes, the next begun when one is full."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._sink = self._parquet = None
        self._episodes_schema = columns.episodes_schema(self.features)
        self._packed: list[pa.Table] = []
        self._num_frames = 0
        limit = self._video_mb * _MB
        self._videos = {
            name: _Videos(name, functools.partial(self._video, name), self._fps, limit)
            for name in self._cameras
        }

    def add(
        self,
        row: dict[str, Any],
        table: pa.Table,
        segments: Mapping[str, video_files.Segment],
        stats: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Writes an episode.

        Args:
          row: its episode_index, tasks and length.
          table: its rows.
          segments: {camera: its frames} of all videos.
          stats: {feature: {stat: array}}.
        """
        first = self._num_frames
        chunk, file = self._write(table)
        row |= {"data/chunk_index": chunk, "data/file_index": file}
        row |= {"dataset_from_index": first, "dataset_to_index": first + len(table)}
        for name, segment in segments.items():
            row |= self._videos[name].append(segment)
        for name, found in stats.items():
            row |= {f"stats/{name}/{stat}": values.tolist() for stat, values in found.items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._num_frames += len(table)
        self._rows.append(row)
        if len(self._rows) == _PACKED:
            self._pack()

    def _pack(self) -> None:
        self._packed.append(pa.Table.from_pylist(self._rows, self._episodes_schema))
        self._rows.clear()

    def _write(self, table: pa.Table) -> tuple[int, int]:
        """Appends to the data files, a row group; returns the indices of chunk and file."""
        if self._parquet is not None:
            size = self._sink.tell()
            if size + size / self._written * len(table) >= self._data_mb * _MB:
                self._close_data()
        if self._parquet is None:
            chunk, file = divmod(len(self.data_files), self._chunks_size)
            path = self._path(_DATA_V3, chunk_index=chunk, file_index=file)
            self._sink = path.open("wb")
            self._parquet = pq.ParquetWriter(self._sink, self.schema)
            self._written = 0
            self.data_files.append(path)
        self._parquet.write_table(table, row_group_size=len(table))
        self._written += len(table)
        return divmod(len(self.data_files) - 1, self._chunks_size)

    def _video(self, name: str, number: int) -> tuple[pathlib.Path, tuple[int, int]]:
        """(the path of a camera's file, its indices of chunk and file)"""
        chunk, file = divmod(number, self._chunks_size)
        path = self._path(_VIDEO_V3, video_key=name, chunk_index=chunk, file_index=file)
        return path, (chunk, file)

    def _close_data(self) -> None:
        if self._parquet is not None:
            self._parquet.close()  # writes the footer
            self._sink.close()
            self._sink = self._parquet = None

    def close(self) -> None:
        """Ends all files of data and videos."""
        self._close_data()
        for videos in self._videos.values():
            videos.close()

    def abandon(self) -> None:
        """Closes what will be deleted, so that what went wrong before is the error that is told."""
        with contextlib.suppress(Exception):
            self._close_data()
        for videos in self._videos.values():
            videos.abandon()

    def info(self) -> dict[str, Any]:
        """What info.json says of the layout."""
        return {
            "chunks_size": self._chunks_size,
            "data_files_size_in_mb": self._data_mb,
            "video_files_size_in_mb": self._video_mb,
        } | _paths(_DATA_V3, _VIDEO_V3, self._cameras)

    def finish(self, tasks: list[str], stats: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the tables of the folder meta, once all is closed."""
        self._pack()
        pq.write_table(pa.concat_tables(self._packed), self._path(_EPISODES_V3))
        pq.write_table(_tasks_table(tasks), self._path("meta/tasks.parquet"))
        files.write_json(self._path("meta/stats.json"), _as_lists(stats))


class _Videos:
    """The files of one camera in version 3.0.

    Args:
      name: the camera's.
      place: number of a file → (its path, its indices of chunk and file).
      limit: the bytes that no file reaches, unless an episode alone does.
    """

    def __init__(self, name: str, place: Callable, fps: int, limit: float):
        self._name, self._place, self._fps, self._limit = name, place, fps, limit
        self._file: video_files.File | None = None
        self._num_files = 0

    def append(self, segment: video_files.Segment) -> dict[str, Any]:
        """Writes an episode; returns where it lies, as the episode table says it."""
        if self._file is not None:
            full = self._file.size + segment.size >= self._limit
            if full or not self._file.takes(segment):
                self.close()
        if self._file is None:
            path, self._indices = self._place(self._num_files)
            self._file = video_files.File(path, segment, self._fps)
            self._num_files += 1
        first = self._file.append(segment)
        found = {
            "chunk_index": self._indices[0],
            "file_index": self._indices[1],
            "from_timestamp": first / self._fps,
            "to_timestamp": (first + segment.num_frames) / self._fps,
        }
        return {f"videos/{self._name}/{key}": value for key, value in found.items()}

    def close(self) -> None:
        if self._file is not None:
            opened, self._file = self._file, None
            opened.close()

    def abandon(self) -> None:
        if self._file is not None:
            with contextlib.suppress(Exception):
                self._file.abandon()


class Version21(_Layout):
    """Version 2.1: a data file and a video per camera for every episode."""

    vector, picture = "Sequence", "frame_{:06d}.png"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._stats: list[str] = []  # lines: as objects they take ten times the memory

    def add(
        self,
        row: dict[str, Any],
        table: pa.Table,
        segments: Mapping[str, video_files.Segment],
        stats: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Writes an episode; arguments as those of `Version3.add`."""
        number = row["episode_index"]
        places = {"episode_index": number, "episode_chunk": number // self._chunks_size}
        path = self._path(_DATA_V21, **places)
        pq.write_table(table, path)
        self.data_files.append(path)
        for name, segment in segments.items():
            path = self._path(_VIDEO_V21, video_key=name, **places)
            video = video_files.File(path, segment, self._fps)
            try:
                video.append(segment)
            except BaseException:
                with contextlib.suppress(Exception):
                    video.abandon()
                raise
            video.close()
        self._rows.append(row)
        self._stats.append(_line({"episode_index": number, "stats": _as_lists(stats)}))

    def close(self) -> None:
        """Nothing is open between episodes."""

    abandon = close

    def info(self) -> dict[str, Any]:
        """What info.json says of the layout."""
        episodes = len(self._rows)
        return {
            "total_videos": episodes * len(self._cameras),
            "total_chunks": -(-episodes // self._chunks_size),
            "chunks_size": self._chunks_size,
        } | _paths(_DATA_V21, _VIDEO_V21, self._cameras)

    def finish(self, tasks: list[str], stats: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the tables of the folder meta. `stats` of all frames have no place there."""
        del stats
        named = ({"task_index": number, "task": task} for number, task in enumerate(tasks))
        self._write_lines("tasks", map(_line, named))
        self._write_lines("episodes", map(_line, self._rows))
        self._write_lines("episodes_stats", self._stats)

    def _write_lines(self, name: str, lines: Iterable[str]) -> None:
        files.write_whole(self._path(f"meta/{name}.jsonl"), "".join(lines).encode())


def _line(row: dict[str, Any]) -> str:
    return f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n"


VERSIONS = {"v3.0": Version3, "v2.1": Version21}


def _paths(data: str, video: str, cameras: list[str]) -> dict[str, Any]:
    return {"data_path": data, "video_path": video if cameras else None}


def _as_lists(stats: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list]]:
    return {
        name: {stat: found[stat].tolist() for stat in statistics.NAMES if stat in found}
        for name, found in stats.items()
    }


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
