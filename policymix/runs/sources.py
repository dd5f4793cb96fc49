"""The datasets of a run: which episodes train, which are held out, and batches drawn from all."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from policymix import files
from policymix.data import lerobot, loader, pictures


class Source:
    """One dataset, split into episodes to train on and episodes held out.

    Attributes:
      dataset: the LeRobot dataset.
      train_episodes, held_out_episodes: disjoint, chosen by config.data.seed.
      train: the chunks of the former; None where every episode is held out.
    """

    def __init__(
        self, path: str, data: ml_collections.ConfigDict, horizon: int, cameras: Mapping[str, str]
    ):
        self.dataset = lerobot.open_dataset(files.local(path))
        self._horizon, self._cameras = horizon, cameras
        self._keys = {
            "state_key": data.state_key,
            "action_key": data.action_key,
            "default_prompt": data.default_prompt or None,
        }
        self._pictures: dict[str, np.ndarray] = {}
        for feature in cameras.values():
            pictures.check_is_image(self.dataset, feature)
        if data.held_out == 1:
            everything = list(range(self.dataset.num_episodes))
            self.train_episodes, self.held_out_episodes, self.train = [], everything, None
        else:
            self.train_episodes, self.held_out_episodes = loader.split_episodes(
                self.dataset.num_episodes, data.held_out, data.seed
            )
            self.train = self.chunks(self.train_episodes)

    def chunks(self, episodes: Sequence[int]) -> loader.ActionChunks:
        """The frames of some episodes, each with the actions that follow."""
        return loader.ActionChunks(self.dataset, self._horizon, episodes, **self._keys)

    def get(self, chunks: loader.ActionChunks, positions: np.ndarray) -> dict[str, Any]:
        """`chunks.get(positions)`, and "images": {camera: uint8 [b, hh, ww, 3]}."""
        raw = chunks.get(positions)
        frames = self.dataset.episode_from[raw["episode_index"]] + raw["frame_index"]
        raw["images"] = {
            camera: self._all_pictures(feature)[frames] for camera, feature in self._cameras.items()
        }
        return raw

    def _all_pictures(self, feature: str) -> np.ndarray:
        """Decoded once and kept: small pictures of small datasets fit in memory."""
        if feature not in self._pictures:
            self._pictures[feature] = pictures.load(self.dataset, feature)
        return self._pictures[feature]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one example's "state", "actions" and the picture of every camera."""
        example, features = self.chunks([0]).get(np.zeros(1, int)), self.dataset.features
        found = {key: example[key].shape[1:] for key in ("state", "actions")}
        for camera, name in self._cameras.items():
            found[camera] = (*pictures.size(features[name], f"{self.dataset.path}: {name!r}"), 3)
        return found

    def training(self) -> dict[str, Any]:
        """What is recorded beside a checkpoint of what it was trained on."""
        return {
            "path": str(self.dataset.path),
            "fingerprint": self.dataset.fingerprint(),
            "episodes": [int(episode) for episode in self.train_episodes],
        }


def check_alike(sources: Sequence[Source]) -> None:
    """ValueError if what a policy reads of them has different shapes, so that no batch has both."""
    first, *others = ((source.dataset.path, source.shapes()) for source in sources)
    for path, shapes in others:
        for key, shape in shapes.items():
            if shape != first[1][key]:
                raise ValueError(
                    f"{key!r} has the shape {list(first[1][key])} in {first[0]} and {list(shape)} "
                    f"in {path}: the datasets of config.data.path must be of one robot"
                )


def shares(sources: Sequence[Source], fractions: Sequence[float], batch_size: int) -> list[int]:
    """How many examples of every batch come from each dataset; they sum to batch_size.

    Args:
      fractions: of the batch, for each dataset, normalised to sum 1; () goes by their frames.

    Raises:
      ValueError: a wrong count, a fraction that is not positive, or a share below one example.
    """
    weights = list(fractions) or [len(source.train) for source in sources]
    if len(weights) != len(sources) or not all(weight > 0 for weight in weights):
        raise ValueError(
            f"config.data.fractions is {tuple(fractions)}; expected a positive number for each of "
            f"the {len(sources)} datasets of config.data.path, or () to go by their frames"
        )
    ends = np.rint(np.cumsum(weights) / np.sum(weights) * batch_size).astype(int)
    counts = np.diff(ends, prepend=0).tolist()
    if min(counts) < 1:
        raise ValueError(
            f"of a batch of {batch_size}, the datasets {[str(s.dataset.path) for s in sources]} "
            f"get {counts} examples: raise config.train.batch_size, or set config.data.fractions"
        )
    return counts


def draw(sources: Sequence[Source], counts: Sequence[int], seed: int, step: int) -> dict[str, Any]:
    """Training batch number `step`: a function of the seed and the step alone."""
    parts = []
    for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
        # The first dataset's order does not depend on whether there is a second.
        indices = loader.batch_indices(len(source.train), count, seed + number, step)
        parts.append(source.get(source.train, indices))
    return parts[0] if len(parts) == 1 else _concatenated(parts)


def _concatenated(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def join(key):
        values = [part[key] for part in parts]
        if isinstance(values[0], list):
            return [item for value in values for item in value]
        if isinstance(values[0], dict):
            return {name: np.concatenate([v[name] for v in values]) for name in values[0]}
        return np.concatenate(values)

    return {key: join(key) for key in parts[0]}
