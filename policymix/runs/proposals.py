"""Action chunks that a policy's checkpoint proposes at the frames of a dataset, kept on disk.

A directory holds `proposals.json`, which says what they were made for, and a file for every block
of frames: float32 [frames, n, h, a] in the robot's own units, and their CRC-32. A block's file is
whole or absent, so that a run that is killed at any time goes on with the first that is missing.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from policymix import files, metrics, processes
from policymix.checkpoints import assets, provenance
from policymix.data import loader
from policymix.models import pi0
from policymix.runs import encoding, policies, sources
from policymix.structs import Observation, Params
from policymix.transforms import compose

_BLOCK = 256  # frames
_KEPT = 256  # blocks that stay mapped: each takes a file descriptor
_MANIFEST, _FORMAT = "proposals.json", 1
_HINT = "delete the directory, or choose another --workdir"
# The fields of config.data that say what a policy sees and what its actions mean.
_WIRING = (
    "robot", "state_key", "action_key", "delta_actions", "adapt", "normalization", "tokenizer",
    "default_prompt",
)  # fmt: skip


def propose(
    config: ml_collections.ConfigDict,
    model: pi0.Pi0Config,
    checkpoint: str,
    source: sources.Source,
    *,
    horizon: int,
    num_proposals: int,
    directory: pathlib.Path | None,
    batch_size: int = 32,
    num_flow_steps: int | None = None,
    seed: int = 0,
) -> "Proposals | None":
    """`num_proposals` chunks of a policy at every frame of a dataset's episodes, those held out
    too, that may begin a chunk.

    What is in `directory` is used again; what is lacking there, or damaged, is made. Pictures and
    prompt are encoded once for all chunks of a frame. The noise of a chunk depends on the seed, the
    frame's number in the dataset and the chunk's own, on nothing else.

    Args:
      config: its section `data` is the checkpoint's: cameras, features, tokenizer.
      model: of the checkpoint. source: its dataset and episodes count, nothing else of it.
      horizon: h, the first actions of the policy's chunk that are kept.
      num_proposals: n. directory: of this cache alone; None: all is checked, nothing is made.
      batch_size: frames that the policy is asked at together.
      num_flow_steps: None: config.evaluate.num_flow_steps.

    Raises:
      ValueError: another policy's horizon, robot or directory, or a frame that cannot be encoded.
      FloatingPointError: what it proposes is not finite. Nothing takes the place of that.
      OSError: no checkpoint, or no room.
    """
    steps = config.evaluate.num_flow_steps if num_flow_steps is None else num_flow_steps
    settings = {"horizon": horizon, "num_proposals": num_proposals, "num_flow_steps": steps}
    _check(settings | {"batch_size": batch_size}, model, checkpoint)
    settings["seed"] = seed % 2**32
    policy = policies.Policy(config, model, checkpoint)
    asked = _Frames(policy, source, config.data.default_prompt or None, settings)
    if directory is None:
        return None
    shape = (len(asked.numbers), num_proposals, horizon, asked.action_dim)
    found = Proposals(files.local(directory), asked.numbers, shape)
    with _alone(found.directory):
        _check_manifest(found.directory, asked, _made_for(config.data, asked))
        missing = [b for b in range(-(-len(found) // _BLOCK)) if not _is_whole(found, b)]
        files.check_space(found.directory, sum(found.num_bytes(b) + 4096 for b in missing))
        for block, chunks in _made(asked, missing, batch_size, config.data.num_threads):
            _write(found.path(block), chunks)
    policy.unload()  # also where threads that made batches still know it
    return found


def _check(settings: Mapping[str, int], model: pi0.Pi0Config, checkpoint: str) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} of proposals is {value}; at least 1 is needed")
    if settings["horizon"] > model.action_horizon:
        raise ValueError(
            f"config.offline_rl.action_horizon is {settings['horizon']}, and {checkpoint} proposes "
            f"chunks of {model.action_horizon} actions (config.model.action_horizon): ask for no "
            "more, or name a policy of longer chunks"
        )


class Proposals:
    """The chunks of a directory, mapped into memory block by block. It pickles without them.

    Attributes:
      directory: where they are. frames: int64 [N], numbers in the dataset, rising.
      num_proposals, horizon, action_dim: n, h and a of every frame.
    """

    def __init__(self, directory: pathlib.Path, frames: np.ndarray, shape: tuple[int, ...]):
        self.directory, self.frames = directory, frames
        _, self.num_proposals, self.horizon, self.action_dim = shape
        self._mapped: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_mapped": {}}

    def __len__(self) -> int:
        return len(self.frames)

    def path(self, block: int) -> pathlib.Path:
        return self.directory / f"chunks-{block:06d}.f32"

    def block_shape(self, block: int) -> tuple[int, ...]:
        count = min(_BLOCK, len(self) - block * _BLOCK)
        return (count, self.num_proposals, self.horizon, self.action_dim)

    def num_bytes(self, block: int) -> int:
        return 4 * math.prod(self.block_shape(block))

    def rows(self, frames: np.ndarray) -> np.ndarray:
        """Which of `self.frames` they are, int64 [b]. IndexError for a frame without proposals."""
        frames = np.asarray(frames, np.int64)
        rows = np.minimum(np.searchsorted(self.frames, frames), len(self) - 1)
        if (wrong := self.frames[rows] != frames).any():
            raise IndexError(
                f"{self.directory} has nothing at frame {frames[wrong][0]}, but at {len(self)} "
                f"frames from {self.frames[0]} to {self.frames[-1]}"
            )
        return rows

    def get(self, frames: np.ndarray) -> np.ndarray:
        """What is proposed at frames of the dataset, int [b]: float32 [b, n, h, a] in the robot's
        own units. Raises as `rows`.
        """
        rows = self.rows(frames)
        found = np.empty((len(rows), *self.block_shape(0)[1:]), np.float32)
        for block in np.unique(rows // _BLOCK).tolist():
            here = rows // _BLOCK == block
            found[here] = self._map(block)[rows[here] - block * _BLOCK]
        return found

    def _map(self, block: int) -> np.ndarray:
        if (mapped := self._mapped.get(block)) is None:  # threads may be here at once
            mapped = np.memmap(self.path(block), "<f4", "r", shape=self.block_shape(block))
            self._mapped = (self._mapped if len(self._mapped) < _KEPT else {}) | {block: mapped}
        return mapped

    def normalized(
        self, encoder: encoding.Encoder, frames: np.ndarray, states: np.ndarray
    ) -> np.ndarray:
        """The same as a network has them, float32 [b, n, h, action_dim]: relative to the state of
        their frame where its actions are, normalised and padded, as `Encoder.batch` does.

        Args:
          encoder: of the network that is to learn from them, not of the policy that made them.
          states: [b, p] of the frames, in the robot's own units.
        """
        chunks = self.get(frames)
        b, n, *rest = chunks.shape
        raw = {"state": np.repeat(states, n, axis=0), "actions": chunks.reshape(b * n, *rest)}
        actions = compose.pad(encoder.normalized(raw)["actions"], encoder.model.action_dim)
        return actions.astype(np.float32).reshape(b, n, *actions.shape[1:])


class Normalized:
    """Proposals as a network has them, at frames whose states are read from their source."""

    def __init__(self, proposals: Proposals, encoder: encoding.Encoder, source: sources.Source):
        self._proposals, self._encoder = proposals, encoder
        self._states = source.chunks(_episodes(source)).frame_values()["state"]

    def get(self, frames: np.ndarray) -> np.ndarray:
        """At frames of the dataset, int [b]: float32 [b, n, h, action_dim]."""
        states = self._states[self._proposals.rows(frames)]
        return self._proposals.normalized(self._encoder, frames, states)


def _episodes(source: sources.Source) -> list[int]:
    return sorted([*source.train_episodes, *source.held_out_episodes])


class _Frames:
    """The frames that a policy is asked at, by their positions 0..N-1 among them.

    Attributes:
      numbers: int64 [N], their numbers in the dataset. action_dim: of the robot.
    """

    def __init__(
        self, policy: policies.Policy, source: sources.Source, prompt: str | None, settings: dict
    ):
        self.policy, self.dataset, self.settings = policy, source.dataset, settings
        keys = policy.encoder.wiring.state_keys, policy.encoder.wiring.action_keys
        self._chunks = loader.ActionChunks(self.dataset, 1, _episodes(source), *keys, prompt)
        if not len(self._chunks):
            raise ValueError(f"{self.dataset.path}: none of its frames may begin a chunk")
        found = self._chunks.get(np.arange(len(self._chunks)))
        self.numbers = self.dataset.episode_from[found["episode_index"]] + found["frame_index"]
        self.action_dim = self._chunks.shapes["actions"][-1]
        state, _ = self.see(np.zeros(1, np.int64))
        nothing = np.zeros((1, 1, policy.model.action_dim), np.float32)
        if (size := policy.encoder.actions(nothing, state).shape[-1]) != self.action_dim:
            raise ValueError(
                f"{policy.name} proposes actions of {size} numbers, those of {self.dataset.path} "
                f"have {self.action_dim}: it belongs to another robot"
            )

    def where(self, position: int) -> str:
        """In words, for errors."""
        found = self._chunks.get(np.array([position]))
        (episode,), (frame,) = found["episode_index"], found["frame_index"]
        return f"frame {frame} of episode {episode} of {self.dataset.path}"

    def see(self, positions: np.ndarray) -> tuple[np.ndarray, Observation]:
        """Their states [b, p] as the robot has them, and what the network sees. ValueError or
        OSError, naming the frame, for one that cannot be read or encoded.
        """
        raw, encoder = self._chunks.get(positions), self.policy.encoder
        try:
            raw["images"] = {
                camera: self.dataset.frames(feature).get(self.numbers[positions])
                for camera, feature in encoder.cameras.items()
            }
            return raw["state"], encoder.observation(raw)
        except Exception as error:
            for position in positions.tolist() if len(positions) > 1 else ():
                self.see(np.array([position]))  # tells which it is
            raise self._failed(positions, error) from error

    def ask(self, positions, states: np.ndarray, observation: Observation) -> np.ndarray:
        """float32 [b, n, h, a], all of them finite."""
        policy, n = self.policy, self.settings["num_proposals"]
        seed, steps = np.uint32(self.settings["seed"]), self.settings["num_flow_steps"]
        frames = self.numbers[positions].astype(np.uint32)
        try:
            args = policy.encoder.seen, policy.load(), observation, frames, seed
            flat = np.concatenate(np.asarray(_sample(*args, n, steps)))
            raw = policy.encoder.actions(flat, np.repeat(states, n, axis=0))
        except Exception as error:
            raise self._failed(positions, error) from error
        chunks = raw.reshape(-1, n, *raw.shape[1:])[:, :, : self.settings["horizon"]]
        if (wrong := ~np.isfinite(chunks).all(axis=(1, 2, 3))).any():
            raise FloatingPointError(
                f"{policy.name} proposes actions that are not finite at "
                f"{self.where(positions[wrong][0])}: its parameters or its norm stats hold NaN or "
                "infinity"
            )
        return chunks

    def _failed(self, positions: np.ndarray, error: Exception) -> Exception:
        """What to raise in the place of an error that does not say at which frame."""
        kind = next((k for k in (OSError, ValueError) if isinstance(error, k)), RuntimeError)
        name = f"{type(error).__name__}: " if kind is RuntimeError else ""
        batch = f", in a batch of {len(positions)} frames" if len(positions) > 1 else ""
        return kind(
            f"{self.policy.name} proposes nothing at {self.where(positions[0])}{batch}: "
            f"{name}{files.reason(error)}"
        )


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _sample(model: pi0.Pi0Config, params: Params, observation: Observation, frames, seed, n, steps):
    """[b, n, h, action_dim] as the network samples them, at frames uint32 [b]."""

    def draw(frame, k):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), frame)
        shape = (model.action_horizon, model.action_dim)
        return jax.random.normal(jax.random.fold_in(key, k), shape)

    numbers = jnp.arange(n, dtype=jnp.uint32)
    noise = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(frames, numbers)
    return pi0.sample_actions(model, params, observation, noise=noise, num_flow_steps=steps)


def _made(
    asked: _Frames, blocks: list[int], batch_size: int, num_threads: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The chunks of each of these blocks. Batches begin anew with every block and are all of one
    size, so that one program makes the same bytes whichever blocks are asked for.
    """
    size = min(batch_size, _BLOCK, total := len(asked.numbers))
    batches = [
        (block, np.arange(start, min(start + size, end)))
        for block in blocks
        for end in [min((block + 1) * _BLOCK, total)]
        for start in range(block * _BLOCK, end, size)
    ]

    def see(number: int) -> tuple[np.ndarray, np.ndarray, Observation]:
        positions = np.resize(batches[number][1], size)  # a small one is repeated
        return positions, *asked.see(positions)

    threads = min(num_threads or processes.num_cores(), len(batches))
    ahead = loader.ahead(see, 0, len(batches), num_threads=threads) if batches else ()
    pairs = itertools.groupby(zip(batches, ahead, strict=True), key=lambda pair: pair[0][0])
    with metrics.Progress("proposals", sum(len(positions) for _, positions in batches)) as shown:
        for block, group in pairs:
            made = []
            for (_, positions), seen in group:
                made.append(asked.ask(*seen)[: len(positions)])
                shown.step(len(positions))
            yield block, np.concatenate(made)


def _made_for(data: ml_collections.ConfigDict, asked: _Frames) -> dict[str, Any]:
    """All that the chunks depend on, as JSON has it."""
    policy, dataset = asked.policy, asked.dataset
    told = {"format": _FORMAT, "frames_per_block": _BLOCK, **asked.settings}
    told["checkpoint"] = provenance.fingerprint(policy.name)
    told["normalisation"] = _digest(assets.norm_stats_json(policy.encoder.norm_stats))
    told["dataset"] = dataset.fingerprint()
    told["instructions"] = _digest([] if data.default_prompt else dataset.tasks)
    told["choice of frames"] = _digest(asked.numbers.tolist())
    told["cameras"] = policy.encoder.cameras
    model = dataclasses.asdict(policy.model).items()
    told |= {f"config.model.{name}": value for name, value in model if name != "remat"}
    told |= {f"config.data.{name}": data[name] for name in _WIRING}
    return json.loads(json.dumps(told, default=str))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_manifest(directory: pathlib.Path, asked: _Frames, made_for: dict[str, Any]) -> None:
    """Writes what a new directory is made for. ValueError where that is something else."""
    path = directory / _MANIFEST
    if not path.exists():
        if any(directory.glob("*.f32")):
            raise ValueError(f"{directory} holds chunks and no {_MANIFEST}; {_HINT}")
        names = {"checkpoint": asked.policy.name, "dataset": str(asked.dataset.path)}
        return files.write_json(path, {"of": names, "made_for": made_for})
    try:
        told = files.read_json(path)
        known, names = dict(told["made_for"]), "{checkpoint} at {dataset}".format(**told["of"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or another's; {_HINT}") from error
    for key in dict.fromkeys([*made_for, *known]):
        if known.get(key) != made_for.get(key):
            raise ValueError(
                f"{directory} holds what {names} proposes, and now another {key} is asked for: "
                f"{made_for.get(key)!r}, not {known.get(key)!r}; {_HINT}"
            )
    return None


def _is_whole(proposals: Proposals, block: int) -> bool:
    """Whether a block is there, as it was written."""
    path = proposals.path(block)
    content = path.read_bytes() if path.exists() else b""
    whole = len(content) == proposals.num_bytes(block) + 4
    whole = whole and zlib.crc32(content[:-4]) == int.from_bytes(content[-4:], "little")
    if path.exists() and not whole:
        print(f"{path} is not as it was written: it is made again", file=sys.stderr)
    return whole


def _write(path: pathlib.Path, chunks: np.ndarray) -> None:
    content = np.ascontiguousarray(chunks, "<f4").tobytes()
    files.write_whole(path, content + zlib.crc32(content).to_bytes(4, "little"))
    with path.open("rb") as file:  # what took minutes to compute may not be lost with the power
        os.fsync(file.fileno())


@contextlib.contextmanager
def _alone(directory: pathlib.Path) -> Iterator[None]:
    """Keeps out other processes and threads that make the same; they find it made."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a") as file:  # the kernel lets go, also on kill -9
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process to fill {directory}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a disk without locks
        for leftover in directory.glob(".*.f32.partial-*"):  # of a run that was killed
            leftover.unlink()
        yield
