"""The state of a learner, and what every update does with gradients: Adam, and target networks."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from policymix.rl.config import LearnerConfig
from policymix.structs import Metrics, Params, PyTree

# Networks that have a slowly moving copy, by algorithm; elsewhere the critic alone.
_TARGETS = {"chunk_soft": ("critic", "value")}


@flax.struct.dataclass
class State:
    """Everything that a resumed run needs besides its config.

    Attributes:
      step: int32 [], updates done so far.
      params: {network: tree}, what Adam moves.
      targets: {network: tree}, moving averages of the critic and, in chunk_soft, of the value; {}
        where config.ema_decay is 0. An encoder that networks share has none: of pictures and
        language the target critic reads what the online encoder makes of them.
      opt_state: {network: Adam's state}; targets have none.
    """

    step: jax.Array
    params: Params
    targets: Params
    opt_state: Mapping[str, Any]

    @property
    def policy_params(self) -> Params:
        """What acts: the networks themselves, without an average."""
        return self.params

    @property
    def target_params(self) -> Params:
        """`params` with the target networks in place of those they follow."""
        return {**self.params, **self.targets}

    def rest(self) -> dict[str, Any]:
        """What a checkpoint holds beside `policy_params`."""
        return {"step": self.step, "targets": dict(self.targets), "opt_state": self.opt_state}

    def joined(self, policy_params: Params, rest: Mapping[str, Any]) -> "State":
        """The state, of this one's structure, that those two are parts of."""
        return State(rest["step"], policy_params, rest["targets"], rest["opt_state"])


def init_state(config: LearnerConfig, params: Params) -> State:
    """Step 0: targets start at the networks they follow, Adam's moments at zero."""
    # A copy of its own: donating the state must not free one buffer twice.
    targets = {
        name: jax.tree.map(jnp.copy, params[name])
        for name in _TARGETS.get(config.algorithm, ("critic",))
        if name in params and config.ema_decay > 0
    }
    optimizer = adam(config)
    opt_state = {name: optimizer.init(tree) for name, tree in params.items()}
    return State(jnp.zeros((), jnp.int32), dict(params), targets, opt_state)


def adam(config: LearnerConfig) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980), after a clip of the network's gradient norm
    where config.clip_norm is above 0.
    """
    optimizer = optax.adam(config.learning_rate)
    if not config.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def apply_gradients(
    config: LearnerConfig, state: State, grads: Mapping[str, PyTree]
) -> tuple[State, Metrics]:
    """One Adam step of each network that `grads` names; the others, the targets and `step` stay.

    Args:
      grads: {network: gradient of its whole tree}.

    Returns:
      The state, and {"network/grad_norm": norm before clipping}.
    """
    params, opt_state, metrics = dict(state.params), dict(state.opt_state), {}
    optimizer = adam(config)
    for name, gradient in grads.items():
        updates, opt_state[name] = optimizer.update(gradient, opt_state[name], params[name])
        params[name] = optax.apply_updates(params[name], updates)
        metrics[f"{name}/grad_norm"] = _norm(gradient)
    return state.replace(params=params, opt_state=opt_state), metrics


def descend(
    config: LearnerConfig, state: State, loss_of: Callable[[Params], tuple[jax.Array, Metrics]]
) -> tuple[State, Metrics]:
    """One Adam step of all networks, in one backward pass of `loss_of` at the parameters before it;
    then the targets move.
    """
    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    state, norms = apply_gradients(config, state, grads)
    targets = polyak(state.targets, state.params, config.ema_decay)
    state = state.replace(step=state.step + 1, targets=targets)
    return state, {"loss": loss, **metrics, **norms}


def polyak(targets: Params, online: Params, ema_decay: float) -> Params:
    """target ← ema_decay * target + (1 - ema_decay) * online, for the networks that `targets` has.

    Args:
      targets: {network: tree}, {} included; online: at least the same networks.
    """
    followed = {name: online[name] for name in targets}
    chex.assert_trees_all_equal_shapes(targets, followed)
    return jax.tree.map(
        lambda target, new: ema_decay * target + (1 - ema_decay) * new, dict(targets), followed
    )


def _norm(tree: PyTree) -> jax.Array:
    """Of all numbers of a tree; the sums run down columns, which vectorises on CPUs."""
    columns = (jnp.sum(jnp.square(x), axis=tuple(range(x.ndim - 1))) for x in jax.tree.leaves(tree))
    return jnp.sqrt(sum(jnp.sum(column) for column in columns))
