"""The memory of a training step: what lasts exactly, the rest near what XLA plans."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from policymix import nf4, sharding, structs, trees
from policymix.models import lora, pi0, siglip, variants
from policymix.runs import budget
from policymix.training import state as state_lib

ROWS, WIDTH, DEPTH = 4096, 640, 6


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


KEY = jax.eval_shape(lambda: jax.random.key(0))
PARAMS = {
    "layers": {"mlp": {"w": array(DEPTH, WIDTH, WIDTH)}},
    "head": {"kernel": array(WIDTH, 4 * WIDTH)},
}


def loss(params, batch, key, *, remat=True):
    """A stack of layers on [b, WIDTH]; a layer is recomputed for its gradient if `remat`."""

    def layer(x, w):
        for _ in range(2):
            x = jnp.tanh(x @ nf4.dequantize(w).astype(x.dtype))
        return x, None

    x, _ = jax.lax.scan(
        jax.checkpoint(layer) if remat else layer, batch, params["layers"]["mlp"]["w"]
    )
    del key
    return jnp.mean(jnp.square(x @ params["head"]["kernel"])), {}


def start(params, *, ema=True, frozen=()):
    optimizer = optax.scale_by_adam()
    return jax.eval_shape(
        functools.partial(state_lib.init, optimizer=optimizer, ema=ema, frozen=frozen), params
    )


def parts(state, mesh, places=None, **options):
    places = places or sharding.parameters(mesh, state)
    options = {"frozen": (), **options}
    batch = array(ROWS, WIDTH)
    return budget.parts(state, loss, batch, KEY, mesh=mesh, places=places, **options)


def held(state, places):
    """Bytes that the first device really holds of arrays at these places."""
    made = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state), places)
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize("fsdp_devices", [1, 4])
def test_what_lasts_is_counted_as_one_device_holds_it(fsdp_devices):
    mesh, state = sharding.mesh(fsdp_devices), start(PARAMS)
    places = sharding.parameters(mesh, state)
    found = parts(state, mesh)
    params = held(state.params, places.params)
    assert found["parameters, trained"] == found["average"] == found["gradients"] == params
    assert found["optimizer"] == held(state.opt_state, places.opt_state)
    assert found["parameters, frozen"] == found["optimizer, on the host"] == 0
    whole = trees.nbytes(PARAMS)
    assert params == whole / fsdp_devices


def test_what_is_frozen_has_neither_gradient_nor_moments():
    mesh = sharding.mesh(devices=jax.devices()[:1])
    path = "layers/mlp/w"
    found = parts(start(PARAMS, frozen=(path,)), mesh, frozen=(path,))
    head = trees.nbytes(PARAMS["head"])
    assert found["parameters, trained"] == found["average"] == found["gradients"] == head
    assert found["parameters, frozen"] == trees.nbytes(PARAMS["layers"])
    assert found["optimizer"] == 2 * head + 4
    few = {**PARAMS, "layers": {"mlp": {"w": nf4.quantize(PARAMS["layers"]["mlp"]["w"])}}}
    narrow = parts(start(few, frozen=(path,)), mesh, frozen=(path,))
    assert narrow["parameters, frozen"] == found["parameters, frozen"] * 4.25 / 32


def test_what_lies_with_the_host_is_told_apart():
    mesh, state = sharding.mesh(), start(PARAMS, ema=False)
    near = sharding.parameters(mesh, state)
    far = near.replace(opt_state=sharding.on_host(near.opt_state))
    here, there = parts(state, mesh), parts(state, mesh, far)
    assert there["optimizer"] == here["optimizer, on the host"] == 0
    assert there["optimizer, on the host"] == here["optimizer"]
    assert there["activations"] == here["optimizer"]  # fetched, when the activations are gone
    assert here["average"] == 0


def test_parts_of_a_batch_need_less_at_once():
    mesh, state = sharding.mesh(devices=jax.devices()[:1]), start(PARAMS)
    whole, quarters = parts(state, mesh), parts(state, mesh, accumulate=4)
    assert whole["activations"] == pytest.approx(4 * quarters["activations"], rel=0.35)
    assert quarters["gradients"] == 2 * whole["gradients"]
    assert quarters["batches"] == whole["batches"] == 4 * 4 * ROWS * WIDTH
    spread = parts(state, sharding.mesh())
    assert spread["batches"] * 8 == whole["batches"]
    assert spread["activations"] < quarters["activations"]


def test_recomputed_layers_are_not_kept():
    trained = trees.flatten(PARAMS)
    batch = array(ROWS, WIDTH)
    one = 4 * ROWS * WIDTH
    kept, recomputed = (
        budget.activations(functools.partial(loss, remat=remat), trained, {}, batch, KEY)
        for remat in (False, True)
    )
    assert kept >= 2 * DEPTH * one
    assert DEPTH * one <= recomputed < kept


@pytest.mark.parametrize(
    ("rows", "remat", "most"), [(8, True, 1.1), (8, False, 1.5), (1024, True, 1.1), (64, True, 1.1)]
)
def test_it_is_near_what_the_compiler_plans(rows, remat, most):
    batch, function = array(rows, WIDTH), functools.partial(loss, remat=remat)
    found = budget.activations(function, trees.flatten(PARAMS), {}, batch, KEY)
    step = jax.jit(jax.value_and_grad(function, has_aux=True)).lower(PARAMS, batch, KEY)
    assert 0.8 < found / step.compile().memory_analysis().temp_size_in_bytes < most


def test_a_batch_of_more_rows():
    batch = {"a": np.zeros((2, 3), np.uint8), "b": array(2)}
    assert budget.with_rows(batch, 8) == {"a": array(8, 3, dtype=jnp.uint8), "b": array(8)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "low_rank", "remat"),
    [(1, False, True), (16, False, True), (16, True, True), (16, False, False)],
)
def test_of_a_policy_too(rows, low_rank, remat):
    size = variants.Size(128, 6, 512, 4, 1, 32, lora.Lora(2) if low_rank else None)
    config = pi0.Pi0Config(
        paligemma_variant=size,
        action_expert_variant=size,
        siglip_variant=siglip.Size(128, 6, 512, 4, 14),
        vocab_size=64,
        action_dim=4,
        action_horizon=4,
        max_token_len=32,
        image_keys=("base_0_rgb",),
        image_resolution=(112, 112),
        dtype="float32",
        remat=remat,
    )
    flat = trees.flatten(pi0.shapes(config))
    trained = {path: leaf for path, leaf in flat.items() if not low_rank or "lora" in path}
    fixed = {
        path: nf4.quantize(leaf) if nf4.suits(path, leaf) else leaf
        for path, leaf in flat.items()
        if path not in trained
    }
    observation = jax.eval_shape(lambda: pi0.example_observation(config, rows))
    batch = structs.Batch(observation, array(rows, 4, 4))
    function = functools.partial(pi0.loss, config)
    found = budget.activations(function, trained, fixed, batch, KEY)

    def step(trained, fixed, batch, key):
        def value(trained):
            return function(trees.unflatten({**fixed, **trained}), batch, key)[0]

        return jax.value_and_grad(value)(trained)

    plan = jax.jit(step).lower(trained, fixed, batch, KEY).compile().memory_analysis()
    assert 0.75 < found / plan.temp_size_in_bytes < (1.25 if remat else 1.75)


def test_the_table_is_in_units_that_read_well():
    sizes = {
        "parameters, trained": 12_000_000_000,
        "average": 0,
        "optimizer, on the host": 24_000_000_000,
        "activations": 500_000_000,
    }
    text = budget.table(sizes)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[1:5] == [
        "parameters, trained 12.0 GB",
        "optimizer, on the host 24.0 GB",
        "activations 0.5 GB",
        "in all, on each device 12.5 GB",
    ]
    assert "come on top" in rows[5]
    assert "0.5 MB" in budget.table({"activations": 500_000})
