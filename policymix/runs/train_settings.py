"""What config.train asks for, looked at before anything is compiled or written."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from policymix import nf4, sharding, trackers, trees
from policymix.models import pi0
from policymix.runs import policies
from policymix.structs import Params
from policymix.training import optimizers
from policymix.training import state as state_lib

FROZEN_DTYPES = ("float32", "bfloat16", "nf4")


@dataclasses.dataclass(frozen=True)
class Update:
    """All that decides the compiled step, besides the model and the devices.

    Attributes:
      optimizer: its settings; freeze among them.
      frozen: the paths of parameters that stay; frozen_dtype: how they are kept.
      accumulate: parts of a batch; shard: (regex, axis) of parameters that are split.
      offload: whether the optimizer's states lie in the host's memory between steps.
    """

    optimizer: optimizers.Settings
    frozen: frozenset[str]
    frozen_dtype: str
    ema_decay: float
    accumulate: int
    augment: bool
    shard: tuple[tuple[str, int | None], ...]
    offload: bool


def update_of(config: ml_collections.ConfigDict, model: pi0.Pi0Config) -> Update:
    """ValueError, which names the field, for what cannot be."""
    t = config.train
    _check_numbers(t)
    trackers.check(tensorboard=t.tensorboard, wandb=t.wandb)
    if t.frozen_dtype not in FROZEN_DTYPES:
        raise ValueError(
            f"config.train.frozen_dtype is {t.frozen_dtype!r}; expected one of "
            f"{', '.join(FROZEN_DTYPES)}"
        )
    settings = optimizers.Settings(
        name=t.optimizer,
        b1=t.b1,
        b2=t.b2,
        weight_decay=t.weight_decay,
        clip_norm=t.clip_norm,
        learning_rates=tuple(_factor(text) for text in t.learning_rates),
        pull=t.pull,
        freeze=(*t.freeze, *pi0.freeze(model)),  # beside low-rank updates, what OpenPI keeps fixed
    )
    shapes = pi0.shapes(model)
    optimizers.check(settings, shapes)
    shard = sharding.parse_rules(t.shard)
    if shard:
        trees.match(shard, list(trees.flatten(shapes)), what="config.train.shard", default=None)
    return Update(
        optimizer=settings,
        frozen=frozenset(optimizers.frozen_paths(shapes, settings.freeze)),
        frozen_dtype=t.frozen_dtype,
        ema_decay=t.ema_decay,
        accumulate=t.accumulate,
        augment=config.data.augment,
        shard=shard,
        offload=t.offload,
    )


def mesh_of(t: ml_collections.ConfigDict, devices: Any) -> jax.sharding.Mesh:
    """The devices of a run. ValueError where they cannot share its batches equally."""
    mesh = sharding.mesh(t.fsdp_devices, devices)
    parts = mesh.size * t.accumulate
    if t.batch_size % parts:
        several = f" in config.train.accumulate = {t.accumulate} parts" if t.accumulate > 1 else ""
        raise ValueError(
            f"config.train.batch_size is {t.batch_size}, which the {mesh.size} devices cannot "
            f"share equally{several}: make it a multiple of {parts}"
        )
    if t.offload and not sharding.has_host_memory(mesh):
        raise ValueError(
            "config.train.offload: the backend "
            f"{mesh.devices.flat[0].platform} cannot keep states in pinned host memory; set it to "
            "False, or try config.train.optimizer='adamw_8bit'"
        )
    return mesh


def learning_rates(t: ml_collections.ConfigDict) -> np.ndarray:
    """float32 [num_steps]."""
    schedule = optimizers.schedule(
        learning_rate=t.learning_rate,
        final_learning_rate=t.final_learning_rate,
        warmup_steps=t.warmup_steps,
        decay_steps=t.decay_steps,
    )
    return optimizers.learning_rates(schedule, t.num_steps)


def kept(update: Update, path: str, leaf: Any) -> Any:
    """A parameter as training keeps it: as it is, or, where it is frozen, smaller."""
    if path not in update.frozen or update.frozen_dtype == "float32":
        return leaf
    if update.frozen_dtype == "nf4" and nf4.suits(path, leaf):
        return nf4.quantize(leaf)
    return leaf.astype(jnp.bfloat16)


def start(update: Update, params: Params) -> state_lib.TrainState:
    """The state before the first step, of parameters as they are kept."""
    return state_lib.init(
        params,
        optimizers.make(update.optimizer),
        ema=update.ema_decay > 0,
        frozen=update.frozen,
    )


def state_shapes(update: Update, model: pi0.Pi0Config) -> state_lib.TrainState:
    """A train state as `jax.ShapeDtypeStruct`s."""
    keep = functools.partial(trees.map_with_path, functools.partial(kept, update))
    return jax.eval_shape(lambda params: start(update, keep(params)), pi0.shapes(model))


def state_places(
    update: Update, mesh: jax.sharding.Mesh, shapes: state_lib.TrainState
) -> state_lib.TrainState:
    """Where the state lies between steps."""
    places = sharding.parameters(mesh, shapes, update.shard)
    if not update.offload:
        return places
    return places.replace(opt_state=sharding.on_host(places.opt_state))


@functools.cache
def compiled(
    update: Update, model: pi0.Pi0Config, seen: pi0.Pi0Config, mesh: jax.sharding.Mesh
) -> Any:
    """The jitted step (state, batch, key, learning rate) → (state, metrics).

    Runs of one process that differ in data or learning rate share it. `seen` is the model with the
    cameras that are there.
    """
    shapes = state_shapes(update, model)
    places = state_places(update, mesh, shapes)
    optimizer = optimizers.make(update.optimizer)
    if update.offload:
        near = sharding.parameters(mesh, shapes, update.shard)
        optimizer = sharding.offloaded(optimizer, near.opt_state)
    step = functools.partial(
        state_lib.update,
        loss_fn=policies.loss_fn(seen, augment=update.augment),
        optimizer=optimizer,
        ema_decay=update.ema_decay,
        frozen=update.frozen,
        accumulate=update.accumulate,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))


def _check_numbers(t: Mapping[str, Any]) -> None:
    """ValueError for numbers that no run can have."""
    least_one = ("batch_size", "num_steps", "log_every", "save_every", "max_to_keep")
    for name in (*least_one, "fsdp_devices", "accumulate", "eval_batches"):
        if t[name] < 1:
            raise ValueError(f"config.train.{name} is {t[name]}; at least 1 is needed")
    not_negative = ("seed", "warmup_steps", "keep_period", "weight_decay", "pull")
    for name in (*not_negative, "eval_every", "rollout_every"):
        if not t[name] >= 0:
            raise ValueError(f"config.train.{name} is {t[name]}; it may not be negative")
    for name in ("learning_rate", "final_learning_rate", "clip_norm"):
        if not (0 <= t[name] < math.inf):
            raise ValueError(f"config.train.{name} is {t[name]}; expected a number of at least 0")
    if not 0 <= t.ema_decay < 1:
        raise ValueError(f"config.train.ema_decay is {t.ema_decay}; expected 0 (off) to below 1")


def _factor(text: str) -> tuple[str, float]:
    """PATH REGEX=FACTOR."""
    pattern, equals, number = str(text).rpartition("=")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not equals or not 0 <= factor < math.inf:
        raise ValueError(
            f"config.train.learning_rates has {text!r}; expected 'PATH REGEX=FACTOR', as in "
            "'PaliGemma/img/.*=0.1'"
        )
    return pattern, factor
