"""The loss of a mix: one backward pass gives what `jax.grad` through the mix gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix import trees
from policymix.mixing import objective
from policymix.models import pi0
from tests import oracle

SHAPES = {"img/w": (3, 2), "img/b": (2,), "llm/w": (4,)}


def quadratic(params, batch, key):
    """½‖θ - batch‖², plus noise that depends on the key alone."""
    apart = jax.tree.map(jnp.subtract, params, batch)
    return 0.5 * trees.dot(apart, apart) + jax.random.normal(key), {}


def _trees(n, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [
        trees.unflatten({p: rng.standard_normal(s).astype(dtype) for p, s in SHAPES.items()})
        for _ in range(n)
    ]


def _through_combine(loss_fn, groups, values, params, batches, keys):
    """(loss, gradient per group) by `jax.grad` through `trees.combine`: the readable truth."""

    def mean(values):
        mixed = trees.combine(dict(zip(groups, values, strict=True)), params)
        losses = [
            loss_fn(mixed, batch, jax.random.clone(key))[0]
            for batch, key in zip(batches, list(jax.random.clone(keys)), strict=True)
        ]
        return sum(losses) / len(losses)

    return jax.jit(jax.value_and_grad(mean))([jnp.asarray(v, jnp.float32) for v in values])


GROUPS = {"llm/.*": [0.5, 0.2, 0.3], "img/w": [1.0, -0.5, 0.5], "img/.*": [0.1, 0.1, 0.8]}


def test_value_and_grad_are_those_of_jax_grad_through_combine():
    params, batches, keys = _trees(3, 0), _trees(2, 1), jax.random.split(jax.random.key(0))
    found = objective.in_memory(quadratic, params, batches, keys)
    c = [0.5, 0.2, 0.3]
    value, (grad,) = _through_combine(quadratic, [".*"], [c], params, batches, keys)
    np.testing.assert_allclose(found.value(c), value, rtol=1e-6)
    np.testing.assert_allclose(found.value_and_grad(c)[0], value, rtol=1e-6)
    np.testing.assert_allclose(found.value_and_grad(c)[1], grad, rtol=1e-5)
    assert found.num_batches == 2


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_groups_keep_their_order_and_their_gradients_apart(order):
    groups = {list(GROUPS)[i]: list(GROUPS.values())[i] for i in order}  # not sorted
    params, batches, keys = _trees(3, 0), _trees(2, 1), jax.random.split(jax.random.key(0))
    value, grads = objective.in_memory(quadratic, params, batches, keys).value_and_grad(groups)
    truth, expected = _through_combine(
        quadratic, list(groups), list(groups.values()), params, batches, keys
    )
    np.testing.assert_allclose(value, truth, rtol=1e-6)
    assert list(grads) == list(groups)
    for name, grad in zip(groups, expected, strict=True):
        np.testing.assert_allclose(grads[name], grad, rtol=1e-5)


def test_the_mean_is_over_batches_and_a_batch_is_always_met_with_its_own_key():
    params, batches = _trees(2, 0), _trees(3, 1)
    found = objective.in_memory(quadratic, params, batches, jax.random.key(7))
    c = [0.5, 0.5]
    singles = [float(found.value(c, i)) for i in range(3)]
    np.testing.assert_allclose(found.value(c), np.mean(singles), rtol=1e-6)
    assert [float(found.value(c, i)) for i in range(3)] == singles
    again = objective.in_memory(quadratic, params, batches[:2], jax.random.key(7))
    assert [float(again.value(c, i)) for i in range(2)] == singles[:2]
    same = objective.in_memory(quadratic, params, [batches[0]] * 2, jax.random.key(7))
    assert float(same.value(c, 0)) != float(same.value(c, 1))  # other noise for another batch


def test_bfloat16_checkpoints_have_the_gradient_of_float32_products():
    params, batches = _trees(3, 0, jnp.bfloat16), _trees(1, 1)
    keys = jax.random.split(jax.random.key(0), 1)
    _, grad = objective.in_memory(quadratic, params, batches, keys).value_and_grad([0.5, 0.2, 0.3])
    wide = [jax.tree.map(lambda x: x.astype(np.float64), tree) for tree in params]
    mixed = trees.flatten(trees.combine([0.5, 0.2, 0.3], params))
    goal = trees.flatten(batches[0])
    # The gradient reaches the parameters in their dtype: bfloat16, eight bits.
    apart = {p: np.asarray(mixed[p] - goal[p]).astype(jnp.bfloat16) for p in mixed}
    expected = [
        sum(np.vdot(apart[p].astype(float), x) for p, x in trees.flatten(tree).items())
        for tree in wide
    ]
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


def test_what_does_not_fit_together_is_refused():
    params, batches = _trees(2, 0), _trees(2, 1)
    with pytest.raises(ValueError, match="at least one validation batch"):
        objective.in_memory(quadratic, params, [], jax.random.key(0))
    with pytest.raises(ValueError, match="2 batches need 2 keys, got 3"):
        objective.in_memory(quadratic, params, batches, jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match=r"checkpoint 0 and checkpoint 1 .* only in checkpoint 0"):
        objective.in_memory(quadratic, [params[0], params[1]["img"]], batches, jax.random.key(0))
    found = objective.in_memory(quadratic, params, batches, jax.random.key(0))
    with pytest.raises(ValueError, match="2 checkpoints need 2 coefficients"):
        found.value([1.0, 0.0, 0.0])


def test_a_corner_is_equal_on_the_chosen():
    np.testing.assert_array_equal(objective.corner(4, [2, 0]), [0.5, 0, 0.5, 0])


# kai0's numbers


def _kai0(model):
    batches = oracle.batches(model)
    params = [oracle.params(model, which) for which in oracle.VARIANTS]
    return objective.in_memory(oracle.loss_fn(model), params, batches, oracle.keys(len(batches)))


@pytest.mark.parametrize("model", oracle.MODELS)
def test_losses_of_single_checkpoints_are_kai0s(model):
    found = _kai0(model)
    expected = oracle.kai0(model)
    for k in range(3):
        per_batch = [float(found.value(np.eye(3)[k], i)) for i in range(found.num_batches)]
        np.testing.assert_allclose(
            per_batch,
            expected["fp32_params_loss_per_checkpoint_per_batch"][k],
            rtol=0,
            atol=1e-5,
        )
        np.testing.assert_allclose(
            found.value(np.eye(3)[k]), expected["fp32_params_loss_per_checkpoint"][k], atol=1e-5
        )


def test_the_gradient_of_a_policys_mix_by_groups_is_that_of_jax_grad_through_combine():
    config = dataclasses.replace(oracle.config("pi0"), image_keys=())
    loss_fn = functools.partial(pi0.loss, config)
    params = [
        {name: child for name, child in tree.items() if name != "PaliGemma"}
        | {"PaliGemma": {"llm": tree["PaliGemma"]["llm"]}}
        for tree in (oracle.params("pi0", which) for which in oracle.VARIANTS)
    ]
    batches = oracle.batches("pi0")[:1]
    groups = {
        "PaliGemma/.*/attn/.*": [0.2, 0.3, 0.5],
        "action_.*": [0.4, 0.3, 0.3],
        ".*": [0.1, 0.8, 0.1],
    }
    value, expected = _through_combine(
        loss_fn, list(groups), list(groups.values()), params, batches, oracle.keys(1)
    )
    loss, grads = objective.in_memory(loss_fn, params, batches, oracle.keys(1)).value_and_grad(
        groups
    )
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    for name, grad in zip(groups, expected, strict=True):
        np.testing.assert_allclose(grads[name], grad, rtol=1e-3, atol=1e-5)
