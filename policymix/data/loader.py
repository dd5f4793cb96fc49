"""Which frames make which batch, and what a policy needs of them: a state and the actions after it.

Everything is a function of its arguments: batch number `step` of a seed is always the same batch,
so that a run that resumes, or another host, needs no iterator's state.
"""

import collections
import contextlib
import functools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from absl import flags

from policymix.data.opening import Dataset

_T = TypeVar("_T")
KEPT = "is_kept"  # marks frames that chunks may begin at, where a dataset has it


def ahead(
    make: Callable[[int], _T],
    first: int,
    last: int,
    *,
    num_threads: int,
    num_processes: int = 0,
    buffered: int = 2,
) -> Iterator[_T]:
    """make(first), make(first + 1), … make(last - 1), in order, made by grain before they are asked
    for.

    What is resumed begins at its step: nothing else has to be kept.

    Args:
      make: a pure function of the step, which may be called in any order and at the same time; for
        processes it must pickle.
      num_threads: that make elements, in each process.
      num_processes: apart from this one; 0 makes elements in threads of this one.
      buffered: elements that may wait, in each process.
    """
    import grain  # takes a second

    threads = max(1, num_threads)
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffered, threads))
    made = grain.MapDataset.range(first, last).map(make).to_iter_dataset(read)
    if not num_processes:
        return iter(made)
    if not flags.FLAGS.is_parsed():  # in notebooks; grain has some, which its processes read
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_processes, buffered)
    return _told(iter(made.mp_prefetch(options, worker_init_fn=_deaf)))


def _deaf(*_) -> None:
    """Ctrl-C and SIGTERM are for the process that waits for this one, and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _told(made: Iterator[_T]) -> Iterator[_T]:
    """Says in our words that a process died."""
    try:
        with _closing(made):
            yield from made
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise OSError(
            "a process that makes batches died (out of memory?): lower config.data.num_processes, "
            "or set it to 0"
        ) from error


def placed(batches: Iterable[_T], place: Callable[[_T], _T], *, buffered: int = 2) -> Iterator[_T]:
    """Batches handed to `place`, which starts to copy them to the devices, `buffered` before they
    are asked for.
    """
    waiting: collections.deque[_T] = collections.deque()
    with _closing(batches):
        for batch in batches:
            waiting.append(place(batch))
            if len(waiting) > buffered:
                yield waiting.popleft()
        yield from waiting


@contextlib.contextmanager
def _closing(made: Any) -> Iterator[None]:
    """Ends the threads and processes of `ahead` with the block, also where it is left early."""
    try:
        yield
    finally:
        if hasattr(made, "close"):
            made.close()


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
    return drawn(num_items, step * batch_size, batch_size, seed)


def drawn(num_items: int, first: int, count: int, seed: int) -> np.ndarray:
    """The items at the positions `first`, first + 1, … of all that is ever drawn: int64 [count]."""
    epochs, places = np.divmod(first + np.arange(count, dtype=np.int64), num_items)
    orders = [
        _permutation(num_items, seed, epoch)[places[epochs == epoch]]
        for epoch in np.unique(epochs).tolist()
    ]
    return np.concatenate(orders) if orders else np.zeros(0, np.int64)


@functools.lru_cache(maxsize=64)  # the datasets of a mixture, two where an epoch turns
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
      state_key, action_key: features of numbers, of shape [p] and [a], or several, one after the
        other.
      default_prompt: the prompt of every frame, in place of the dataset's task.
      window: w, the states up to and with the frame's own that make an example.

    Where the dataset has a column `is_kept`, chunks begin at the frames alone that it marks.

    Attributes:
      whole: whether chunks begin at all frames of the episodes.

    Raises:
      ValueError: an episode that is not there, or a key that is not a vector of numbers.
    """

    def __init__(
        self,
        dataset: Dataset,
        horizon: int,
        episodes: Sequence[int] | None = None,
        state_key: str | Sequence[str] = "observation.state",
        action_key: str | Sequence[str] = "action",
        default_prompt: str | None = None,
        window: int = 1,
    ):
        if horizon < 1 or window < 1:
            raise ValueError(
                "horizon is the number of actions per chunk and window that of states, at least 1; "
                f"got {horizon} and {window}"
            )
        chosen = _checked_episodes(dataset, episodes)
        starts, ends = dataset.episode_from[chosen], dataset.episode_to[chosen]
        self.dataset = dataset
        self.horizon, self.window = horizon, window
        self._default_prompt = default_prompt
        lengths = ends - starts
        self._episodes = np.repeat(chosen.astype(np.int32), lengths)
        before = np.cumsum(lengths) - lengths
        self._frames = np.arange(len(self._episodes)) + np.repeat(starts - before, lengths)
        kept = dataset.column(KEPT)[self._frames] if KEPT in dataset.features else True
        self.whole = bool(np.all(kept))
        if not self.whole:
            self._episodes, self._frames = self._episodes[kept], self._frames[kept]
        self._states = vectors(dataset, state_key, "state_key")
        self._actions = vectors(dataset, action_key, "action_key")
        self._tasks = np.array(dataset.tasks, dtype=object)

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one example: {"state": [p], "actions": [h, a]}."""
        return {
            "state": self._states.shape[1:],
            "actions": (self.horizon, *self._actions.shape[1:]),
        }

    def get(self, positions: np.ndarray) -> dict[str, Any]:
        """The frames at `positions` int [b], each in 0..len(self)-1.

        Returns:
          state: float32 [b, p]; with a window [b, w, p], before the episode its first state again,
            and state_is_pad: bool [b, w], true for those.
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
        frames, episodes = self._frames[positions], self._episodes[positions].astype(np.int64)
        first = self.dataset.episode_from[episodes]
        if self._default_prompt is None:
            prompts = self._tasks[self.dataset.column("task_index")[frames]].tolist()
        else:
            prompts = [self._default_prompt] * len(frames)
        actions, is_pad = self._chunks(frames, episodes)
        found = {
            "state": self._states[frames],
            "actions": actions,
            "action_is_pad": is_pad,
            "prompt": prompts,
            "episode_index": episodes,
            "frame_index": frames - first,
        }
        if self.window > 1:
            window = frames[:, None] + np.arange(1 - self.window, 1)
            found["state"] = self._states[np.maximum(window, first[:, None])]
            found["state_is_pad"] = window < first[:, None]
        return found

    def blocks(
        self, size: int = 4096, *, index: int = 0, count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """All examples in order, `size` at a time: {"state": [b, p], "actions": [b, h, a]}; of
        these blocks every `count`-th from `index` on.
        """
        for start in range(index * size, len(self), count * size):
            chosen = slice(start, start + size)
            actions, _ = self._chunks(self._frames[chosen], self._episodes[chosen])
            yield {"state": self._states[self._frames[chosen]], "actions": actions}

    def frame_values(self) -> dict[str, np.ndarray]:
        """The states and actions of the chosen frames, one of each: {"state": [N, p], "actions":
        [N, a]}.
        """
        return {"state": self._states[self._frames], "actions": self._actions[self._frames]}

    def episodes(self, positions: np.ndarray) -> list[int]:
        """The episodes that the frames at `positions` int [b] are of, sorted."""
        return np.unique(self._episodes[positions]).tolist()

    def lengths(self) -> list[int]:
        """How many chunks begin in each of the chosen episodes, in order."""
        return np.diff(np.flatnonzero(np.diff(self._episodes, prepend=-1, append=-1))).tolist()

    def _chunks(self, frames: np.ndarray, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Actions [b, h, a] from these frames on, and which lie beyond the episode [b, h]."""
        window = frames[:, None] + np.arange(self.horizon)
        last = self.dataset.episode_to[episodes][:, None] - 1
        return self._actions.take(np.minimum(window, last), axis=0), window > last


def _checked_episodes(dataset: Dataset, episodes: Sequence[int] | None) -> np.ndarray:
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


def vectors(dataset: Dataset, keys: str | Sequence[str], argument: str) -> np.ndarray:
    """Features of numbers of shape [p], one after the other: float32 [num_frames, p]; a single
    number is p = 1.

    ValueError, which calls `keys` by `argument`, for one that is no vector of numbers.
    """
    keys = [keys] if isinstance(keys, str) else list(keys)
    parts = [_vector(dataset, key, argument) for key in keys]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _vector(dataset: Dataset, key: str, argument: str) -> np.ndarray:
    shapes = {k: dataset.features[k]["shape"] for k in dataset.numeric_keys}
    if key not in dataset.features or (key in shapes and len(shapes[key]) <= 1):
        values = dataset.column(key).astype(np.float32, copy=False)  # an unknown one is told there
        return values.reshape(len(values), -1)
    raise ValueError(
        f"{argument}={key!r} is no vector of numbers in {dataset.path}: it has dtype "
        f"{dataset.features[key]['dtype']} and shape {dataset.features[key]['shape']}; there are "
        f"{[k for k, shape in shapes.items() if len(shape) <= 1]}"
    )
