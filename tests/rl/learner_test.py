"""The learner as a whole: what an update may depend on, what a state holds, and what is learned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.rl import learner, losses, networks
from policymix.rl import state as states
from policymix.rl.config import ALGORITHMS, LearnerConfig
from policymix.structs import ChunkBatch, Observation

SIZES = {"action_dim": 2, "proprio_dim": 3, "action_horizon": 2, "hidden_dim": 8, "num_layers": 1,
         "feature_dim": 8, "num_samples": 2, "num_flow_steps": 2}  # fmt: skip
KINDS = [(name, "gaussian") for name in ("chunk_iql", "chunk_soft", "cloning")]
KINDS += [(name, "flow") for name in ("chunk_iql", "cloning", "qc", "qc_fql")]
_QUICK = (("chunk_soft", "gaussian"), ("cloning", "flow"), ("qc", "flow"))
every_kind = pytest.mark.parametrize("kind", KINDS, ids="-".join)
update = jax.jit(learner.update, static_argnums=0)
update_many = jax.jit(learner.update_many, static_argnums=0)
act = jax.jit(learner.act, static_argnums=0)
q_and_v = jax.jit(learner.q_and_v, static_argnums=0)
critic = jax.jit(networks.critic, static_argnums=0)


def config_of(kind, **changes) -> LearnerConfig:
    several = {"num_candidates": 3} if kind[1] == "flow" else {}
    sizes = SIZES | {"network": "plain"} | several | changes
    return LearnerConfig(algorithm=kind[0], policy=kind[1], **sizes)


def batch_of(config, *lead) -> ChunkBatch:
    """With leading axes and then a batch of 4."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((*lead, 4, *shape), np.float32))

    def seen():
        return Observation(images={}, image_masks={}, proprio=normal(config.proprio_dim))

    return ChunkBatch(
        observation=seen(),
        actions=jnp.tanh(normal(config.action_horizon, config.action_dim)),
        action_is_pad=jnp.asarray(rng.random((*lead, 4, config.action_horizon)) < 0.2),
        rewards=normal(),
        discounts=jnp.full((*lead, 4), 0.9),
        next_observation=seen(),
        has_next=jnp.asarray(rng.random((*lead, 4)) < 0.8),
    )


@functools.cache
def start(config):
    return jax.jit(learner.init, static_argnums=0)(config, jax.random.key(0))


def equal(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def test_every_algorithm_is_tried_here():
    assert {name for name, _ in KINDS} == set(ALGORITHMS)


@pytest.mark.parametrize(
    "kind",
    [k if k in _QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
    ids="-".join,
)
def test_k_updates_in_one_loop_are_k_updates(kind):
    """And each is a function of state, batch and key alone."""
    config, key = config_of(kind), jax.random.key(1)
    batches = batch_of(config, 3)
    state = start(config)
    for i in range(3):
        state, metrics = update(config, state, jax.tree.map(lambda x, i=i: x[i], batches), key)
    together, last = update_many(config, start(config), batches, key)
    equal(together, state, rtol=1e-4, atol=1e-5)
    equal(last, metrics, rtol=1e-3, atol=1e-5)
    assert together.step == 3
    again, _ = update_many(config, start(config), batches, key)
    equal(again, together, rtol=0)


@every_kind
def test_what_is_drawn_depends_on_the_step(kind):
    """So that no two updates of a run draw the same, and a resumed one draws what is next."""
    config, key = config_of(kind), jax.random.key(1)
    state, batch = start(config), batch_of(config)
    _, first = update(config, state, batch, key)
    _, later = update(config, state.replace(step=state.step + 1), batch, key)
    draws = config.policy == "flow" or kind[0] == "chunk_soft"
    assert (float(first["loss"]) != float(later["loss"])) == draws


@every_kind
def test_an_update_changes_no_type(kind):
    """Not even from a type that jax took from a Python number: the next update would compile."""
    config, key = config_of(kind, dtype="bfloat16", network=None), jax.random.key(0)
    state = jax.eval_shape(functools.partial(learner.init, config), key)
    assert not any(x.weak_type for x in jax.tree.leaves(state))
    step = functools.partial(learner.update, config)
    moved, metrics = jax.eval_shape(step, state, batch_of(config), key)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True):
        assert (after.shape, after.dtype, after.weak_type) == (before.shape, before.dtype, False)
    assert {(x.shape, x.dtype) for x in metrics.values()} == {((), jnp.dtype("float32"))}


@every_kind
def test_every_network_moves_and_nothing_else_has_moments(kind):
    config = config_of(kind)
    before = jax.device_get(start(config))
    state, metrics = jax.device_get(
        update(config, start(config), batch_of(config), jax.random.key(1))
    )
    assert all(np.ndim(value) == 0 and np.isfinite(value) for value in metrics.values())
    assert {"loss", "policy/loss", "policy/grad_norm"} <= metrics.keys()
    for name, network in state.params.items():
        moved = jax.tree.map(lambda a, b: np.any(a != b), network, before.params[name])
        assert any(jax.tree.leaves(moved)), name
        assert metrics[f"{name}/grad_norm"] > 0
        moments = jax.eval_shape(states.adam(config).init, network)
        assert jax.tree.structure(state.opt_state[name]) == jax.tree.structure(moments)
    assert state.opt_state.keys() == state.params.keys()
    followed = {"critic", "value"} if kind[0] == "chunk_soft" else {"critic"}
    assert set(state.targets) <= followed
    assert bool(state.targets) == (kind[0] != "cloning")
    for name, target in state.targets.items():
        expected = states.polyak(
            {name: before.targets[name]}, {name: state.params[name]}, config.ema_decay
        )
        equal(target, expected[name], rtol=1e-5, atol=1e-6)


@every_kind
def test_a_policy_acts_and_its_chunks_have_values(kind):
    config = config_of(kind)
    params, observation = start(config).policy_params, batch_of(config).observation
    chunks = act(config, params, observation, jax.random.key(2))
    assert chunks.shape == (4, config.action_horizon, config.action_dim)
    same = np.all(chunks == act(config, params, observation, jax.random.key(3)))
    assert same == (config.policy == "gaussian")
    if kind[0].startswith("qc"):
        assert np.abs(chunks).max() <= 1
    if kind[0] == "cloning":
        with pytest.raises(ValueError, match="no critic"):
            learner.q_and_v(config, params, observation, chunks)
        return
    q, v = q_and_v(config, params, observation, chunks)
    read = {
        name: networks.features(config, params, name, observation)
        for name in networks.NAMES[config.algorithm]
    }
    equal(q, np.min(critic(config, params, read["critic"], chunks), axis=0), rtol=1e-5)
    if kind[0].startswith("qc"):  # of the chunk that is played
        chosen = act(config, params, observation, jax.random.key(0))
        expected = np.min(critic(config, params, read["critic"], chosen), axis=0)
    else:
        expected = jax.jit(networks.value, static_argnums=0)(config, params, read["value"])
    assert v.shape == (4,)
    equal(v, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["chunk_iql", "qc"])
def test_the_critic_chooses_among_candidates(algorithm):
    """The chunk that is played is the one of the flow's that it values most. Q-chunking has
    candidates where nothing is said.
    """
    config = config_of((algorithm, "flow"), num_candidates=None if algorithm == "qc" else 8)
    assert config.num_candidates == (32 if algorithm == "qc" else 8)
    params, observation = start(config).params, batch_of(config).observation
    read = observation.proprio
    shape = (4, config.num_candidates, config.action_horizon, config.action_dim)

    @jax.jit
    def proposed(noise):
        chunks = losses.integrate(
            lambda x_t, t: networks.velocity(config, params, read, x_t, t),
            noise,
            config.num_flow_steps,
        )
        chunks = jnp.clip(chunks, -1, 1) if algorithm == "qc" else chunks
        return chunks, networks.critic(config, params, read, chunks)

    chunks, q = map(np.asarray, proposed(jax.random.normal(jax.random.key(4), shape)))
    best = np.argmax(np.mean(q, axis=0) if algorithm == "qc" else np.min(q, axis=0), axis=1)
    assert len(set(best.tolist())) > 1
    found = act(config, params, observation, jax.random.key(4))
    equal(found, chunks[np.arange(4), best], rtol=1e-4, atol=1e-5)


def test_one_candidate_asks_no_critic():
    config = config_of(("chunk_iql", "flow"), num_candidates=1)
    params = {"policy": start(config).params["policy"]}
    observation = batch_of(config).observation
    whole = act(config, start(config).params, observation, jax.random.key(4))
    equal(act(config, params, observation, jax.random.key(4)), whole, rtol=1e-6)


def test_polyak_ends():
    old, new = {"critic": {"w": jnp.zeros(3)}}, {"critic": {"w": jnp.ones(3)}, "value": jnp.ones(1)}
    equal(states.polyak(old, new, 0.0), {"critic": {"w": np.ones(3)}})
    equal(states.polyak(old, new, 1.0), old)
    equal(states.polyak(old, new, 0.75), {"critic": {"w": np.full(3, 0.25)}})
    assert states.polyak({}, new, 0.5) == {}


def test_each_networks_gradient_is_clipped_by_itself_and_its_norm_told_as_it_was():
    """Adam does not see the scale of its gradients, so look at its first moment."""
    config = config_of(("chunk_iql", "gaussian"), clip_norm=0.01)
    state = start(config)
    grads = {name: state.params[name] for name in ("critic", "policy")}
    found, metrics = jax.jit(states.apply_gradients, static_argnums=0)(config, state, grads)
    for name, gradient in grads.items():
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(jax.device_get(gradient))))
        assert norm > 0.01
        np.testing.assert_allclose(metrics[f"{name}/grad_norm"], norm, rtol=1e-5)
        moments = jax.device_get(found.opt_state[name])[1][0].mu
        clipped = jax.tree.map(lambda x, norm=norm: 0.1 * 0.01 * np.asarray(x) / norm, gradient)
        equal(moments, clipped, rtol=1e-4, atol=1e-9)
    equal(found.params["value"], state.params["value"], rtol=0)
    assert found.step == state.step


# What is learned: of two chunks that the data has in every state, one earns a reward.

BANDIT = {"action_dim": 1, "proprio_dim": 2, "action_horizon": 2, "hidden_dim": 32,
          "num_layers": 2, "learning_rate": 3e-3, "num_flow_steps": 5}  # fmt: skip
_GOOD, _BAD = 0.6, -0.6


def bandit(num_updates, size=64) -> ChunkBatch:
    rng = np.random.default_rng(0)
    good = rng.random((num_updates, size)) < 0.5
    actions = np.where(good, _GOOD, _BAD)[..., None, None] + 0.2 * rng.standard_normal(
        (num_updates, size, 2, 1)
    )
    observation = Observation(
        images={}, image_masks={},
        proprio=jnp.asarray(rng.standard_normal((num_updates, size, 2), np.float32)),
    )  # fmt: skip
    return ChunkBatch(
        observation=observation,
        actions=jnp.asarray(actions, jnp.float32),
        action_is_pad=jnp.zeros((num_updates, size, 2), bool),
        rewards=jnp.asarray(good, jnp.float32),
        discounts=jnp.zeros((num_updates, size)),
        next_observation=observation,
        has_next=jnp.ones((num_updates, size), bool),
    )


@functools.cache
def trained(config: LearnerConfig):
    """Parameters after 300 updates."""
    state, metrics = update_many(config, start(config), bandit(300), jax.random.key(1))
    assert all(np.isfinite(value) for value in metrics.values())
    return state.params


def played(algorithm, policy, among=None, **changes) -> np.ndarray:
    """Chunks for 200 states; the critic chooses, if anything, of `among`."""
    config = LearnerConfig(algorithm=algorithm, policy=policy, **BANDIT | changes)
    params = trained(config)
    proprio = jnp.asarray(np.random.default_rng(1).standard_normal((200, 2), np.float32))
    observation = Observation(images={}, image_masks={}, proprio=proprio)
    acting = dataclasses.replace(config, num_candidates=among or config.num_candidates)
    return np.asarray(act(acting, params, observation, jax.random.key(2)))[..., 0]


def good(chunks: np.ndarray) -> float:
    """The fraction of chunks that are of the better kind."""
    return np.mean(np.mean(chunks, axis=-1) > 0)


def test_iql_plays_what_earns_and_cloning_the_mean_of_both():
    better = played("chunk_iql", "gaussian")
    assert np.abs(better - _GOOD).mean() < 0.15
    assert np.abs(played("cloning", "gaussian")).mean() < 0.2


def test_iqls_flow_plays_what_earns_and_clonings_flow_either():
    assert good(played("chunk_iql", "flow")) > 0.85
    assert 0.3 < good(played("cloning", "flow")) < 0.7
    assert good(played("chunk_iql", "flow", among=4)) > 0.95


@pytest.mark.parametrize(
    "kind", [("qc", {"num_candidates": 8}), ("qc_fql", {"distill_scale": 0.03})], ids=str
)
def test_q_chunking_plays_what_earns(kind):
    assert good(played(kind[0], "flow", **kind[1])) > 0.95


def test_settings_of_a_learner_are_hashable_and_decide_its_program():
    config = config_of(("chunk_iql", "gaussian"))
    assert hash(config) == hash(dataclasses.replace(config))
