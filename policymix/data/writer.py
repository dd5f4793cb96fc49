"""LeRobot datasets of version 3.0 and 2.1, written so that LeRobot opens them.

Numbers, bools, text, pictures (PNG inside the data files) and videos. `timestamp`, `frame_index`,
`episode_index`, `index` and `task_index` are added to every frame. The same episodes give the same
bytes.
"""

import concurrent.futures
import dataclasses
import json
import numbers
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from policymix import files
from policymix.data import columns, layouts, pictures, statistics, video_files, videos

VERSIONS = tuple(layouts.VERSIONS)
_THREADS = min(8, os.cpu_count() or 1)  # encoders let go of Python's lock
_BLOCK = 32  # frames of a clip that are decoded at once for statistics
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
        single number or a text; pictures, of dtype image or video, are [height, width, 3], or
        [3, height, width] with names.
      robot_type: what info.json says of the robot.
      overwrite: whether a dataset in that folder is replaced.
      version: of LeRobot's format, "v3.0" or "v2.1".
      codec: of videos, "av1" (LeRobot's default) or "h264".
      data_files_size_in_mb, video_files_size_in_mb: in version 3.0 a file stays below that.
      chunks_size: a folder has at most that many files of data, or of a camera.

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
        version: str = "v3.0",
        codec: str = "av1",
        data_files_size_in_mb: float = 100,
        video_files_size_in_mb: float = 200,
        chunks_size: int = 1000,
    ):
        self.path = files.local(path)
        for name, value in {"fps": fps, "chunks_size": chunks_size}.items():
            if not isinstance(value, numbers.Real) or not value >= 1 or value % 1:
                raise ValueError(
                    f"{self.path}: {name} is {value!r}; expected a whole number, 1 or more"
                )
        if version not in VERSIONS or codec not in video_files.CODECS:
            raise ValueError(
                f"{self.path}: version is one of {', '.join(VERSIONS)} and codec one of "
                f"{', '.join(video_files.CODECS)}; got {version=}, {codec=}"
            )
        self._fps, self._robot_type, self._overwrite = int(fps), robot_type, overwrite
        self._version, self._codec = version, codec
        self._limits = (data_files_size_in_mb, video_files_size_in_mb, int(chunks_size))
        self._given = {name: dict(feature) for name, feature in features.items()}
        for name, feature in self._given.items():
            columns.check_feature(name, feature, str(self.path))
            feature["shape"] = [int(n) for n in feature["shape"]]
            if name in AUTOMATIC:
                raise ValueError(f"{self.path}: {name!r} is written by itself; leave it out")
            _check_json({name: feature}, f"{self.path}: feature {name!r}")
            if feature["dtype"] == "video":
                feature.pop("video_info", None)  # of older datasets
                feature["info"] = self._format(name).info()
        _check_json(robot_type, f"{self.path}: robot_type")
        _check_json(self._limits, f"{self.path}: the size of files")
        self.features = self._given | AUTOMATIC
        self._cameras = [k for k, f in self._given.items() if f["dtype"] in columns.PICTURES]
        self._tasks: dict[str, int] = {}
        self._num_episodes = self._num_frames = 0
        self._pictures = {name: statistics.Total() for name in self._cameras}
        self._sources = video_files.Sources()
        self._failed = False

    def __enter__(self) -> "Writer":
        files.check_output(self.path, overwrite=self._overwrite, ours=_is_dataset)
        self._whole = files.whole_directory(self.path, overwrite=self._overwrite)
        self._folder = self._whole.__enter__()
        kind = layouts.VERSIONS[self._version]
        self._layout = kind(self._folder, self.features, self._fps, *self._limits)
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
        self._camera_pool = concurrent.futures.ThreadPoolExecutor(max(_THREADS, len(self._cameras)))
        return self

    def __exit__(self, *raised) -> None:
        self._camera_pool.shutdown()  # before the pool that it hands pictures to
        self._pool.shutdown()
        try:
            if raised[0] is None:
                self._layout.close()
                self._finish()
            else:
                self._layout.abandon()
        except BaseException:
            self._layout.abandon()
            self._whole.__exit__(*sys.exc_info())
            raise
        self._whole.__exit__(*raised)

    @property
    def folder(self) -> pathlib.Path:
        """Where the dataset is in the making: for files of one's own beside it."""
        return self._folder

    def add_episode(
        self,
        arrays: Mapping[str, Any],
        task: str | Sequence[str],
        stats: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Writes one episode of T frames: `prepare` and `add`. Arguments and errors as of those."""
        self.add(self.prepare(arrays, task, stats))

    def prepare(
        self,
        arrays: Mapping[str, Any],
        task: str | Sequence[str],
        stats: Mapping[str, Mapping[str, Any]] | None = None,
        number: int | None = None,
    ) -> "Prepared":
        """Checks and encodes one episode of T frames; threads may prepare several at a time.

        Args:
          arrays: {feature: [T, *shape]} of every feature given at the start; shape [1] may be left
            out; pictures are uint8 or T PNG or JPEG files as bytes, or for a video a
            `video_files.Clip` of T frames.
          task: the instruction, or one for each frame.
          stats: {feature: {statistic: array}} of features of pictures, which are kept instead of
            being computed again; of what is missing or useless here, pictures are decoded.
          number: what errors call the episode; None: the next one to be added.

        Raises:
          ValueError: a feature is missing or unknown, or its values are not as declared, or cannot
            be encoded.
          FileNotFoundError: a clip's file is missing.
        """
        where = f"{self.path}, episode {self._num_episodes if number is None else number}"
        values = self._checked(arrays, where)
        length = len(next(iter(values.values())))
        sentences = _checked_tasks(task, length, where)
        known = self._checked_stats(stats or {}, where)
        counted, segments = self._encoded(values, known, where)
        found = {
            name: counted[name].stats() if name in counted else statistics.of_numbers(values[name])
            for name, feature in self._given.items()
            if feature["dtype"] != "string"
        }
        return Prepared(length, sentences, values, counted, segments, found)

    def add(self, prepared: "Prepared") -> None:
        """Writes a prepared episode, as the next one. OSError for a disk without room."""
        length, frames = prepared.length, np.arange(prepared.length)
        for sentence in prepared.sentences:
            self._tasks.setdefault(sentence, len(self._tasks))
        own = {
            "timestamp": (frames / self._fps).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(length, self._num_episodes),
            "index": self._num_frames + frames,
            "task_index": np.array([self._tasks[sentence] for sentence in prepared.sentences]),
        }
        stats = prepared.stats | {name: statistics.of_numbers(own[name]) for name in AUTOMATIC}
        tasks = list(dict.fromkeys(prepared.sentences))
        row = {"episode_index": self._num_episodes, "tasks": tasks, "length": length}
        layout = self._layout
        table = columns.table(self.features, prepared.values | own, layout.schema, layout.picture)
        try:
            layout.add(row, table, prepared.segments, stats)
        except BaseException as error:
            self._failed = True
            if isinstance(error, OSError) and error.errno in files.NO_ROOM:
                where = f"{self.path}, episode {self._num_episodes}"
                raise files.no_room(where, error.errno) from error
            raise
        for name, one in prepared.counted.items():
            self._pictures[name].add(one)
        self._num_episodes += 1
        self._num_frames += length

    def _checked(self, arrays: Mapping[str, Any], where: str) -> dict[str, Any]:
        missing, extra = self._given.keys() - arrays.keys(), arrays.keys() - self._given.keys()
        if missing or extra:
            raise ValueError(
                f"{where}: expected the features {list(self._given)}; missing {sorted(missing)}, "
                f"unknown {sorted(extra)}"
            )
        values = {}
        for name, feature in self._given.items():
            if feature["dtype"] == "video" and isinstance(arrays[name], video_files.Clip):
                values[name] = arrays[name]
            else:
                place = f"{where}: {name!r}"
                values[name] = columns.checked(feature, arrays[name], place, self._pool.map)
        lengths = {name: len(column) for name, column in values.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(
                f"{where}: expected one or more frames, as many of every feature; found {lengths}"
            )
        return values

    def _checked_stats(self, stats: Mapping[str, Mapping[str, Any]], where: str) -> dict:
        if extra := stats.keys() - set(self._cameras):
            raise ValueError(
                f"{where}: stats are taken of the pictures {self._cameras} alone, got "
                f"{sorted(extra)}"
            )
        return {k: statistics.of_pictures(v, f"{where}: {k!r}") for k, v in stats.items()}

    def _encoded(self, values: Mapping[str, Any], known: Mapping, where: str) -> tuple[dict, dict]:
        """({camera: its statistics}, {video: its segment}), all cameras at once."""

        def encode(name: str) -> tuple[statistics.Pictures, video_files.Segment | None]:
            place, taken = f"{where}: {name!r}", None
            read = _reader(values[name], self._given[name], place)
            if self._given[name]["dtype"] == "video":
                taken = values[name]
                if not isinstance(taken, video_files.Clip):
                    taken = (read(np.array([frame]))[0] for frame in range(len(values[name])))
                taken = video_files.segment(taken, self._format(name), place, self._sources)
            if known.get(name) is not None:
                return statistics.Pictures(known=known[name]), taken
            sampled = statistics.sampled(len(values[name]))
            blocks = np.array_split(sampled, -(-len(sampled) // _BLOCK))
            if isinstance(values[name], video_files.Clip):  # its reader is for one thread
                counts = [_count(read(block)) for block in blocks]
            else:
                counts = list(self._pool.map(lambda block: _count(read(block)), blocks))
            return statistics.Pictures(sum(counts), len(sampled)), taken

        found = dict(zip(self._cameras, self._camera_pool.map(encode, self._cameras), strict=True))
        segments = {name: taken for name, (_, taken) in found.items() if taken is not None}
        return {name: counted for name, (counted, _) in found.items()}, segments

    def _format(self, name: str) -> video_files.Format:
        height, width = pictures.size(self._given[name], f"{self.path}: {name!r}")
        return video_files.Format(self._codec, self._fps, height, width)

    def _finish(self) -> None:
        """The tables of the folder meta; info.json, without which nothing is a dataset, last."""
        if self._failed:
            raise ValueError(f"{self.path}: an episode could not be written, so nothing is kept")
        if not self._num_episodes:
            raise ValueError(f"{self.path}: no episodes were added; a dataset has one or more")
        stats = self._stats() if self._version == "v3.0" else {}
        self._layout.finish(list(self._tasks), stats)
        info = {
            "codebase_version": self._version,
            "robot_type": self._robot_type,
            "total_episodes": self._num_episodes,
            "total_frames": self._num_frames,
            "total_tasks": len(self._tasks),
        } | self._layout.info()
        paths = {key: info.pop(key) for key in ("data_path", "video_path")}
        info |= {"fps": self._fps, "splits": {"train": f"0:{self._num_episodes}"}}
        info |= paths | {"features": self.features}
        files.write_json(self._folder / "meta" / "info.json", info)

    def _stats(self) -> dict[str, dict[str, np.ndarray]]:
        """Of all frames; numbers are read back from the data files, one feature at a time."""
        return {
            name: self._pictures[name].stats()
            if name in self._pictures
            else statistics.of_numbers(self._layout.column(name))
            for name, feature in self.features.items()
            if feature["dtype"] != "string"
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """An episode that nothing is wrong with, ready to be written.

    Attributes:
      length: T. sentences: one per frame.
      values: as `columns.checked` gives them, and clips.
      counted: {camera: what is known of its pictures}; segments: {video: its packets}.
      stats: {feature: {statistic: array}}, of those that were given.
    """

    length: int
    sentences: list[str]
    values: dict[str, Any]
    counted: dict[str, statistics.Pictures]
    segments: dict[str, video_files.Segment]
    stats: dict[str, dict[str, np.ndarray]]


def _count(images: np.ndarray) -> np.ndarray:
    return sum(statistics.histogram(image) for image in images)


def _reader(values: Any, feature: Mapping[str, Any], where: str) -> Callable:
    """What gives frames of an episode by number: int [n] → uint8 [n, hh, ww, 3]."""
    if isinstance(values, np.ndarray):
        return lambda frames: values[frames]
    shape = pictures.size(feature, where)
    if not isinstance(values, video_files.Clip):
        return lambda frames: np.stack(
            [pictures.decode(values[k], shape, f"{where}, frame {k}") for k in frames]
        )
    opened: list[videos.Reader] = []  # only if needed

    def read(frames: np.ndarray) -> np.ndarray:
        if not opened:
            opened.append(videos.Reader(values.path, values.fps, shape))
        try:
            return opened[0].get(values.first_frame + frames)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    return read


def _check_json(value: Any, where: str) -> None:
    """ValueError for what info.json cannot hold."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is {files.reason(repr(value))}, which JSON has no words for "
            f"({files.reason(error)})"
        ) from error


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
    for sentence in set(sentences):
        columns.check_text(sentence, f"{where}: task")
    return sentences
