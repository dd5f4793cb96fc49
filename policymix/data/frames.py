"""Random access to the pictures of a feature, whatever they are stored as.

Features of dtype image lie as PNG or JPEG in parquet, which knows no random access: the encoded
bytes are held in memory, or, where they are many, laid out once in a file that is mapped. Features
of dtype video lie in mp4 files.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from policymix import files, metrics
from policymix.data import pictures, tables, videos

IN_MEMORY = 1_000_000_000  # bytes of a feature's pictures, encoded, that are held in memory
_ROWS = 128  # pictures read at a time
_BYTES, _OFFSETS = "pictures.bin", "offsets.npy"
_POOL = videos.Pool()  # one for all features and datasets: file descriptors are few


class Frames(Protocol):
    """The pictures of all frames of one feature. Threads may share it, and it pickles.

    Attributes:
      shape: (hh, ww).
      num_frames: their number, as in the dataset.
    """

    shape: tuple[int, int]
    num_frames: int

    def get(self, indices: np.ndarray) -> np.ndarray:
        """The pictures of these frames of the dataset, int [n]: uint8 [n, hh, ww, 3].

        They are decoded in the calling thread.

        Raises:
          IndexError: no such frame.
          FileNotFoundError, ValueError: a file that is missing or damaged, or unlike its
            declaration; it is named, and so is the episode or frame.
        """
        ...


class PictureFrames:
    """`Frames` of dtype image.

    Args:
      where: names the dataset and the feature in errors.
      key: the feature.
      shape: (hh, ww) as declared.
      data_files: the parquet files, in order of frames.
      episode_to: int64 [num_episodes], where episodes end among the frames.
    """

    def __init__(
        self,
        where: str,
        key: str,
        shape: tuple[int, int],
        data_files: Sequence[pathlib.Path],
        episode_to: np.ndarray,
    ):
        self.shape, self.num_frames = shape, int(episode_to[-1]) if len(episode_to) else 0
        self._to = episode_to
        self._where, self._key, self._files = where, key, list(data_files)
        self._lock, self._stored = threading.Lock(), None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_stored")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock(), _stored=None)

    def get(self, indices: np.ndarray) -> np.ndarray:
        indices = _checked(indices, self)
        data, offsets = self._store()
        images = np.empty((len(indices), *self.shape, 3), np.uint8)
        for place, index in enumerate(indices.tolist()):
            encoded = bytes(data[offsets[index] : offsets[index + 1]])
            images[place] = self._decode(index, encoded)
        return images

    def encoded(self) -> Iterator[tuple[bytes, np.ndarray]]:
        """The pictures as they are stored, some at a time: their bytes, one after another, and
        int64 [n + 1] where in these each begins, the end at last.
        """
        first = 0
        for path in self._files:
            for array in tables.batches(path, self._key, _ROWS):
                yield self._bytes(array, first)
                first += len(array)
        if first != self.num_frames:
            raise ValueError(
                f"{self._where} has {first} pictures for {self.num_frames} frames; {tables.AGAIN}"
            )

    def all(self) -> np.ndarray:
        """The pictures of all frames, uint8 [num_frames, hh, ww, 3], decoded by threads."""
        images = np.empty((self.num_frames, *self.shape, 3), np.uint8)

        def fill(item: tuple[int, bytes]) -> None:
            images[item[0]] = self._decode(*item)

        first = 0
        with (
            concurrent.futures.ThreadPoolExecutor(pictures.THREADS) as pool,
            metrics.Progress(f"reading {self._key}", self.num_frames) as shown,
        ):
            for data, offsets in self.encoded():
                for _ in pool.map(fill, enumerate(separate(data, offsets), first)):
                    shown.step()
                first += len(offsets) - 1
        return images

    def _decode(self, index: int, encoded: bytes) -> np.ndarray:
        try:
            return pictures.decode(encoded, self.shape, self._where)
        except ValueError as error:
            said = str(error).removeprefix(f"{self._where}: ")
            raise ValueError(f"{self._named(index)}: {said}") from error

    def _named(self, index: int) -> str:
        """A frame by the dataset, its feature, its episode and its file."""
        episode = int(np.searchsorted(self._to, index, side="right"))
        frame = index - (int(self._to[episode - 1]) if episode else 0)
        ends = np.cumsum(list(tables.num_rows(self._files).values()))
        file = self._files[int(np.searchsorted(ends, index, side="right"))]
        return f"{self._where}, frame {frame} of episode {episode}, in {file.name}"

    def _bytes(self, column: pa.Array, first: int) -> tuple[bytes, np.ndarray]:
        """What `encoded` yields, of a column whose first row is frame `first`."""
        if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
            raise ValueError(
                f"{self._where} is stored as {column.type}, expected pictures as "
                "struct<bytes: binary, path: string>"
            )
        column = pc.struct_field(column, "bytes").cast(pa.large_binary())
        if column.null_count:
            frame = first + int(np.argmin(column.is_valid().to_numpy(zero_copy_only=False)))
            raise ValueError(
                f"{self._named(frame)}, has no bytes, only a path at best; write the dataset again "
                "with the pictures inside"
            )
        _, offsets, data = column.buffers()
        offsets = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
        start, end = int(offsets[0]), int(offsets[-1])
        return (data[start:end].to_pybytes() if data else b""), offsets - start

    def _store(self) -> tuple[memoryview, np.ndarray]:
        """The bytes of all pictures, and int64 [num_frames + 1] where each begins."""
        if self._stored is not None:
            return self._stored
        with self._lock:
            if self._stored is None:
                size = sum(tables.num_bytes(path, self._key) for path in self._files)
                self._stored = self._held() if size <= IN_MEMORY else self._mapped(size)
            return self._stored

    def _held(self) -> tuple[memoryview, np.ndarray]:
        held, offsets = bytearray(), [np.zeros(1, np.int64)]
        for data, starts in self.encoded():
            offsets.append(starts[1:] + len(held))
            held += data
        return memoryview(held), np.concatenate(offsets)

    def _mapped(self, size: int) -> tuple[memoryview, np.ndarray]:
        """From the cache, where a directory is named after the files as they are now."""
        cache = files.local(os.environ.get("POLICYMIX_CACHE") or "~/.cache/policymix") / "frames"
        stats = [(str(files.local(path)), path.stat()) for path in self._files]
        name = json.dumps([self._key, *((p, s.st_size, s.st_mtime_ns) for p, s in stats)])
        path = cache / hashlib.sha256(name.encode()).hexdigest()[:32]
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            if not self._is_whole(path):
                files.check_space(path, size + 8 * (self.num_frames + 1))
                print(f"{self._where}: laying out pictures in {path}", file=sys.stderr, flush=True)
                with files.whole_directory(path, overwrite=True) as folder:
                    self._extract(folder)
        data = np.memmap(path / _BYTES, np.uint8, "r")
        return memoryview(data), np.load(path / _OFFSETS, mmap_mode="r")

    def _is_whole(self, path: pathlib.Path) -> bool:
        if not path.is_dir():
            return False
        try:
            offsets = np.load(path / _OFFSETS, mmap_mode="r")
            size = (path / _BYTES).stat().st_size
        except (OSError, ValueError):
            return False
        return offsets.shape == (self.num_frames + 1,) and int(offsets[-1]) == size

    def _extract(self, folder: pathlib.Path) -> None:
        offsets, end, first = np.zeros(self.num_frames + 1, np.int64), 0, 0
        with (
            (folder / _BYTES).open("wb") as file,
            metrics.Progress(f"reading {self._key}", self.num_frames) as shown,
        ):
            for data, starts in self.encoded():
                file.write(data)
                count = len(starts) - 1
                offsets[first + 1 : first + count + 1] = starts[1:] + end
                end, first = end + len(data), first + count
                shown.step(count)
        np.save(folder / _OFFSETS, offsets)


class VideoFrames:
    """`Frames` of dtype video.

    Args:
      where: names the dataset and the feature in errors.
      key: the feature.
      shape: (hh, ww) as declared. fps: as the dataset's.
      paths: the video files.
      of_episode: int [num_episodes], which of these an episode is in.
      first_frames: int64 [num_episodes], the number of its first frame in that file.
      episode_from, episode_to: int64 [num_episodes], its frames in the dataset, `to` exclusive.
    """

    def __init__(
        self,
        where: str,
        key: str,
        shape: tuple[int, int],
        fps: int,
        paths: Sequence[str],
        of_episode: np.ndarray,
        first_frames: np.ndarray,
        episode_from: np.ndarray,
        episode_to: np.ndarray,
    ):
        self.shape, self.num_frames = shape, int(episode_to[-1]) if len(episode_to) else 0
        self._where, self._key, self._fps, self._paths = where, key, fps, list(paths)
        self._of_episode, self._first_frames = of_episode, first_frames
        self._from, self._to = episode_from, episode_to
        # How many frames every file must have.
        self._ends = np.zeros(len(self._paths), np.int64)
        np.maximum.at(self._ends, of_episode, first_frames + episode_to - episode_from)

    def clip(self, episode: int) -> tuple[pathlib.Path, int]:
        """(the file of an episode, the number of the episode's first frame in it)."""
        path = self._paths[self._of_episode[episode]]
        return pathlib.Path(path), int(self._first_frames[episode])

    def get(self, indices: np.ndarray) -> np.ndarray:
        indices = _checked(indices, self)
        episodes = np.searchsorted(self._to, indices, side="right")
        numbers = self._first_frames[episodes] + indices - self._from[episodes]
        of_frame = self._of_episode[episodes]
        if len(indices) and (of_frame == of_frame[0]).all():
            return self._read(int(of_frame[0]), numbers, episodes)
        images = np.empty((len(indices), *self.shape, 3), np.uint8)
        for file in np.unique(of_frame).tolist():
            here = of_frame == file
            images[here] = self._read(file, numbers[here], episodes[here])
        return images

    def all(self) -> np.ndarray:
        """The pictures of all frames, uint8 [num_frames, hh, ww, 3], episodes side by side."""
        images = np.empty((self.num_frames, *self.shape, 3), np.uint8)
        with (
            concurrent.futures.ThreadPoolExecutor(pictures.THREADS) as pool,
            metrics.Progress(f"reading {self._key}", self.num_frames) as shown,
        ):

            def fill(part: tuple[int, int]) -> None:
                images[slice(*part)] = self.get(np.arange(*part))
                shown.step(part[1] - part[0])

            parts = zip(self._from.tolist(), self._to.tolist(), strict=True)
            for _ in pool.map(fill, [part for part in parts if part[0] < part[1]]):
                pass
        return images

    def _read(self, file: int, numbers: np.ndarray, episodes: np.ndarray) -> np.ndarray:
        """Frames of one file by their numbers in it; their episodes are named in errors."""
        path = self._paths[file]
        try:
            reader = _POOL.reader(path, self._fps, self.shape)
        except (OSError, ValueError) as error:
            raise type(error)(f"{self._where}, episode {episodes[0]}: {error}") from error
        if reader.num_frames < self._ends[file]:
            lengths = self._to - self._from
            last = np.flatnonzero(
                (self._of_episode == file) & (self._first_frames + lengths > reader.num_frames)
            )[0]
            raise ValueError(
                f"{self._where}, episode {last}: expected frames {self._first_frames[last]}.."
                f"{self._first_frames[last] + lengths[last] - 1} in {path}, found "
                f"{reader.num_frames} frames; {tables.AGAIN}"
            )
        try:
            return reader.get(numbers)
        except videos.NoFrame as error:
            episode = episodes[np.argmax(numbers == error.frame)]
            frame = error.frame - self._first_frames[episode]
            where = f"{self._where}, frame {frame} of episode {episode}"
            raise ValueError(f"{where}: {error}") from error


def separate(data: bytes, offsets: np.ndarray) -> list[bytes]:
    """The pictures in what `PictureFrames.encoded` yields, each as bytes."""
    starts = offsets.tolist()
    return [data[a:b] for a, b in itertools.pairwise(starts)]


def load(dataset: Any, key: str) -> np.ndarray:
    """All pictures of a feature of dtype image or video: uint8 [num_frames, hh, ww, 3].

    For datasets whose pictures fit in memory. Raises as `Frames.get`, and ValueError for a feature
    that is not there, or of no pictures.
    """
    check_is_image(dataset, key)
    return dataset.frames(key).all()


def check_is_image(dataset: Any, key: str) -> None:
    """ValueError unless the dataset has a feature `key` of pictures, its frames in order."""
    if key not in dataset.features:
        dataset.column(key)  # explains which features there are
    dtype = dataset.features[key]["dtype"]
    if key not in dataset.camera_keys:
        raise ValueError(
            f"{dataset.path}: {key!r} has dtype {dtype}, expected image or video; the dataset's "
            f"cameras are {dataset.camera_keys}"
        )
    dataset.column("index")  # a frame is found by its row: the order is checked there


def _checked(indices: np.ndarray, frames: "PictureFrames | VideoFrames") -> np.ndarray:
    indices = np.asarray(indices, np.int64)
    if indices.size and not 0 <= indices.min() <= indices.max() < frames.num_frames:
        raise IndexError(
            f"{frames._where} has frames 0..{frames.num_frames - 1}, got {indices.min()}.."
            f"{indices.max()}"
        )
    return indices


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Keeps out other processes and threads that lay out the same pictures."""
    with path.open("a") as file:  # the kernel lets go, also on kill -9
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
