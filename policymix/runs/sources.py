"""The datasets of a run: which episodes train, which are held out, and batches drawn from all."""

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from policymix.data import frames, loader, opening
from policymix.runs import encoding
from policymix.transforms import images

_TURN = (math.sqrt(5) - 1) / 2  # multiples of the golden ratio are spread evenly over a turn


class Source:
    """One dataset, split into episodes to train on and episodes held out.

    Attributes:
      dataset: LeRobot's or RLDS.
      train_episodes, held_out_episodes: disjoint, chosen by config.data.seed.
      left_out: {episode: why it cannot be used}; they are neither trained on nor held out.
      train: the chunks of the former; None where every episode is held out.
    """

    def __init__(
        self,
        name: str,
        data: ml_collections.ConfigDict,
        horizon: int,
        cameras: Mapping[str, str],
        resolution: tuple[int, int] | None = None,
    ):
        """`resolution` (hh, ww): of pictures; as they are stored unless given.

        Raises:
          ValueError, OSError: no dataset, not as config.data says, or one with episodes that cannot
            be used, unless config.data.skip_bad_episodes.
        """
        self.dataset = opening.open_dataset(
            name,
            fps=data.fps,
            skip_unlabeled=data.skip_unlabeled,
            skip_bad=data.skip_bad_episodes,
        )
        self._horizon, self._cameras, self._resolution = horizon, cameras, resolution
        self._wiring = encoding.wiring(data)
        self._default_prompt = data.default_prompt or None
        self._cache_bytes = data.cache_mb * 1_000_000
        self._kept: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        if data.fps and self.dataset.fps != data.fps:
            raise ValueError(
                f"{self.dataset.path} has {self.dataset.fps} frames per second, expected "
                f"{data.fps} (config.data.fps, or the first dataset's): chunks would last "
                "differently"
            )
        self._frames = {feature: self.dataset.frames(feature) for feature in cameras.values()}
        self.left_out = self._bad_episodes(data.skip_bad_episodes)
        self._split(data)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_lock": threading.Lock()})

    def _bad_episodes(self, skip: bool) -> dict[int, str]:
        keys = (*self._wiring.state_keys, *self._wiring.action_keys)
        bad = self.dataset.check_episodes(keys)
        if bad and not skip:
            episode, why = next(iter(bad.items()))
            raise ValueError(
                f"{self.dataset.path}: {len(bad)} of {self.dataset.num_episodes} episodes cannot "
                f"be used; episode {episode}: {why}. Leave them out with "
                "--config.data.skip_bad_episodes, or delete them with edit_dataset.py"
            )
        for episode, why in bad.items():
            print(f"{self.dataset.path}: episode {episode} is left out: {why}")
        return bad

    def _split(self, data: ml_collections.ConfigDict) -> None:
        everything = [n for n in range(self.dataset.num_episodes) if n not in self.left_out]
        if not everything:
            raise ValueError(f"{self.dataset.path} has no episode that can be used")
        if data.held_out == 1:
            self.train_episodes, self.held_out_episodes, self.train = [], everything, None
            return
        # Of all episodes, so that leaving one out moves no other.
        train, held_out = loader.split_episodes(self.dataset.num_episodes, data.held_out, data.seed)
        self.train_episodes = [n for n in train if n not in self.left_out]
        self.held_out_episodes = [n for n in held_out if n not in self.left_out]
        if not self.train_episodes:
            raise ValueError(f"{self.dataset.path}: no episode is left to train on")
        self.train = self.chunks(self.train_episodes)

    def chunks(self, episodes: Sequence[int]) -> loader.ActionChunks:
        """The frames of some episodes, each with the actions that follow."""
        return loader.ActionChunks(
            self.dataset,
            self._horizon,
            episodes,
            self._wiring.state_keys,
            self._wiring.action_keys,
            self._default_prompt,
        )

    def get(self, chunks: loader.ActionChunks, positions: np.ndarray) -> dict[str, Any]:
        """`chunks.get(positions)`, and "images": {camera: uint8 [b, hh, ww, 3]}."""
        raw = chunks.get(positions)
        numbers = self.dataset.episode_from[raw["episode_index"]] + raw["frame_index"]
        raw["images"] = {
            camera: self._pictures(feature, numbers) for camera, feature in self._cameras.items()
        }
        return raw

    def _pictures(self, feature: str, numbers: np.ndarray) -> np.ndarray:
        found = self._frames[feature]
        shape = self._resolution or found.shape
        if found.num_frames * math.prod(shape) * 3 > self._cache_bytes:
            return images.resize_with_pad(found.get(numbers), *shape)
        return self._all_pictures(feature, found, shape)[numbers]

    def _all_pictures(
        self, feature: str, found: frames.Frames, shape: tuple[int, int]
    ) -> np.ndarray:
        """Decoded and resized once and kept: small pictures of small datasets fit in memory."""
        with self._lock:
            if feature not in self._kept:
                if found.shape == tuple(shape):
                    self._kept[feature] = found.all()
                else:
                    self._kept[feature] = images.resize_with_pad(found.all(), *shape)
            return self._kept[feature]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one example's "state", "actions" and the picture of every camera."""
        example = self.chunks([0]).get(np.zeros(1, int))
        found = {key: example[key].shape[1:] for key in ("state", "actions")}
        for camera, feature in self._cameras.items():
            found[camera] = (*(self._resolution or self._frames[feature].shape), 3)
        return found

    def training(self) -> dict[str, Any]:
        """What is recorded beside a checkpoint of what it was trained on."""
        return {
            "path": str(self.dataset.path),
            "fingerprint": self.dataset.fingerprint(),
            "episodes": [int(episode) for episode in self.train_episodes],
        }


def check_alike(sources: Sequence[Source]) -> None:
    """ValueError if what a policy reads of them has different shapes, so that no batch has both, or
    another rate, so that their chunks last differently.
    """
    first, *others = ((s.dataset.path, {"fps": (s.dataset.fps,)} | s.shapes()) for s in sources)
    for path, shapes in others:
        for key, shape in shapes.items():
            if shape != first[1][key]:
                raise ValueError(
                    f"{key!r} has the shape {list(first[1][key])} in {first[0]} and {list(shape)} "
                    f"in {path}: the datasets of config.data.path must be of one robot"
                )


def counts(fractions: np.ndarray, batch_size: int, step: int) -> np.ndarray:
    """How many examples of batch `step` come from each dataset: int64, summing to batch_size.

    Each is its fraction of the batch, rounded down or up so that over the steps it comes out right.
    """
    exact = np.asarray(fractions) * batch_size
    least = np.floor(exact + 1e-9)
    rest = np.cumsum(np.maximum(exact - least, 0))
    rest[-1] = batch_size - least.sum()
    extra = np.diff(np.floor(rest + step * _TURN % 1), prepend=0)
    return (least + extra).astype(np.int64)


def draw(
    sources: Sequence[Source],
    fractions: np.ndarray,
    batch_size: int,
    seed: int,
    step: int,
    rows: slice = slice(None),
) -> dict[int, dict[str, Any]]:
    """The `rows` of training batch number `step`, by the number of the source that they are from:
    a function of the seed and the step alone.
    """
    wanted, first, found = np.arange(batch_size)[rows], 0, {}
    most = np.ceil(np.asarray(fractions) * batch_size - 1e-9).astype(int).tolist()
    for number, count in enumerate(counts(fractions, batch_size, step).tolist()):
        source, here = sources[number], wanted[(wanted >= first) & (wanted < first + count)]
        if len(here):
            # The first dataset's order does not depend on whether there is a second.
            drawn = loader.drawn(len(source.train), step * most[number], count, seed + number)
            found[number] = source.get(source.train, drawn[here - first])
        first += count
    return found
