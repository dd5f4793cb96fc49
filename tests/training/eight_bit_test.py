"""Moments of 8 bits: what they keep, what they take, and that Adam learns with them as it does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from policymix import trees
from policymix.training import eight_bit

BOUNDS = jnp.full((1, 1), 0.7)


@pytest.mark.parametrize("count", [1, 2**31 - 1])
@pytest.mark.parametrize("bound", [2.0**-90, 1.3e-6, 1.0, 1.9999999, 7e8])
def test_quantising_what_was_dequantised_gives_every_code_again(bound, count):
    codes = jnp.arange(-(2**15), 2**15, dtype=jnp.int16)[None]
    bounds = jnp.full((1, 1), bound)
    mu, nu = eight_bit.dequantize(codes, bounds)
    np.testing.assert_array_equal(eight_bit.quantize(mu, nu, bounds, count), codes)
    assert (nu > 0).all()
    assert np.isfinite(mu).all()


def test_moments_come_back_within_an_eighth():
    rng = np.random.default_rng(0)
    nu = 0.7 * 2.0 ** rng.uniform(-30.5, 0, (1, 20_000))
    ratio = 2.0 ** rng.uniform(-11, 3, nu.shape) * rng.choice([-1, 1], nu.shape)
    mu = ratio * np.sqrt(nu)
    given = jnp.float32(mu), jnp.float32(nu)
    found = eight_bit.dequantize(eight_bit.quantize(*given, BOUNDS, 1), BOUNDS)
    for value, expected in zip(found, given, strict=True):
        error = np.abs(value / expected - 1)
        assert error.max() <= 1 / 8 + 1e-6
        assert error.mean() < 1 / 16
        assert np.abs(np.mean(value / expected) - 1) < 0.005  # of no direction
    assert (np.sign(found[0]) == np.sign(mu)).all()


def test_over_steps_the_mean_of_either_moment_is_kept():
    """Of the same number too, whose own bits decide nothing; and no two places go together."""
    mu, nu = jnp.full((1, 64), -0.083), jnp.full((1, 64), 0.0101)
    codes = jax.vmap(lambda count: eight_bit.quantize(mu, nu, BOUNDS, count)[0])(jnp.arange(1, 513))
    for values, expected in zip(eight_bit.dequantize(codes, BOUNDS), (mu, nu), strict=True):
        values = np.asarray(values)
        assert len(np.unique(values)) == 2
        # At each place over steps, where a level is 10 %, and at each step over places.
        np.testing.assert_allclose(values.mean(0), expected[0], rtol=0.01)
        np.testing.assert_allclose(values.mean(1), np.full(512, expected[0, 0]), rtol=0.01)


def test_zero_stays_zero_and_a_small_second_moment_does_not_become_it():
    mu, nu = jnp.array([[0.0, 1e-9, -1e-9, 0.8]]), jnp.array([[0.0, 1e-30, 1e-8, 0.7]])
    mu, nu = eight_bit.dequantize(eight_bit.quantize(mu, nu, BOUNDS, 1), BOUNDS)
    np.testing.assert_array_equal(mu[0, [0, 2]], 0)
    np.testing.assert_allclose(mu[0, 3], 0.8, rtol=1 / 8)
    smallest = 0.7 * 2.0**-31
    assert (nu[0, :2] >= smallest).all()
    assert (nu[0, :2] <= 2 * smallest).all()
    np.testing.assert_allclose(nu[0, 2:], [1e-8, 0.7], rtol=1 / 8)


def test_a_second_moment_that_fades_slowly_does_fade():
    """An average moves by less than half a level at a step; its mean does not stand still."""
    optimizer = eight_bit.scale_by_adam_8bit(0.9, 0.98)
    rng, rows = np.random.default_rng(6), 16
    state = optimizer.init({"w": jnp.zeros((rows, 1024))})
    step = jax.jit(optimizer.update)
    for k in range(150):
        scale = np.where(np.arange(1024) % 2, 1.0, 1.0 if k < 50 else 0.1)
        grads = {"w": jnp.float32(scale * rng.normal(size=(rows, 1024)))}
        _, state = step(grads, state)
    moments = state.moments["w"]
    _, nu = eight_bit.dequantize(moments.codes, moments.bounds[:, None])
    steady, faded = float(nu[:, 1::2].mean()), float(nu[:, ::2].mean())
    np.testing.assert_allclose(steady, 1 - 0.98**150, rtol=0.1)
    np.testing.assert_allclose(faded, 0.98**100 * (1 - 0.98**50) + 0.01 * 0.87, rtol=0.1)


STEADY_OR_RARE = {
    "constant": 0.12,
    "nearly constant": 0.12,
    "tenth": 0.2,
    "89th": 0.2,
    "noise": 0.16,
}


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_steady_and_rare_gradients_get_adams_updates(b2):
    """Where neither moments nor gradients are random, and an average moves by 0.1 % at a step.

    Rows are blocks, so that gradients of all kinds fit in one array.
    """
    ours, wide = (o(0.9, b2) for o in (eight_bit.scale_by_adam_8bit, optax.scale_by_adam))
    rng = np.random.default_rng(7)
    base = jnp.float32(rng.normal(size=(2, 2048)) * 10 ** rng.uniform(-2, 0, (2, 2048)))
    places = np.arange(4096).reshape(2, 2048)

    def gradients(k):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(8), k), base.shape)
        rare = [jnp.where(places % every == k % every, base * noise, 0) for every in (10, 89)]
        return jnp.stack([base, base * (1 + 0.01 * noise), *rare, base * noise])

    def step(states, k):
        pairs = [o.update(gradients(k), s) for o, s in zip((ours, wide), states, strict=True)]
        (found, expected), states = zip(*pairs, strict=True)
        products = found * found, found * expected, expected * expected
        return states, jnp.stack([p.sum((1, 2)) for p in products])

    start = tuple(o.init(gradients(0)) for o in (ours, wide))
    states, products = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(400)))(start)
    moments, expected = states[0].moments, np.asarray(states[1].nu)
    _, nu = eight_bit.dequantize(moments.codes, moments.bounds[..., None])
    kept = expected > 2.0**-30 * np.asarray(moments.bounds)[..., None]
    ratios = np.mean(np.asarray(nu) / expected, axis=(1, 2), where=kept)
    square, product, theirs = np.asarray(products[-100:]).sum(0)
    errors = np.sqrt((square - 2 * product + theirs) / theirs)
    for k, (name, error) in enumerate(STEADY_OR_RARE.items()):
        np.testing.assert_allclose(product[k] / theirs[k], 1, atol=0.03, err_msg=name)
        np.testing.assert_allclose(ratios[k], 1, atol=0.1, err_msg=name)
        assert errors[k] < error, name


def test_both_moments_fade_without_gradients():
    optimizer = eight_bit.scale_by_adam_8bit(0.9, 0.95)
    grads = {"w": jnp.ones((4, 2048))}
    state, step = optimizer.init(grads), jax.jit(optimizer.update)
    for k in range(200):
        updates, state = step({"w": grads["w"] * (k < 10)}, state)
    mu, nu = eight_bit.dequantize(state.moments["w"].codes, state.moments["w"].bounds[:, None])
    np.testing.assert_array_equal(mu, 0)
    assert (nu > 0).all()
    np.testing.assert_allclose(nu.mean(), (1 - 0.95**10) * 0.95**190, rtol=0.25)
    assert float(jnp.abs(updates["w"]).max()) == 0


@pytest.mark.parametrize("count", range(1, 9))
def test_a_second_moment_strays_an_octave_above_its_bound_at_most(count):
    codes = eight_bit.quantize(jnp.full((1, 1), -0.5), jnp.full((1, 1), 1.7), BOUNDS, count)
    mu, nu = eight_bit.dequantize(codes, BOUNDS)
    np.testing.assert_allclose(mu, -0.5, rtol=1 / 8)
    np.testing.assert_array_equal(nu, 1.5)


SHAPES = {
    "wide": (8, 4096),  # two blocks to a row
    "long": (3, 5000),  # blocks of 1250
    "thin": (3000, 7),  # blocks of 2048 that run across rows, the last filled up
    "stack": (2, 64, 96),
    "small": (40,),
}


def gradients(step):
    """Of sizes that differ within a block by three powers of ten, and rows without any."""
    rng = np.random.default_rng([3, step])
    sizes = np.random.default_rng(4)
    found = {
        name: rng.normal(size=shape) * 10 ** sizes.uniform(-3, 0, shape)
        for name, shape in SHAPES.items()
    }
    found["wide"][2] = 0
    found["long"][:, 17] = 0
    return jax.tree.map(jnp.float32, found)


@pytest.fixture(scope="module")
def runs():
    """Updates of both optimizers on the same thirty gradients, and the last state of ours."""
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    found = {}
    for name, optimizer in (
        ("ours", eight_bit.scale_by_adam_8bit(0.9, 0.95)),
        ("wide", optax.scale_by_adam(0.9, 0.95)),
    ):
        state, updates, step = optimizer.init(params), [], jax.jit(optimizer.update)
        for k in range(30):
            update, state = step(gradients(k), state)
            updates.append(trees.flatten(update))
        found[name] = updates, state
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_updates_are_adams_but_for_rounding(runs, name):
    ours, wide = (np.stack([u[name] for u in runs[side][0]]) for side in ("ours", "wide"))
    assert ours.shape == wide.shape
    np.testing.assert_array_equal(ours == 0, wide == 0)  # rows and columns without gradients
    tolerance = 1e-5 if name == "small" else 0.1
    assert np.sqrt(np.mean((ours - wide) ** 2) / np.mean(wide**2)) < tolerance
    assert np.abs(ours).max() < 1.2 * np.abs(wide).max()  # no second moment was lost
    # Nor do updates grow or shrink on the whole.
    np.testing.assert_allclose(np.sum(ours * wide) / np.sum(wide**2), 1, atol=0.02)


def test_moments_take_two_bytes_and_have_the_shape_of_their_parameter(runs):
    state = runs["ours"][1]
    for name in SHAPES.keys() - {"small"}:
        moments = state.moments[name]
        assert (moments.codes.shape, moments.codes.dtype) == (SHAPES[name], jnp.int16)
        assert trees.nbytes(moments) <= 2.3 * trees.num_params(moments.codes)
    assert state.moments["small"].mu.dtype == jnp.float32
    shapes = {name: state.moments[name].bounds.shape for name in ("wide", "stack", "thin")}
    assert shapes == {"wide": (8, 2), "stack": (2, 64), "thin": (11,)}


@pytest.mark.parametrize("last", [16, 32, 72, 256, 1152, 4304, 16384])
def test_states_of_usual_matrices_stay_below_the_promised_bytes(last):
    shape = {"w": jax.ShapeDtypeStruct((1024, last), jnp.float32)}
    state = jax.eval_shape(eight_bit.scale_by_adam_8bit().init, shape)
    assert trees.nbytes(state) <= 2.3 * 1024 * last


def test_a_second_moment_far_below_its_blocks_bound_makes_no_huge_step():
    """A gradient of 1 once in a block of gradients of 1e-7, whose squares are far below."""
    optimizer = eight_bit.scale_by_adam_8bit(0.9, 0.95)
    grads = {"w": jnp.full((4, 2048), 1e-7).at[:, 5].set(1.0)}
    state, step = optimizer.init(grads), jax.jit(optimizer.update)
    for _ in range(5):
        updates, state = step(grads, state)
    assert float(jnp.abs(updates["w"]).max()) <= 1.1
    assert float(jnp.abs(updates["w"][0, 5])) == pytest.approx(1, abs=0.1)


def test_gradients_are_clipped_as_optax_does():
    grads = {"w": jnp.linspace(-1, 1, 8192).reshape(2, 4096)}
    clip = optax.clip_by_global_norm(0.3)
    given = eight_bit.scale_by_adam_8bit(max_norm=0.3)
    apart = optax.chain(clip, eight_bit.scale_by_adam_8bit())
    found, expected = (jax.jit(o.update)(grads, o.init(grads))[0] for o in (given, apart))
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4)


def test_states_split_over_devices_make_the_same_updates():
    mesh = jax.make_mesh((8,), ("fsdp",))
    optimizer = eight_bit.scale_by_adam_8bit(0.9, 0.95)
    step = jax.jit(optimizer.update)
    grads = {name: gradients(0)[name] for name in ("wide", "stack")}
    state = step(grads, optimizer.init(grads))[1]

    def split(x):
        sizes = [n % 8 == 0 for n in x.shape]
        axis = sizes.index(True) if True in sizes else None
        spec = [("fsdp" if k == axis else None) for k in range(x.ndim)]
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

    apart = step(jax.tree.map(split, grads), jax.tree.map(split, state))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9),
        *(jax.device_get(x) for x in (apart, step(grads, state))),
    )
