"""The state of training, and one step of it: state in, (state, metrics) out."""

from collections.abc import Collection, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from policymix import trees
from policymix.structs import LossFn, Metrics, Params, PyTree


@flax.struct.dataclass
class TrainState:
    """Everything that a resumed run needs besides its config.

    Attributes:
      step: int32 [], updates done so far.
      params: what the optimizer moves.
      opt_state: the optimizer's.
      ema_params: exponential moving average of params; None without one.
    """

    step: jax.Array
    params: Params
    opt_state: PyTree
    ema_params: Params | None

    @property
    def policy_params(self) -> Params:
        """What evaluation and mixing take: the average where there is one, as in OpenPI."""
        return self.params if self.ema_params is None else self.ema_params

    def rest(self) -> dict[str, Any]:
        """What a checkpoint holds beside `policy_params`; raw parameters where these are their
        average.
        """
        raw = {} if self.ema_params is None else dict(self.params)
        return {"step": self.step, "params": raw, "opt_state": self.opt_state}

    def joined(self, policy_params: Params, rest: Mapping[str, Any]) -> "TrainState":
        """The state, of this one's structure, that those two are parts of."""
        if self.ema_params is None:
            return TrainState(rest["step"], policy_params, rest["opt_state"], None)
        return TrainState(rest["step"], rest["params"], rest["opt_state"], policy_params)


def init(params: Params, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """Step 0. The average starts at the parameters, so that it needs no debiasing."""
    # A copy of its own: donating the state must not free one buffer twice.
    ema_params = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema_params)


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
) -> tuple[TrainState, Metrics]:
    """One optimizer step on one batch.

    Of `frozen` paths no gradient is computed; `optimizer` is to leave them alone.

    The key is fold_in(root_key, step), so that a resumed run draws what the uninterrupted one would
    have. params ← params + learning_rate * updates of the optimizer;
    ema ← ema_decay * ema + (1 - ema_decay) * params.

    Returns:
      The next state, and {"loss", "grad_norm" (before clipping), "param_norm", "learning_rate",
      and the loss's own}.
    """
    key = jax.random.fold_in(root_key, state.step)

    def loss_of(params):
        fixed = trees.map_with_path(
            lambda path, leaf: jax.lax.stop_gradient(leaf) if path in frozen else leaf, params
        )
        return loss_fn(fixed, batch, key)

    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updates = optax.tree.scale(learning_rate, updates)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1.0 - ema_decay)
    metrics = dict(metrics) | {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(params),
        "learning_rate": jnp.asarray(learning_rate, jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state, ema_params), metrics
