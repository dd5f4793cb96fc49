"""Flow matching: the path and its ends, training times, Euler integration, time embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.models import flow

laws = settings(deadline=None, max_examples=20)


def _arrays(seed, *shape):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]


def test_the_path_runs_from_data_at_0_to_noise_at_1():
    actions, noise = _arrays(0, 2, 4, 3)
    x_t, u_t = flow.path(actions, noise, np.array([0.0, 1.0], np.float32))
    np.testing.assert_array_equal(x_t[0], actions[0])
    np.testing.assert_array_equal(x_t[1], noise[1])
    np.testing.assert_array_equal(u_t, noise - actions)


@laws
@given(st.integers(0, 2**32 - 1), st.floats(0, 1, width=32))
def test_the_velocity_is_the_derivative_of_the_path(seed, t):
    actions, noise = _arrays(seed, 1, 2, 3)
    _, slope = jax.jvp(
        lambda t: flow.path(actions, noise, t)[0],
        (jnp.full(1, t, jnp.float32),),
        (jnp.ones(1, jnp.float32),),
    )
    np.testing.assert_allclose(slope, flow.path(actions, noise, np.float32([t]))[1], atol=1e-6)


@laws
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_euler_is_exact_where_the_velocity_is_constant(seed, steps):
    actions, noise = _arrays(seed, 2, 3, 2)
    found = flow.integrate(lambda x_t, t: noise - actions, jnp.asarray(noise), steps)
    np.testing.assert_allclose(found, actions, atol=1e-5)


def test_euler_visits_one_first_and_zero_never():
    found = flow.integrate(lambda x_t, t: jnp.broadcast_to(t[:, None, None], x_t.shape), *_zeros(4))
    np.testing.assert_allclose(found, -(1 + 0.75 + 0.5 + 0.25) / 4, rtol=1e-6)


def _zeros(steps):
    return jnp.zeros((2, 1, 1)), steps


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="num_flow_steps is 0"):
        flow.integrate(lambda x_t, t: x_t, *_zeros(0))


def test_training_times_are_beta_distributed_above_a_thousandth():
    t = np.asarray(flow.sample_time(jax.random.key(0), 20_000))
    assert t.min() >= 0.001
    assert t.max() <= 1.0
    scaled = (t - 0.001) / 0.999  # Beta(1.5, 1) has P(x <= q) = q^1.5
    for q in (0.1, 0.5, 0.9):
        np.testing.assert_allclose((scaled <= q).mean(), q**1.5, atol=0.01)


def test_squared_error_is_the_mean_over_action_dimensions_only():
    v, u = _arrays(3, 2, 4, 3)
    np.testing.assert_allclose(flow.squared_error(v, u), ((v - u) ** 2).mean(-1), rtol=1e-6)


def test_the_time_embedding_has_unit_pairs_and_periods_from_4ms_to_4():
    t = np.array([0.0, 0.25, 1.0], np.float32)
    embedded = np.asarray(flow.embed_time(t, 8), np.float64)
    sines, cosines = embedded[:, :4], embedded[:, 4:]
    np.testing.assert_allclose(sines**2 + cosines**2, 1, atol=1e-6)
    np.testing.assert_array_equal(embedded[0], [0] * 4 + [1] * 4)
    periods = np.geomspace(4e-3, 4.0, 4)
    np.testing.assert_allclose(sines[1], np.sin(2 * np.pi * 0.25 / periods), atol=1e-4)
    with pytest.raises(ValueError, match="width 7 is odd"):
        flow.embed_time(t, 7)
