"""The rows of `make bench` that learn from chunks and act by them: ours, and a straightforward
version of the same function.

The straightforward update is that of published programs (FQL's, Q-chunking's): the networks in
plain jax, each loss with forward passes of its own, and one Adam over a tree that has the target
network in it.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from policymix.rl import learner
from policymix.rl.config import LearnerConfig
from policymix.rl.state import State
from policymix.runs.measurements import Row, here, interleaved
from policymix.runs.soft_rows import require_same
from policymix.structs import ChunkBatch, Observation, Params, PyTree

# As in OGBench's cube tasks, where published throughput was measured.
_CUBE = LearnerConfig(action_dim=5, proprio_dim=37, action_horizon=5)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much a row learns.

    Attributes:
      learner: the networks; batch_size: transitions of an update. updates: in one measurement,
        two or more.
      steps: of an environment, in which a policy is asked.
    """

    learner: LearnerConfig = _CUBE
    batch_size: int = 256
    updates: int = 10
    steps: int = 100


SIZES = {"rl": Sizes()}


def update_row(sizes: Sizes) -> list[Row]:
    """Updates of chunked implicit Q-learning, beside the straightforward ones.

    Raises:
      ValueError: the losses of the two differ.
    """
    config, batches = sizes.learner, _batches(sizes)
    theirs = jax.jit(functools.partial(straightforward_update, config))
    ours = jax.jit(functools.partial(learner.update, config))
    state, key = learner.init(config, jax.random.key(0)), jax.random.key(1)
    start = straightforward_state(config, state)
    # After a step the target network is another than the one it follows.
    moved, theirs_moved = ours(state, _at(batches, 0), key)[0], theirs(start, _at(batches, 0))[0]
    difference = require_same(
        ours(moved, _at(batches, 1), key)[1], theirs(theirs_moved, _at(batches, 1))[1]
    )

    def run(step: Callable, carried: PyTree):
        for i in range(sizes.updates):
            carried = step(carried, _at(batches, i))[0]
        return carried

    row = Row(
        "updates of chunked IQL",
        *interleaved(
            here(lambda: run(lambda s, b: ours(s, b, key), state)),
            here(lambda: run(theirs, start)),
        ),
    )
    told = _each(row, sizes.updates, "the straightforward way")
    return [row._replace(note=f"{told}; losses equal to {difference:.1e}")]


def loop_row(sizes: Sizes) -> list[Row]:
    """The same updates in one compiled loop with donated state, beside a call for each."""
    config, batches, key = sizes.learner, _batches(sizes), jax.random.key(1)
    many = jax.jit(functools.partial(learner.update_many, config), donate_argnums=0)
    one = jax.jit(functools.partial(learner.update, config))
    state = learner.init(config, jax.random.key(0))
    carried = [jax.tree.map(jnp.copy, state)]

    def together():
        carried[0], _ = many(carried[0], batches, key)
        return carried[0]

    def singly():
        found = state
        for i in range(sizes.updates):
            found, _ = one(found, _at(batches, i), key)
        return found

    row = Row("updates in one compiled loop", *interleaved(here(together), here(singly)))
    return [row._replace(note=_each(row, sizes.updates, "a call at a time"))]


def act_row(sizes: Sizes) -> list[Row]:
    """A flow policy asked once for a chunk of h actions, beside once for every action."""
    config = dataclasses.replace(sizes.learner, policy="flow", num_candidates=8)
    act = jax.jit(functools.partial(learner.act, config))
    params = learner.init(config, jax.random.key(0)).policy_params
    proprios = np.random.default_rng(0).standard_normal((sizes.steps, 1, config.proprio_dim))
    calls = {1: 0, config.action_horizon: 0}

    def roll_out(replan_steps: int) -> list[np.ndarray]:
        calls[replan_steps], played = 0, []
        for step, proprio in enumerate(proprios.astype(np.float32)):
            if step % replan_steps == 0:
                seen = Observation(images={}, image_masks={}, proprio=proprio)
                chunk = np.asarray(act(params, seen, jax.random.key(step)))
                calls[replan_steps] += 1
            played.append(chunk[:, step % replan_steps])
        return played

    sides = (here(functools.partial(roll_out, n)) for n in (config.action_horizon, 1))
    row = Row("acting by whole chunks", *interleaved(*sides))
    ours, theirs = calls[config.action_horizon], calls[1]
    note = f"{ours} calls of the policy in {sizes.steps} steps, in place of {theirs}"
    return [row._replace(note=note)]


def _each(row: Row, count: int, other: str) -> str:
    ours, theirs = row.ours.cpu / count, row.theirs.cpu / count
    return f"{ours:.4f} CPU s for each update, {theirs:.4f} {other}"


def _batches(sizes: Sizes) -> ChunkBatch:
    """Random ones, stacked on a leading axis."""
    config, rng = sizes.learner, np.random.default_rng(0)
    lead = (sizes.updates, sizes.batch_size)

    def seen():
        proprio = rng.standard_normal((*lead, config.proprio_dim), np.float32)
        return Observation(images={}, image_masks={}, proprio=proprio)

    shape = (config.action_horizon, config.action_dim)
    return jax.device_put(
        ChunkBatch(
            observation=seen(),
            actions=rng.uniform(-1, 1, (*lead, *shape)).astype(np.float32),
            action_is_pad=np.zeros((*lead, config.action_horizon), bool),
            rewards=rng.standard_normal(lead, np.float32),
            discounts=np.full(lead, 0.95, np.float32),
            next_observation=seen(),
            has_next=np.ones(lead, bool),
        )
    )


def _at(batches: ChunkBatch, index: int) -> ChunkBatch:
    return jax.tree.map(lambda x: x[index], batches)


# The straightforward version


def straightforward_state(config: LearnerConfig, state: State) -> tuple[Params, PyTree]:
    """(params with the target network among them, Adam's state of them all)."""
    params = {**state.params, "target": state.targets["critic"]}
    return params, optax.adam(config.learning_rate).init(params)


def straightforward_update(
    config: LearnerConfig, state: tuple[Params, PyTree], batch: ChunkBatch
) -> tuple[tuple[Params, PyTree], dict[str, jax.Array]]:
    """Chunked implicit Q-learning with a Gaussian policy; plain networks that see proprio alone."""
    params, opt_state = state
    seen, following = batch.observation.proprio, batch.next_observation.proprio
    pairs = jnp.concatenate([seen, batch.actions.reshape(len(seen), -1)], axis=-1)

    def q_of(network):
        return jax.vmap(lambda member: _mlp(member, pairs)[:, 0])(network["head"])

    def v_of(network, proprio):
        return _mlp(network["head"], proprio)[:, 0]

    def value_loss(trained):
        difference = jnp.min(q_of(params["target"]), axis=0) - v_of(trained["value"], seen)
        weight = jnp.where(difference < 0, 1 - config.expectile, config.expectile)
        return jnp.mean(weight * difference**2)

    def critic_loss(trained):
        target = batch.rewards + batch.discounts * v_of(params["value"], following)
        return jnp.mean((q_of(trained["critic"]) - target[None]) ** 2)

    def policy_loss(trained):
        advantage = jnp.min(q_of(params["target"]), axis=0) - v_of(params["value"], seen)
        weights = jnp.minimum(jnp.exp(advantage / config.temperature), config.max_weight)
        out = _mlp(trained["policy"]["head"], seen)
        mean, raw = jnp.split(out, 2, axis=-1)
        std = jax.nn.softplus(raw) + config.min_std
        played = batch.actions.reshape(mean.shape)
        return -jnp.mean(weights * jnp.sum(jax.scipy.stats.norm.logpdf(played, mean, std), axis=-1))

    def total(trained):
        found = {
            "value/loss": value_loss(trained),
            "critic/loss": critic_loss(trained),
            "policy/loss": policy_loss(trained),
        }
        return sum(found.values()), found

    grads, found = jax.grad(total, has_aux=True)(params)
    updates, opt_state = optax.adam(config.learning_rate).update(grads, opt_state, params)
    moved = optax.apply_updates(params, updates)
    target = optax.incremental_update(moved["critic"], params["target"], 1 - config.ema_decay)
    return ({**moved, "target": target}, opt_state), found


def _mlp(layers: Params, x: jax.Array) -> jax.Array:
    """[b, d] through dense layers, GELU and, where there is one, LayerNorm."""
    last = sum(name.startswith("dense") for name in layers) - 1
    for i in range(last + 1):
        dense = layers[f"dense_{i}"]
        x = x @ dense["kernel"] + dense["bias"][None]
        if i == last:
            return x
        x = jax.nn.gelu(x)
        if norm := layers.get(f"norm_{i}"):
            centred = x - jnp.mean(x, axis=-1, keepdims=True)
            variance = jnp.var(x, axis=-1, keepdims=True)
            x = centred / jnp.sqrt(variance + 1e-6) * norm["scale"][None] + norm["bias"][None]
    return x
