"""Which device holds what: by size, by rules, and in the memory of the host."""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from policymix import nf4, sharding, trees

BIG = (2, 1024, 1024)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "layers": {"mlp": {"linear": array(*BIG)}, "norm": {"scale": array(2, 1024)}},
    "head": {"kernel": array(1024, 2048), "linear": array(*BIG)},
}


@flax.struct.dataclass
class State:
    """Like a training's: what its optimizer keeps is a tree of the parameters, or nearly."""

    step: Any
    params: Any
    opt_state: Any
    ema_params: Any


class Codes(NamedTuple):
    """A moment in another shape."""

    numbers: Any
    scales: Any


def state(params=PARAMS):
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {"trained": optax.scale_by_adam(), "frozen": optax.set_to_zero()},
            trees.map_with_path(lambda p, _: "frozen" if "norm" in p else "trained", params),
        ),
        optax.masked(optax.trace(0.9), trees.map_with_path(lambda p, _: "head" in p, params)),
    )
    return State(array(), params, jax.eval_shape(optimizer.init, params), params)


def specs(places) -> dict[str, set]:
    """{end of the path: how what lies there is split}."""
    found: dict[str, set] = {}
    for path, place in jax.tree_util.tree_leaves_with_path(places):
        keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        found.setdefault("/".join(keys[-2:]), set()).add(place.spec)
    return found


def test_without_rules_size_alone_decides():
    places = sharding.parameters(sharding.mesh(4), state())
    assert specs(places) == {
        "": {P()},
        "trained": {P()},  # the steps that Adam counts
        "mlp/linear": {P(None, "fsdp", None)},
        "norm/scale": {P(None, None)},
        "head/kernel": {P(None, "fsdp")},
        "head/linear": {P(None, "fsdp", None)},
    }
    alone = sharding.parameters(sharding.mesh(1), state())
    assert all(set(place.spec) <= {None} for place in jax.tree.leaves(alone))


def test_rules_hold_for_parameters_averages_and_moments_alike():
    rules = sharding.parse_rules([".*/mlp/linear=2", "head/kernel=none", ".*norm/.*=-1"])
    tree = state()
    places = sharding.parameters(sharding.mesh(4), tree, rules)
    assert specs(places) == {
        "": {P()},
        "trained": {P()},  # the steps that Adam counts
        "mlp/linear": {P(None, None, "fsdp")},
        "norm/scale": {P(None, "fsdp")},  # however small
        "head/kernel": {P(None, None)},
        "head/linear": {P(None, "fsdp", None)},  # which no rule matches
    }
    assert jax.tree.structure(places) == jax.tree.structure(tree)
    # params, average, mu, nu; and the head's trace
    count = [p for p in jax.tree.leaves(places) if p.spec == P(None, None, "fsdp")]
    assert len(count) == 4
    arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree.params)
    put = jax.device_put(arrays, places.params)
    assert put["layers"]["mlp"]["linear"].addressable_shards[0].data.shape == (2, 1024, 256)


def test_rules_hold_for_parameters_alone():
    places = sharding.parameters(sharding.mesh(8), PARAMS, [("layers/.*", -1)])
    assert specs(places)["mlp/linear"] == {P(None, None, "fsdp")}


def test_of_another_shape_only_what_divides():
    moment = {"head": {"kernel": Codes(array(8192, 256, dtype=jnp.uint8), array(8192))}}
    tree = State(array(), PARAMS, (moment, optax.EmptyState()), None)
    place = functools.partial(sharding.parameters, sharding.mesh(4), tree)
    found = place([("head/kernel", 1)]).opt_state[0]["head"]["kernel"]
    assert found.numbers.spec == P(None, "fsdp")
    assert found.scales.spec == P(None)  # has no axis 1
    found = place([("head/kernel", 0)]).opt_state[0]["head"]["kernel"]
    assert (found.numbers.spec, found.scales.spec) == (P("fsdp", None), P("fsdp"))
    found = place([("head/kernel", None)]).opt_state[0]["head"]["kernel"]
    assert (found.numbers.spec, found.scales.spec) == (P(None, None), P(None))


def test_four_bits_are_split_too():
    params = {"layers": {"mlp": {"linear": nf4.quantize(array(4, 4096, 4096))}}}
    mesh = sharding.mesh(4)
    path = "layers/mlp/linear"
    found = sharding.parameters(mesh, params)["layers"]["mlp"]["linear"]
    assert (found.codes.spec, found.scales.spec) == (P(None, "fsdp"), P(None, None))
    found = sharding.parameters(mesh, params, [(path, 0)])["layers"]["mlp"]["linear"]
    assert (found.codes.spec, found.scales.spec) == (P("fsdp", None), P("fsdp", None))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["layer/.*=0"], "matches no parameter; the nearest path is 'layers/"),
        (["head/kernel=2"], r"head/kernel is \(1024, 2048\) and has no axis 2; give one of 0 to 1"),
        (
            [".*/mlp/linear=0"],
            r"axis 0 of layers/mlp/linear \(2, 1024, 1024\) is 2 long, which .*4",
        ),
        (["head/.*=1", "head/kernel=0"], "earlier rules take"),
        (["head/kernel"], "'head/kernel' is no rule; expected 'PATH REGEX=AXIS'"),
        (["=1"], "is no rule"),
        (["head/kernel=first"], "is no rule"),
        (["head/(kernel=1"], "not a regular expression"),
    ],
)
def test_rules_that_cannot_be(rules, expected):
    with pytest.raises(ValueError, match=rf"config.train.shard: .*{expected}"):
        sharding.parameters(sharding.mesh(4), state(), sharding.parse_rules(rules))


def test_rules_as_texts():
    found = sharding.parse_rules(["a=b/.*=1", "c{1,2}=None", "d=-2"])
    assert found == (("a=b/.*", 1), ("c{1,2}", None), ("d", -2))
    assert sharding.parse_rules("a=1") == (("a", 1),)
    with pytest.raises(ValueError, match=r"^config.x: "):
        sharding.parse_rules(["a"], "config.x")


@pytest.mark.parametrize("fsdp_devices", [1, 4])
def test_a_step_whose_state_lies_with_the_host(fsdp_devices):
    """What is fetched, used and put back is what stays on the devices would be."""
    mesh = sharding.mesh(fsdp_devices)
    if not sharding.has_host_memory(mesh):
        pytest.skip("this backend has no such memory")
    optimizer = optax.adam(1e-3)
    params = {"w": np.ones((1024, 1024), np.float32), "b": np.ones((3,), np.float32)}
    opt_state = jax.device_get(optimizer.init(params))  # the steps take their arguments for good
    near = sharding.parameters(mesh, opt_state)
    far = sharding.on_host(near)
    with_params = sharding.parameters(mesh, params)

    def step(places, params, opt_state):
        updates, opt_state = sharding.offloaded(optimizer, places).update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    results = []
    for places in (near, far):
        run = jax.jit(
            functools.partial(step, places),
            donate_argnums=(0, 1),
            out_shardings=(with_params, places),
        )
        made = jax.device_put(params, with_params), jax.device_put(opt_state, places)
        for _ in range(2):
            made = run(*made)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(made[1])}
        assert kinds == {place.memory_kind for place in jax.tree.leaves(places)}
        results.append(jax.device_get(made))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert {place.memory_kind for place in jax.tree.leaves(far)} == {sharding.HOST}


def test_host_memory_is_tried_and_not_supposed():
    class Device:
        def addressable_memories(self):
            return []

    assert not sharding._has_host_memory(Device())
