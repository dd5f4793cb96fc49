"""Rewards and ends of single frames → what chunks of actions earn, how long they are and what comes
after them.

A frame holds what is seen, the action that is taken then, and that action's reward. Frames are
numbered through all episodes; an episode is a range of them.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

CHUNK_REWARDS = ("sum", "max", "any")
TAILS = ("pad", "drop")


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Chunks of h actions, one for each of m frames that they begin at.

    Attributes:
      horizon: h.
      starts: int64 [m], the frames that chunks begin at, in order.
      lengths: int32 [m], how many of its actions count, 1 to h; the rest is padding.
      next_frames: int64 [m], what is seen after the last of these.
      rewards, discounts: float32 [m], of the chunk, and of the value at the next frame.
      has_next: bool [m]; false: what came after was not recorded, so that a critic can learn
        nothing from the chunk. Its action was taken, and can be imitated.
    """

    horizon: int
    starts: np.ndarray
    lengths: np.ndarray
    next_frames: np.ndarray
    rewards: np.ndarray
    discounts: np.ndarray
    has_next: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, chosen: np.ndarray) -> "Chunks":
        """Some of them, by their positions int [b] or a mask bool [m]."""
        fields = ("starts", "lengths", "next_frames", "rewards", "discounts", "has_next")
        return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in fields})

    def is_pad(self) -> np.ndarray:
        """Which actions are padding: bool [m, h]."""
        return np.arange(self.horizon) >= self.lengths[:, None]

    def frames(self) -> np.ndarray:
        """The frames whose actions make the chunks, int64 [m, h]; padding repeats the last one."""
        return self.starts[:, None] + np.minimum(np.arange(self.horizon), self.lengths[:, None] - 1)


def cut(
    rewards: np.ndarray,
    terminated: np.ndarray,
    episode_from: np.ndarray,
    episode_to: np.ndarray,
    horizon: int,
    discount: float,
    *,
    chunk_reward: str = "sum",
    tails: str = "pad",
) -> Chunks:
    """The chunks that begin at every frame of all episodes.

    A chunk of frame t counts h actions, or fewer:
      up to and with the first whose frame is `terminated`: the task ended there, and the discount
        is 0;
      where the episode stops without that: those before its last frame, since what the last action
        led to was not recorded. At the last frame itself `has_next` is false.
    With n actions that count, the discount is else γ^n, of the frame t + n.

    Args:
      rewards: [N]. terminated: bool [N], whether the task ended with the frame's action.
      episode_from, episode_to: int [E], the episodes' frames, `to` exclusive.
      chunk_reward: "sum", Σ γ^i r_{t+i} over i < n; "max" of them; "any": 1 where one is above 0.
      tails: "pad", or "drop": no chunk begins where fewer than h frames of its episode are left.
        The last chunk of an episode that stops unterminated then still has h - 1 actions that
        count and one of padding, since its next frame is the episode's last.

    Raises:
      ValueError: unknown words, or a horizon or discount out of range.
    """
    check(horizon, discount, chunk_reward, tails)
    starts, ends = _frames(episode_from, episode_to)
    if tails == "drop":
        kept = starts + horizon <= ends
        starts, ends = starts[kept], ends[kept]
    last = ends - 1
    # The first terminated frame from each one on; beyond the episode it is another's.
    number = len(rewards)
    marked = np.where(terminated, np.arange(number), number)
    first = np.minimum.accumulate(marked[::-1])[::-1][starts] if len(starts) else starts
    ended = (first <= last) & (first < starts + horizon)
    played = np.where(ended, first - starts + 1, np.minimum(horizon, last - starts))
    has_next = played > 0
    lengths = np.maximum(played, 1).astype(np.int32)
    return Chunks(
        horizon=horizon,
        starts=starts,
        lengths=lengths,
        next_frames=np.minimum(starts + played, last),
        rewards=_earned(rewards, starts, lengths, horizon, discount, chunk_reward),
        discounts=np.where(ended | ~has_next, 0, float(discount) ** lengths).astype(np.float32),
        has_next=has_next,
    )


def cut_rlvla(
    rewards: np.ndarray,
    episode_from: np.ndarray,
    episode_to: np.ndarray,
    horizon: int,
    discount: float,
    *,
    chunk_reward: str = "max",
) -> Chunks:
    """The chunks of rlvla, for runs that follow it: whole ones alone, begun at t = 0..T-h.

    The next frame is min(t + h, T - 1), and every episode ends with its task done, where
    t + h ≥ T - 1: one frame early, so that the last two chunks of an episode are terminal. `cut`
    is right about both.

    Args and raises: as `cut`.
    """
    check(horizon, discount, chunk_reward, "drop")
    starts, ends = _frames(episode_from, episode_to)
    kept = starts + horizon <= ends
    starts, ends = starts[kept], ends[kept]
    lengths = np.full(len(starts), horizon, np.int32)
    done = starts + horizon >= ends - 1
    return Chunks(
        horizon=horizon,
        starts=starts,
        lengths=lengths,
        next_frames=np.minimum(starts + horizon, ends - 1),
        rewards=_earned(rewards, starts, lengths, horizon, discount, chunk_reward),
        discounts=np.where(done, 0, float(discount) ** horizon).astype(np.float32),
        has_next=np.ones(len(starts), bool),
    )


class Sequence(NamedTuple):
    """Windows of Q-chunking, float64 [b, h]: element i of each is of the first i + 1 frames.

    Attributes:
      rewards: Σ γ^j r_j. masks: 0 once the task has ended. terminals: 1 once an episode has.
      valid: 0 for frames that belong to the next episode.
    """

    rewards: np.ndarray
    masks: np.ndarray
    terminals: np.ndarray
    valid: np.ndarray

    def kept(self) -> np.ndarray:
        """Windows that lie in one episode, bool [b]: its critic learns from no others."""
        return self.valid[:, -1] > 0


def sample_sequence(
    rewards: np.ndarray,
    masks: np.ndarray,
    terminals: np.ndarray,
    starts: np.ndarray,
    horizon: int,
    discount: float,
) -> Sequence:
    """Windows of `horizon` frames as Q-chunking's sampler makes them (Li, Zhou and Levine 2025,
    arXiv 2507.07969): it cuts at any frame, across episodes, and tells afterwards what is valid.

    Args:
      rewards, masks, terminals: [N], frame by frame.
      starts: int [b], first frames, each in 0..N - horizon; it draws them uniformly.

    Raises:
      IndexError: a window beyond the last frame.
    """
    starts = np.asarray(starts, np.int64)
    if starts.size and not 0 <= starts.min() <= starts.max() <= len(rewards) - horizon:
        raise IndexError(
            f"windows of {horizon} of {len(rewards)} frames begin at 0..{len(rewards) - horizon}, "
            f"got {starts.min()}..{starts.max()}"
        )
    window = starts[:, None] + np.arange(horizon)
    weights = (float(discount) ** np.arange(horizon))[None]
    ends = np.maximum.accumulate(np.asarray(terminals, np.float64)[window], axis=1)
    before = np.concatenate([np.zeros((len(starts), 1)), ends[:, :-1]], axis=1)
    return Sequence(
        rewards=np.cumsum(np.asarray(rewards, np.float64)[window] * weights, axis=1),
        masks=np.minimum.accumulate(np.asarray(masks, np.float64)[window], axis=1),
        terminals=ends,
        valid=1 - before,
    )


def check(horizon: int, discount: float, chunk_reward: str, tails: str) -> None:
    """ValueError for what `cut` cannot take."""
    for name, value, known in (
        ("chunk_reward", chunk_reward, CHUNK_REWARDS),
        ("tails", tails, TAILS),
    ):
        if value not in known:
            raise ValueError(
                f"config.offline_rl.{name} is {value!r}; expected one of {list(known)}"
            )
    if horizon < 1:
        raise ValueError(f"config.offline_rl.action_horizon is {horizon}; at least 1 is needed")
    if not 0 <= discount <= 1:
        raise ValueError(f"config.offline_rl.discount is {discount}; expected 0 to 1")


def _frames(episode_from: np.ndarray, episode_to: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All frames of the episodes, and where the episode of each ends: int64 [m] each."""
    begin, end = np.asarray(episode_from, np.int64), np.asarray(episode_to, np.int64)
    lengths = end - begin
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(begin - before, lengths), np.repeat(end, lengths)


def _earned(
    rewards: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    horizon: int,
    discount: float,
    rule: str,
) -> np.ndarray:
    """float32 [m], one place of the chunk after another: no array is larger than the dataset."""
    rewards = np.asarray(rewards, np.float64)
    total = np.zeros(len(starts)) if rule == "sum" else np.full(len(starts), -np.inf)
    for i in range(horizon):
        counted = i < lengths
        if not counted.any():
            break
        here = rewards[starts[counted] + i]
        if rule == "sum":
            total[counted] += float(discount) ** i * here
        else:
            total[counted] = np.maximum(total[counted], here)
    return (total > 0 if rule == "any" else total).astype(np.float32)
