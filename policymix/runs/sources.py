"""The datasets of a run: which episodes train, which are held out, and batches drawn from all."""

import concurrent.futures
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from policymix import metrics, processes
from policymix.data import loader, opening
from policymix.runs import encoding
from policymix.transforms import images

_BLOCK = 256  # pictures that are decoded together


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
        self._kept: dict[str, np.ndarray] = {}
        self._rows: np.ndarray | None = None
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
        return vars(self) | {"_kept": {}, "_rows": None}  # other processes read for themselves

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
        if not len(self.train):
            raise ValueError(
                f"{self.dataset.path}: no frame of the {len(self.train_episodes)} episodes to "
                "train on may begin a chunk: none is marked in the column is_kept"
            )

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
        if feature in self._kept and (rows := self._rows[numbers]).min(initial=0) >= 0:
            return self._kept[feature][rows]
        return images.resize_with_pad(found.get(numbers), *(self._resolution or found.shape))

    def decoded_bytes(self) -> int:
        """What the pictures of the training episodes take, decoded and resized."""
        shapes = [self._resolution or found.shape for found in self._frames.values()]
        return self._num_train_frames() * sum(3 * math.prod(shape) for shape in shapes)

    def _num_train_frames(self) -> int:
        chosen = np.array(self.train_episodes, np.int64)
        return int((self.dataset.episode_to[chosen] - self.dataset.episode_from[chosen]).sum())

    def keep_decoded(self) -> None:
        """Decodes and resizes the pictures of the training episodes once, by threads, and keeps
        them: `get` copies from there.
        """
        bounds = [
            (int(self.dataset.episode_from[n]), int(self.dataset.episode_to[n]))
            for n in self.train_episodes
        ]
        numbers = np.concatenate([np.arange(*pair) for pair in bounds])
        rows = np.full(self.dataset.num_frames, -1, np.int32)
        rows[numbers] = np.arange(len(numbers))
        blocks = [
            np.arange(start, min(start + _BLOCK, end))
            for first, end in bounds
            for start in range(first, end, _BLOCK)
        ]
        for feature, found in self._frames.items():
            shape = self._resolution or found.shape
            kept = np.empty((len(numbers), *shape, 3), np.uint8)

            def fill(block: np.ndarray, feature=feature, kept=kept) -> int:
                kept[rows[block]] = self._pictures(feature, block)
                return len(block)

            with (
                concurrent.futures.ThreadPoolExecutor(processes.num_cores()) as pool,
                metrics.Progress(f"reading {feature}", len(numbers)) as shown,
            ):
                for count in pool.map(fill, blocks):
                    shown.step(count)
            self._kept[feature] = kept
        self._rows = rows

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one example's "state", "actions" and the picture of every camera."""
        found = dict(self.chunks([0]).shapes)
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


def drawn_before(fractions: np.ndarray, batch_size: int, step: int) -> np.ndarray:
    """How many examples of each dataset the batches before `step` have: int64 [n], summing to
    step * batch_size.

    Each has its fraction of every batch, rounded down or up, so that it comes out right over the
    steps: with R the sums of what rounding down leaves, dataset d has one more in the steps where
    ⌊R_d + u⌋ > ⌊R_(d-1) + u⌋, u running through van der Corput's sequence.
    """
    exact = np.asarray(fractions) * batch_size
    least = np.floor(exact + 1e-9)
    rest = np.cumsum(np.maximum(exact - least, 0))
    rest[-1] = batch_size - least.sum()
    whole = np.floor(rest + 1e-9)
    below = np.array([_points_below(1 - r, step) for r in np.maximum(rest - whole, 0).tolist()])
    turns = step * whole.astype(np.int64) + step - below
    return step * least.astype(np.int64) + np.diff(turns, prepend=0)


def _points_below(x: float, count: int) -> int:
    """How many of the first `count` points of van der Corput's sequence in base 2 lie below x.

    The points of a block of 2^k whose first number m is its multiple are those of m, which is below
    2^-k, and of steps of 2^-k from there.
    """
    total = start = 0
    for k in range(count.bit_length() - 1, -1, -1):
        if count >> k & 1:
            first = int(f"{start:b}"[::-1], 2) / (1 << start.bit_length())
            total += min(max(math.ceil((x - first) * (1 << k)), 0), 1 << k)
            start += 1 << k
    return total


def drawn(
    sources: Sequence[Source],
    fractions: np.ndarray,
    batch_size: int,
    seed: int,
    step: int,
    rows: slice = slice(None),
) -> dict[int, np.ndarray]:
    """Which chunks the `rows` of training batch number `step` are, by the number of their source: a
    function of the seed and the step alone. Each dataset is gone through epoch by epoch.
    """
    wanted, place, found = np.arange(batch_size)[rows], 0, {}
    before, after = (drawn_before(fractions, batch_size, step + k).tolist() for k in (0, 1))
    for number, (first, end) in enumerate(zip(before, after, strict=True)):
        count = end - first
        here = wanted[(wanted >= place) & (wanted < place + count)] - place
        if len(here):
            # The first dataset's order does not depend on whether there is a second.
            order = loader.drawn(len(sources[number].train), first, count, seed + number)
            found[number] = order[here]
        place += count
    return found


def draw(
    sources: Sequence[Source],
    fractions: np.ndarray,
    batch_size: int,
    seed: int,
    step: int,
    rows: slice = slice(None),
) -> dict[int, dict[str, Any]]:
    """What those chunks are: raw examples, by the number of their source."""
    chosen = drawn(sources, fractions, batch_size, seed, step, rows)
    return {n: sources[n].get(sources[n].train, positions) for n, positions in chosen.items()}
