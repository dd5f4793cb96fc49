"""Q-chunking: a critic of chunks that bootstraps on chunks like the data's, which a flow makes.

    qc       of num_candidates chunks of the flow the one with the highest Q is played
    qc_fql   a one-step actor imitates the flow and climbs the critic

    critic   Q_j(s, A) → rewards + discounts * mean_j Q̄_j(s', A')
    flow     v(x_t, t) → noise - A
    actor    distill_scale * |actor(noise) - flow(noise)|² - mean_j Q_j(s, actor(noise))

Chunks that networks make are clipped to ±1, so actions are to be normalised to that range.
Sources: Li et al. 2025 (arXiv:2507.07969), Park et al. 2025 (arXiv:2502.02538). Their time runs the
other way, see `losses`; their targets follow the critic one update later than ours.
b batch, n candidates, e ensemble, h action horizon, a action.
"""

import flax.struct
import jax
import jax.numpy as jnp

from policymix.rl import losses, networks
from policymix.rl import state as states
from policymix.rl.chunk_iql import critic_metrics, read_by, target_read
from policymix.rl.config import LearnerConfig
from policymix.rl.state import State
from policymix.structs import Array, ChunkBatch, Metrics, Params


@flax.struct.dataclass
class Noises:
    """What an update draws.

    Attributes:
      following: of the chunks at the next observation: [b, h, a] (qc_fql), [b, n, h, a] (qc).
      flow, t: of the flow's loss: [b, h, a] and [b].
      distilled: of the chunks that the actor imitates and improves, [b, h, a]; qc: None.
    """

    following: Array
    flow: Array
    t: Array
    distilled: Array | None = None


def update(
    config: LearnerConfig, state: State, batch: ChunkBatch, root_key: jax.Array
) -> tuple[State, Metrics]:
    """One Adam step of all networks, in one backward pass at the parameters before it; then the
    targets move. Draws from fold_in(root_key, state.step).
    """
    noises = draw(config, jax.random.fold_in(root_key, state.step), len(batch.actions))
    return update_given(config, state, batch, noises)


def draw(config: LearnerConfig, key: jax.Array, batch_size: int) -> Noises:
    """Standard normal noise, and times uniform in 0..1."""
    shape = (batch_size, config.action_horizon, config.action_dim)
    following, flow, t, distilled = jax.random.split(key, 4)
    several = (batch_size, config.num_candidates, *shape[1:])
    return Noises(
        jax.random.normal(following, several if config.algorithm == "qc" else shape),
        jax.random.normal(flow, shape),
        jax.random.uniform(t, (batch_size,)),
        jax.random.normal(distilled, shape) if config.algorithm == "qc_fql" else None,
    )


def update_given(
    config: LearnerConfig, state: State, batch: ChunkBatch, noises: Noises
) -> tuple[State, Metrics]:
    """`update` with noises of one's own."""

    def loss_of(params):
        return total_loss(config, params, state.target_params, batch, noises)

    return states.descend(config, state, loss_of)


def total_loss(
    config: LearnerConfig, params: Params, target_params: Params, batch: ChunkBatch, noises: Noises
) -> tuple[jax.Array, Metrics]:
    """critic_loss + lambda_pi * (flow_loss, and with an actor its two losses).

    Args:
      target_params: the whole tree with the target networks in it, constants.
    """
    read = read_by(config, params, networks.NAMES[config.algorithm], batch.observation)
    critic_loss, metrics = _critic_loss(config, params, target_params, batch, noises, read)
    x_t, u_t = losses.flow_path(batch.actions, noises.flow, noises.t)
    v_t = networks.velocity(config, params, read["policy"], x_t, noises.t)
    flow_loss = jnp.mean(losses.flow_error(v_t, u_t, batch.action_is_pad))
    policy_loss, metrics = flow_loss, metrics | {"policy/flow_loss": flow_loss}
    if config.algorithm == "qc_fql":
        distill_loss, q_loss = _actor_losses(config, params, noises, read)
        policy_loss += config.distill_scale * distill_loss + q_loss
        metrics |= {"policy/distill_loss": distill_loss, "policy/q_loss": q_loss}
    return critic_loss + config.lambda_pi * policy_loss, metrics | {"policy/loss": policy_loss}


def _critic_loss(config, params, target_params, batch, noises, read):
    fixed, target_params = jax.lax.stop_gradient(params), jax.lax.stop_gradient(target_params)
    names = networks.NAMES[config.algorithm]
    seen = read_by(config, fixed, names, batch.next_observation)
    following = next_chunks(config, fixed, seen, noises.following)
    target_seen = target_read(config, target_params, batch.next_observation, seen["critic"])
    next_q = jnp.mean(networks.critic(config, target_params, target_seen, following), axis=0)
    target = batch.rewards + batch.discounts * next_q
    q = networks.critic(config, params, read["critic"], batch.actions)
    loss = losses.critic_loss(q, target, batch.has_next)
    return loss, critic_metrics(loss, q, target)


def next_chunks(
    config: LearnerConfig, params: Params, read: dict[str, jax.Array], noise: Array
) -> jax.Array:
    """The chunks that would be played, [b, h, a].

    Args:
      read: {network: features [b, d]}; noise: as in `Noises.following`.
    """
    if config.algorithm == "qc_fql":
        return clipped(networks.one_step(config, params, read["actor"], noise))
    return best_of(config, params, read, noise)


def best_of(
    config: LearnerConfig, params: Params, read: dict[str, jax.Array], noise: Array
) -> jax.Array:
    """Of the flow's chunks from noise [b, n, h, a] the one with the highest Q, by the mean of the
    ensemble: [b, h, a].
    """
    chunks = clipped(flow_chunks(config, params, read["policy"], noise))
    if chunks.shape[1] == 1:
        return chunks[:, 0]
    return chosen(chunks, jnp.mean(networks.critic(config, params, read["critic"], chunks), axis=0))


def chosen(chunks: jax.Array, q: jax.Array) -> jax.Array:
    """Of chunks [b, n, h, a] those with the highest of q [b, n]: [b, h, a]."""
    best = jnp.argmax(q, axis=1)
    return jnp.take_along_axis(chunks, best[:, None, None, None], axis=1)[:, 0]


def flow_chunks(
    config: LearnerConfig, params: Params, features: jax.Array, noise: Array
) -> jax.Array:
    """What the flow makes of noise [b, h, a] or [b, n, h, a], of the same shape, not clipped."""

    def velocity(x_t, t):
        return networks.velocity(config, params, features, x_t, t)

    return losses.integrate(velocity, noise, config.num_flow_steps)


def clipped(chunks: jax.Array) -> jax.Array:
    """Within ±1, where the data's actions are."""
    return jnp.clip(chunks, -1.0, 1.0)


def _actor_losses(config, params, noises, read):
    """The one-step actor's squared distance to the flow, and the negative Q of its chunks.

    The flow and the critic are constants here; what both read of the observation too.
    """
    fixed, seen = jax.lax.stop_gradient((params, read))
    wanted = clipped(flow_chunks(config, fixed, seen["policy"], noises.distilled))
    chunks = networks.one_step(config, params, read["actor"], noises.distilled)
    distill_loss = jnp.mean(jnp.square(chunks - wanted))
    q = networks.critic(config, fixed, seen["critic"], clipped(chunks))
    return distill_loss, -jnp.mean(q)
