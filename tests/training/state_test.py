"""One step of training: what moves, what is averaged, what stays as it is, and where its randomness
comes from.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix import nf4, trees
from policymix.training import optimizers, state
from policymix.training.optimizers import Settings

OPTIMIZER = optimizers.make(Settings())


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
        assert after.policy_params["w"] is after.ema_params["w"]


def test_without_average_the_policy_is_what_was_trained():
    (_, _), (after, _) = steps(state.init({"w": jnp.zeros(4)}, OPTIMIZER, ema=False), 1)
    assert after.ema_params is None
    assert after.policy_params["w"] is after.params["w"]


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
    optimizer = optimizers.make(Settings(pull=0.1))
    start = state.init({"w": jnp.zeros(4)}, optimizer, ema=True)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(start)]
    assert len(set(pointers)) == len(pointers)


def test_no_gradient_of_what_is_frozen_is_computed():
    """Its gradient would be infinite here, and so would the norm of all."""
    params = {"w": jnp.ones(4), "fixed": jnp.zeros(())}

    def loss_fn(params, batch, key):
        del key
        return jnp.sum((params["w"] - batch) ** 2) + jnp.sqrt(params["fixed"]), {}

    start = state.init(params, OPTIMIZER, ema=True, frozen=("fixed",))
    assert start.ema_params.keys() == {"w"}
    after, metrics = state.update(
        start, jnp.zeros(4), jax.random.key(0), 0.1,
        loss_fn=loss_fn, optimizer=OPTIMIZER, frozen=("fixed",),
    )  # fmt: skip
    assert float(metrics["grad_norm"]) == pytest.approx(4.0)  # of 2 w
    assert float(metrics["param_norm"]) == pytest.approx(np.linalg.norm(after.params["w"]))
    assert float(after.params["fixed"]) == 0
    assert (np.asarray(after.params["w"]) < 1).all()


def test_split_and_merge_are_inverse():
    params = {"a": {"b": jnp.ones(2), "c": jnp.zeros(3)}, "d": jnp.ones(())}
    trained, fixed = state.split(params, ("a/c",))
    assert list(trees.flatten(trained)) == ["a/b", "d"]
    assert list(trees.flatten(fixed)) == ["a/c"]
    assert trees.flatten(state.merge(trained, fixed)) == trees.flatten(params)
    with pytest.raises(ValueError, match="'a/b' is in both"):
        state.merge(params, trained)


# Frozen parameters in 4 bits and bfloat16


@pytest.fixture(params=[False, True], ids=["raw", "average"])
def narrow(request):
    """A state with one parameter in float32 that is trained, and two that are not, beside the
    function that makes its shapes.
    """
    rng = np.random.default_rng(0)
    wide = jnp.float32(rng.normal(size=(2, 64, 66)))

    def make(wide):
        params = {
            "w": jnp.ones((3, 4)),
            "base": {"matrix": nf4.quantize(wide), "bias": jnp.ones(5, jnp.bfloat16)},
        }
        frozen = ("base/matrix", "base/bias")
        return state.init(params, OPTIMIZER, ema=request.param, frozen=frozen)

    return make(wide), jax.eval_shape(make, wide)


def loss_of_narrow(params, batch, key):
    del key
    matrix = nf4.dequantize(params["base"]["matrix"]).astype(jnp.float32)
    shift = jnp.sum(matrix) + jnp.sum(params["base"]["bias"]).astype(jnp.float32)
    return jnp.sum((params["w"] - batch) ** 2) + 1e-6 * shift, {}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def stepped(narrow):
    start, shapes = narrow
    after, _ = jax.jit(
        functools.partial(
            state.update,
            loss_fn=loss_of_narrow,
            optimizer=OPTIMIZER,
            ema_decay=0.5,
            frozen=frozenset({"base/matrix", "base/bias"}),
        )
    )(start, jnp.zeros((3, 4)), jax.random.key(0), 0.1)
    return start, after, shapes


def test_what_is_frozen_in_few_bits_stays_as_it_is(stepped):
    start, after, _ = stepped
    equal(after.params["base"], start.params["base"])
    assert (after.params["w"] != start.params["w"]).all()
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(after.opt_state)}
    assert shapes == {(), (3, 4)}


def test_a_checkpoint_holds_arrays_and_gives_the_state_back_bit_for_bit(stepped):
    _, after, shapes = stepped
    policy, rest = after.policy_params, after.rest()
    matrix = policy["base"]["matrix"]
    assert (matrix.shape, matrix.dtype) == ((2, 64, 66), jnp.bfloat16)
    assert set(trees.flatten(rest["params"])) == ({"w"} if after.ema_params else set())
    if after.ema_params:
        np.testing.assert_array_equal(policy["w"], after.ema_params["w"])
    acting = after.acting_params
    equal(acting["base"], after.params["base"])
    np.testing.assert_array_equal(acting["w"], policy["w"])
    equal(shapes.joined(policy, rest), after)


def test_shapes_have_the_checkpoints_structure(stepped):
    _, after, shapes = stepped
    for of in (lambda s: s.policy_params, lambda s: s.rest()):
        assert jax.tree.structure(of(shapes)) == jax.tree.structure(of(after))
    for shape, leaf in zip(
        jax.tree.leaves(shapes.policy_params), jax.tree.leaves(after.policy_params), strict=True
    ):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


# Parts of a batch


@flax.struct.dataclass
class Masked:
    x: jax.Array
    action_mask: jax.Array | None = None


def regression(params, batch, key):
    """Without randomness; the mean over what the mask lets through."""
    del key
    error = jnp.square(batch.x @ params["w"] - 1.0)
    mask = batch.action_mask
    if mask is None:
        return jnp.mean(error), {"mean": jnp.mean(error), "rows": 2 * jnp.mean(batch.x)}
    value = jnp.sum(error * mask) / jnp.maximum(jnp.sum(mask), 1)
    return value, {"mean": value}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_batch_make_the_step_of_the_whole(masked, parts):
    rng = np.random.default_rng(1)
    mask = jnp.asarray(rng.random((16, 3)) < 0.5).at[::parts].set(False) if masked else None
    batch = Masked(jnp.float32(rng.normal(size=(16, 5))), mask)
    start = state.init({"w": jnp.float32(rng.normal(size=(5, 3)))}, OPTIMIZER, ema=True)
    update = functools.partial(state.update, loss_fn=regression, optimizer=OPTIMIZER, ema_decay=0.9)
    (whole, expected), (found, metrics) = (
        jax.jit(functools.partial(update, accumulate=k))(start, batch, jax.random.key(0), 0.1)
        for k in (1, parts)
    )
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, whole)


def test_parts_have_their_own_randomness_and_rows_stay_on_their_device():
    def noisy(params, batch, key):
        return jnp.sum(params["w"]) + jnp.mean(jax.random.normal(key, batch.shape)), {
            "first": batch[0, 0]
        }

    start = state.init({"w": jnp.zeros(2)}, OPTIMIZER, ema=False)
    batch = jnp.arange(32.0).reshape(16, 2)
    _, metrics = state.update(
        start, batch, jax.random.key(0), 0.1, loss_fn=noisy, optimizer=OPTIMIZER, accumulate=2
    )
    key = jax.random.fold_in(jax.random.key(0), 0)
    drawn = [jax.random.normal(jax.random.fold_in(key, k), (8, 2)) for k in range(2)]
    np.testing.assert_allclose(metrics["loss"], np.mean(drawn), rtol=1e-5)
    assert float(metrics["first"]) == 1.0  # parts begin with rows 0 and 1

    place = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    shard = jax.jit(lambda x: state._parts(x, 2))(jax.device_put(batch, place)).sharding
    assert tuple(shard.spec)[:2] == (None, "data")


def test_a_batch_that_parts_do_not_divide_is_refused():
    start = state.init({"w": jnp.zeros(4)}, OPTIMIZER, ema=False)
    with pytest.raises(ValueError, match="config.train.accumulate is 3, .*batch of 4"):
        state.update(
            start, jnp.ones(4), jax.random.key(0), 0.1,
            loss_fn=loss_fn, optimizer=OPTIMIZER, accumulate=3,
        )  # fmt: skip
