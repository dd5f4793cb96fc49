"""One step of training: what moves, what is averaged, and where its randomness comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.training import optimizers, state

OPTIMIZER = optimizers.adamw()


def loss_fn(params, batch, key):
    value = jnp.sum((params["w"] - batch + jax.random.normal(key, (4,))) ** 2)
    return value, {"loss": value, "first": params["w"][0]}


def steps(start, count, root=0):
    """States and metrics of a few steps; the key is made anew, as a resumed run does."""
    found = [(start, {})]
    for _ in range(count):
        found.append(
            state.update(
                found[-1][0], jnp.ones(4), jax.random.key(root), 0.1,
                loss_fn=loss_fn, optimizer=OPTIMIZER, ema_decay=0.75,
            )
        )  # fmt: skip
    return found


@pytest.fixture(params=[False, True], ids=["raw", "average"])
def start(request):
    return state.init({"w": jnp.zeros(4)}, OPTIMIZER, ema=request.param)


def test_the_average_follows_the_parameters():
    found = [s for s, _ in steps(state.init({"w": jnp.zeros(4)}, OPTIMIZER, ema=True), 3)]
    expected = np.zeros(4)
    for after in found[1:]:
        expected = 0.75 * expected + 0.25 * np.asarray(after.params["w"])
        np.testing.assert_allclose(after.ema_params["w"], expected, rtol=1e-6)
        assert after.policy_params is after.ema_params


def test_without_average_the_policy_is_what_was_trained():
    (_, _), (after, _) = steps(state.init({"w": jnp.zeros(4)}, OPTIMIZER, ema=False), 1)
    assert after.ema_params is None
    assert after.policy_params is after.params


def test_randomness_is_that_of_the_step_and_not_of_the_run(start):
    whole = [metrics.get("loss") for _, metrics in steps(start, 4)]
    (middle, _) = steps(start, 2)[-1]
    assert int(middle.step) == 2
    resumed = [metrics.get("loss") for _, metrics in steps(middle, 2)]
    assert [float(x) for x in whole[3:]] == [float(x) for x in resumed[1:]]
    other = steps(start, 1, root=1)[-1][1]["loss"]
    assert float(other) != float(whole[1])


def test_metrics_are_of_the_parameters_before_and_after(start):
    (before, _), (after, metrics) = steps(start, 1)
    assert metrics.keys() == {"loss", "first", "grad_norm", "param_norm", "learning_rate"}
    assert float(metrics["first"]) == float(before.params["w"][0])
    np.testing.assert_allclose(metrics["param_norm"], np.linalg.norm(after.params["w"]), rtol=1e-6)


def test_donating_the_first_state_frees_no_buffer_twice():
    start = state.init({"w": jnp.zeros(4)}, OPTIMIZER, ema=True)
    assert start.params["w"].unsafe_buffer_pointer() != (
        start.ema_params["w"].unsafe_buffer_pointer()
    )


def test_no_gradient_of_what_is_frozen_is_computed():
    """Its gradient would be infinite here, and so would the norm of all."""
    params = {"w": jnp.ones(4), "fixed": jnp.zeros(())}

    def loss_fn(params, batch, key):
        del key
        return jnp.sum((params["w"] - batch) ** 2) + jnp.sqrt(params["fixed"]), {}

    optimizer = optimizers.freeze(OPTIMIZER, params, ("fixed",))
    after, metrics = state.update(
        state.init(params, optimizer, ema=False), jnp.zeros(4), jax.random.key(0), 0.1,
        loss_fn=loss_fn, optimizer=optimizer, frozen=("fixed",),
    )  # fmt: skip
    assert float(metrics["grad_norm"]) == pytest.approx(4.0)  # of 2 w
    assert float(after.params["fixed"]) == 0
    assert (np.asarray(after.params["w"]) < 1).all()
