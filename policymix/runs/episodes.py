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
import resource
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import av
import numpy as np

from policymix import metrics, processes
from policymix.data import columns, lerobot, pictures, statistics, video_files, writer
from policymix.runs import records, rows

Episodes = Sequence[tuple[lerobot.Dataset, int]]

PICTURES = columns.PICTURES
ENCODING = ("info", "video_info", "fps")  # of a feature: how it is stored, not what it is
_OPEN_FILES = 64  # beside those that each output takes
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
            film = feature["dtype"] == "video"
            how = "encoded anew" if anew else "copied where possible" if film else "copied"
            said += f"; {key}: {target.codec if film else 'pictures'}, {how}"
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
    `record.csv` go with their episodes (`records.write`). It is said how many episodes of a video
    could not be copied.

    Args:
      what: what progress is called.
      num_workers: threads that read, decode and encode ahead; 0: one per core, 8 at most.

    Raises:
      ValueError, OSError: a source that is damaged, by file and episode; a disk without room.
    """
    jobs = _in_order(outputs)
    _check_open_files(target, outputs)
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

        anew: collections.Counter = collections.Counter()
        numbers = {path: itertools.count() for path in outputs}
        numbered = [(next(numbers[job[0]]), job) for job in jobs]
        prepared = processes.ahead(pool, prepare, numbered, workers)
        stack.callback(prepared.close)
        with metrics.Progress(what, len(jobs)) as shown:
            for path, dataset, episode in jobs:
                ready = next(prepared)
                with _naming(dataset, episode, writers[path].path):
                    writers[path].add(ready)
                anew.update((path, k) for k, found in ready.segments.items() if not found.copied)
                shown.step()
        for path, episodes in outputs.items():
            records.write(writers[path].folder / "meta", episodes)
        for (path, name), count in anew.items():
            print(f"{path.name}: {name}: {count} of {len(outputs[path])} episodes encoded anew")


def _check_open_files(target: Target, outputs: Mapping[pathlib.Path, Episodes]) -> None:
    """OSError if the system allows fewer open files than are read and written at a time."""
    written = 1 + sum(feature["dtype"] == "video" for feature in target.features.values())
    needed = _OPEN_FILES
    for episodes in outputs.values():
        read = {dataset.clip(name, e)[0] for dataset, e in episodes for name in _videos(dataset)}
        needed += 1 + written + min(len(read), video_files.OPEN_FILES)  # the first is its lock
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed != resource.RLIM_INFINITY and needed > allowed:
        raise OSError(
            f"{len(outputs)} datasets at a time take up to {needed} open files, and the system "
            f"allows {allowed}: allow more with ulimit -n {needed}, or make fewer"
        )


class _Reader:
    """What `Writer.prepare` takes, of the episodes of one source; threads may share it."""

    def __init__(self, dataset: lerobot.Dataset, target: Target):
        self._dataset, self._target = dataset, target
        cameras = [name for name in dataset.camera_keys if name in target.features]
        self._stats = dataset.episode_stats(cameras) if target.keep_stats else None
        self._tasks = dataset.column("task_index")
        self._films = [name for name in _videos(dataset) if name in target.features]
        stored = target.features.keys() - target.replaced.keys() - set(self._films)
        self._rows = rows.Rows(dataset, sorted(stored))

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
    """The codec of a video, with its pixel format if that is unusual: as the first of its files
    that can be read says, for info.json is not always right. "" where there is none; those that are
    wanted are told with their episodes.
    """
    whole = np.flatnonzero(dataset.episode_to > dataset.episode_from).tolist()
    for path in dict.fromkeys(dataset.clip(name, episode)[0] for episode in whole):
        with (
            contextlib.suppress(OSError, IndexError, AttributeError, av.FFmpegError),
            av.open(str(path)) as container,
        ):
            stream = container.streams.video[0]
            pixels = stream.codec_context.pix_fmt
            unusual = f"/{pixels}" * (pixels != video_files.PIX_FMT)
            return stream.codec.canonical_name + unusual
    return ""


def _is_packed_anew(target: Target, dataset: lerobot.Dataset, name: str) -> bool:
    """Whether pictures change their form. Of a video that is copied, episodes that do not begin at
    a keyframe still do.
    """
    dtype = target.features[name]["dtype"]
    if dataset.features[name]["dtype"] != dtype:
        return True
    return dtype == "video" and _codec(dataset, name) not in (target.codec, "")
