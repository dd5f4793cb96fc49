"""Real-time chunking: weights as in the paper, and chunks that go on from one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.models import pi0, rtc
from tests import oracle


def test_weights_fall_from_one_to_zero():
    found = np.asarray(rtc.weights(10, 2, 3))
    assert (found[:2] == 1).all()
    assert (found[7:] == 0).all()
    assert (np.diff(found[1:8]) < 0).all()
    c = (10 - 3 - 4) / (10 - 3 - 2 + 1)  # the fifth step
    np.testing.assert_allclose(found[4], c * np.expm1(c) / np.expm1(1), rtol=1e-6)


@pytest.fixture(scope="module", params=oracle.MODELS)
def problem(request):
    model = request.param
    config, params = oracle.config(model), oracle.params(model)
    return config, params, oracle.observation(model), oracle.forward(model)["in/noise"]


def continued(problem, previous, **settings):
    config, params, observation, noise = problem
    settings = {"delay": 2, "replan_steps": 2} | settings
    return rtc.continue_actions(
        config, params, observation, noise=noise, previous=previous, **settings
    )


def test_without_guidance_it_is_plain_sampling(problem):
    config, params, observation, noise = problem
    plain = pi0.sample_actions(config, params, observation, noise=noise)
    found = continued(problem, jnp.zeros_like(plain), delay=0, max_guidance=0.0)
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_the_first_steps_are_those_that_are_being_executed(problem):
    config, params, observation, noise = problem
    previous = 0.3 + pi0.sample_actions(config, params, observation, noise=noise)
    found = continued(problem, previous)
    np.testing.assert_array_equal(found[:, :2], previous[:, :2])


def test_what_follows_is_drawn_towards_the_old_chunk(problem):
    """Compared with a chunk from the same noise that knows nothing of it."""
    config, params, observation, noise = problem
    plain = pi0.sample_actions(config, params, observation, noise=noise)
    previous = plain + 0.3
    held, free = (continued(problem, previous, max_guidance=g) for g in (5.0, 0.0))
    here = slice(2, 4)  # after what is executed, before what the old chunk does not reach
    distance = [float(jnp.abs(x - previous)[:, here].mean()) for x in (held, free)]
    assert distance[0] < 0.8 * distance[1]


def test_what_the_old_chunk_says_of_the_end_is_not_looked_at(problem):
    previous = jax.random.normal(jax.random.key(0), problem[3].shape)
    other = previous.at[:, -2:].set(100.0)
    np.testing.assert_array_equal(continued(problem, previous), continued(problem, other))


def test_delays_do_not_compile_again(problem):
    previous = jnp.zeros_like(problem[3])
    continued(problem, previous, delay=jnp.int32(1))
    before = rtc._continue._cache_size()
    continued(problem, previous, delay=jnp.int32(3))
    assert rtc._continue._cache_size() == before
