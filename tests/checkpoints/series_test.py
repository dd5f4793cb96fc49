"""A state that lies on several devices, partly in 4 bits, comes back from disk where it lay."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from policymix import nf4, sharding
from policymix.checkpoints import series
from policymix.training import optimizers, state

FROZEN = frozenset({"layers/matrix", "bias"})
RULES = [("layers/matrix", 1), ("w", 0)]
OPTIMIZER = optimizers.make(optimizers.Settings())
BESIDE = series.Assets({"data": {}}, [])


def make(width=64):
    def normal(*shape):
        return jax.random.normal(jax.random.key(len(shape)), shape)

    params = {
        "layers": {"matrix": nf4.quantize(normal(2, width, 128))},
        "bias": jnp.ones(128, jnp.bfloat16),
        "w": normal(width, 4),
    }
    return state.init(params, OPTIMIZER, ema=True, frozen=FROZEN)


def loss_fn(params, batch, key):
    matrix = nf4.dequantize(params["layers"]["matrix"]).astype(jnp.float32)
    x = batch + jax.random.normal(key, batch.shape)
    hidden = jnp.tanh(x @ params["w"].T @ matrix[0] + params["bias"].astype(jnp.float32)[None])
    return jnp.mean(jnp.square(hidden)), {}


@functools.cache
def run():
    """(shapes, places, start, step)"""
    shapes = jax.eval_shape(make)
    mesh = sharding.mesh(4, jax.devices()[:4])
    places = sharding.parameters(mesh, shapes, RULES)
    update = functools.partial(
        state.update, loss_fn=loss_fn, optimizer=OPTIMIZER, ema_decay=0.9, frozen=FROZEN
    )
    out = (places, sharding.replicated(mesh))
    step = jax.jit(update, donate_argnums=0, out_shardings=out)
    return shapes, places, jax.jit(make, out_shardings=places), step


def after(found, count):
    mesh = run()[1].step.mesh
    batch = jax.device_put(np.ones((8, 4), np.float32), sharding.batch(mesh))
    for _ in range(count):
        found, _ = run()[3](found, batch, jax.random.key(0), np.float32(0.1))
    return found


@pytest.fixture
def saved(tmp_path):
    opened = series.Series(tmp_path / "run", max_to_keep=1, keep_period=None)
    yield opened
    opened.close()


def test_two_steps_and_two_more_are_four_bit_for_bit(saved):
    shapes, places, start, step = run()
    with warnings.catch_warnings():
        # Where what is donated lies elsewhere than the results, jax warns.
        warnings.simplefilter("error")
        saved.save(after(start(), 2), BESIDE)
        saved.wait()
        restored = saved.restore(shapes, places)
        codes = restored.params["layers"]["matrix"].codes
        assert codes.addressable_shards[0].data.size * 4 == codes.size
        for leaf, place in zip(jax.tree.leaves(restored), jax.tree.leaves(places), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        resumed, whole = after(restored, 2), after(start(), 4)
    assert step._cache_size() == 1
    assert int(resumed.step) == 4
    assert jax.tree.structure(resumed) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_what_is_in_four_bits_is_wide_on_no_device(saved, monkeypatch):
    """Neither while it is saved nor while it is read."""
    shapes, places, start, _ = run()
    asked = []

    def seen(name):
        original = getattr(ocp.args, name)
        monkeypatch.setattr(
            ocp.args, name, lambda item, **o: asked.append((item, o)) or original(item, **o)
        )

    seen("PyTreeSave")
    saved.save(start(), BESIDE)
    saved.wait()
    item, _ = asked[0]
    assert isinstance(item["params"]["layers"]["matrix"]["value"], np.ndarray)
    assert isinstance(item["params"]["bias"]["value"], jax.Array)
    asked.clear()
    seen("PyTreeRestore")
    saved.restore(shapes, places)
    args = asked[0][1]["restore_args"]["params"]
    assert args["layers"]["matrix"]["value"].restore_type is np.ndarray
    assert isinstance(args["bias"]["value"], ocp.ArrayRestoreArgs)


def test_matrices_of_another_shape_are_told(saved):
    shapes, places, start, _ = run()
    saved.save(start(), BESIDE)
    saved.wait()

    def other(tree):
        matrix = tree.params["layers"]["matrix"].replace(matrix=(32, 128))
        return tree.replace(params={**tree.params, "layers": {"matrix": matrix}})

    expected = r"is \(2, 64, 128\) there; expected \(2, 32, 128\).*by another model"
    with pytest.raises(ValueError, match=expected):
        saved.restore(other(shapes), other(places))
