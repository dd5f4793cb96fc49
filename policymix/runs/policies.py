"""From a config to a policy: the model's configuration, its loss, and checkpoints that act."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from policymix import metrics, trees
from policymix.checkpoints import assets, keymaps, leaves, store
from policymix.checkpoints.leaves import Leaf
from policymix.models import pi0, recognize
from policymix.runs import encoding
from policymix.structs import Batch, LossFn, Observation, Params
from policymix.transforms import images

VOCABULARY_PADDING = 64  # rows


def model_config(config: ml_collections.ConfigDict, *, why: str) -> pi0.Pi0Config:
    """config.model as a Pi0Config. ValueError if it is empty, with `why` it is needed."""
    fields = config.model.to_dict()
    if not fields:
        raise ValueError(
            f"{why} needs a model, and config.model is empty: pass --config=configs/NAME.py of "
            "the policy that the checkpoints belong to, for example configs/pi05_libero.py"
        )
    known = set(pi0.Pi0Config.__dataclass_fields__)
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"config.model has unknown fields {unknown}; Pi0Config has {sorted(known)}"
        )
    if lacking := [f for f in ("action_dim", "image_keys") if f in fields and fields[f] is None]:
        raise ValueError(
            f"{why} needs config.model.{lacking[0]}, which the config leaves to a dataset: set it "
            "as it is in the run's config.json"
        )
    return pi0.Pi0Config(**fields)


def optional_model(config: ml_collections.ConfigDict) -> pi0.Pi0Config | None:
    """config.model as a Pi0Config; None where it is empty."""
    return model_config(config, why="a policy") if config.model else None


def open_checkpoint(
    name: str, model: pi0.Pi0Config | None, *, merge_lora: bool
) -> store.Checkpoint:
    """`store.open_checkpoint`, low-rank updates scaled as the config says; by 1 where it has none,
    as OpenPI's variants are.

    Raises:
      ValueError: as there, or updates of another rank than the config's.
    """
    sizes = (model.paligemma_variant, model.action_expert_variant) if model else ()
    loras = [size.lora for size in sizes]
    if not merge_lora or not any(loras):
        return store.open_checkpoint(name, merge_lora=merge_lora)

    def scale(path: str) -> float:
        expert = re.fullmatch(keymaps.GROUPS["action_expert"], path) is not None
        return loras[expert].scale if loras[expert] else 1.0

    opened = store.open_checkpoint(name, merge_lora=True, lora_scale=scale)
    if opened.lora:
        recognize.check(pi0.shapes(model), store.open_checkpoint(name).leaves, name)
    return opened


def cut_vocabulary(tree: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A tree of leaves with the first `size` rows of its vocabulary: that of a PaliGemma as Hugging
    Face publishes it has rows that pad it, and that nothing was trained to say.
    """
    flat, path = trees.flatten(tree), keymaps.EMBEDDER
    if path in flat and size < flat[path].shape[0] <= size + VOCABULARY_PADDING:
        flat[path] = leaves.Rows(flat[path], size)
    return trees.unflatten(flat)


def read_params(header: Mapping[str, Any], dtype: str = "") -> Params:
    """Reads leaves one by one, each put on the device before the next is read: in `dtype`, or as it
    is stored.
    """
    total = sum(leaf.size for leaf in jax.tree.leaves(header))
    with metrics.Progress("reading", total, lines=0) as shown:

        def read(leaf: Leaf) -> jax.Array:
            array = leaf.read()
            cast = bool(dtype) and jnp.issubdtype(array.dtype, np.floating)
            placed = jax.device_put(array.astype(dtype) if cast else array)
            shown.step(leaf.size)
            return placed

        return jax.tree.map(read, dict(header))


@functools.cache
def loss_fn(model: pi0.Pi0Config, *, augment: bool = False) -> LossFn:
    """(params, batch, key) → (mean flow-matching loss, metrics); one object per model, so that what
    was compiled for it is found again. `augment`: of pictures augmented as OpenPI's in training.
    """
    loss = functools.partial(pi0.loss, model)
    if not augment:
        return loss

    def augmented(params: Params, batch: Batch, key: jax.Array):
        seen = images.augment(jax.random.fold_in(key, 1), batch.observation.images)
        observation = batch.observation.replace(images=seen)
        return loss(params, batch.replace(observation=observation), key)

    return augmented


@functools.cache
def residual_fn(model: pi0.Pi0Config) -> Callable[..., jax.Array]:
    """(params, batch, key) → the residual whose mean square that loss is; one object per model."""
    return functools.partial(pi0.residual, model)


class Policy:
    """A checkpoint that acts: raw observations in, raw action chunks out.

    Attributes:
      name: its path as given; model: its configuration; encoder: its normalisation and prompts.
      header: its parameters, not yet read.
    """

    def __init__(self, config: ml_collections.ConfigDict, model: pi0.Pi0Config, checkpoint: str):
        """Reads headers and statistics; parameters follow with `load`.

        Raises:
          ValueError, OSError: no checkpoint, another architecture, or no norm stats beside it.
        """
        self.name, self.model = checkpoint, model
        self.header = store.open_params(checkpoint, model.siglip_heads)
        recognize.check(pi0.shapes(model), self.header, checkpoint)
        found = assets.norm_stats_of(checkpoint, config.data.asset_id or None)
        if found is None:
            raise ValueError(
                f"{checkpoint} has no norm stats beside it, without which its actions mean "
                "nothing: put norm_stats.json into its assets/ASSET_ID/"
            )
        self.encoder = encoding.Encoder(model, config.data, found[1])
        self._params: Params | None = None

    def load(self) -> Params:
        """The parameters, on the device; read once."""
        if self._params is None:
            self._params = read_params(self.header)
        return self._params

    def unload(self) -> None:
        """Forgets the parameters."""
        self._params = None

    def act(
        self,
        raw: Mapping[str, Any],
        *,
        seeds: Sequence[int],
        call: int,
        num_flow_steps: int,
    ) -> np.ndarray:
        """The next chunk of every episode, float32 [b, h, a], in the robot's own units.

        Args:
          raw: what `Encoder.observation` takes.
          seeds: [b], of each episode's noise; call: how many chunks it has had. The noise depends
            on these two alone, so every policy meets the same.
        """
        return act(self.encoder, self.load(), raw, seeds, call, num_flow_steps)


class Live:
    """The policy of a run that goes on, as roll-outs take it: parameters that are there already."""

    def __init__(self, name: str, params: Params, encoder: encoding.Encoder):
        self.name, self.model, self.encoder, self._params = name, encoder.model, encoder, params

    def act(
        self,
        raw: Mapping[str, Any],
        *,
        seeds: Sequence[int],
        call: int,
        num_flow_steps: int,
    ) -> np.ndarray:
        """As that of `Policy`."""
        return act(self.encoder, self._params, raw, seeds, call, num_flow_steps)


def act(
    encoder: encoding.Encoder,
    params: Params,
    raw: Mapping[str, Any],
    seeds: Sequence[int],
    call: int,
    num_flow_steps: int,
) -> np.ndarray:
    """Chunks of a policy's parameters, float32 [b, h, a], in the robot's own units."""
    sampled = _sample(
        encoder.seen,
        params,
        encoder.observation(raw),
        jnp.asarray(seeds, jnp.uint32),
        jnp.asarray(call, jnp.uint32),
        num_flow_steps,
    )
    return encoder.actions(np.asarray(sampled), raw["state"])


@functools.partial(jax.jit, static_argnames=("model", "num_flow_steps"))
def _sample(
    model: pi0.Pi0Config,
    params: Params,
    observation: Observation,
    seeds: jax.Array,
    call: jax.Array,
    num_flow_steps: int,
) -> jax.Array:
    def draw(seed):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), call)
        return jax.random.normal(key, (model.action_horizon, model.action_dim))

    noise = jax.vmap(draw)(seeds)
    return pi0.sample_actions(
        model, params, observation, noise=noise, num_flow_steps=num_flow_steps
    )
