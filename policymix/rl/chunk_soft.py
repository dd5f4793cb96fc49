"""Soft actor-critic learning over action chunks, offline: three networks, each after the other.

    critic   Q_j(s, A) → y = rewards + discounts * V̄(s')
    value    V(s) → mean over n chunks A_k of the policy of min_j Q̄_j(s, A_k) - T_H log π(A_k | s)
    policy   A, weighted by w = exp((min_j Q̄_j(s, A) - V(s)) / T), clipped, over its batch's mean

T_H is config.entropy_temperature, T config.temperature; `discounts` holds γ^h; Q̄ and V̄ are the
target networks, or Q and V where ema_decay is 0. Each uses what the one before has just been
updated to, its target too: Q, then V, then π.

The program that these losses are from has T_H = 1, no target networks, one critic and no clip:
LearnerConfig(algorithm="chunk_soft", entropy_temperature=1.0, max_weight=0, ema_decay=0,
num_critics=1, min_std=1e-6, max_token_len=0). That diverges, in a circle. With no network to
average over time, V and Q settle, if at all, at

    V ≈ (E[rewards] + T_H * Σ (log std + 1.42)) / (1 - γ^h)

where the sum, the entropy, has h * a terms: 70 for ten actions of seven. At h = 10 and γ = 0.99
one unit of log std moves V by 730, while returns are of the order of one. The policy's loss narrows
std where it has data and says nothing about the mean elsewhere; samples are chunks nobody played,
Q of them is extrapolated, V believes it, and Q's target is V. Meanwhile exp((Q - V) / T) with
advantages of hundreds is one chunk's alone (the effective batch falls to 1 of 32) and overflows
float32 at 89. The defaults break it at each place: T_H = 1e-3, weights of at most 100, the smaller
of two slowly moving critics where samples and data are judged, and a slowly moving V in Q's target.

Sources: soft values: Haarnoja et al. 2018 (arXiv:1801.01290); weights: Peng et al. 2019
(arXiv:1910.00177); the smaller of two: Fujimoto et al. 2018 (arXiv:1802.09477).
b batch, n chunks of one state, e ensemble, h action horizon, a action, d features.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from policymix.rl import chunk_iql, losses, networks
from policymix.rl import state as states
from policymix.rl.config import LearnerConfig
from policymix.rl.state import State
from policymix.structs import ChunkBatch, Metrics, Params, PyTree


def update(
    config: LearnerConfig, state: State, batch: ChunkBatch, root_key: jax.Array
) -> tuple[State, Metrics]:
    """One Adam step of each network, in turn. Draws from fold_in(root_key, state.step)."""
    shape = (len(batch.actions), config.num_samples, config.action_horizon, config.action_dim)
    noise = jax.random.normal(jax.random.fold_in(root_key, state.step), shape)
    return update_given(config, state, batch, noise)


def update_given(
    config: LearnerConfig, state: State, batch: ChunkBatch, noise: jax.Array
) -> tuple[State, Metrics]:
    """`update` with the policy's samples at mean + std * noise; noise [b, n, h, a].

    Every network reads the observations once to learn, and once more when it has learned and is
    asked; the policy once. "loss" is critic + lambda_v * value + lambda_pi * policy. With "fused"
    networks these two scale nothing else: each network has an Adam of its own, whose steps do not
    depend on the scale of a loss. In "plain" ones they weigh what reaches the shared encoder.
    """
    reading = _Reading(config, state.params, batch)
    state, metrics, into = _improve_critic(config, state, batch, reading)
    mean_std, pull = reading.vjp(state.params, "policy", networks.gaussian)
    chunks, action_is_pad = chunk_iql.regressed(batch)
    q, soft = _asked(config, state, batch, reading, chunks, mean_std, noise)
    state, told, from_value = _improve_value(config, state, reading, soft)
    metrics |= told
    seen = reading.again(state.params, "value")
    advantage = q - networks.value(config, state.params, seen)[:, None]
    weights = losses.advantage_weights(
        advantage, config.temperature, config.max_weight, config.normalize_weights
    )

    def loss_of(mean_std):
        mean, std = (x[:, None] for x in mean_std)
        log_prob = losses.gaussian_log_prob(mean, std, chunks, action_is_pad)
        return losses.policy_loss(log_prob, weights), log_prob

    (loss, log_prob), cotangent = jax.value_and_grad(loss_of, has_aux=True)(mean_std)
    gradient, from_policy = pull(cotangent)
    state, norms = states.apply_gradients(config, state, {"policy": gradient})
    metrics |= norms | {
        "policy/loss": loss,
        "policy/log_prob": jnp.mean(log_prob),
        "policy/advantage_mean": jnp.mean(advantage),
        "policy/weight_max": jnp.max(weights),
        "policy/effective_batch": losses.effective_batch(weights),
        "loss": metrics["critic/loss"]
        + config.lambda_v * metrics["value/loss"]
        + config.lambda_pi * loss,
    }
    state, norms = states.apply_gradients(
        config, state, reading.encoder_gradient(into, from_value, from_policy)
    )
    return state.replace(step=state.step + 1), metrics | norms


class _Reading:
    """What networks read of a batch's observations: of encoders of their own, or of a shared one,
    which then runs once, before the update.
    """

    def __init__(self, config: LearnerConfig, params: Params, batch: ChunkBatch):
        self.config, self.observation = config, batch.observation
        self.shared, self.pull = None, None
        if config.network == "plain":
            encoder = {"encoder": params["encoder"]} if "encoder" in params else {}
            self.shared, self.pull = jax.vjp(
                lambda own: networks.features(config, own, "critic", self.observation), encoder
            )

    def again(self, params: Params, name: str) -> jax.Array:
        """Features [b, d] of network `name` as it is in `params`."""
        if self.shared is not None:
            return self.shared
        return networks.features(self.config, params, name, self.observation)

    def vjp(
        self, params: Params, name: str, function: Callable, *inputs: jax.Array
    ) -> tuple[PyTree, Callable]:
        """`function` (config, params, features, *inputs), and what takes a cotangent of its result
        to gradients of params[name] and of the shared features, None where there are none.
        """

        def run(own, read):
            whole = {**params, name: own}
            if read is None:
                read = networks.features(self.config, whole, name, self.observation)
            return function(self.config, whole, read, *inputs)

        return jax.vjp(run, params[name], self.shared)

    def encoder_gradient(self, critic, value, policy) -> dict[str, PyTree]:
        """{"encoder": gradient of the total loss}, {} where each network has its own."""
        if self.shared is None:
            return {}
        total = critic + self.config.lambda_v * value + self.config.lambda_pi * policy
        return self.pull(total)[0]


def _improve_critic(config, state, batch, reading):
    """Q towards rewards + discounts * V(s'); and its target network towards it."""
    bootstrap = state.target_params
    seen = networks.features(config, bootstrap, "value", batch.next_observation)
    target = batch.rewards + batch.discounts * networks.value(config, bootstrap, seen)
    q, pull = reading.vjp(state.params, "critic", networks.critic, batch.actions)
    loss, cotangent = jax.value_and_grad(losses.critic_loss)(q, target, batch.has_next)
    gradient, into = pull(cotangent)
    state, norms = _step(config, state, "critic", gradient)
    return state, chunk_iql.critic_metrics(loss, q, target) | norms, into


def _asked(config, state, batch, reading, chunks, mean_std, noise):
    """min_j Q_j of `chunks`, [b, n]; and the soft value of samples of the policy, [b]."""
    mean, std = (x[:, None] for x in mean_std)
    samples = mean + std * noise
    asked = state.target_params
    both = jnp.concatenate([chunks, samples], axis=1)
    q = jnp.min(networks.critic(config, asked, reading.again(asked, "critic"), both), axis=0)
    q, q_samples = q[:, : chunks.shape[1]], q[:, chunks.shape[1] :]
    log_prob = losses.gaussian_log_prob(mean, std, samples)
    return q, losses.soft_value_target(q_samples.T, log_prob.T, config.entropy_temperature)


def _improve_value(config, state, reading, target):
    """V towards the soft value; and its target network, if there is one, towards it."""
    v, pull = reading.vjp(state.params, "value", networks.value)
    loss, cotangent = jax.value_and_grad(losses.squared_value_loss)(v, target)
    gradient, into = pull(cotangent)
    state, norms = _step(config, state, "value", gradient)
    metrics = {
        "value/loss": loss,
        "value/v_mean": jnp.mean(v),
        "value/target_mean": jnp.mean(target),
    }
    return state, metrics | norms, into


def _step(config: LearnerConfig, state: State, name: str, gradient: PyTree):
    """Adam's step of a network, and then that of its target network, if it has one."""
    state, norms = states.apply_gradients(config, state, {name: gradient})
    own = {key: tree for key, tree in state.targets.items() if key == name}
    moved = states.polyak(own, state.params, config.ema_decay)
    return state.replace(targets={**state.targets, **moved}), norms
