"""Checkpoints of chunk-level learners that act, as `policies.Policy` does for π0."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from policymix import trees
from policymix.checkpoints import assets, store
from policymix.models import recognize
from policymix.rl import learner, networks
from policymix.rl.config import LearnerConfig
from policymix.runs import encoding, learners, policies
from policymix.structs import Observation, Params


def is_chunk_policy(checkpoint: str) -> bool:
    """Whether a checkpoint is a chunk-level learner's, by its arrays."""
    opened = store.open_checkpoint(checkpoint)
    return opened.format == "orbax" and recognize.is_chunk_level(store.open_params(checkpoint))


class ChunkPolicy:
    """A chunk-level policy: raw observations in, raw action chunks out.

    Attributes:
      name: its path as given; model: the learner's configuration; encoder: its normalisation.
      header: its parameters, not yet read.
    """

    def __init__(self, config: ml_collections.ConfigDict, checkpoint: str):
        """Reads headers and statistics; parameters follow with `load`.

        Raises:
          ValueError, OSError: no checkpoint, another learner's, or no norm stats beside it.
        """
        self.name = checkpoint
        self.header = store.open_params(checkpoint)
        found = assets.norm_stats_of(checkpoint, config.data.asset_id or None)
        if found is None:
            raise ValueError(
                f"{checkpoint} has no norm stats beside it, without which its actions mean "
                "nothing: put norm_stats.json into its assets/ASSET_ID/"
            )
        config, self.model = learners.of_checkpoint(config, checkpoint, found[1])
        check(self.model, self.header, checkpoint)
        self.encoder = encoding.Encoder(self.model, config.data, found[1])
        self._params: Params | None = None

    def load(self) -> Params:
        """The parameters, on the device; read once."""
        if self._params is None:
            self._params = policies.read_params(self.header)
        return self._params

    def unload(self) -> None:
        """Forgets the parameters."""
        self._params = None

    def act(
        self, raw: Mapping[str, Any], *, seeds: Sequence[int], call: int, num_flow_steps: int = 0
    ) -> np.ndarray:
        """The next chunk of every episode, float32 [b, h, a], in the robot's own units.

        Args:
          raw: what `Encoder.observation` takes.
          seeds: [b], of each episode's noise; call: how many chunks it has had.
          num_flow_steps: not used; the learner's own.
        """
        observation = self.encoder.observation(raw)
        return act(self.model, self.load(), self.encoder, observation, raw["state"], seeds, call)


class Live:
    """The policy of a run that goes on, as roll-outs take it."""

    def __init__(self, name: str, model: LearnerConfig, params: Params, encoder: encoding.Encoder):
        self.name, self.model, self.encoder, self._params = name, model, encoder, params

    def act(
        self, raw: Mapping[str, Any], *, seeds: Sequence[int], call: int, num_flow_steps: int = 0
    ) -> np.ndarray:
        """As that of `ChunkPolicy`."""
        observation = self.encoder.observation(raw)
        return act(self.model, self._params, self.encoder, observation, raw["state"], seeds, call)


def act(
    model: LearnerConfig,
    params: Params,
    encoder: encoding.Encoder,
    observation: Observation,
    state: np.ndarray,
    seeds: Sequence[int],
    call: int,
) -> np.ndarray:
    """Chunks of a learner's parameters, float32 [b, h, a], in the units of the robot whose `state`
    [b, p] this is; the noise depends on seeds and call alone.
    """
    seeds = jnp.asarray(seeds, jnp.uint32)
    chunks = _act(model, params, observation, seeds, jnp.asarray(call, jnp.uint32))
    return encoder.actions(np.asarray(chunks), state)


@functools.partial(jax.jit, static_argnames="model")
def _act(
    model: LearnerConfig,
    params: Params,
    observation: Observation,
    seeds: jax.Array,
    call: jax.Array,
) -> jax.Array:
    def one(seed, seen):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), call)
        return learner.act(model, params, jax.tree.map(lambda x: x[None], seen), key)[0]

    return jax.vmap(one)(seeds, observation)


def check(model: LearnerConfig, header: Params, name: str) -> None:
    """ValueError where arrays are not those of the learner: of a π0, or of another algorithm,
    robot, horizon or size.
    """
    if not recognize.is_chunk_level(header):
        raise ValueError(
            f"{name} holds {recognize.describe(header)}, and a chunk-level learner's checkpoint is "
            "needed here: one that offline_rl.py wrote, or a mix of such"
        )
    expected = jax.eval_shape(functools.partial(networks.init, model), jax.random.key(0))
    if set(expected) != set(header):
        raise ValueError(
            f"{name} holds {_words(header)}, and {model.algorithm} as the config has it "
            f"{_words(expected)}: another algorithm's, or one that reads pictures and language "
            "otherwise"
        )
    ours, theirs = (trees.flatten(tree) for tree in (expected, header))
    shapes = [{path: tuple(leaf.shape) for path, leaf in flat.items()} for flat in (ours, theirs)]
    differ = sorted(path for path, _ in shapes[0].items() ^ shapes[1].items())
    if differ:
        there, here = (flat.get(differ[0], "absent") for flat in shapes[::-1])
        raise ValueError(
            f"{name} is not the learner that the config describes, {model.algorithm} with chunks "
            f"of {model.action_horizon} actions of {model.action_dim} numbers, proprio of "
            f"{model.proprio_dim} and cameras {list(model.image_keys)}: {differ[0]} is {there} "
            f"there and {here} here"
        )


def _words(tree: Params) -> str:
    return "the networks " + ", ".join(sorted(tree))
