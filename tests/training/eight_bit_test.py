"""Moments of 8 bits: what they keep, what they take, and that Adam learns with them as it does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from policymix import trees
from policymix.training import eight_bit

BOUNDS = jnp.full((1, 1), 0.7)


@pytest.mark.parametrize("bound", [2.0**-90, 1.3e-6, 1.0, 1.9999999, 7e8])
def test_quantising_what_was_dequantised_gives_every_code_again(bound):
    codes = jnp.arange(-(2**15), 2**15, dtype=jnp.int16)[None]
    bounds = jnp.full((1, 1), bound)
    mu, nu = eight_bit.dequantize(codes, bounds)
    np.testing.assert_array_equal(eight_bit.quantize(mu, nu, bounds), codes)
    assert (nu > 0).all()
    assert np.isfinite(mu).all()


def test_moments_come_back_within_a_sixteenth_and_an_eighth():
    rng = np.random.default_rng(0)
    nu = 0.7 * 2.0 ** rng.uniform(-31.5, 0, (1, 20_000))
    ratio = 2.0 ** rng.uniform(-11, 3, nu.shape) * rng.choice([-1, 1], nu.shape)
    mu = ratio * np.sqrt(nu)
    given = jnp.float32(mu), jnp.float32(nu)
    found = eight_bit.dequantize(eight_bit.quantize(*given, BOUNDS), BOUNDS)
    for value, expected, bound in zip(found, given, (1 / 16, 1 / 8), strict=True):
        error = np.abs(value / expected - 1)
        assert error.max() <= bound + 1e-6
        assert error.mean() < bound / 2
        assert np.abs(np.mean(value / expected) - 1) < 0.005  # of no direction
    assert (np.sign(found[0]) == np.sign(mu)).all()


def test_zero_stays_zero_and_a_small_second_moment_does_not_become_it():
    mu, nu = jnp.array([[0.0, 1e-9, -1e-9, 0.8]]), jnp.array([[0.0, 1e-30, 1e-8, 0.7]])
    mu, nu = eight_bit.dequantize(eight_bit.quantize(mu, nu, BOUNDS), BOUNDS)
    np.testing.assert_array_equal(mu[0, [0, 2]], 0)
    np.testing.assert_allclose(mu[0, 3], 0.8, rtol=1 / 16)
    smallest = 0.7 * 2.0**-32
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


def test_what_exceeds_its_bound_by_rounding_is_the_bound():
    codes = eight_bit.quantize(jnp.full((1, 1), -0.5), jnp.full((1, 1), 0.8), BOUNDS)
    mu, nu = eight_bit.dequantize(codes, BOUNDS)
    np.testing.assert_allclose(mu, -0.5, rtol=1 / 16)
    np.testing.assert_allclose(nu, 0.7, rtol=1 / 16)


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
    assert np.abs(ours).max() < 1.1 * np.abs(wide).max()  # no second moment was lost
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
