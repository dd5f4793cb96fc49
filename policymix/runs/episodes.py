"""Episodes of LeRobot datasets copied into others: the one loop behind splitting and editing.

Numbers and texts are copied as they are, timestamps are frame_index / fps, pictures keep their
bytes, and videos their compressed frames where the output has the same codec; tasks go by their
sentence. Episodes are read, decoded and packed ahead in threads and added in order, so that the
output has the same bytes whatever the number of workers.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from policymix import metrics, processes
from policymix.data import columns, lerobot, pictures, statistics, tables, video_files, writer
from policymix.runs import records

Episodes = Sequence[tuple[lerobot.Dataset, int]]

PICTURES = columns.PICTURES
ENCODING = ("info", "video_info", "fps")  # of a feature: how it is stored, not what it is
_DECODED = 64  # frames of a video that are decoded at a time
_PER_PIXEL = {"image": 1.5, "video": 0.2}  # bytes that newly packed pictures take at most, usually


@dataclasses.dataclass(frozen=True)
class Target:
    """What the datasets that episodes are copied into are like.

    Attributes:
      features: {name: declaration} without those that every dataset has.
      fps, robot_type, version, codec: as `writer.Writer`.
      replaced: {feature: [num_frames of the source, …]}: columns that take the source's place.
      keep_stats: whether the statistics of pictures are the source's, where it has whole ones.
    """

    features: dict[str, dict[str, Any]]
    fps: int
    robot_type: str | None
    version: str
    codec: str
    replaced: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    keep_stats: bool = True


def target(
    dataset: lerobot.Dataset, *, version: str = "", pictures: str = "", codec: str = ""
) -> Target:
    """What copies of a dataset are like: as itself, but for what is asked for.

    Args:
      version: "v3.0" or "v2.1"; as the dataset where empty, and 2.1 for one of 2.0.
      pictures: "image" or "video", which all its cameras become.
      codec: of videos, "av1" or "h264"; as the dataset's first video where empty.

    Raises:
      ValueError: an unknown choice, or a feature that cannot be written.
    """
    known = {"version": writer.VERSIONS, "pictures": PICTURES, "codec": video_files.CODECS}
    for name, value in {"version": version, "pictures": pictures, "codec": codec}.items():
        if value and value not in known[name]:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known[name])}")
    features = {}
    for name, feature in dataset.features.items():
        if name not in writer.AUTOMATIC:
            kept = {key: value for key, value in feature.items() if key not in ENCODING}
            kept["shape"] = [int(n) for n in feature["shape"]] or [1]
            if pictures and feature["dtype"] in PICTURES:
                kept["dtype"] = pictures
            columns.check_feature(name, kept, str(dataset.path))
            features[name] = kept
    found = [_codec(dataset, name) for name in _videos(dataset)]
    return Target(
        features=features,
        fps=dataset.fps,
        robot_type=dataset.info.get("robot_type"),
        version=version or ("v3.0" if dataset.version == "v3.0" else "v2.1"),
        codec=codec or next((c for c in found if c in video_files.CODECS), video_files.CODECS[0]),
    )


def chosen(text: str, dataset: lerobot.Dataset, flag: str = "episodes") -> list[int]:
    """Episodes by number, 3,5:8 → [3, 5, 6, 7]. ValueError unless the dataset has them all."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, colon, last = part.partition(":")
        if not (first.isdecimal() and last.isdecimal() if colon else first.isdecimal()):
            raise ValueError(
                f"{flag}={text!r}: {part!r} is neither a number nor a range; write 3,5:8 for 3, 5, "
                "6 and 7"
            )
        numbers = range(int(first), int(last) if colon else int(first) + 1)
        if not numbers or numbers[-1] >= dataset.num_episodes:
            raise ValueError(
                f"{flag}={text!r}: {part!r} names episodes that {dataset.path} does not have; it "
                f"has 0..{dataset.num_episodes - 1} (the end of a range is not part of it)"
            )
        found.update(numbers)
    return sorted(found)


def check(target: Target, episodes: Episodes) -> int:
    """Looks at what can be known before any work, and returns the bytes that a copy needs.

    Raises:
      FileNotFoundError, ValueError: a video that is missing, or a place outside of its dataset.
    """
    total, seen = 0, set()
    lengths: collections.Counter = collections.Counter()
    for dataset, episode in episodes:
        lengths[dataset] += int(dataset.episode_to[episode] - dataset.episode_from[episode])
        for name in _videos(dataset):
            with _naming(dataset, episode):
                path, _ = dataset.clip(name, episode)
                if path not in seen and not pathlib.Path(path).is_file():
                    raise FileNotFoundError(
                        f"{path}: no such file, expected the video of {name!r}; copy or download "
                        "the dataset again"
                    )
                seen.add(path)
    for dataset, length in lengths.items():
        records.read(dataset)
        share = length / dataset.num_frames
        total += share * sum(path.stat().st_size for path in dataset.data_files)
        for name, feature in target.features.items():
            if feature["dtype"] in PICTURES and _is_packed_anew(target, dataset, name):
                height, width = pictures.size(feature, f"{dataset.path}: {name!r}")
                total += length * height * width * _PER_PIXEL[feature["dtype"]]
    return int(total + sum(pathlib.Path(path).stat().st_size for path in seen))


def say(target: Target, episodes: Episodes, name: str) -> None:
    """Prints what an output will be, in one line."""
    frames = sum(int(d.episode_to[e] - d.episode_from[e]) for d, e in episodes)
    said = f"{name}: {len(episodes)} episodes, {frames:,} frames, {target.version}"
    sources = dict.fromkeys(dataset for dataset, _ in episodes)
    for key, feature in target.features.items():
        if feature["dtype"] in PICTURES:
            anew = any(_is_packed_anew(target, dataset, key) for dataset in sources)
            kind = target.codec if feature["dtype"] == "video" else "pictures"
            said += f"; {key}: {kind}, {'encoded anew' if anew else 'copied'}"
    print(said)


def copy(
    target: Target,
    outputs: Mapping[pathlib.Path, Episodes],
    what: str,
    *,
    num_workers: int = 0,
    overwrite: bool = False,
) -> None:
    """Writes a dataset of episodes into each folder of `outputs`, all in one pass.

    Within an output the episodes of one source ascend, and sources follow one another. Files
    `record.csv` go with their episodes (`records.write`).

    Args:
      what: what progress is called.
      num_workers: threads that read, decode and encode ahead; 0: one per core, 8 at most.

    Raises:
      ValueError, OSError: a source that is damaged, by file and episode; a disk without room.
    """
    jobs = _in_order(outputs)
    workers = num_workers or min(8, processes.num_cores())
    if workers < 1:
        raise ValueError(f"num_workers is {workers}; expected 1 or more, or 0 for one per core")
    readers = {d: _Reader(d, target) for d in dict.fromkeys(d for _, d, _ in jobs)}
    with contextlib.ExitStack() as stack:
        writers = {path: stack.enter_context(_writer(path, target, overwrite)) for path in outputs}
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))

        def prepare(job: tuple) -> writer.Prepared:
            number, (path, dataset, episode) = job
            with _naming(dataset, episode, writers[path].path):
                arrays, tasks, stats = readers[dataset].read(episode)
                return writers[path].prepare(arrays, tasks, stats, number)

        numbers = {path: itertools.count() for path in outputs}
        numbered = [(next(numbers[job[0]]), job) for job in jobs]
        prepared = processes.ahead(pool, prepare, numbered, workers)
        stack.callback(prepared.close)
        with metrics.Progress(what, len(jobs)) as shown:
            for path, dataset, episode in jobs:
                ready = next(prepared)
                with _naming(dataset, episode, writers[path].path):
                    writers[path].add(ready)
                shown.step()
        for path, episodes in outputs.items():
            records.write(writers[path].folder / "meta", episodes)


class _Reader:
    """What `Writer.prepare` takes, of the episodes of one source; threads may share it."""

    def __init__(self, dataset: lerobot.Dataset, target: Target):
        self._dataset, self._target = dataset, target
        self._stats = dataset.episode_stats() if target.keep_stats else None
        self._tasks = dataset.column("task_index")
        self._films = [name for name in _videos(dataset) if name in target.features]
        stored = target.features.keys() - target.replaced.keys() - set(self._films)
        self._rows = _Rows(dataset, sorted(stored))

    def read(self, episode: int) -> tuple[dict[str, Any], list[str], dict | None]:
        """(values of every feature, the task of every frame, statistics of pictures)"""
        dataset, target = self._dataset, self._target
        first, end = int(dataset.episode_from[episode]), int(dataset.episode_to[episode])
        stored, arrays = self._rows.get(first, end), {}
        for name, feature in target.features.items():
            if name in target.replaced:
                arrays[name] = target.replaced[name][first:end]
            elif name not in self._films:
                arrays[name] = stored[name]
            elif feature["dtype"] == "image":
                arrays[name] = self._decoded(name, first, end)
            else:
                path, frame = dataset.clip(name, episode)
                arrays[name] = video_files.Clip(path, frame, end - first, dataset.fps)
        tasks = [dataset.tasks[task] for task in self._tasks[first:end]]
        return arrays, tasks, self._kept_stats(episode)

    def _decoded(self, name: str, first: int, end: int) -> list[bytes]:
        """A video's frames as PNG files; raw ones would take a hundred times the memory."""
        packed: list[bytes] = []
        for start in range(first, end, _DECODED):
            images = self._dataset.frames(name).get(np.arange(start, min(start + _DECODED, end)))
            packed += map(pictures.png, images)
        return packed

    def _kept_stats(self, episode: int) -> dict | None:
        """Those of pictures that are whole; of the others the writer looks at the pictures."""
        if self._stats is None:
            return None
        kept = {}
        for name, feature in self._target.features.items():
            if feature["dtype"] in PICTURES and name in self._stats[episode]:
                with contextlib.suppress(ValueError):  # of a form that no version of LeRobot wrote
                    kept[name] = statistics.of_pictures(self._stats[episode][name], name)
        return {name: stats for name, stats in kept.items() if stats}


class _Rows:
    """Columns of the data files, a row group at a time: a whole column may not fit in memory."""

    def __init__(self, dataset: lerobot.Dataset, names: Sequence[str]):
        dataset.column("index")  # a frame is found by its row: the order is checked there
        self._dataset, self._names = dataset, names
        self._groups: list[tuple[pathlib.Path, int]] = []
        starts = [0]
        for path in dataset.data_files:
            with tables.parquet(path) as file:
                for group in range(file.num_row_groups):
                    self._groups.append((path, group))
                    starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
        self._starts = np.array(starts)
        self._last: tuple[int, pa.Table] | None = None  # large groups hold many episodes
        self._lock = threading.Lock()

    def get(self, first: int, end: int) -> dict[str, Any]:
        """{name: values of the frames first..end-1}, pictures as the bytes that are stored."""
        found: dict[str, list] = {name: [] for name in self._names}
        group = int(np.searchsorted(self._starts, first, side="right")) - 1
        while self._starts[group] < end:
            start = int(self._starts[group])
            table = self._group(group).slice(max(0, first - start), end - max(first, start))
            for name in self._names:
                found[name].append(self._values(name, table[name], self._groups[group][0]))
            group += 1
        return {
            name: list(itertools.chain(*parts)) if isinstance(parts[0], list) else _joined(parts)
            for name, parts in found.items()
        }

    def _group(self, number: int) -> pa.Table:
        with self._lock:  # all would read a large group at once
            if self._last is None or self._last[0] != number:
                path, group = self._groups[number]
                with tables.parquet(path) as file:
                    if missing := set(self._names) - set(file.schema_arrow.names):
                        raise ValueError(f"{path} lacks the columns {sorted(missing)}")
                    self._last = number, file.read_row_group(group, self._names)
            return self._last[1]

    def _values(self, name: str, column: pa.ChunkedArray, path: pathlib.Path) -> Any:
        feature, where = self._dataset.features[name], f"{path}: {name!r}"
        if name not in self._dataset.camera_keys:
            dtype = np.dtype(feature["dtype"]) if name in self._dataset.numeric_keys else None
            return tables.to_numpy(column, dtype, [int(n) for n in feature["shape"]], where)
        if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
            raise ValueError(
                f"{where} is stored as {column.type}, expected pictures as struct<bytes: binary, "
                "path: string>"
            )
        found = pc.struct_field(column, "bytes").to_pylist()
        if None in found:
            raise ValueError(
                f"{where} has frames without bytes, only a path at best; write the dataset again "
                "with the pictures inside"
            )
        return found


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _in_order(outputs: Mapping[pathlib.Path, Episodes]) -> list[tuple]:
    """(output, dataset, episode) of all outputs: one source after another, each read once."""
    jobs = [(path, d, e) for path, episodes in outputs.items() for d, e in episodes]
    places = {dataset: place for place, dataset in enumerate(dict.fromkeys(d for _, d, _ in jobs))}
    return sorted(jobs, key=lambda job: (places[job[1]], job[2]))


def _writer(path: pathlib.Path, target: Target, overwrite: bool) -> writer.Writer:
    return writer.Writer(
        path,
        fps=target.fps,
        features=target.features,
        robot_type=target.robot_type,
        version=target.version,
        codec=target.codec,
        overwrite=overwrite,
    )


@contextlib.contextmanager
def _naming(
    dataset: lerobot.Dataset, episode: int, output: pathlib.Path | None = None
) -> Iterator[None]:
    """Says of an error which episode of the source it is of, not of which output."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's own: what was written is named elsewhere
        said, where = str(error), f"{output}, episode "
        if output is not None and said.startswith(where):
            said = said.removeprefix(where).partition(": ")[2]
        # Plain ones: those of libraries are made in other ways.
        kinds = (FileNotFoundError, OSError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{dataset.path}, episode {episode}: {said}") from error


def _videos(dataset: lerobot.Dataset) -> list[str]:
    return [k for k in dataset.camera_keys if dataset.features[k]["dtype"] == "video"]


def _codec(dataset: lerobot.Dataset, name: str) -> str:
    """The codec of a video, with its pixel format if that is unusual: as its first file says, for
    info.json is not always right. "" where it cannot be read, which is told with its episode.
    """
    first = int(np.argmax(dataset.episode_to > dataset.episode_from))
    path, _ = dataset.clip(name, first)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            pixels = stream.codec_context.pix_fmt
            unusual = f"/{pixels}" * (pixels != video_files.PIX_FMT)
            return stream.codec.canonical_name + unusual
    except (OSError, IndexError, AttributeError, av.FFmpegError):
        return ""


def _is_packed_anew(target: Target, dataset: lerobot.Dataset, name: str) -> bool:
    """Whether pictures change their form. Of a video that is copied, episodes that do not begin at
    a keyframe still do.
    """
    dtype = target.features[name]["dtype"]
    if dataset.features[name]["dtype"] != dtype:
        return True
    return dtype == "video" and _codec(dataset, name) not in (target.codec, "")
