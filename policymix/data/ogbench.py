"""OGBench's .npz files as datasets: one frame after another, of all episodes.

A file holds observations, actions and terminals, one row a frame; qpos and other numbers may be
beside them, and, of single tasks, rewards and masks. Three forms of it are about (ogbench/utils.py
of 1.2):
  as it is downloaded: terminals is 1 in an episode's last row, which shows how the episode ended;
    no use was made of its action;
  compact: the same rows, valids is 0 in the last one, and terminals is 1 in the last two;
  regular: without these rows, and with next_observations; terminals is 1 in the last one.
All become the first: the last frame of an episode is there to be seen, its numbers apart from the
observation are those of the frame before, and no chunk of actions begins there (`is_kept`).
"""

import difflib
import hashlib
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from policymix.data import columns

SUFFIX = ".npz"
_STATE, _PICTURE, _ACTION = "observation.state", "observation.image", "action"
_NAMES = {"actions": _ACTION, "rewards": "reward"}  # OGBench's → LeRobot's; others stay
_NEEDED = ("observations", "actions", "terminals")
_BOUNDS = ("terminals", "valids", "next_observations")  # say where episodes end; are no features
_MADE = ("index", "episode_index", "frame_index", "task_index")


def is_dataset(path: pathlib.Path) -> bool:
    """Whether `path` is a file that `open_dataset` may read."""
    return path.suffix == SUFFIX and path.is_file()


def open_dataset(path: str | pathlib.Path, *, fps: float = 0) -> "Dataset":
    """Opens a file; arrays are read when they are asked for, or mapped where it is not compressed.

    Args:
      fps: frames per second, which files do not say.

    Raises:
      FileNotFoundError, ValueError: there is none, or it holds something else.
    """
    return Dataset(pathlib.Path(path).expanduser(), fps)


class Dataset:
    """A file of OGBench, made by `open_dataset`, with the attributes of `lerobot.Dataset`.

    Features: observation.state, or observation.image where observations are pictures (the state is
    then a 0, for a policy that must have one); action; reward and masks if there are any; further
    arrays under their own names; is_kept.
    """

    version = "ogbench"
    robot_type = None
    ends_seen = True  # the last frame of an episode is only seen
    no_rewards = (
        "the package ogbench, whose make_env_and_datasets('cube-single-play-singletask-task2-v0', "
        "compact_dataset=True) computes those of a single task: numpy.savez(FILE, **dataset)"
    )

    def __init__(self, path: pathlib.Path, fps: float = 0):
        self.path, self.fps = path, fps
        self.info = {"fps": fps, "robot_type": None}
        self.tasks = [""]
        self._file = _File(path)
        declared = self._file.declared
        if lacking := [name for name in _NEEDED if name not in declared]:
            raise ValueError(
                f"{path} is no dataset of OGBench: it lacks {lacking}, and has {sorted(declared)}"
            )
        self._rows = len(self._file.read("terminals"))
        self._appended = "next_observations" in declared  # frames that the file has no row for
        last = self._last_rows()
        ends = last + 1 + np.arange(1, len(last) + 1) if self._appended else last + 1
        self.episode_to = ends.astype(np.int64)
        self.episode_from = np.concatenate([[0], self.episode_to[:-1]])
        self.num_episodes, self.num_frames = len(ends), int(ends[-1])
        self._check_lengths()
        self.features = self._declare()
        self.camera_keys = [k for k, f in self.features.items() if f["dtype"] == "image"]
        self.numeric_keys = [k for k, f in self.features.items() if f["dtype"] != "image"]
        self._columns: dict[str, np.ndarray] = {}
        self._fingerprint: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_columns": {}}  # other processes read for themselves

    def column(self, name: str) -> np.ndarray:
        """One feature of all frames: [num_frames, *shape], or [num_frames] where shape is [1].

        ValueError for a feature that is not there, or of pictures.
        """
        if name not in self._columns:
            if name not in self.numeric_keys:
                near = difflib.get_close_matches(name, self.features, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                what = "pictures" if name in self.camera_keys else f"no {name!r}"
                raise ValueError(
                    f"{self.path}: expected numbers, found {what}{hint} It has "
                    f"{list(self.features)}"
                )
            values = self._made(name) if name in (*_MADE, "is_kept") else self._numbers(name)
            one = self.features[name]["shape"] == [1]
            self._columns[name] = values.reshape(len(values)) if one else values
        return self._columns[name]

    def frames(self, key: str) -> "Frames":
        """The pictures of all frames; ValueError if there are none called `key`."""
        if key not in self.camera_keys:
            raise ValueError(f"{self.path} has no camera {key!r}; it has {self.camera_keys}")
        return Frames(self)

    def observations(self, frames: np.ndarray) -> np.ndarray:
        """What is seen in these frames, int [n]: [n, ...] as it is stored."""
        if not self._appended:
            return self._file.read("observations")[frames]
        found = self._file.read("observations")[self._acting(frames)]
        last = frames == self.episode_to[self._episodes(frames)] - 1
        found[last] = self._file.read("next_observations")[self._acting(frames[last])]
        return found

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the file."""
        if self._fingerprint is None:
            with self.path.open("rb") as file:
                self._fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        return self._fingerprint

    def check_episodes(self, keys: Iterable[str]) -> dict[int, str]:
        """{episode: what is wrong with it}: numbers of the features `keys` that are not finite."""
        values = ((key, self.column(key)) for key in keys)
        return columns.bad_episodes(values, self.episode_from, self.episode_to)

    def _last_rows(self) -> np.ndarray:
        """The last row of every episode, int [num_episodes]."""
        if "valids" in self._file.declared and not self._appended:
            ends = self._file.read("valids") == 0
        else:
            ends = self._file.read("terminals") > 0
        last = np.flatnonzero(ends)
        if not self._rows or not len(last) or last[-1] != self._rows - 1:
            raise ValueError(
                f"{self.path}: the last of its {self._rows} rows ends no episode: the file was cut "
                "short, or `terminals` is not OGBench's"
            )
        return last

    def _check_lengths(self) -> None:
        for name, (shape, _) in self._file.declared.items():
            if name in (*_NEEDED, *_BOUNDS, "rewards", "masks") and shape[:1] != (self._rows,):
                raise ValueError(
                    f"{self.path}: {name} has the shape {list(shape)}, and terminals {self._rows} "
                    "rows: expected one row a frame"
                )
        if (short := np.flatnonzero(self.episode_to - self.episode_from < 2)).size:
            raise ValueError(
                f"{self.path}: episode {short[0]} has one frame, with no action that was used; two "
                "are needed"
            )

    def _declare(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, (shape, dtype) in self._file.declared.items():
            if shape[:1] != (self._rows,) or dtype.kind not in "biuf" or name in _BOUNDS:
                continue
            if name != "observations":
                found[_NAMES.get(name, name)] = _feature(dtype.name, list(shape[1:]) or [1])
            elif len(shape) == 4:
                if shape[-1] != 3 or dtype != np.uint8:
                    raise ValueError(
                        f"{self.path}: observations are {dtype.name} {list(shape)}; pictures are "
                        "uint8 [frames, height, width, 3]"
                    )
                found[_PICTURE] = _feature("image", list(shape[1:]))
                found[_STATE] = _feature("float32", [1])
            else:
                found[_STATE] = _feature(dtype.name, list(shape[1:]) or [1])
        return (
            found | {"is_kept": _feature("bool", [1])} | {n: _feature("int64", [1]) for n in _MADE}
        )

    def _numbers(self, name: str) -> np.ndarray:
        if name == _STATE:
            if self.camera_keys:
                return np.zeros((self.num_frames, 1), np.float32)
            every = np.arange(self.num_frames)
            return self.observations(every) if self._appended else self._file.read("observations")
        stored = next((ours for ours, theirs in _NAMES.items() if theirs == name), name)
        return self._file.read(stored)[self._acting(np.arange(self.num_frames))]

    def _made(self, name: str) -> np.ndarray:
        frames, lengths = np.arange(self.num_frames), self.episode_to - self.episode_from
        if name == "is_kept":
            kept = np.ones(self.num_frames, bool)
            kept[self.episode_to - 1] = False
            return kept
        if name == "index":
            return frames
        if name == "task_index":
            return np.zeros(self.num_frames, np.int64)
        if name == "frame_index":
            return frames - np.repeat(self.episode_from, lengths)
        return np.repeat(np.arange(self.num_episodes), lengths)

    def _episodes(self, frames: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.episode_to, frames, side="right")

    def _acting(self, frames: np.ndarray) -> np.ndarray:
        """The rows of what was done in these frames; in an episode's last one, in that before."""
        episodes = self._episodes(frames)
        last = frames == self.episode_to[episodes] - 1
        return frames - last - (episodes if self._appended else 0)


class Frames:
    """The pictures that are a file's observations: a `frames.Frames`."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self.shape: tuple[int, int] = tuple(dataset.features[_PICTURE]["shape"][:2])
        self.num_frames = dataset.num_frames

    def get(self, indices: np.ndarray) -> np.ndarray:
        """The pictures of these frames, int [n]: uint8 [n, hh, ww, 3]; IndexError for others."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_frames:
            raise IndexError(
                f"{self._dataset.path} has frames 0..{self.num_frames - 1}, got {indices.min()}.."
                f"{indices.max()}"
            )
        return self._dataset.observations(indices)

    def all(self) -> np.ndarray:
        """The pictures of all frames."""
        return self.get(np.arange(self.num_frames))


class _File:
    """Arrays of an .npz file.

    Attributes:
      declared: {name: (shape, dtype)}.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._arrays = path, {}
        self.declared: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self._places: dict[str, int] = {}  # where the numbers of an uncompressed array begin
        try:
            with zipfile.ZipFile(path) as opened:
                for member in opened.infolist():
                    self._look(opened, member)
        except (zipfile.BadZipFile, ValueError, struct.error) as error:
            raise ValueError(f"{path} is no file of numpy.savez ({error})") from error

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_arrays": {}}

    def _look(self, opened: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        with opened.open(member) as array:
            version = np.lib.format.read_magic(array)
            read = "read_array_header_1_0" if version == (1, 0) else "read_array_header_2_0"
            shape, fortran, dtype = getattr(np.lib.format, read)(array)
            header = array.tell()
        name = member.filename.removesuffix(".npy")
        self.declared[name] = shape, dtype
        if member.compress_type == zipfile.ZIP_STORED and not fortran and not dtype.hasobject:
            with self._path.open("rb") as file:
                file.seek(member.header_offset + 26)  # the lengths of what precedes the array
                self._places[name] = member.header_offset + 30 + header
                self._places[name] += sum(struct.unpack("<HH", file.read(4)))

    def read(self, name: str) -> np.ndarray:
        """An array, which is kept; it cannot be written to. ValueError if it is damaged."""
        if name not in self._arrays:
            shape, dtype = self.declared[name]
            try:
                if name in self._places and 0 not in shape:
                    found = np.memmap(self._path, dtype, "r", self._places[name], shape)
                else:
                    with np.load(self._path, allow_pickle=False) as opened:
                        found = opened[name]
            except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
                raise ValueError(f"{self._path}: {name!r} cannot be read ({error})") from error
            found.setflags(write=False)
            self._arrays[name] = found
        return self._arrays[name]


def _feature(dtype: str, shape: list[int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "names": None}
