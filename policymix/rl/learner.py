"""A chunk-level learner: state in, (state, metrics) out; and what it has learned, asked.

Every function is pure and takes its config as a constant: jit them with it closed over or static.
b batch, n candidates, e ensemble, h action horizon, a action.
"""

import jax
import jax.numpy as jnp

from policymix.rl import chunk_iql, chunk_soft, networks, qc
from policymix.rl import state as states
from policymix.rl.config import LearnerConfig
from policymix.rl.state import State
from policymix.structs import ChunkBatch, Metrics, Observation, Params

_UPDATES = {
    "chunk_iql": chunk_iql.update,
    "chunk_soft": chunk_soft.update,
    "cloning": chunk_iql.update,
    "qc": qc.update,
    "qc_fql": qc.update,
}


def init(config: LearnerConfig, key: jax.Array) -> State:
    """Fresh networks, targets that are copies, and Adam's moments at zero."""
    return states.init_state(config, networks.init(config, key))


def update(
    config: LearnerConfig, state: State, batch: ChunkBatch, root_key: jax.Array
) -> tuple[State, Metrics]:
    """One step of config.algorithm; draws from fold_in(root_key, state.step), so that a resumed
    run does what the uninterrupted one would have.

    Returns:
      The next state, and float32 numbers by name: "loss", "critic/…", "value/…", "policy/…".
    """
    return _UPDATES[config.algorithm](config, state, batch, root_key)


def update_many(
    config: LearnerConfig, state: State, batches: ChunkBatch, root_key: jax.Array
) -> tuple[State, Metrics]:
    """k updates in one compiled loop; the metrics are the last one's.

    Args:
      batches: k of them, stacked on a leading axis.
    """

    def step(carried, batch):
        return update(config, carried, batch, root_key)

    state, metrics = jax.lax.scan(step, state, batches)
    return state, jax.tree.map(lambda values: values[-1], metrics)


def act(
    config: LearnerConfig, params: Params, observation: Observation, key: jax.Array
) -> jax.Array:
    """A normalised chunk for each observation, [b, h, a].

    A Gaussian policy's mean. Of a flow policy a sample, by Euler steps from noise; of
    config.num_candidates samples the one with the highest Q, which is the least of the ensemble,
    or in Q-chunking, as in its targets, the mean. Of qc_fql what its one-step actor makes of noise.

    Args:
      params: the whole tree, State.policy_params. key: draws the noise.
    """
    if config.policy == "gaussian":
        read = networks.features(config, params, "policy", observation)
        return networks.gaussian(config, params, read)[0]
    batch_size, shape = len(observation.proprio), (config.action_horizon, config.action_dim)
    names = tuple(name for name in ("critic", "policy", "actor") if name in params)
    read = chunk_iql.read_by(config, params, names, observation)
    if config.algorithm == "qc_fql":
        return qc.next_chunks(config, params, read, jax.random.normal(key, (batch_size, *shape)))
    num_candidates = config.num_candidates if "critic" in params else 1
    noise = jax.random.normal(key, (batch_size, num_candidates, *shape))
    if config.algorithm == "qc":
        return qc.best_of(config, params, read, noise)
    chunks = qc.flow_chunks(config, params, read["policy"], noise)
    if num_candidates == 1:
        return chunks[:, 0]
    q = jnp.min(networks.critic(config, params, read["critic"], chunks), axis=0)
    return qc.chosen(chunks, q)


def q_and_v(
    config: LearnerConfig, params: Params, observation: Observation, actions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Q of the chunks, the least of the ensemble, and V of the observations, both [b].

    Algorithms without a value network have for V the Q of what `act` does with key 0.

    Args:
      actions: [b, h, a], normalised.

    Raises:
      ValueError: the algorithm has no critic.
    """
    if "critic" not in params:
        raise ValueError(
            f"config.offline_rl.algorithm is {config.algorithm!r}, which has no critic to ask; "
            "chunk_iql, chunk_soft, qc and qc_fql have one"
        )
    seen = networks.features(config, params, "critic", observation)
    q = jnp.min(networks.critic(config, params, seen, actions), axis=0)
    if "value" in params:
        read = networks.features(config, params, "value", observation)
        return q, networks.value(config, params, read)
    played = act(config, params, observation, jax.random.key(0))
    return q, jnp.min(networks.critic(config, params, seen, played), axis=0)
