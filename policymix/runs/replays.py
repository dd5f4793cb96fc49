"""Replay of the nearest demonstration: what a policy has to beat to have learned anything."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from policymix import files
from policymix.data import loader
from policymix.runs import collect_demos, encoding, policies, sources, statistics
from policymix.sim import envs
from policymix.transforms import images

PREFIX = "nearest:"
_EPSILON = 1e-6  # as in normalisation; of dimensions that never change
_BLOCK = 64  # pictures compared at once
_ALIKE = 1e-9  # variances below are rounding, which no distance is to be divided by


def is_replay(name: str) -> bool:
    """Whether one of --checkpoints names demonstrations to replay, as nearest:DATASET."""
    return name.startswith(PREFIX)


def dataset_of(name: str) -> str:
    """DATASET of nearest:DATASET."""
    return name.removeprefix(PREFIX)


class Replay:
    """Plays the recorded actions of a demonstration, open loop: a `rollouts.Policy`.

    At an episode's start it chooses among the demonstrations of the same prompt, where the dataset
    has several prompts, that whose first observation is nearest. It reads what the config's policy
    reads. With z the state less its mean over all frames of the dataset, divided by its standard
    deviation there, and x_c the picture of camera c, of the model's resolution, with pixels in
    [0, 1], the distance is

      mean_d (z_d - z'_d)² / V + mean_c mean(x_c - x'_c)² / V_c

    where V and V_c are the variances of a z_d and of a pixel over the first observations, in the
    mean over dimensions and over pixels; 1 where these are all alike. So states count as much as
    pictures do, which are mostly background; and it is the first observations that say how much
    both vary, because only they are compared. Beyond a demonstration's end its last action is
    repeated.

    Prints a WARNING where demonstrations were collected with noise, whose recorded actions lead
    elsewhere when they are played again.

    Attributes:
      name: nearest:DATASET; model: the config's, of whose chunks as many actions are played;
        encoder: what is read, with the dataset's own statistics.
    """

    header = None  # it has no parameters

    def __init__(self, config: ml_collections.ConfigDict, name: str):
        """Reads the dataset's numbers, and the first pictures of its episodes.

        Raises:
          ValueError, OSError: no dataset, or one that lacks what the config's policy reads.
        """
        if not dataset_of(name):
            raise ValueError(f"{name!r} names no dataset: write {PREFIX}DATASET")
        model = policies.model_config(config, why="replaying demonstrations")
        # It reads no prompt's tokens, so it needs no tokenizer.
        self.name, self.model = name, dataclasses.replace(model, max_token_len=0)
        data = config.data.copy_and_resolve_references()
        data.update({"path": dataset_of(name), "repo_id": "", "mixture": "", "held_out": 0.0})
        horizon, cameras = model.action_horizon, encoding.cameras(model, data)
        source = sources.Source(data.path, data, horizon, cameras, model.image_resolution)
        wired = encoding.wiring(data)
        stats = statistics.of_chunks([source.train], wired.adapt)
        self.encoder = encoding.Encoder(self.model, data, stats)
        self._played = config.evaluate.replan_steps or horizon  # of each chunk
        self._dataset = source.dataset
        self._actions = loader.vectors(source.dataset, wired.action_keys, "action_key")
        shapes = source.shapes()
        self._sizes = shapes["state"][-1], shapes["actions"][-1]
        self._read_starts(source)
        self._warn_of_noise()
        self._chosen: dict[tuple[str, int], int] = {}  # by prompt and seed

    def _read_starts(self, source: sources.Source) -> None:
        lengths = source.train.lengths()
        starts = source.get(source.train, np.cumsum([0, *lengths[:-1]]))
        first = self._dataset.episode_from[starts["episode_index"]]
        self._from = first + starts["frame_index"]
        self._last = self._dataset.episode_to[starts["episode_index"]] - 1
        self._prompts = np.array(starts["prompt"], dtype=object)
        self._states, self._pictures = self._scaled(starts["state"]), starts["images"]
        self._variance = _divisor(self._states.var(axis=0).mean())
        self._variances = {c: _divisor(_variance(found)) for c, found in self._pictures.items()}

    def _warn_of_noise(self) -> None:
        path = pathlib.Path(self._dataset.path) / collect_demos.SOURCE
        noise = files.read_json(path).get("noise", 0) if path.is_file() else 0
        if noise:
            print(
                f"WARNING: {self.name} was collected with noise={noise}: it holds what the expert "
                "said, not what was executed, so that its actions do not lead to its observations "
                "again, and replaying them does worse than the demonstrations did. Collect some "
                "without noise to compare policies with"
            )

    def describe(self) -> dict[str, Any]:
        """What evaluation.json says of it: path, fingerprint of the dataset, demonstrations."""
        return {
            "path": f"{PREFIX}{self._dataset.path}",
            "fingerprint": self._dataset.fingerprint(),
            "demonstrations": len(self._prompts),
        }

    def check(self, env: envs.Env, prompts: Mapping[envs.Task, str]) -> None:
        """ValueError for demonstrations of another robot, or of none of these tasks.

        Args:
          prompts: what each task is told.
        """
        keys = self.encoder.wiring.state_keys
        there = sum(env.features[key]["shape"][0] for key in keys), *env.features["action"]["shape"]
        here = self._sizes
        if here != there:
            raise ValueError(
                f"{self.name} has states of {here[0]} numbers and actions of {here[1]}; the "
                f"environments have {there[0]} and {there[1]}: it is of another robot"
            )
        told = list(prompts.values())
        if len(set(told)) < len(told):
            raise ValueError(
                f"{self.name} tells episodes apart by their prompts and seeds, and "
                f"{', '.join(map(str, prompts))} share a prompt: evaluate them one at a time"
            )
        known = sorted(set(self._prompts))
        if len(known) > 1 and (lacking := sorted(set(told) - set(known))):
            raise ValueError(
                f"{self.name} demonstrates {known}, and nothing whose prompt is {lacking[0]!r}: "
                "collect demonstrations of it, or leave the task out of --env"
            )

    def load(self) -> None:
        """There is nothing to load."""

    def unload(self) -> None:
        """Forgets which demonstrations were chosen."""
        self._chosen.clear()

    def act(
        self, raw: Mapping[str, Any], *, seeds: Sequence[int], call: int, num_flow_steps: int = 0
    ) -> np.ndarray:
        """The next actions of every episode's demonstration, float32 [b, h, a].

        Args:
          raw: what `Encoder.observation` takes. It is looked at in call 0 alone.
          seeds: [b]; with its prompt, a seed says which episode a row is.
          call: how many chunks each has had; num_flow_steps: not used.
        """
        episodes = list(zip(raw["prompt"], map(int, seeds), strict=True))
        if call == 0:
            self._chosen.update(zip(episodes, self._nearest(raw), strict=True))
        rows = np.array([self._chosen[episode] for episode in episodes])
        steps = call * self._played + np.arange(self.model.action_horizon)
        frames = np.minimum(self._from[rows][:, None] + steps, self._last[rows][:, None])
        return self._actions[frames].astype(np.float32)

    def _nearest(self, raw: Mapping[str, Any]) -> list[int]:
        states = self._scaled(raw["state"])
        seen = {
            camera: images.resize_with_pad(raw["images"][camera], *self.model.image_resolution)
            for camera in self._pictures
        }
        return [
            self._nearest_to(prompt, states[row], {c: found[row] for c, found in seen.items()})
            for row, prompt in enumerate(raw["prompt"])
        ]

    def _nearest_to(
        self, prompt: str, state: np.ndarray, pictures: Mapping[str, np.ndarray]
    ) -> int:
        rows = np.arange(len(self._prompts))
        if len(set(self._prompts)) > 1:
            rows = np.flatnonzero(self._prompts == prompt)
        distances = np.square(self._states[rows] - state).mean(axis=1) / self._variance
        for camera, picture in pictures.items():
            apart = _squared(self._pictures[camera], rows, picture)
            distances += apart / self._variances[camera] / len(pictures)
        return int(rows[distances.argmin()])

    def _scaled(self, state: np.ndarray) -> np.ndarray:
        adapted = self.encoder.wiring.adapt.apply({"state": np.asarray(state)})["state"]
        stats = self.encoder.norm_stats["state"]
        return (adapted - stats.mean) / (stats.std + _EPSILON)


def _variance(pictures: np.ndarray) -> float:
    """Of a pixel of uint8 [n, hh, ww, 3] over n, in the mean, pixels in [0, 1]."""
    mean = pictures.mean(axis=0, dtype=np.float32)
    return float(_squared(pictures, np.arange(len(pictures)), mean).mean())


def _divisor(variance: float) -> float:
    return float(variance) if variance > _ALIKE else 1.0


def _squared(pictures: np.ndarray, rows: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """[n]: the mean squared differences of chosen pictures and one, pixels in [0, 1]."""
    wanted = picture.astype(np.float32)
    blocks = [rows[k : k + _BLOCK] for k in range(0, len(rows), _BLOCK)]
    return np.concatenate(
        [np.square((pictures[b] - wanted) / 255).mean(axis=(1, 2, 3)) for b in blocks]
    )
