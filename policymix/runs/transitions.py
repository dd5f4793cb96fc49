"""From datasets with rewards to batches of chunks: what was seen, played, earned and seen next."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np

from policymix.data import loader, opening
from policymix.rl import chunks as chunks_lib
from policymix.rl import config as rl_config
from policymix.runs import encoding, label_rewards, metadata, pipeline
from policymix.runs import sources as sources_lib
from policymix.structs import ChunkBatch, Observation
from policymix.transforms import compose

TERMINALS = (*label_rewards.ENDS, "rlvla")
CHUNK_SOURCES = ("dataset", "policy")
_BLOCK = 16_384  # frames or chunks that are encoded together
_UNIT = 1 + 1e-4  # the largest normalised action where flows are clipped to ±1


class Proposals(Protocol):
    """Chunks that another policy proposes for the frames of one dataset."""

    def get(self, frames: np.ndarray) -> np.ndarray:
        """Of frames of the dataset, int [b]: float32 [b, n, h, a], normalised and padded."""
        ...


class Transitions(pipeline.Pipeline):
    """Batches of chunks with what they earn, of one dataset or of several of one robot.

    Attributes, beside those of `Pipeline`:
      num_chunks: to train on.
      parts: one per dataset.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        settings: rl_config.LearnerConfig,
        resumed: pathlib.Path | None = None,
    ):
        """`resumed` is the step whose run goes on.

        Raises:
          ValueError: config says what cannot be, or the data have nothing to learn from.
        """
        self._options = options = config.offline_rl
        _check(options, config.data, settings)
        super().__init__(_for_pipeline(config, settings), settings, resumed)
        # What is not of pictures is encoded once, by an encoder without cameras.
        data = config.data.copy_and_resolve_references()
        data.cameras = ml_collections.ConfigDict()
        bare = encoding.Encoder(settings.seeing(()), data, self.encoder.norm_stats)
        cameras = tuple(self.encoder.cameras)
        prompt = config.data.default_prompt or None
        self.parts = [Part(source, options, bare, cameras, prompt) for source in self.sources]
        self.num_chunks = sum(len(part.train) for part in self.parts)
        if all(source.train_episodes for source in self.sources):
            self._check_data()
        self.check_trains()

    @functools.cached_property
    def _fractions(self) -> np.ndarray:
        return metadata.fractions(self._data, [len(part.train) for part in self.parts])

    def propose(self, proposals: Sequence[Proposals]) -> None:
        """Chunks of another policy, an object per dataset, or none: candidates beside the dataset's
        own or, with chunk_source="policy", in their place.
        """
        if proposals and len(proposals) != len(self.parts):
            raise ValueError(
                f"expected proposals for each of the {len(self.parts)} datasets, got "
                f"{len(proposals)}"
            )
        for number, part in enumerate(self.parts):
            part.proposals = proposals[number] if proposals else None
        if proposals and self._options.chunk_source == "policy":
            print(
                "WARNING: chunks are a policy's (config.offline_rl.chunk_source=policy); what they "
                "earn and what is seen next is that of the demonstrated ones"
            )

    def batch(self, step: int, batch_size: int, rows: slice = slice(None)) -> ChunkBatch:
        """The `rows` of training batch number `step`: a function of the seed and the step alone."""
        drawn = sources_lib.draw(self.parts, self._fractions, batch_size, self._seed, step, rows)
        return _joined(list(drawn.values()))

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches until every chunk was drawn."""
        return -(-self.num_chunks // batch_size)

    def held_out_batch(self, size: int) -> ChunkBatch | None:
        """Up to `size` chunks of held-out episodes, the same each time; None if there are none."""
        ends = np.cumsum([len(part.held_out) for part in self.parts])
        chosen = np.sort(np.random.default_rng(self._seed).permutation(int(ends[-1]))[:size])
        of_part = np.searchsorted(ends, chosen, side="right")
        found = [
            part.get(part.held_out, chosen[of_part == number] - (ends[number] - len(part.held_out)))
            for number, part in enumerate(self.parts)
            if (of_part == number).any()
        ]
        return _joined(found) if found else None

    def describe(self) -> list[str]:
        """What is trained on, in words: a line or two per dataset."""
        return [line for part in self.parts for line in part.describe()]

    def _check_data(self) -> None:
        """ValueError where there is nothing to learn from."""
        options = self._options
        for part in self.parts:
            part.check_lengths(whole=options.tails == "drop" or options.terminals == "rlvla")
        if options.algorithm == "cloning":
            return
        if not any(np.any(part.train.rewards) for part in self.parts):
            raise ValueError(
                f"{self.parts[0].where}: every reward of the training episodes is 0, so that all "
                "chunks are worth the same: label them with edit_dataset.py "
                "--operation=label_rewards, or name another feature with "
                "config.offline_rl.reward_key"
            )
        if options.algorithm.startswith("qc"):
            for part in self.parts:
                part.check_bounded(options.algorithm)


class Part:
    """The frames of one dataset, encoded, and the chunks of them; `sources.draw` takes it for a
    source.

    Attributes:
      train, held_out: chunks of either kind of episodes.
      where: the dataset and the feature of rewards, for messages.
      proposals: of another policy, or None.
    """

    def __init__(
        self,
        source: sources_lib.Source,
        options: ml_collections.ConfigDict,
        encoder: encoding.Encoder,
        cameras: Sequence[str],
        prompt: str | None,
    ):
        self._source, self._encoder, self._cameras = source, encoder, tuple(cameras)
        self._from_policy = options.chunk_source == "policy"
        self.proposals: Proposals | None = None
        dataset, horizon = source.dataset, encoder.model.action_horizon
        key, rewards = _rewards(dataset, options)
        rule = "always" if options.terminals == "rlvla" else options.terminals
        ended, self._why = label_rewards.ends(dataset, rule, rewards)
        self.where = f"{dataset.path}: {key!r}" if key else str(dataset.path)
        self._ended = np.logical_or.reduceat(ended, dataset.episode_from)
        cut = _cut(dataset, options, rewards, ended, horizon)
        self.train = cut.take(_begin(dataset, source.train_episodes)[cut.starts])
        self.held_out = cut.take(_begin(dataset, source.held_out_episodes)[cut.starts])
        for chunks in (self.train, self.held_out):
            self._check_rewards(chunks)
        self._encode(dataset, prompt)

    def get(self, chunks: chunks_lib.Chunks, positions: np.ndarray) -> ChunkBatch:
        """The chunks at these positions, int [b]."""
        chosen = chunks.take(positions)
        observation, following = self._observations(chosen.starts, chosen.next_frames)
        actions, is_pad, candidates = self.actions(chosen), chosen.is_pad(), None
        if self.proposals is not None:
            candidates = self.proposals.get(chosen.starts).astype(np.float32, copy=False)
        if self._from_policy:
            if candidates is None:
                raise ValueError(
                    "config.offline_rl.chunk_source is 'policy', and no policy proposes chunks: "
                    "name its checkpoint with config.offline_rl.proposals"
                )
            actions, is_pad, candidates = candidates[:, 0], np.zeros_like(is_pad), None
        return ChunkBatch(
            observation=observation,
            actions=actions,
            action_is_pad=is_pad,
            rewards=chosen.rewards,
            discounts=chosen.discounts,
            next_observation=following,
            has_next=chosen.has_next,
            candidates=candidates,
        )

    def actions(self, chunks: chunks_lib.Chunks) -> np.ndarray:
        """The actions of chunks as they were recorded, normalised and padded: float32 [b, h, a]."""
        if not self._encoder.wiring.relative:
            return self._actions[chunks.frames()]
        # Relative to the state that the chunk begins in.
        raw = {"state": self._states[chunks.starts], "actions": self._actions[chunks.frames()]}
        found = self._encoder.normalized(raw)["actions"].astype(np.float32, copy=False)
        return compose.pad(found, self._encoder.model.action_dim)

    def check_lengths(self, whole: bool) -> None:
        """ValueError where there is no chunk, as where they must be `whole`; a warning where all
        are padded.
        """
        dataset, horizon = self._source.dataset, self.train.horizon
        lengths = (dataset.episode_to - dataset.episode_from)[self._source.train_episodes]
        said = f"{dataset.path}: no training episode has {horizon} frames, as a chunk has actions"
        if lengths.max() < horizon and not whole:
            print(f"WARNING: {said} (the longest {lengths.max()}): every chunk is padded")
        elif lengths.max() < horizon:
            raise ValueError(
                f"{said} (the longest {lengths.max()}), and whole chunks alone are taken: lower "
                "config.offline_rl.action_horizon, or set config.offline_rl.tails=pad"
            )
        if not len(self.train):
            raise ValueError(f"{dataset.path}: no frame to train on may begin a chunk")

    def check_bounded(self, algorithm: str) -> None:
        """ValueError unless all actions to train on lie within ±1."""
        for start in range(0, len(self.train), _BLOCK):
            actions = self.actions(self.train.take(slice(start, start + _BLOCK)))
            largest = np.abs(actions).max(axis=(0, 1))
            if largest.max() > _UNIT:
                raise ValueError(
                    f"{self._source.dataset.path}: normalised actions reach {largest.max():.3g} in "
                    f"dimension {largest.argmax()}, and {algorithm} clips what its flow makes to "
                    "±1: set config.data.normalization=bounds, with norm stats of these data and "
                    "not those of config.offline_rl.init_from or config.data.norm_stats"
                )

    def describe(self) -> list[str]:
        """How much there is, how much of it earns something, and how episodes end."""
        source, chunks = self._source, self.train
        rewarded = np.count_nonzero(chunks.rewards)
        ended = int(self._ended[source.train_episodes].sum())
        number = len(source.train_episodes)
        frames = sum(source.train.lengths()) if source.train is not None else 0
        what = (
            f"{source.dataset.path}: {number:,} of {source.dataset.num_episodes:,} episodes to "
            f"train on, {frames:,} frames, {len(chunks):,} chunks of {chunks.horizon} actions; "
            f"{len(self.held_out):,} chunks held out"
        )
        earned = (
            f"{self.where}: {rewarded:,} chunks ({rewarded / max(len(chunks), 1):.1%}) are not at "
            f"0, of {chunks.rewards.min(initial=0):g} to {chunks.rewards.max(initial=0):g}; "
            f"in {ended:,} episodes the task ended ({self._why}), {number - ended:,} stopped"
        )
        return [what, earned]

    def _encode(self, dataset: opening.Dataset, prompt: str | None) -> None:
        """Everything but pictures, of all frames; instructions, of all tasks."""
        model, wiring = self._encoder.model, self._encoder.wiring
        states = loader.vectors(dataset, wiring.state_keys, "state_key")
        actions = loader.vectors(dataset, wiring.action_keys, "action_key")
        self._states, self._actions = (states, actions) if wiring.relative else (None, None)
        self._proprio = np.empty((len(states), model.proprio_dim), np.float32)
        if not wiring.relative:
            self._actions = np.empty((len(actions), model.action_dim), np.float32)
        for start in range(0, len(states), _BLOCK):
            here = slice(start, start + _BLOCK)
            raw = {"state": states[here], "actions": actions[here, None]}
            found = self._encoder.normalized(raw)
            self._proprio[here] = compose.pad(found["state"], model.proprio_dim)
            if not wiring.relative:
                self._actions[here] = compose.pad(found["actions"][:, 0], model.action_dim)
        tasks = dataset.tasks if prompt is None else [prompt]
        self._task = None if prompt is not None else dataset.column("task_index")
        raw = {"state": np.zeros((len(tasks), states.shape[1]), np.float32), "prompt": tasks}
        told = self._encoder.observation(raw | {"images": {}})
        self._tokens, self._token_mask = told.prompt_tokens, told.prompt_mask

    def _observations(self, now: np.ndarray, following: np.ndarray) -> Iterator[Observation]:
        """What is seen in frames and in those that follow, int [b] each."""
        both, pictures = np.concatenate([now, following]), {}
        if self._cameras:  # together, since they are near each other in a video
            pictures = self._source.get(_Frames(self._source.dataset), both)["images"]
        for part, frames in ((slice(len(now)), now), (slice(len(now), None), following)):
            tokens = mask = None
            if self._tokens is not None:
                task = np.zeros(len(frames), int) if self._task is None else self._task[frames]
                tokens, mask = self._tokens[task], self._token_mask[task]
            yield Observation(
                images={camera: pictures[camera][part] for camera in self._cameras},
                image_masks={camera: np.ones(len(frames), bool) for camera in self._cameras},
                proprio=self._proprio[frames],
                prompt_tokens=tokens,
                prompt_mask=mask,
            )

    def _check_rewards(self, chunks: chunks_lib.Chunks) -> None:
        """ValueError for one that is not finite."""
        if (wrong := np.flatnonzero(~np.isfinite(chunks.rewards))).size:
            frame, dataset = int(chunks.starts[wrong[0]]), self._source.dataset
            episode = int(np.searchsorted(dataset.episode_to, frame, side="right"))
            raise ValueError(
                f"{self.where} is not finite in the {chunks.horizon} frames from frame "
                f"{frame - dataset.episode_from[episode]} of episode {episode} on: label the "
                "rewards anew with edit_dataset.py --operation=label_rewards"
            )


class _Frames:
    """Frames by their numbers in the dataset, for `Source.get`, which takes chunks."""

    def __init__(self, dataset: opening.Dataset):
        self._dataset = dataset

    def get(self, numbers: np.ndarray) -> dict[str, Any]:
        episodes = np.searchsorted(self._dataset.episode_to, numbers, side="right")
        first = self._dataset.episode_from[episodes]
        return {"episode_index": episodes, "frame_index": numbers - first}


def _check(options, data, settings: rl_config.LearnerConfig) -> None:
    """ValueError for options that no run can have."""
    for name, known in (("terminals", TERMINALS), ("chunk_source", CHUNK_SOURCES)):
        if options[name] not in known:
            raise ValueError(
                f"config.offline_rl.{name} is {options[name]!r}; expected one of {list(known)}"
            )
    chunks_lib.check(settings.action_horizon, options.discount, options.chunk_reward, options.tails)
    for name in ("reward_scale", "reward_shift"):
        if not np.isfinite(options[name]):
            raise ValueError(
                f"config.offline_rl.{name} is {options[name]}; expected a finite number"
            )
    if options.seed < 0:
        raise ValueError(f"config.offline_rl.seed is {options.seed}; it may not be negative")
    if data.mixture:
        raise ValueError(
            f"config.data.mixture is {data.mixture!r}, of several robots: offline RL is of one; "
            "name its datasets with config.data.path=a,b"
        )


def _for_pipeline(config: ml_collections.ConfigDict, settings: rl_config.LearnerConfig):
    """The config as `Pipeline` reads it: our seed, our start with its norm stats, cameras seen."""
    config = config.copy_and_resolve_references()
    config.train.seed = config.offline_rl.seed
    config.train.init_from = config.offline_rl.init_from
    if not settings.image_keys:
        config.data.cameras = ml_collections.ConfigDict()
    return config


def _rewards(
    dataset: opening.Dataset, options: ml_collections.ConfigDict
) -> tuple[str, np.ndarray]:
    """The feature of rewards and the reward of every frame, float64 [N]; cloning needs none."""
    named = options.reward_key or label_rewards.key(dataset)
    if options.algorithm == "cloning" and not named:
        return "", np.zeros(dataset.num_frames)
    return label_rewards.recorded(dataset, options.reward_key)


def _cut(
    dataset: opening.Dataset,
    options: ml_collections.ConfigDict,
    rewards: np.ndarray,
    ended: np.ndarray,
    horizon: int,
) -> chunks_lib.Chunks:
    """All chunks of a dataset. Rewards are scaled and shifted frame by frame where a chunk's is
    their sum, and as the chunk's else: what is above 0 is a matter of the recorded ones.
    """
    scale, shift = options.reward_scale, options.reward_shift
    summed = options.chunk_reward == "sum"
    rewards = rewards * scale + shift if summed else rewards
    bounds = dataset.episode_from, dataset.episode_to
    rest = {"chunk_reward": options.chunk_reward}
    if options.terminals == "rlvla":
        found = chunks_lib.cut_rlvla(rewards, *bounds, horizon, options.discount, **rest)
    else:
        rest["tails"] = options.tails
        found = chunks_lib.cut(rewards, ended, *bounds, horizon, options.discount, **rest)
    if summed:
        return found
    return dataclasses.replace(found, rewards=np.float32(scale) * found.rewards + np.float32(shift))


def _begin(dataset: opening.Dataset, episodes: Sequence[int]) -> np.ndarray:
    """Whether a chunk may begin in each frame: it is of these episodes, and marked if any are."""
    chosen = np.zeros(dataset.num_episodes, bool)
    chosen[list(episodes)] = True
    found = np.repeat(chosen, dataset.episode_to - dataset.episode_from)
    return found & dataset.column(loader.KEPT) if loader.KEPT in dataset.features else found


def _joined(batches: Sequence[ChunkBatch]) -> ChunkBatch:
    if len(batches) == 1:
        return batches[0]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
