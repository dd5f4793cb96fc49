"""The three losses one after the other: what must not matter to them, what the shared encoder of
plain networks learns, and that the defaults hold where the settings they come from run away.

The numbers of the program that the losses are from: chunk_soft_golden_test.
"""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.rl import chunk_soft, learner, losses, networks
from policymix.rl.config import LearnerConfig
from policymix.structs import ChunkBatch, Observation
from tests.rl.chunk_soft_golden_test import FAITHFUL

SMALL = {
    "algorithm": "chunk_soft", "action_dim": 2, "action_horizon": 3, "proprio_dim": 4,
    "hidden_dim": 16, "feature_dim": 16, "num_layers": 2, "num_samples": 2, "ema_decay": 0.9,
}  # fmt: skip
CONFIG = LearnerConfig(**SMALL)
# Plain networks that share an encoder of language.
READING = LearnerConfig(
    **SMALL | {"num_layers": 1, "learning_rate": 1e-30}, network="plain", max_token_len=3,
    vocab_size=32, lambda_v=0.7, lambda_pi=0.3,
)  # fmt: skip
KEY = jax.random.key(2)
step = jax.jit(chunk_soft.update, static_argnums=0)


def _random_batch(config: LearnerConfig, size: int, key, candidates: int = 0) -> ChunkBatch:
    keys = jax.random.split(key, 8)
    picture = (size, *config.image_resolution, 3)

    def observation(key):
        first, second, third = jax.random.split(key, 3)
        tokens = jax.random.randint(third, (size, config.max_token_len), 0, 32)
        return Observation(
            images={n: jax.random.uniform(second, picture, minval=-1) for n in config.image_keys},
            image_masks={n: jnp.ones(size, bool) for n in config.image_keys},
            proprio=jax.random.normal(first, (size, config.proprio_dim)),
            prompt_tokens=tokens if config.max_token_len else None,
            prompt_mask=tokens >= 0 if config.max_token_len else None,
        )

    shape = (config.action_horizon, config.action_dim)
    proposed = jax.random.normal(keys[6], (size, candidates, *shape)) if candidates else None
    return ChunkBatch(
        observation=observation(keys[0]),
        actions=jax.random.normal(keys[1], (size, *shape)),
        action_is_pad=jnp.zeros((size, config.action_horizon), bool),
        rewards=jax.random.bernoulli(keys[2], 0.1, (size,)).astype(jnp.float32),
        discounts=0.9 * jax.random.bernoulli(keys[3], 0.9, (size,)),
        next_observation=observation(keys[4]),
        has_next=jnp.ones(size, bool),
        candidates=proposed,
    )


@functools.cache
def start(config: LearnerConfig):
    return jax.jit(learner.init, static_argnums=0)(config, jax.random.key(0))


@functools.cache
def _drawn(config: LearnerConfig, candidates: int = 0) -> ChunkBatch:
    draw = jax.jit(_random_batch, static_argnums=(0, 1, 3))
    return draw(config, 4, jax.random.key(1), candidates)


def _equal(a, b) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_the_draws_of_an_update_are_those_of_its_step():
    state, batch = start(CONFIG), _drawn(CONFIG)
    once = step(CONFIG, state, batch, KEY)
    assert _equal(once, step(CONFIG, state, batch, KEY))
    later = step(CONFIG, state.replace(step=state.step + 1), batch, KEY)
    assert not _equal(once[1]["value/target_mean"], later[1]["value/target_mean"])
    assert int(once[0].step) == 1


def test_rows_without_a_next_observation_leave_the_critic_as_it_is():
    batch = _drawn(CONFIG)
    lost = batch.replace(
        has_next=jnp.asarray([True, False, True, False]),
        rewards=batch.rewards.at[1::2].set(1e6),
    )
    kept = jax.tree.map(lambda x: x[np.array([0, 2, 0, 2])], batch)
    _, of_lost = step(CONFIG, start(CONFIG), lost, KEY)
    _, of_kept = step(CONFIG, start(CONFIG), kept, KEY)
    np.testing.assert_allclose(of_lost["critic/loss"], of_kept["critic/loss"], rtol=1e-5)
    np.testing.assert_allclose(of_lost["critic/grad_norm"], of_kept["critic/grad_norm"], rtol=1e-4)


def test_padded_actions_do_not_count_in_the_policys_loss():
    batch = _drawn(CONFIG)
    padded = batch.replace(action_is_pad=batch.action_is_pad.at[:, 1:].set(True))
    _, whole = step(CONFIG, start(CONFIG), batch, KEY)
    _, part = step(CONFIG, start(CONFIG), padded, KEY)
    for name in ("critic/loss", "value/loss", "policy/advantage_mean"):
        np.testing.assert_allclose(whole[name], part[name], rtol=1e-6)
    assert float(part["policy/log_prob"]) > 0.6 * float(whole["policy/log_prob"])  # both below 0


def test_a_candidate_that_is_the_datas_own_chunk_changes_nothing_but_what_is_proposed():
    state, batch = start(CONFIG), _drawn(CONFIG, candidates=3)
    same = batch.replace(candidates=batch.actions[:, None].repeat(3, axis=1))
    alone, _ = step(CONFIG, state, batch.replace(candidates=None), KEY)
    beside, _ = step(CONFIG, state, same, KEY)
    other, _ = step(CONFIG, state, batch, KEY)
    for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(beside.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert _equal(alone.params["critic"], other.params["critic"])
    assert not _equal(alone.params["policy"], other.params["policy"])


def test_targets_follow_slowly_and_are_what_is_asked():
    state, batch = start(CONFIG), _drawn(CONFIG)
    moved, _ = step(CONFIG, state, batch, KEY)
    for name, target in moved.targets.items():
        expected = jax.tree.map(
            lambda old, new: 0.9 * old + 0.1 * new, state.targets[name], moved.params[name]
        )
        for a, b in zip(jax.tree.leaves(target), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    high = jax.tree.map(lambda x: x, state.targets["critic"])
    high["head"]["dense_2"]["bias"] = high["head"]["dense_2"]["bias"] + 10
    raised, told = step(
        CONFIG, state.replace(targets={**state.targets, "critic": high}), batch, KEY
    )
    assert float(told["value/target_mean"]) > 8  # nine tenths of ten
    assert float(raised.step) == 1


@jax.jit
def _written_out(params, batch, noise):
    """The total loss of READING with the networks as they are and targets equal to them, and the
    weights of its policy.
    """
    fixed = jax.lax.stop_gradient

    def ask(network, params, observation, *rest):
        read = networks.features(READING, params, network.__name__, observation)
        return network(READING, params, read, *rest)

    def of_policy(params, actions):
        read = networks.features(READING, params, "policy", batch.observation)
        mean, std = (x[:, None] for x in networks.gaussian(READING, params, read))
        samples = mean + std * noise
        return samples, losses.gaussian_log_prob(mean, std, samples if actions is None else actions)

    y = batch.rewards + batch.discounts * ask(networks.value, params, batch.next_observation)
    samples, log_prob = of_policy(params, None)
    q = jnp.min(ask(networks.critic, params, batch.observation, samples), axis=0)
    soft = jnp.mean(q - READING.entropy_temperature * log_prob, axis=1)
    q = jnp.min(ask(networks.critic, params, batch.observation, batch.actions), axis=0)
    weights = jnp.exp(q - ask(networks.value, params, batch.observation))
    weights = fixed(jnp.minimum(weights, READING.max_weight))

    def total(params):
        q = ask(networks.critic, params, batch.observation, batch.actions)
        v = ask(networks.value, params, batch.observation)
        log_prob = of_policy(params, batch.actions[:, None])[1][:, 0]
        critic, value = jnp.mean((q - fixed(y)[None]) ** 2), jnp.mean((v - fixed(soft)) ** 2)
        policy = -jnp.mean(weights / jnp.mean(weights) * log_prob)
        return critic + 0.7 * value + 0.3 * policy

    return jax.value_and_grad(total)(params), weights


def test_a_shared_encoder_learns_from_all_three_losses():
    """Steps are too small for one network's to reach the next one's loss."""
    state, batch = start(READING), _drawn(READING)
    moved, metrics = step(READING, state, batch, KEY)
    noise = jax.random.normal(jax.random.fold_in(KEY, 0), (4, 2, 3, 2))
    (loss, gradient), weights = _written_out(state.params, batch, noise)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    # Adam's first moment after one step is a tenth of the gradient.
    found = 10 * moved.opt_state["encoder"][0].mu["prompt"]["embedding"]
    expected = gradient["encoder"]["prompt"]["embedding"]
    assert np.any(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    size = np.sum(weights) ** 2 / (4 * np.sum(np.square(weights)))
    np.testing.assert_allclose(metrics["policy/effective_batch"], size, rtol=1e-5)
    assert size < 0.999


@pytest.mark.parametrize("network", ["plain", pytest.param("fused", marks=pytest.mark.slow)])
def test_every_part_of_the_networks_learns(network):
    config = LearnerConfig(
        **SMALL, network=network, image_keys=("a",), image_resolution=(32, 32), max_token_len=3,
        vocab_size=32,
    )  # fmt: skip
    state = start(config)
    moved, metrics = step(config, state, _drawn(config), KEY)
    assert ("encoder" in state.params) == (network == "plain")
    before, after = (flax.traverse_util.flatten_dict(s.params, sep="/") for s in (state, moved))
    still = [path for path in before if np.array_equal(before[path], after[path])]
    assert not still
    assert all(np.isfinite(value) for value in metrics.values())


def _toy(config: LearnerConfig, num_steps: int):
    """Largest |Q| in each tenth of a run on a toy: 512 chunks, rewards at random, 32 a step."""
    data = _random_batch(config, 512, jax.random.key(7))

    def step(state, key):
        rows = jax.random.randint(key, (32,), 0, 512)
        batch = jax.tree.map(lambda x: x[rows], data)
        state, metrics = chunk_soft.update(config, state, batch, jax.random.key(3))
        return state, (
            jnp.maximum(metrics["critic/q_max"], -metrics["critic/q_min"]),
            metrics["policy/loss"],
        )

    run = jax.jit(
        lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(4), num_steps))
    )
    _, (q, loss) = run(start(config))
    return np.asarray(q).reshape(10, -1).max(axis=1), np.asarray(loss)


@pytest.mark.slow
def test_the_defaults_hold_where_the_settings_it_comes_from_run_away():
    sizes = {
        "hidden_dim": 128,
        "feature_dim": 128,
        "action_dim": 7,
        "action_horizon": 10,
        "proprio_dim": 8,
    }
    q, loss = _toy(LearnerConfig(algorithm="chunk_soft", **sizes), 4000)
    assert np.isfinite(loss).all()
    assert q.max() < 10  # returns are at most 1 a chunk, 10 in all; random ones, 1 in all
    q, loss = _toy(LearnerConfig(**FAITHFUL, **sizes), 1000)
    assert not np.isfinite(loss).all() or np.nanmax(q) > 1000
