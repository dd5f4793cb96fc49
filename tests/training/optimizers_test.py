"""The optimizer is optax's AdamW, with the learning rate as an argument of the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from policymix.training import optimizers, state

SCHEDULE = {
    "learning_rate": 3e-2,
    "final_learning_rate": 1e-3,
    "warmup_steps": 3,
    "decay_steps": 9,
}


def loss_fn(params, batch, key):
    predicted = batch["x"] @ params["w"] + params["b"][None]
    noise = 0.01 * jax.random.normal(key, predicted.shape)
    value = jnp.mean((predicted + noise - batch["y"]) ** 2)
    return value, {"loss": value, "largest": jnp.max(jnp.abs(predicted))}


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), "b": jnp.zeros(3)}


def batch(step):
    rng = np.random.default_rng([1, step])
    return {"x": jnp.float32(rng.normal(size=(8, 5))), "y": jnp.float32(rng.normal(size=(8, 3)))}


def test_learning_rates_are_the_schedules():
    schedule = optimizers.schedule(**SCHEDULE)
    rates = optimizers.learning_rates(schedule, 12)
    assert (rates.shape, rates.dtype) == ((12,), np.float32)
    np.testing.assert_array_equal(rates, [np.float32(schedule(k)) for k in range(12)])
    np.testing.assert_allclose(rates[:4], 3e-2 * np.array([1, 2, 3, 4]) / 4, rtol=1e-6)
    np.testing.assert_allclose(rates[9:], 1e-3, rtol=1e-6)
    assert (np.diff(rates[3:10]) < 0).all()


def test_a_schedule_that_ends_before_its_warm_up_is_refused():
    with pytest.raises(ValueError, match="decay_steps 3 .* must exceed warmup_steps 3"):
        optimizers.schedule(**SCHEDULE | {"decay_steps": 3})


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_with_a_rate_each_are_adamw_with_that_schedule(params, weight_decay):
    schedule = optimizers.schedule(**SCHEDULE)
    rates = optimizers.learning_rates(schedule, 8)
    ours = optimizers.adamw(weight_decay=weight_decay, clip_norm=0.5)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=weight_decay),
    )

    @jax.jit
    def step(found, batch, rate):
        return state.update(found, batch, jax.random.key(0), rate, loss_fn=loss_fn, optimizer=ours)

    @jax.jit
    def expected_step(params, opt_state, batch, k):
        key = jax.random.fold_in(jax.random.key(0), k)
        grads = jax.grad(loss_fn, has_aux=True)(params, batch, key)[0]
        updates, opt_state = theirs.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)

    found, expected, opt_state = state.init(params, ours, ema=False), params, theirs.init(params)
    for k in range(8):
        found, metrics = step(found, batch(k), rates[k])
        expected, opt_state, norm = expected_step(expected, opt_state, batch(k), k)
        assert float(metrics["learning_rate"]) == rates[k]
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), found.params, expected)
    assert np.abs(found.params["w"] - params["w"]).max() > 0.05


def test_runs_of_two_learning_rates_share_a_program(params):
    optimizer = optimizers.adamw()
    step = jax.jit(
        lambda s, b, k, rate: state.update(s, b, k, rate, loss_fn=loss_fn, optimizer=optimizer)
    )
    start, root = state.init(params, optimizer, ema=False), jax.random.key(0)
    slow, fast = (step(start, batch(0), root, np.float32(rate))[0] for rate in (1e-3, 1e-2))
    assert step._cache_size() == 1
    moved = [np.asarray(s.params["w"] - params["w"]) for s in (slow, fast)]
    np.testing.assert_allclose(10 * moved[0], moved[1], rtol=1e-3)


def test_what_is_frozen_stays_and_has_no_optimizer_state(params):
    optimizer = optimizers.freeze(optimizers.adamw(), params, ("b",))
    start = state.init(params, optimizer, ema=False)
    after, _ = state.update(
        start, batch(0), jax.random.key(0), 0.1, loss_fn=loss_fn, optimizer=optimizer
    )
    np.testing.assert_array_equal(after.params["b"], params["b"])
    assert (after.params["w"] != params["w"]).all()
    assert params["b"].shape not in {np.shape(leaf) for leaf in jax.tree.leaves(start.opt_state)}
    with pytest.raises(ValueError, match="'bias' matches no parameter"):
        optimizers.freeze(optimizers.adamw(), params, ("bias",))
