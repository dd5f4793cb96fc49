"""The optimizer is optax's AdamW, with the learning rate as an argument of the step; and what may
be set beside that.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from policymix import trees
from policymix.training import optimizers, state
from policymix.training.optimizers import Settings

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
    with pytest.raises(ValueError, match="decay_steps 3 .* must exceed .*warmup_steps 3"):
        optimizers.schedule(**SCHEDULE | {"decay_steps": 3})


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_with_a_rate_each_are_adamw_with_that_schedule(params, weight_decay):
    schedule = optimizers.schedule(**SCHEDULE)
    rates = optimizers.learning_rates(schedule, 8)
    ours = optimizers.make(Settings(weight_decay=weight_decay, clip_norm=0.5))
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
    optimizer = optimizers.make(Settings())
    step = jax.jit(
        lambda s, b, k, rate: state.update(s, b, k, rate, loss_fn=loss_fn, optimizer=optimizer)
    )
    start, root = state.init(params, optimizer, ema=False), jax.random.key(0)
    slow, fast = (step(start, batch(0), root, np.float32(rate))[0] for rate in (1e-3, 1e-2))
    assert step._cache_size() == 1
    moved = [np.asarray(s.params["w"] - params["w"]) for s in (slow, fast)]
    np.testing.assert_allclose(10 * moved[0], moved[1], rtol=1e-3)


def updates(settings, params, grads):
    """Those of the first step, by path."""
    optimizer = optimizers.make(settings)

    @jax.jit
    def first(params, grads):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    return trees.flatten(first(params, grads))


@pytest.fixture
def nested():
    rng = np.random.default_rng(5)
    shapes = {"tower/kernel": (80, 64), "llm/w": (6, 7), "llm/lora": (3, 2)}
    flat = {
        path: jnp.float32(rng.choice([-1, 1], shape) * rng.uniform(0.5, 2, shape))
        for path, shape in shapes.items()
    }
    return trees.unflatten(flat), trees.unflatten({p: 0.1 * x for p, x in flat.items()})


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_a_factor_multiplies_the_updates_of_the_first_rule_that_matches(nested, name):
    params, grads = nested
    rules = (("llm/w", 0.25), ("llm/.*", 4.0))
    plain = updates(Settings(name=name, weight_decay=0.1), params, grads)
    found = updates(Settings(name=name, weight_decay=0.1, learning_rates=rules), params, grads)
    for path, factor in {"llm/w": 0.25, "llm/lora": 4.0, "tower/kernel": 1.0}.items():
        np.testing.assert_array_equal(found[path], factor * plain[path])


def test_adam_is_adamw_without_decay(nested):
    params, grads = nested
    for end in ("", "_8bit"):
        found = updates(Settings(name="adam" + end, weight_decay=0.5), params, grads)
        decayed = updates(Settings(name="adamw" + end, weight_decay=0.5), params, grads)
        for path, leaf in trees.flatten(params).items():
            np.testing.assert_allclose(decayed[path], found[path] - 0.5 * leaf, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_pull_is_the_gradient_of_a_penalty_on_the_distance_from_the_start(nested, name):
    start, grads = nested
    pulled = optimizers.make(Settings(name=name, pull=0.3, clip_norm=1e9))
    plain = optimizers.make(Settings(name=name, clip_norm=1e9))
    params = jax.tree.map(lambda x: x + 0.5 * jnp.sin(7 * x), start)

    def penalty(params):
        distance = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, start)
        return 0.3 / 2 * sum(jax.tree.leaves(distance))

    @jax.jit
    def both(params, grads):
        whole = jax.tree.map(jnp.add, grads, jax.grad(penalty)(params))
        expected = plain.update(whole, plain.init(start), params)[0]
        return pulled.update(grads, pulled.init(start), params)[0], expected

    found, expected = both(params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)


def test_the_pull_is_not_clipped_and_vanishes_at_the_start(nested):
    start, grads = nested
    transform = optimizers.make(Settings(name="adam", pull=1e3, clip_norm=1e-2))
    state = transform.init(start)
    jax.tree.map(np.testing.assert_array_equal, state[1]["initial"], start)
    moved = jax.tree.map(lambda x: x + 1.0, start)
    # After one step Adam's updates are the signs of the gradients, or here of θ - θ_0 = 1.
    for params, expected in ((start, jax.tree.map(lambda g: -jnp.sign(g), grads)), (moved, None)):
        found, _ = transform.update(grads, state, params)
        expected = expected or jax.tree.map(lambda g: -jnp.ones_like(g), grads)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.1), found, expected)


def test_clipping_is_optaxs(nested):
    _, grads = nested
    for max_norm in (1e-3, 0.5, 1e6):
        ours, theirs = optimizers._clip(max_norm), optax.clip_by_global_norm(max_norm)
        assert ours.init(grads) == theirs.init(grads)
        (found, _), (expected, _) = (t.update(grads, t.init(grads)) for t in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_what_is_frozen_stays_and_has_no_optimizer_state(params):
    settings = Settings(freeze=("b",))
    frozen = optimizers.frozen_paths(params, settings.freeze)
    assert frozen == ["b"]
    optimizer = optimizers.make(settings)
    start = state.init(params, optimizer, ema=False, frozen=frozen)
    after, _ = state.update(
        start, batch(0), jax.random.key(0), 0.1,
        loss_fn=loss_fn, optimizer=optimizer, frozen=frozen,
    )  # fmt: skip
    np.testing.assert_array_equal(after.params["b"], params["b"])
    assert (after.params["w"] != params["w"]).all()
    assert params["b"].shape not in {np.shape(leaf) for leaf in jax.tree.leaves(start.opt_state)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamw8bit"}, "config.train.optimizer .*did you mean 'adamw_8bit'"),
        ({"b2": 1.0}, "config.train.b2 is 1.0; expected 0 to below 1"),
        ({"pull": -1.0}, "config.train.pull is -1.0"),
        ({"freeze": ("bias",)}, "config.train.freeze: .*'bias' matches no parameter"),
        ({"freeze": (".*",)}, r"config.train.freeze .*nothing is left to train"),
        ({"freeze": ("w", "b")}, r"config.train.freeze .*all 2 parameters"),
        ({"learning_rates": (("v", 0.1),)}, "config.train.learning_rates: .*'v' matches no"),
        ({"learning_rates": (("w", -0.1),)}, "config.train.learning_rates .*-0.1"),
        (
            {"learning_rates": (("b", 0.1),), "freeze": ("b",)},
            "config.train.learning_rates .*all frozen",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(params, settings, message):
    with pytest.raises(ValueError, match=message):
        optimizers.check(Settings(**settings), params)


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_settings_that_can_be_are_not(params, name):
    settings = Settings(name=name, learning_rates=(("w", 0.1),), freeze=("b",), pull=0.1)
    optimizers.check(settings, jax.eval_shape(lambda: params))
    assert hash(settings) == hash(Settings(**vars(settings)))
