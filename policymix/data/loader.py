"""Which frames make which batch, and what a policy needs of them: a state and the actions after it.

Everything is a function of its arguments: batch number `step` of a seed is always the same batch,
so that a run that resumes, or another host, needs no iterator's state.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from policymix.data import lerobot


def batch_indices(num_items: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The items of batch `step`: int64 [batch_size], each in 0..num_items-1.

    Items are drawn without replacement, in a new order each epoch: position i of all that is ever
    drawn is the item permutation(seed, i // num_items)[i % num_items]. A batch may straddle epochs.

    Raises:
      ValueError: num_items or batch_size below 1, seed or step below 0.
    """
    if num_items < 1 or batch_size < 1 or seed < 0 or step < 0:
        raise ValueError(
            "expected num_items >= 1, batch_size >= 1, seed >= 0 and step >= 0; got "
            f"{num_items=}, {batch_size=}, {seed=}, {step=}"
        )
    positions = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, num_items)
    return np.concatenate(
        [
            _permutation(num_items, seed, epoch)[places[epochs == epoch]]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
    )


@functools.lru_cache(maxsize=2)  # a batch at the turn of an epoch needs two
def _permutation(num_items: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(num_items).astype(np.int64)
    order.setflags(write=False)  # the cache hands the same array to every caller
    return order


def split_episodes(num_episodes: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Episodes to train on and episodes held out, both sorted, chosen by `seed`.

    Args:
      held_out: the fraction to hold out, in [0, 1), rounded to whole episodes: none for 0, else at
        least one, and at least one is left to train on.

    Raises:
      ValueError: the fraction is outside [0, 1), or there are too few episodes for both parts.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is the fraction of episodes, in [0, 1); got {held_out}")
    least = 2 if held_out else 1
    if num_episodes < least:
        raise ValueError(
            f"{num_episodes} episodes cannot be split with held_out={held_out}: at least {least} "
            "needed. Record more, or set held_out to 0"
        )
    num_held = min(max(1, round(held_out * num_episodes)), num_episodes - 1) if held_out else 0
    order = np.random.default_rng(seed).permutation(num_episodes).tolist()
    return sorted(order[num_held:]), sorted(order[:num_held])


class ActionChunks:
    """The frames of chosen episodes, each with the `horizon` actions that follow it (p proprio).

    Args:
      dataset: where the frames are.
      horizon: h, the actions per chunk; the first is the frame's own.
      episodes: episode numbers, in the order wanted; None for all.
      state_key, action_key: features of numbers, of shape [p] and [a].
      default_prompt: the prompt of every frame, in place of the dataset's task.

    Raises:
      ValueError: an episode that is not there, or a key that is not a vector of numbers.
    """

    def __init__(
        self,
        dataset: lerobot.Dataset,
        horizon: int,
        episodes: Sequence[int] | None = None,
        state_key: str = "observation.state",
        action_key: str = "action",
        default_prompt: str | None = None,
    ):
        if horizon < 1:
            raise ValueError(
                f"horizon is the number of actions per chunk, at least 1; got {horizon}"
            )
        chosen = _checked_episodes(dataset, episodes)
        starts, ends = dataset.episode_from[chosen], dataset.episode_to[chosen]
        self.dataset = dataset
        self.horizon = horizon
        self._default_prompt = default_prompt
        self._frames = np.concatenate([np.arange(*r) for r in zip(starts, ends, strict=True)])
        self._episodes = np.repeat(chosen, ends - starts)
        self._states = _vectors(dataset, state_key, "state_key")
        self._actions = _vectors(dataset, action_key, "action_key")
        self._tasks = np.array(dataset.tasks, dtype=object)

    def __len__(self) -> int:
        return len(self._frames)

    def get(self, positions: np.ndarray) -> dict[str, Any]:
        """The frames at `positions` int [b], each in 0..len(self)-1.

        Returns:
          state: float32 [b, p].
          actions: float32 [b, h, a], beyond the episode its last action again.
          action_is_pad: bool [b, h], true for those.
          prompt: b sentences.
          episode_index, frame_index: int64 [b], the episode and the frame's number in it.

        Raises:
          IndexError: a position out of range.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(
                f"{self.dataset.path}: positions are 0..{len(self) - 1} here, got "
                f"{positions.min()}..{positions.max()}"
            )
        frames, episodes = self._frames[positions], self._episodes[positions]
        actions, is_pad = self._chunks(frames, episodes)
        if self._default_prompt is None:
            prompts = self._tasks[self.dataset.column("task_index")[frames]].tolist()
        else:
            prompts = [self._default_prompt] * len(frames)
        return {
            "state": self._states[frames],
            "actions": actions,
            "action_is_pad": is_pad,
            "prompt": prompts,
            "episode_index": episodes,
            "frame_index": frames - self.dataset.episode_from[episodes],
        }

    @property
    def all_states(self) -> np.ndarray:
        """The states of all frames of the chosen episodes: float32 [N, p]."""
        return self._states[self._frames]

    def statistics_arrays(self) -> dict[str, np.ndarray]:
        """What normalisation statistics are taken of: {"state": [N, p], "actions": [N * h, a]}.

        Every element of every chunk counts, repeated ones too, as in OpenPI: late actions of an
        episode weigh more than early ones.
        """
        actions, _ = self._chunks(self._frames, self._episodes)
        return {"state": self.all_states, "actions": actions.reshape(-1, actions.shape[-1])}

    def _chunks(self, frames: np.ndarray, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Actions [b, h, a] from these frames on, and which lie beyond the episode [b, h]."""
        window = frames[:, None] + np.arange(self.horizon)
        last = self.dataset.episode_to[episodes][:, None] - 1
        return self._actions[np.minimum(window, last)], window > last


def _checked_episodes(dataset: lerobot.Dataset, episodes: Sequence[int] | None) -> np.ndarray:
    if episodes is None:
        return np.arange(dataset.num_episodes)
    chosen = np.asarray(episodes)
    if not chosen.size:
        raise ValueError(f"no episodes chosen; {dataset.path} has 0..{dataset.num_episodes - 1}")
    wrong = [n for n in chosen.tolist() if n not in range(dataset.num_episodes)]
    if wrong or chosen.ndim != 1 or len(set(chosen.tolist())) < chosen.size:
        raise ValueError(
            f"episodes must be distinct numbers of episodes of {dataset.path}, which has "
            f"0..{dataset.num_episodes - 1}; got {wrong or chosen.tolist()}"
        )
    return chosen.astype(np.int64)


def _vectors(dataset: lerobot.Dataset, key: str, argument: str) -> np.ndarray:
    """A feature of numbers of shape [p] as float32 [num_frames, p]; a single number is p = 1."""
    shapes = {k: dataset.features[k]["shape"] for k in dataset.numeric_keys}
    if key not in dataset.features or (key in shapes and len(shapes[key]) <= 1):
        values = dataset.column(key).astype(np.float32)  # an unknown key is explained there
        return values.reshape(len(values), -1)
    raise ValueError(
        f"{argument}={key!r} is no vector of numbers in {dataset.path}: it has dtype "
        f"{dataset.features[key]['dtype']} and shape {dataset.features[key]['shape']}; there are "
        f"{[k for k, shape in shapes.items() if len(shape) <= 1]}"
    )
