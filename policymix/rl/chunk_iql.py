"""Implicit Q-learning over action chunks, and cloning, which is its policy's loss alone.

    value    V(s) → expectile of min_j Q̄_j(s, A)
    critic   Q_j(s, A) → rewards + discounts * V(s')
    policy   A, weighted by exp((min_j Q̄_j(s, A) - V(s)) / temperature)

Q̄ is the target network. No chunk but the data's is ever valued in a target, so that nothing is
learned from what a critic imagines of chunks nobody played.
Sources: Kostrikov et al. 2021 (arXiv:2110.06169); chunks: Li et al. 2025 (arXiv:2507.07969).
b batch, n chunks of one state, e ensemble, h action horizon, a action, d features.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from policymix.rl import losses, networks
from policymix.rl import state as states
from policymix.rl.config import LearnerConfig
from policymix.rl.state import State
from policymix.structs import ChunkBatch, Metrics, Observation, Params


def update(
    config: LearnerConfig, state: State, batch: ChunkBatch, root_key: jax.Array
) -> tuple[State, Metrics]:
    """One Adam step of all networks, in one backward pass at the parameters before it; then the
    targets move. Draws from fold_in(root_key, state.step).
    """
    key = jax.random.fold_in(root_key, state.step)

    def loss_of(params):
        return total_loss(config, params, state.target_params, batch, key)

    return states.descend(config, state, loss_of)


def total_loss(
    config: LearnerConfig, params: Params, target_params: Params, batch: ChunkBatch, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """critic_loss + lambda_v * value_loss + lambda_pi * policy_loss (cloning: the last one).

    Args:
      target_params: the whole tree with the target networks in it, constants.
    """
    chunks, action_is_pad = regressed(batch)
    read = read_by(config, params, networks.NAMES[config.algorithm], batch.observation)
    if config.algorithm == "cloning":
        weights, loss, metrics = jnp.ones(chunks.shape[:2]), 0.0, {}
    else:
        advantage, loss, metrics = _values(config, params, target_params, batch, chunks, read)
        weights = losses.advantage_weights(
            advantage, config.temperature, config.max_weight, config.normalize_weights
        )
        metrics |= {
            "policy/advantage_mean": jnp.mean(advantage),
            "policy/weight_max": jnp.max(weights),
            "policy/effective_batch": losses.effective_batch(weights),
        }
    log_prob = fit(config, params, read["policy"], chunks, action_is_pad, key)
    policy_loss = losses.policy_loss(log_prob, weights)
    told = "policy/log_prob" if config.policy == "gaussian" else "policy/flow_loss"
    metrics |= {
        "policy/loss": policy_loss,
        told: jnp.mean(log_prob if config.policy == "gaussian" else -log_prob),
    }
    return loss + config.lambda_pi * policy_loss, metrics


def _values(config, params, target_params, batch, chunks, read):
    """Advantages [b, n] of `chunks`, whose first is the data's; the two losses; metrics."""
    fixed = jax.lax.stop_gradient
    q = networks.critic(config, params, read["critic"], batch.actions)
    if config.ema_decay > 0:
        seen = fixed(target_read(config, target_params, batch.observation, read["critic"]))
        target_q = networks.critic(config, fixed(target_params), seen, chunks)
    elif batch.candidates is None:
        target_q = q[..., None]
    else:
        target_q = networks.critic(config, params, read["critic"], chunks)
    target_q = fixed(jnp.min(target_q, axis=0))  # [b, n], for the value and for the weights
    value = networks.value(config, params, read["value"])
    value_loss = losses.value_loss(value, target_q[:, 0], config.expectile)
    seen = read_by(config, fixed(params), ("value",), batch.next_observation)["value"]
    next_value = networks.value(config, fixed(params), seen)
    target = batch.rewards + batch.discounts * next_value
    critic_loss = losses.critic_loss(q, target, batch.has_next)
    metrics = critic_metrics(critic_loss, q, target) | {
        "value/loss": value_loss,
        "value/v_mean": jnp.mean(value),
    }
    return target_q - fixed(value)[:, None], critic_loss + config.lambda_v * value_loss, metrics


def regressed(batch: ChunkBatch) -> tuple[jax.Array, jax.Array]:
    """What the policy regresses on at each state: chunks [b, n, h, a], the data's own and then the
    candidates, and what of them is padded, [b, n, h]: of a proposed chunk nothing.
    """
    chunks, action_is_pad = batch.actions[:, None], batch.action_is_pad[:, None]
    if batch.candidates is None:
        return chunks, action_is_pad
    whole = jnp.zeros(batch.candidates.shape[:3], bool)
    return (
        jnp.concatenate([chunks, batch.candidates], axis=1),
        jnp.concatenate([action_is_pad, whole], axis=1),
    )


def fit(
    config: LearnerConfig,
    params: Params,
    features: jax.Array,
    chunks: jax.Array,
    action_is_pad: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """How well the policy makes each of `chunks` [b, n, h, a], [b, n]: its log-probability, or, of
    a flow, the negative error of its velocity at one t, uniform in 0..1, and one noise.
    """
    if config.policy == "gaussian":
        mean, std = networks.gaussian(config, params, features)
        return losses.gaussian_log_prob(mean[:, None], std[:, None], chunks, action_is_pad)
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, chunks.shape)
    t = jax.random.uniform(time_key, chunks.shape[:2])
    x_t, u_t = losses.flow_path(chunks, noise, t)
    v_t = networks.velocity(config, params, features, x_t, t)
    return -losses.flow_error(v_t, u_t, action_is_pad)


def read_by(
    config: LearnerConfig, params: Params, names: Sequence[str], observation: Observation
) -> dict[str, jax.Array]:
    """{network: its features [b, d]}; where networks share an encoder it runs once."""
    if config.network == "plain":
        return dict.fromkeys(names, networks.features(config, params, names[0], observation))
    return {name: networks.features(config, params, name, observation) for name in names}


def target_read(
    config: LearnerConfig, target_params: Params, observation: Observation, shared: jax.Array
) -> jax.Array:
    """The target critic's features [b, d]: `shared`, or those of an encoder of its own."""
    if config.network == "plain":
        return shared
    return networks.features(config, target_params, "critic", observation)


def critic_metrics(loss: jax.Array, q: jax.Array, target: jax.Array) -> Metrics:
    """What is told of a critic: q is [e, b], target [b]."""
    return {
        "critic/loss": loss,
        "critic/q_mean": jnp.mean(q),
        "critic/q_min": jnp.min(q),
        "critic/q_max": jnp.max(q),
        "critic/target_mean": jnp.mean(target),
    }
