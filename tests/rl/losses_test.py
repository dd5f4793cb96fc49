"""The arithmetic of the losses: laws, and numbers worked out by numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.rl import losses

laws = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 2**32 - 1)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


@laws
@given(seeds)
def test_an_expectile_of_a_half_is_half_the_squared_error(seed):
    value, q = normal(seed, 6, 6)
    half = losses.value_loss(value, q, 0.5)
    np.testing.assert_allclose(half, losses.squared_value_loss(value, q) / 2, rtol=1e-6)


def test_a_higher_expectile_is_minimised_by_a_higher_value():
    q = jnp.asarray([0.0, 0.0, 0.0, 1.0])
    grid = np.linspace(0, 1, 201)

    def best(expectile):
        found = jax.vmap(lambda v: losses.value_loss(jnp.full(4, v), q, expectile))(grid)
        return grid[int(np.argmin(found))]

    assert best(0.5) == pytest.approx(0.25, abs=0.006)
    assert best(0.9) == pytest.approx(0.9 / (0.9 + 0.3), abs=0.006)  # 0.9 (1 - v) = 0.1 * 3 v


@laws
@given(seeds)
def test_the_critics_mean_is_over_members_and_rows_that_count(seed):
    q, target = normal(seed, (3, 5), 5)
    mask = np.array([True, False, True, True, False])
    expected = np.mean((np.asarray(q) - np.asarray(target))[:, mask] ** 2)
    np.testing.assert_allclose(losses.critic_loss(q, target, mask), expected, rtol=1e-5)
    assert losses.critic_loss(q, target, np.zeros(5, bool)) == 0


def test_nothing_flows_into_targets_or_weights():
    q, target, log_prob = normal(0, (2, 4), 4, 4)
    ones = jnp.ones(4, bool)
    for loss, x in (
        (lambda x: losses.critic_loss(q, x, ones), target),
        (lambda x: losses.value_loss(target, x, 0.7), log_prob),
        (lambda x: losses.squared_value_loss(target, x), log_prob),
        (lambda x: losses.policy_loss(log_prob, x), target),
        (lambda x: jnp.sum(losses.advantage_weights(x, 1.0, 0.0, True)), target),
    ):
        assert not np.any(jax.grad(loss)(x))


def test_a_soft_value_is_a_mean_over_chunks():
    q, log_prob = normal(1, (5, 3), (5, 3))
    expected = np.mean(np.asarray(q) - 0.2 * np.asarray(log_prob), axis=0)
    found = losses.soft_value_target(q, log_prob, 0.2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@laws
@given(seeds, st.floats(0.1, 3.0))
def test_weights_are_clipped_exponentials(seed, temperature):
    (advantage,) = normal(seed, 7)
    found = losses.advantage_weights(advantage, temperature, 5.0, False)
    expected = np.minimum(np.exp(np.asarray(advantage, np.float64) / temperature), 5.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@laws
@given(seeds, st.sampled_from([0.0, 0.1, 2.0, 100.0]), st.sampled_from([0.0, -20.0, 3.0]))
def test_normalised_weights_are_those_divided_by_their_mean(seed, max_weight, shift):
    """Whatever is added to all advantages: of small weights the mean is as small."""
    (advantage,) = normal(seed, (4, 3))
    plain = np.exp((np.asarray(advantage + shift, np.float64)) / 0.5)
    plain = np.minimum(plain, max_weight) if max_weight else plain
    found = losses.advantage_weights(advantage + shift, 0.5, max_weight, True)
    np.testing.assert_allclose(found, plain / plain.mean(), rtol=1e-4)


@pytest.mark.parametrize("max_weight", [0.0, 100.0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("advantage", [[1e4, -1e4, 0.0], [-1e4] * 3, [1e4] * 3])
def test_no_advantage_overflows(advantage, max_weight, normalize):
    """The rlvla program's weights are inf / inf at an advantage of 100."""
    weights = losses.advantage_weights(jnp.asarray(advantage), 0.1, max_weight, normalize)
    assert np.all(np.isfinite(weights))
    assert np.isfinite(losses.policy_loss(jnp.full(3, -1e4), weights))
    assert 0 <= losses.effective_batch(weights) <= 1 + 1e-6
    if max_weight and not normalize:
        assert weights.max() <= max_weight * (1 + 1e-6)
    if normalize:
        np.testing.assert_allclose(np.mean(weights), 1, rtol=1e-5)


def test_the_effective_batch_is_the_fraction_of_equal_weights():
    np.testing.assert_allclose(losses.effective_batch(jnp.full(8, 0.3)), 1, rtol=1e-6)
    one_hot = jnp.zeros(8).at[3].set(1e17)
    np.testing.assert_allclose(losses.effective_batch(one_hot), 1 / 8, rtol=1e-6)
    np.testing.assert_allclose(losses.effective_batch(jnp.asarray([1.0, 3.0])), 16 / 20, rtol=1e-6)


def test_a_gaussian_log_prob_is_the_sum_of_densities_of_played_steps():
    mean, raw, actions = normal(2, (2, 3, 4), (2, 3, 4), (2, 3, 4))
    std = jnp.exp(raw)
    action_is_pad = np.array([[False, False, True], [False, False, False]])
    density = np.exp(-0.5 * ((np.asarray(actions) - mean) / std) ** 2)
    log_density = np.log(density / (np.asarray(std) * math.sqrt(2 * math.pi)))
    expected = np.sum(log_density.sum(-1) * ~action_is_pad, axis=-1)
    found = losses.gaussian_log_prob(mean, std, actions, action_is_pad)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    whole = losses.gaussian_log_prob(mean, std, actions)
    np.testing.assert_allclose(whole[1], found[1], rtol=1e-6)
    several = losses.gaussian_log_prob(
        mean[:, None], std[:, None], jnp.stack([actions, mean], axis=1)
    )
    assert several.shape == (2, 2)
    np.testing.assert_allclose(several[:, 0], whole, rtol=1e-6)


def test_a_flows_path_leads_from_data_to_noise():
    actions, noise = normal(3, (2, 3, 4), (2, 3, 4))
    for t, end in ((0.0, actions), (1.0, noise)):
        x_t, u_t = losses.flow_path(actions, noise, jnp.full(2, t))
        np.testing.assert_allclose(x_t, end, atol=1e-6)
        np.testing.assert_allclose(u_t, np.asarray(noise) - actions, atol=1e-6)


def test_a_flows_error_counts_played_steps_alike():
    v_t, u_t = normal(4, (2, 3, 4), (2, 3, 4))
    action_is_pad = np.array([[False, True, True], [False, False, False]])
    error = np.mean((np.asarray(v_t) - u_t) ** 2, axis=-1)
    expected = [error[0, 0] / 3, error[1].mean()]
    np.testing.assert_allclose(losses.flow_error(v_t, u_t, action_is_pad), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 5, 3, 4)])
def test_integration_of_a_straight_flow_ends_at_the_data(shape):
    actions, noise = normal(5, shape, shape)
    seen = []

    def velocity(x_t, t):
        seen.append(t.shape)
        return noise - actions

    np.testing.assert_allclose(losses.integrate(velocity, noise, 4), actions, atol=1e-5)
    assert seen[0] == shape[:-2]


def test_integration_asks_at_the_times_from_one_down():
    noise = jnp.zeros((1, 1, 1))
    found = losses.integrate(lambda x_t, t: -t[:, None, None], noise, 4)
    np.testing.assert_allclose(found, (1 + 0.75 + 0.5 + 0.25) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.critic_loss(jnp.zeros(3), jnp.zeros(3), jnp.ones(3)),
        lambda: losses.critic_loss(jnp.zeros((2, 3)), jnp.zeros(2), jnp.ones(2)),
        lambda: losses.value_loss(jnp.zeros((3, 1)), jnp.zeros(3), 0.5),
        lambda: losses.policy_loss(jnp.zeros((3, 1)), jnp.zeros(3)),
        lambda: losses.soft_value_target(jnp.zeros(3), jnp.zeros(3), 0.1),
        lambda: losses.flow_path(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4)), jnp.zeros((2, 1))),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(AssertionError):
        call()
