"""The state of training, and one step of it: state in, (state, metrics) out."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from policymix import nf4, sharding, trees
from policymix.structs import LossFn, Metrics, Params, PyTree


@flax.struct.dataclass
class TrainState:
    """Everything that a resumed run needs besides its config.

    Attributes:
      step: int32 [], updates done so far.
      params: the whole tree; what is frozen may be in bfloat16, or an `nf4.Nf4` in place of an
        array.
      opt_state: the optimizer's, of the trained parameters alone.
      ema_params: exponential moving average of those; None without one.
    """

    step: jax.Array
    params: Params
    opt_state: PyTree
    ema_params: Params | None

    @property
    def acting_params(self) -> Params:
        """What acts: the average where there is one, as in OpenPI, beside what is frozen."""
        if self.ema_params is None:
            return self.params
        averages = trees.flatten(self.ema_params)
        flat = trees.flatten(self.params)
        return trees.unflatten({path: averages.get(path, leaf) for path, leaf in flat.items()})

    @property
    def policy_params(self) -> Params:
        """The same in arrays alone, as evaluation and mixing take it from a checkpoint; those of
        what is in 4 bits are the host's.
        """
        flat = trees.flatten(self.acting_params)
        return trees.unflatten({path: _array(leaf) for path, leaf in flat.items()})

    def rest(self) -> dict[str, Any]:
        """What a checkpoint holds beside `policy_params`; raw parameters where these are their
        average.
        """
        averages = trees.flatten(self.ema_params or {})
        raw = {p: leaf for p, leaf in trees.flatten(self.params).items() if p in averages}
        return {"step": self.step, "params": trees.unflatten(raw), "opt_state": self.opt_state}

    def joined(self, policy_params: Params, rest: Mapping[str, Any]) -> "TrainState":
        """The state, of this one's structure, that those two are parts of. What is in 4 bits here
        comes back bit for bit, and to its place, matrix after matrix. ValueError for one of another
        shape.
        """
        given, raw = trees.flatten(policy_params), trees.flatten(rest["params"])
        flat = {
            path: raw[path] if path in raw else _as(leaf, given[path])
            for path, leaf in trees.flatten(self.params).items()
        }
        averages = None
        if self.ema_params is not None:
            averages = trees.unflatten({p: given[p] for p in trees.flatten(self.ema_params)})
        return TrainState(rest["step"], trees.unflatten(flat), rest["opt_state"], averages)


def _array(leaf: Any) -> Any:
    """What an Nf4 stands for: in the host's memory, since all of them together would not fit beside
    the state, and brought there by layers, which are all that the devices have wide. Where
    processes share it, each has the whole of it.
    """
    if not isinstance(leaf, nf4.Nf4) or not isinstance(leaf.codes, jax.Array):
        return nf4.dequantize(leaf)
    wide = np.empty(leaf.shape, leaf.dtype)
    for number in range(len(wide)):
        layer = _layer(leaf, number)
        if layer.is_fully_addressable:
            wide[number] = jax.device_get(layer)
        else:
            wide[number] = multihost_utils.process_allgather(layer, tiled=True)
    return wide


@jax.jit
def _layer(leaf: nf4.Nf4, number: jax.Array) -> jax.Array:
    return nf4.dequantize(jax.tree.map(lambda x: x[number], leaf))


def _as(leaf: Any, given: Any) -> Any:
    """What was made an array for a checkpoint, in the form and at the place that it has in a
    state. Of what lies with the host every process has the whole.
    """
    if not isinstance(leaf, nf4.Nf4):
        return given
    if given.shape != leaf.shape:  # of other arrays Orbax sees it
        raise ValueError(f"a matrix is {given.shape} there; expected {leaf.shape}")
    place = jax.tree.map(lambda x: x.sharding, leaf)
    return sharding.put_whole(nf4.by_layers(given), place)


def split(params: Params, frozen: Collection[str]) -> tuple[Params, Params]:
    """(trained, fixed): trees of what is not at one of the `frozen` paths, and of what is."""
    parts = {}, {}
    for path, leaf in trees.flatten(params).items():
        parts[path in frozen][path] = leaf
    return trees.unflatten(parts[0]), trees.unflatten(parts[1])


def merge(trained: Params, fixed: Params) -> Params:
    """The whole tree again. ValueError where a path is in both."""
    a, b = trees.flatten(trained), trees.flatten(fixed)
    if twice := sorted(a.keys() & b.keys()):
        raise ValueError(f"{twice[0]!r} is in both trees")
    return trees.unflatten(a | b)


def init(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    ema: bool,
    frozen: Collection[str] = (),
) -> TrainState:
    """Step 0. The average starts at the parameters, so that it needs no debiasing."""
    trained, _ = split(params, frozen)
    # A copy of its own: donating the state must not free one buffer twice.
    ema_params = jax.tree.map(jnp.copy, trained) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trained), ema_params)


def update(
    state: TrainState,
    batch: Any,
    root_key: jax.Array,
    learning_rate: jax.Array | float,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
    frozen: Collection[str] = (),
    accumulate: int = 1,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on one batch.

    Of `frozen` paths no gradient is computed, and the optimizer does not see them.

    The key is fold_in(root_key, step), so that a resumed run draws what the uninterrupted one would
    have. params ← params + learning_rate * updates of the optimizer;
    ema ← ema_decay * ema + (1 - ema_decay) * params.

    Args:
      accumulate: parts of the batch that are gone through one after another, each with a key of its
        own; their gradients are averaged, which takes the memory of one part.

    Returns:
      The next state, and {"loss", "grad_norm" (before clipping), "param_norm" (of what is trained),
      "learning_rate", and the loss's own}.
    """
    key = jax.random.fold_in(root_key, state.step)
    trained, fixed = split(state.params, frozen)

    def loss_of(trained, batch, key):
        return loss_fn(merge(trained, fixed), batch, key)

    gradients = functools.partial(_accumulated, parts=accumulate) if accumulate > 1 else _whole
    (loss, metrics), grads = gradients(loss_of, trained, batch, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    updates = optax.tree.scale(learning_rate, updates)
    trained = optax.apply_updates(trained, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(trained, ema_params, 1.0 - ema_decay)
    metrics = dict(metrics) | {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(trained),
        "learning_rate": jnp.asarray(learning_rate, jnp.float32),
    }
    return TrainState(state.step + 1, merge(trained, fixed), opt_state, ema_params), metrics


def _whole(loss_of: LossFn, trained: Params, batch: Any, key: jax.Array):
    return jax.value_and_grad(loss_of, has_aux=True)(trained, batch, key)


def _accumulated(loss_of: LossFn, trained: Params, batch: Any, key: jax.Array, parts: int):
    """What `_whole` returns, for the mean over equal parts of the batch, in float32.

    Of a batch with an action mask, parts count by the numbers that their mask lets through, which
    makes of means over those the mean over all of them.
    """
    batch = jax.tree.map(lambda x: _parts(x, parts), batch)
    weights = _weights(batch, parts)

    def body(total, inputs):
        number, weight, part = inputs
        (loss, metrics), grads = _whole(loss_of, trained, part, jax.random.fold_in(key, number))
        total = jax.tree.map(lambda t, g: t + weight * g.astype(jnp.float32), total, grads)
        return total, (loss, dict(metrics))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    total, found = jax.lax.scan(body, zeros, (jnp.arange(parts), weights, batch))
    grads = jax.tree.map(lambda t, x: t.astype(x.dtype), total, trained)
    means = jax.tree.map(lambda x: jnp.tensordot(weights, x.astype(jnp.float32), axes=1), found)
    return means, grads


def _parts(x: jax.Array, parts: int) -> jax.Array:
    """[b, ...] → [parts, b / parts, ...], every `parts`-th row in one: rows that are split over
    devices stay where they are.
    """
    if x.shape[0] % parts:
        raise ValueError(
            f"config.train.accumulate is {parts}, which does not divide the batch of {x.shape[0]}"
        )
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _weights(batch: Any, parts: int) -> jax.Array:
    """float32 [parts], whose sum is 1."""
    mask = getattr(batch, "action_mask", None)
    if mask is None:
        return jnp.full(parts, 1 / parts, jnp.float32)
    counts = jnp.sum(mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.float32)
    return counts / jnp.maximum(jnp.sum(counts), 1.0)
