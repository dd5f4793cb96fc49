"""RLDS datasets for training: every step of a split at hand, with what training uses of the
interface of data.lerobot.

The first time a split is opened it is indexed (data/rlds_index.py); the index stays in the cache
until the shards change.
"""

import collections
import difflib
import hashlib
import json
import os
import pathlib
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from policymix import files
from policymix.data import columns, features, oxe, rlds_index, tfds

Builder = tfds.Builder
AUTO = "auto"
_OPEN_FILES = 64
_ORDER = ("timestamp", "frame_index", "episode_index", "index")


def is_dataset(path: str | os.PathLike) -> bool:
    """Whether a folder is a dataset of tfds, or holds versions of one."""
    path = files.local(path)
    return any(next(path.glob(f"{above}{tfds.INFO}"), None) for above in ("", "*/", "*/*/"))


def open_dataset(
    path: str | os.PathLike,
    standardize: str | None = AUTO,
    split: str = "train",
    *,
    fps: float = 0,
    skip_unlabeled: bool = False,
    skip_bad: bool = False,
    num_workers: int = 0,
) -> "Dataset":
    """Opens a split, and indexes it unless that was done.

    Args:
      path: the folder of the dataset, NAME/VERSION, or NAME where it has one version.
      standardize: a name in oxe.DATASETS; AUTO: the dataset's own name, if it is there; None: the
        features as they are stored.
      fps: steps per second, in place of oxe.DATASETS; 0 where neither says it.
      skip_unlabeled: whether episodes none of whose steps has an instruction are left out, told
        and counted.
      skip_bad: whether damaged episodes are left out, told and counted, rather than an error.
      num_workers: processes that index; 0 for one per core.

    Raises:
      FileNotFoundError: there is no such dataset, or a shard is missing.
      ValueError: it is damaged, or not understood; names file and episode.
    """
    builder = Builder(path)
    if standardize == AUTO:
        standardize = builder.name if builder.name in oxe.DATASETS else None
    if standardize:
        oxe.find(standardize)
    options = rlds_index.Options(
        builder.path, split, standardize or "", bool(skip_unlabeled), bool(skip_bad)
    )
    folder = rlds_index.make(builder, options, num_workers)
    dataset = Dataset(builder, options, folder, fps)
    if dataset.left_features:
        told = "; ".join(f"{name}: {why}" for name, why in dataset.left_features.items())
        print(f"{builder.path}: features are left out, {told}", file=sys.stderr, flush=True)
    for why, episodes in dataset.left_out.items():
        print(
            f"{builder.path}: {len(episodes)} of {builder.num_episodes(split)} episodes of "
            f"{split!r} are left out, {why}: {_brief(episodes)}",
            file=sys.stderr,
            flush=True,
        )
    if not dataset.num_frames:
        raise ValueError(f"{builder.path}: no episode of {split!r} has a step that can be used")
    return dataset


class Dataset:
    """A split of an RLDS dataset, made by `open_dataset`. It pickles, without its columns.

    Attributes:
      path: its folder. version: of the dataset; split, standardize: as it was opened.
      fps: steps per second, 0 if not known. robot_type: whose it is, if known.
      features: {name: {"dtype", "shape", "names"}}: observation.state, action,
        observation.images.*, and more where nothing is standardised.
      num_frames, num_episodes: totals. tasks: sentences; the position is the task_index.
      episode_from, episode_to: int64 [num_episodes], the episodes' steps, `to` exclusive.
      episode_numbers: int64 [num_episodes], their numbers in the split.
      camera_keys: features of pictures; numeric_keys: features of numbers and bools.
      left_out: {reason: numbers in the split} of episodes.
      left_features: {feature of steps, or its path: why it is left out}.
      normalized: dimensions of the action that are normalised, () where that is not known.
    """

    def __init__(
        self,
        builder: tfds.Builder,
        options: rlds_index.Options,
        folder: pathlib.Path,
        fps: float = 0,
    ):
        self._folder, self._index = folder, files.read_json(folder / rlds_index.INDEX)
        self.path, self.version, self.split = builder.path, builder.version, options.split
        self.standardize, self._shards = options.standardize, builder.shards(options.split)
        standard = oxe.find(options.standardize) if options.standardize else None
        self.fps = fps or (standard.fps if standard else 0)
        self.robot_type = standard.robot if standard else None
        self.normalized = standard.normalized if standard else ()
        self.info = {"fps": self.fps, "robot_type": self.robot_type}
        self.tasks: list[str] = self._index["tasks"] or [""]
        self.left_out: dict[str, list[int]] = self._index["left_out"]
        self._columns: dict[str, np.ndarray] = {}
        lengths = np.array(self._load("@length", np.empty(0, np.int64)))
        self.episode_to = np.cumsum(lengths, dtype=np.int64)
        self.episode_from = self.episode_to - lengths
        self.episode_numbers = np.array(self._load("@number", np.empty(0, np.int64)))
        self.num_frames, self.num_episodes = int(lengths.sum()), len(lengths)
        self.left_features = {} if standard else rlds_index.declared(builder.features)[1]
        self.features = self._declared(builder.features, standard)
        self.camera_keys = [k for k, f in self.features.items() if f["dtype"] == "image"]
        self.numeric_keys = [k for k, f in self.features.items() if f["dtype"] != "image"]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_columns": {}}  # mapped files would be copied

    def column(self, name: str) -> np.ndarray:
        """One feature of all steps: [num_frames, *shape], or [num_frames] where shape is [1].

        It lies in a file that is mapped into memory, and cannot be written to; but for what
        follows from the episodes' lengths, which is computed.

        Raises:
          ValueError: no such feature, or one of pictures.
        """
        if name not in self._columns:
            self._columns[name] = self._order(name) if name in _ORDER else self._numbers(name)
        return self._columns[name]

    def frames(self, key: str) -> "Pictures":
        """Random access to the pictures of a camera. ValueError if there is none called `key`."""
        if key not in self.camera_keys:
            raise ValueError(f"{self.path} has no camera {key!r}; it has {self.camera_keys}")
        where, feature = f"{self.path}: {key!r}", self.features[key]
        bounds = np.cumsum(self._index["steps"])
        return Pictures(
            where, feature["shape"], [s.path for s in self._shards], bounds, self._files(key)
        )

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the checksums of all records and of how they were standardised,
        wherever they lie.
        """
        signed = self._index["signature"]
        options = {k: v for k, v in signed["options"].items() if k != "path"}
        said = json.dumps([self._index["digest"], options, signed["features"], signed["format"]])
        return hashlib.sha256(said.encode()).hexdigest()

    def check_episodes(self, keys: Iterable[str]) -> dict[int, str]:
        """{episode: what is wrong with it}: no steps, or numbers of the features `keys` that are
        not finite. Empty where all is well.
        """
        values = ((key, self.column(key)) for key in keys)
        return columns.bad_episodes(values, self.episode_from, self.episode_to)

    def _declared(
        self, tree: features.Tree, standard: oxe.Standard | None
    ) -> dict[str, dict[str, Any]]:
        """The features, as LeRobot's info.json declares them."""
        found: dict[str, dict[str, Any]] = {}
        leaves, (paths, _) = tfds.per_step(tree), rlds_index.declared(tree)
        if standard:
            paths = {
                f"{oxe.IMAGES}{camera}": f"observation/{name}"
                for camera, name in standard.cameras.items()
            }
        for name in self._index["columns"]:
            key = name.partition("@")[0]
            if key.startswith(oxe.IMAGES):
                height, width, _ = leaves[paths[key]].shape
                if height is None or width is None:
                    height, width = self._first_size(key)
                names = ["height", "width", "channels"]
                found[key] = {"dtype": "image", "shape": [height, width, 3], "names": names}
            elif key:
                values = self._load(key)
                shape = list(values.shape[1:]) or [1]
                found[key] = {"dtype": values.dtype.name, "shape": shape, "names": None}
        for name in _ORDER:
            dtype = "float32" if name == "timestamp" else "int64"
            found[name] = {"dtype": dtype, "shape": [1], "names": None}
        return found

    def _first_size(self, key: str) -> tuple[int, int]:
        """Of the first picture, where features.json does not say it."""
        if not self.num_frames:
            return 0, 0
        bounds = np.cumsum(self._index["steps"])
        shape, paths = [None, None, 3], [shard.path for shard in self._shards]
        pictures = Pictures(f"{self.path}: {key!r}", shape, paths, bounds, self._files(key))
        return pictures.one(0).shape[:2]

    def _files(self, key: str) -> tuple[pathlib.Path, pathlib.Path]:
        columns = self._index["columns"]
        return tuple(self._folder / columns[f"{key}@{what}"] for what in ("offset", "length"))

    def _load(self, name: str, default: np.ndarray | None = None) -> np.ndarray:
        file = self._index["columns"].get(name)
        if file is None and default is not None:
            return default
        return _mapped(self._folder / file)

    def _numbers(self, name: str) -> np.ndarray:
        if name in self._index["columns"] and name in self.numeric_keys:
            values = self._load(name)
            one = self.features[name]["shape"] == [1]
            return values.reshape(len(values)) if one else values
        if why := self.left_features.get(name):
            raise ValueError(f"{self.path}: {name!r} is not in the index, since {why}")
        if name in self.camera_keys:
            raise ValueError(f"{self.path}: {name!r} is pictures; the numbers: {self.numeric_keys}")
        near = difflib.get_close_matches(name, self.features, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{self.path} has no {name!r}{hint} It has {list(self.features)}")

    def _order(self, name: str) -> np.ndarray:
        """What follows from the episodes' lengths."""
        lengths = self.episode_to - self.episode_from
        if name == "episode_index":
            return np.repeat(np.arange(self.num_episodes), lengths)
        index = np.arange(self.num_frames)
        if name == "index":
            return index
        index -= np.repeat(self.episode_from, lengths)
        if name == "frame_index":
            return index
        if not self.fps:
            raise ValueError(
                f"{self.path} does not say how many steps it has in a second: give fps to "
                "open_dataset, or config.data.fps"
            )
        return (index / self.fps).astype(np.float32)


class Pictures:
    """Pictures of a camera, read from the shards as they are asked for: a `frames.Frames`.

    Args:
      where: names the dataset and the camera in errors.
      shape: [hh, ww, 3] as declared.
      paths: the shards. bounds: int64 [shards], the number of steps up to and with each.
      places: .npy files, where pictures begin in their shard, and their lengths in bytes.
    """

    def __init__(self, where, shape, paths: list[pathlib.Path], bounds: np.ndarray, places):
        self.shape: tuple[int, int] = tuple(shape[:2])
        self.num_frames = int(bounds[-1]) if len(bounds) else 0
        self._where, self._paths, self._bounds, self._places = where, paths, bounds, places
        self._dtype = np.dtype(np.uint8)
        self._reopen()

    def _reopen(self) -> None:
        self._offsets, self._lengths = map(_mapped, self._places)
        self._lock, self._files = threading.Lock(), collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        out = ("_offsets", "_lengths", "_lock", "_files")
        return {k: v for k, v in vars(self).items() if k not in out}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._reopen()

    def get(self, indices: np.ndarray) -> np.ndarray:
        """The pictures of these steps, int [n]: uint8 [n, hh, ww, 3].

        Raises:
          IndexError: no such step.
          ValueError: a picture that is damaged or of another shape; names file and step.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_frames:
            raise IndexError(
                f"{self._where} has frames 0..{self.num_frames - 1}, got {indices.min()}.."
                f"{indices.max()}"
            )
        images = np.empty((len(indices), *self.shape, 3), np.uint8)
        for place, index in enumerate(indices.tolist()):
            self.one(index, images[place])
        return images

    def all(self) -> np.ndarray:
        """The pictures of all steps, for datasets whose pictures fit in memory."""
        return self.get(np.arange(self.num_frames))

    def one(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """One picture, uint8 [hh, ww, 3], decoded into `out` if that is given."""
        shard = int(np.searchsorted(self._bounds, index, side="right"))
        offset, length = int(self._offsets[index]), int(self._lengths[index])
        file = self._file(shard)  # held: another thread may drop it
        data = os.pread(file.descriptor, length, offset)
        try:
            if len(data) < length:
                raise ValueError(
                    f"expected {length} bytes from byte {offset} on, found {len(data)}"
                )
            return features.picture(data, (*self.shape, 3), self._dtype, out)
        except ValueError as error:
            raise ValueError(
                f"{self._where}, frame {index}, in {self._paths[shard]}: {error}; copy or download "
                "the dataset again"
            ) from error

    def _file(self, shard: int) -> "_Open":
        """An open shard; few are open at a time."""
        with self._lock:
            if shard not in self._files:
                try:
                    self._files[shard] = _Open(self._paths[shard])
                except OSError as error:
                    raise type(error)(f"{self._where}: {error}") from error
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            return self._files[shard]


class _Open:
    """A file that is open for as long as somebody holds this."""

    def __init__(self, path: pathlib.Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _mapped(path: pathlib.Path) -> np.ndarray:
    """An .npy file of the index, mapped."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no such file; the shards have changed and were indexed anew, or the cache "
            "was emptied: open the dataset again"
        ) from error


def _brief(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, …" if len(numbers) > 8 else shown
