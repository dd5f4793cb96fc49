"""The loss of a mix: one backward pass gives what `jax.grad` through the mix gives, and forward
passes what `jax.jacfwd` does.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix import sharding, trees
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


# Gauss and Newton


def residual(params, batch, key):
    """Curved in the parameters, and with noise from the key; as many elements as the batch has."""
    hidden = jnp.tanh(batch["x"] @ params["img"]["w"] + params["img"]["b"][None])
    out = hidden @ params["llm"]["w"].reshape(2, 2)
    return out - batch["y"] + 0.1 * jax.random.normal(key, out.shape)


def mean_square(params, batch, key):
    return jnp.mean(jnp.square(residual(params, batch, key).astype(jnp.float32))), {}


def _examples(*sizes):
    rng = np.random.default_rng(5)
    return [
        {"x": rng.standard_normal((b, 3), np.float32), "y": rng.standard_normal((b, 2), np.float32)}
        for b in sizes
    ]


def _least_squares(params, batches, key=None):
    key = jax.random.key(3) if key is None else key
    return objective.in_memory(mean_square, params, batches, key, residual)


def _by_jacfwd(groups, values, params, batches, keys):
    """(loss, gradient, curvature) of the mean over batches, from the whole Jacobian of each."""

    @jax.jit
    def both(flat, batch, key):
        def of_mix(flat):
            rows = list(flat.reshape(len(groups), -1))
            mixed = trees.combine(dict(zip(groups, rows, strict=True)), params)
            r = residual(mixed, batch, key).ravel()
            return r, r

        return jax.jacfwd(of_mix, has_aux=True)(flat)

    flat, found = np.concatenate(values).astype(np.float32), []
    for batch, key in zip(batches, keys, strict=True):
        jacobian, r = (np.asarray(x, float) for x in both(flat, batch, jax.random.clone(key)))
        square = 2 * jacobian.T @ jacobian
        found.append((r @ r / r.size, 2 * jacobian.T @ r / r.size, square / r.size))
    return [sum(parts) / len(found) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("groups", [{".*": [0.5, 0.2, 0.3]}, GROUPS])
def test_gauss_newton_is_the_jacobian_of_jacfwd(groups):
    params, batches = _trees(3, 0), _examples(4, 6)  # batches count alike, whatever their size
    keys = jax.random.split(jax.random.key(0))
    c = groups if len(groups) > 1 else groups[".*"]
    found = _least_squares(params, batches, keys).gauss_newton(c)
    expected = _by_jacfwd(list(groups), list(groups.values()), params, batches, list(keys))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    # Of one batch, too.
    single = _least_squares(params, batches, keys).gauss_newton(c, 1)
    expected = _by_jacfwd(list(groups), list(groups.values()), params, batches[1:], list(keys)[1:])
    np.testing.assert_allclose(single[2], expected[2], rtol=1e-5, atol=1e-5)


def test_gauss_newton_has_the_loss_and_the_gradient_of_value_and_grad():
    target = _least_squares(_trees(3, 0), _examples(4, 4))
    for c in ([0.5, 0.2, 0.3], GROUPS):
        value, grad = target.value_and_grad(c)
        loss, gradient, _ = target.gauss_newton(c)
        np.testing.assert_allclose([loss, target.value(c)], value, rtol=1e-6)  # the same noise
        flat = np.concatenate(list(grad.values()) if isinstance(c, dict) else [grad])
        np.testing.assert_allclose(gradient, flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [(".*",), tuple(GROUPS)])
def test_on_the_simplex_one_direction_less_tells_the_same(groups):
    target, n = _least_squares(_trees(3, 0), _examples(4)), 3
    c = {group: [0.5, 0.2, 0.3] for group in groups}
    whole, part = (target.gauss_newton(c, on_simplex=on_simplex) for on_simplex in (False, True))
    moves = np.random.default_rng(0).standard_normal((5, len(groups), n))
    moves = (moves - moves.mean(axis=-1, keepdims=True)).reshape(5, -1)
    np.testing.assert_allclose(moves @ part[1], moves @ whole[1], atol=1e-6)
    np.testing.assert_allclose(moves @ part[2] @ moves.T, moves @ whole[2] @ moves.T, atol=1e-5)
    assert np.all(part[2].reshape(len(groups), n, -1)[:, 0] == 0)  # relative to checkpoint 0
    one = _least_squares(_trees(1, 0), _examples(4)).gauss_newton([1.0], on_simplex=True)
    assert one[2].shape == (1, 1)


def test_checkpoints_that_are_almost_alike_keep_their_curvature():
    """Columns along whole checkpoints would agree to seven digits, their difference be noise."""
    base, steps = _trees(1, 0)[0], _trees(3, 1)
    params = [jax.tree.map(lambda a, b: a + np.float32(1e-5) * b, base, step) for step in steps]
    _, gradient, curvature = _least_squares(params, _examples(8)).gauss_newton([0.2, 0.5, 0.3])
    exact = [
        jax.tree.map(lambda a, b: (a.astype(float) - b).astype(np.float32), tree, params[0])
        for tree in params
    ]
    mixed = trees.combine([0.2, 0.5, 0.3], params)

    def along(step):
        key = jax.random.fold_in(jax.random.key(3), 0)
        function = functools.partial(residual, batch=_examples(8)[0], key=key)
        r, column = jax.jvp(function, (mixed,), (step,))
        return np.asarray(r, float).ravel(), np.asarray(column, float).ravel()

    r, columns = along(exact[1])[0], np.stack([along(step)[1] for step in exact])
    np.testing.assert_allclose(
        gradient - gradient[0], 2 * columns @ r / r.size, rtol=1e-4, atol=1e-10
    )
    apart = curvature - curvature[:1] - curvature[:, :1] + curvature[0, 0]
    np.testing.assert_allclose(apart, 2 * columns @ columns.T / r.size, rtol=1e-4, atol=1e-16)


def test_bfloat16_checkpoints_have_products_summed_in_float32():
    params = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree) for tree in _trees(3, 0)]
    found = _least_squares(params, _examples(512)).gauss_newton([0.5, 0.2, 0.3])
    wide = [jax.tree.map(lambda x: x.astype(np.float32), tree) for tree in params]
    exact = _least_squares(wide, _examples(512)).gauss_newton([0.5, 0.2, 0.3])
    # bfloat16 has eight bits; a sum of a thousand such squares, kept in it, would have none left.
    np.testing.assert_allclose(found[0], exact[0], rtol=1e-2)
    np.testing.assert_allclose(found[2], exact[2], rtol=2e-2, atol=2e-2)
    assert found[2].dtype == np.float64


def test_who_does_not_like_the_loss_is_spared_the_other_columns():
    target, asked = _least_squares(_trees(3, 0), _examples(4, 4)), []
    loss, gradient, curvature = target.gauss_newton([0.5, 0.2, 0.3], proceed=asked.append)
    assert (gradient, curvature) == (None, None)
    assert asked == [loss]
    np.testing.assert_allclose(loss, target.value([0.5, 0.2, 0.3]), rtol=1e-6)
    assert target.gauss_newton([0.5, 0.2, 0.3], proceed=lambda _: True)[2].shape == (3, 3)


def test_without_residuals_there_is_no_gauss_newton():
    found = objective.in_memory(mean_square, _trees(2, 0), _examples(4), jax.random.key(0))
    with pytest.raises(ValueError, match="pass residual_fn"):
        found.gauss_newton([0.5, 0.5])


def test_sharded_checkpoints_give_what_whole_ones_give():
    rng = np.random.default_rng(0)
    params = [
        {"w": rng.standard_normal((1024, 1024), np.float32) / 32, "b": rng.standard_normal(8)}
        for _ in range(3)
    ]
    params = [jax.tree.map(lambda x: x.astype(np.float32), tree) for tree in params]
    batch = {"x": rng.standard_normal((8, 1024), np.float32)}

    def residual(params, batch, key):
        out = jnp.tanh(batch["x"] @ params["w"])[:, :8] + params["b"][None]
        return out + jax.random.normal(key, out.shape)

    def loss_fn(params, batch, key):
        return jnp.mean(jnp.square(residual(params, batch, key))), {}

    mesh, found = sharding.mesh(8), []
    spec = sharding.parameters(mesh, params[0])
    assert not spec["w"].is_fully_replicated
    for place in (lambda x, _: x, jax.device_put):
        placed = [place(tree, spec) for tree in params]
        examples = place(batch, sharding.batch(mesh))
        target = objective.in_memory(loss_fn, placed, [examples], jax.random.key(0), residual)
        # One after the other: two programs that wait for all devices could wait for each other.
        evaluations = (target.value, target.value_and_grad, target.gauss_newton)
        found.append([jax.block_until_ready(f([0.5, 0.2, 0.3])) for f in evaluations])
    assert placed[0]["w"].addressable_shards[0].data.shape == (128, 1024)
    for one, eight in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-5)


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


def _blind(model="pi0"):
    """(config, checkpoints) of the oracle without its vision tower, which is slow to compile."""
    config = dataclasses.replace(oracle.config(model), image_keys=())
    params = [
        {name: child for name, child in tree.items() if name != "PaliGemma"}
        | {"PaliGemma": {"llm": tree["PaliGemma"]["llm"]}}
        for tree in (oracle.params(model, which) for which in oracle.VARIANTS)
    ]
    return config, params


def test_the_gradient_of_a_policys_mix_by_groups_is_that_of_jax_grad_through_combine():
    config, params = _blind()
    loss_fn = functools.partial(pi0.loss, config)
    batches = oracle.batches("pi0")[:1]
    groups = {
        "PaliGemma/.*/attn/.*": [0.2, 0.3, 0.5],
        "action_.*": [0.4, 0.3, 0.3],
        ".*": [0.1, 0.8, 0.1],
    }
    value, expected = _through_combine(
        loss_fn, list(groups), list(groups.values()), params, batches, oracle.keys(1)
    )
    target = objective.in_memory(
        loss_fn, params, batches, oracle.keys(1), functools.partial(pi0.residual, config)
    )
    loss, grads = target.value_and_grad(groups)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    for name, grad in zip(groups, expected, strict=True):
        np.testing.assert_allclose(grads[name], grad, rtol=1e-3, atol=1e-5)
    # Forward passes come to the same gradient as the backward pass.
    loss, gradient, curvature = target.gauss_newton(groups)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    np.testing.assert_allclose(gradient, np.concatenate(list(grads.values())), rtol=1e-4, atol=1e-5)
    assert np.all(np.linalg.eigvalsh(curvature) > -1e-6 * np.trace(curvature))
