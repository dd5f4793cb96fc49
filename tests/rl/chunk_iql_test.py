"""Chunked implicit Q-learning and cloning: their losses written out, what must not matter to them,
and that they learn.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.rl import chunk_iql, learner, losses, networks
from policymix.rl import state as states
from policymix.rl.config import LearnerConfig
from policymix.structs import ChunkBatch, Observation

SMALL = LearnerConfig(
    action_dim=2, proprio_dim=3, action_horizon=3, hidden_dim=8, num_layers=2, max_weight=2.0,
    lambda_v=0.7, lambda_pi=0.3,
)  # fmt: skip
SEEING = dataclasses.replace(
    SMALL, image_keys=("base",), image_resolution=(32, 32), feature_dim=4, num_layers=1
)
FUSED = dataclasses.replace(SMALL, network="fused", feature_dim=6)
CLONING = dataclasses.replace(SMALL, algorithm="cloning")


def flowing(config):
    return dataclasses.replace(config, policy="flow")


def batch_of(config, size=6, seed=0, padded=False, num_candidates=0) -> ChunkBatch:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((size, *shape), np.float32))

    def seen():
        pixels = (size, *config.image_resolution, 3)
        return Observation(
            images={k: rng.integers(0, 256, pixels, np.uint8) for k in config.image_keys},
            image_masks={k: jnp.ones(size, bool) for k in config.image_keys},
            proprio=normal(config.proprio_dim),
        )

    shape = (config.action_horizon, config.action_dim)
    played = rng.integers(1, config.action_horizon + 1, size)
    action_is_pad = np.arange(config.action_horizon)[None] >= played[:, None]
    return ChunkBatch(
        observation=seen(),
        actions=normal(*shape),
        action_is_pad=jnp.asarray(action_is_pad & padded),
        rewards=normal(),
        discounts=jnp.asarray(rng.choice([0.0, 0.9], size), jnp.float32),
        next_observation=seen(),
        has_next=jnp.asarray(np.arange(size) != 1),
        candidates=normal(num_candidates, *shape) if num_candidates else None,
    )


@functools.partial(jax.jit, static_argnums=0)
def losses_and_gradients(config, params, target_params, batch, key):
    def loss_of(params):
        return chunk_iql.total_loss(config, params, target_params, batch, key)

    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return {"loss": loss, **metrics}, grads


@functools.cache
def start(config) -> states.State:
    """Networks, and targets that are others."""
    init = jax.jit(learner.init, static_argnums=0)
    state, other = init(config, jax.random.key(0)), init(config, jax.random.key(1))
    return state.replace(targets={name: other.params[name] for name in state.targets})


def measure(config, batch, seed=2):
    state = start(config)
    key = jax.random.key(seed)
    return losses_and_gradients(config, state.params, state.target_params, batch, key)


def same(found, expected, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-6} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


@pytest.mark.parametrize("config", [SMALL, SEEING, FUSED], ids=["plain", "seeing", "fused"])
def test_one_backward_pass_has_the_gradients_of_three_losses(config):
    """With everything that each of them takes as given computed beforehand."""
    state, batch = start(config), batch_of(config, padded=True)
    metrics, grads = measure(config, batch)

    def ask(network, params, observation, *rest):
        read = networks.features(config, params, network.__name__, observation)
        return network(config, params, read, *rest)

    @jax.jit
    def apart(params):
        # Pictures are read by the online encoder also for the target, where it is shared.
        target_q = jnp.min(
            ask(networks.critic, state.target_params, batch.observation, batch.actions), axis=0
        )
        advantage = target_q - ask(networks.value, params, batch.observation)
        weights = jnp.minimum(jnp.exp(advantage / config.temperature), config.max_weight)
        y = batch.rewards + batch.discounts * ask(networks.value, params, batch.next_observation)

        def losses_of(params):
            q = ask(networks.critic, params, batch.observation, batch.actions)
            counted = batch.has_next.astype(jnp.float32)[None]
            u = target_q - ask(networks.value, params, batch.observation)
            read = networks.features(config, params, "policy", batch.observation)
            mean, std = networks.gaussian(config, params, read)
            log_prob = losses.gaussian_log_prob(mean, std, batch.actions, batch.action_is_pad)
            critic = jnp.sum((q - y[None]) ** 2 * counted) / (2 * jnp.sum(counted))
            value = jnp.mean(jnp.abs(config.expectile - (u < 0)) * u**2)
            policy = -jnp.mean(weights * log_prob)
            found = {"critic/loss": critic, "value/loss": value, "policy/loss": policy}
            return critic + 0.7 * value + 0.3 * policy, found

        return jax.value_and_grad(losses_of, has_aux=True)(params)

    (loss, expected), total = apart(state.params)
    same({name: metrics[name] for name in ("loss", *expected)}, {"loss": loss} | expected)
    same(grads, total, atol=1e-4)
    if config.image_keys:
        assert np.any(grads["encoder"]["pictures"]["dense"]["kernel"])


@pytest.mark.parametrize("num_candidates", [0, 3])
def test_without_targets_the_online_critic_is_taken(num_candidates):
    config = dataclasses.replace(SMALL, ema_decay=0.0)
    batch = batch_of(config, num_candidates=num_candidates)
    assert start(config).targets == {}
    metrics, grads = measure(config, batch)
    state = start(config)
    with_copies = losses_and_gradients(SMALL, state.params, state.params, batch, jax.random.key(2))
    same((metrics, grads), with_copies)


@pytest.mark.parametrize("config", [CLONING, flowing(CLONING)], ids=["gaussian", "flow"])
def test_padded_actions_are_not_learned(config):
    """A flow's velocity of a step depends on its padded ones, so there look at a row of padding."""
    batch = batch_of(config, padded=True)
    batch = batch.replace(action_is_pad=batch.action_is_pad.at[0].set(True))
    changed = batch.action_is_pad
    if config.policy == "flow":
        changed &= jnp.all(changed, axis=1, keepdims=True)
    other = jnp.where(changed[..., None], 9.0, batch.actions)
    assert np.any(other != batch.actions)
    same(measure(config, batch), measure(config, batch.replace(actions=other)))
    changed = measure(config, batch.replace(actions=batch.actions + 0.1))
    assert changed[0]["loss"] != measure(config, batch)[0]["loss"]


def test_rows_without_a_next_do_not_count_for_the_critic():
    batch = batch_of(SMALL)
    other = batch.replace(
        rewards=batch.rewards.at[1].set(50.0), discounts=batch.discounts.at[1].set(9.0)
    )
    (metrics, grads), (changed, others) = measure(SMALL, batch), measure(SMALL, other)
    assert metrics["critic/target_mean"] != changed["critic/target_mean"]
    same(grads, others)
    counted = measure(SMALL, other.replace(has_next=jnp.ones(6, bool)))[0]
    assert counted["critic/loss"] > 10 * metrics["critic/loss"]


def test_a_candidate_that_is_the_datas_chunk_changes_nothing():
    batch = batch_of(SMALL)
    often = batch.replace(candidates=batch.actions[:, None].repeat(3, axis=1))
    same(measure(SMALL, often), measure(SMALL, batch))


@pytest.mark.parametrize("config", [SMALL, flowing(SMALL)], ids=["gaussian", "flow"])
def test_candidates_are_the_policys_alone(config):
    """Each has the weight of its own advantage; the critic and the value do not see them."""
    batch = batch_of(config, num_candidates=3)
    metrics, grads = measure(config, batch)
    without, others = measure(config, batch.replace(candidates=None))
    for name in ("critic", "value"):
        same(grads[name], others[name])
        np.testing.assert_allclose(metrics[f"{name}/loss"], without[f"{name}/loss"], rtol=1e-6)
    assert abs(metrics["policy/loss"] - without["policy/loss"]) > 1e-4
    chunks, action_is_pad = chunk_iql.regressed(batch)
    assert chunks.shape == (6, 4, 3, 2)
    assert not np.any(action_is_pad[:, 1:])


def test_each_chunk_of_the_set_has_the_weight_of_its_own_advantage():
    batch = batch_of(SMALL, num_candidates=3, padded=True)
    state = start(SMALL)
    metrics, _ = measure(SMALL, batch)

    @jax.jit
    def expected(params, target_params):
        read = batch.observation.proprio
        value, (mean, std) = (
            networks.value(SMALL, params, read),
            networks.gaussian(SMALL, params, read),
        )
        terms = []
        for i in range(4):
            chunk = batch.candidates[:, i - 1] if i else batch.actions
            q = jnp.min(networks.critic(SMALL, target_params, read, chunk), axis=0)
            weight = jnp.minimum(jnp.exp((q - value) / SMALL.temperature), SMALL.max_weight)
            pads = None if i else batch.action_is_pad
            terms.append((weight, weight * losses.gaussian_log_prob(mean, std, chunk, pads)))
        weights, fits = map(jnp.stack, zip(*terms, strict=True))
        return -jnp.mean(fits), jnp.sum(weights) ** 2 / (weights.size * jnp.sum(weights**2))

    loss, size = expected(state.params, state.target_params)
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["policy/effective_batch"], size, rtol=1e-4)
    assert size < 0.99


def test_cloning_is_a_likelihood():
    batch = batch_of(CLONING, padded=True)
    params = start(CLONING).params
    assert set(params) == {"policy"}
    metrics, _ = measure(CLONING, batch)
    ask = jax.jit(networks.gaussian, static_argnums=0)
    mean, std = ask(CLONING, params, batch.observation.proprio)
    log_prob = losses.gaussian_log_prob(mean, std, batch.actions, batch.action_is_pad)
    np.testing.assert_allclose(metrics["loss"], -0.3 * np.mean(log_prob), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/log_prob"], np.mean(log_prob), rtol=1e-5)
