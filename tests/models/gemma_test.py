"""Gemma's parts: rotary positions, norms, sizes, and the variant with as many keys as heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix import trees
from policymix.models import attention, gemma, variants

laws = settings(deadline=None, max_examples=20)
TINY = variants.Size(width=12, depth=2, mlp_dim=20, num_heads=2, num_kv_heads=2, head_dim=4)


def _normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@laws
@given(st.integers(0, 2**32 - 1), st.integers(0, 500))
def test_rotation_preserves_norms(seed, position):
    x = _normal(seed, 1, 1, 2, 8)
    turned = attention.rotate(x, np.full((1, 1), position))
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


@laws
@given(st.integers(0, 2**32 - 1), st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_products_of_rotated_vectors_depend_on_relative_position_only(seed, i, j, shift):
    q, k = _normal(seed, 1, 1, 1, 8), _normal(seed + 1, 1, 1, 1, 8)

    def product(i, j):
        turned = (attention.rotate(x, np.full((1, 1), p)) for x, p in ((q, i), (k, j)))
        return float(np.vdot(*turned))

    np.testing.assert_allclose(product(i, j), product(i + shift, j + shift), atol=1e-3)


def test_position_zero_is_not_turned_and_the_first_half_pairs_with_the_second():
    x = np.array([1.0, 0.0, 0.0, 0.0], np.float32).reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(attention.rotate(x, np.zeros((1, 1))), x)
    turned = np.asarray(attention.rotate(x, np.ones((1, 1)))).ravel()
    np.testing.assert_allclose(turned, [np.cos(1), 0, np.sin(1), 0], atol=1e-6)


def test_rms_norm_divides_by_the_root_mean_square():
    x = _normal(0, 2, 3, 8)
    scale = _normal(1, 8)
    normed, gate = gemma.RMSNorm().apply({"params": {"scale": scale}}, x)
    rms = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed, x / rms * (1 + scale), rtol=1e-5)
    assert gate is None


def test_an_adaptive_norm_reads_scale_shift_and_gate_from_the_condition_in_that_order():
    x, cond = _normal(0, 2, 3, 4), _normal(1, 2, 5)
    bias = np.repeat(np.float32([0.5, -2.0, 0.25]), 4)
    dense = {"kernel": np.zeros((5, 12), np.float32), "bias": bias}
    normed, gate = gemma.RMSNorm(adaptive=True).apply({"params": {"Dense_0": dense}}, x, cond)
    rms = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed, x / rms * 1.5 - 2.0, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(gate, np.full((2, 1, 4), 0.25))


def test_as_many_keys_as_heads_share_one_array_and_run():
    model = gemma.Gemma((TINY, dataclasses.replace(TINY, width=8)), (False, True), 16, jnp.float32)
    xs, cond = [_normal(0, 2, 3, 12), _normal(1, 2, 2, 8)], _normal(2, 2, 8)
    inputs = (xs, np.tile(np.arange(5), (2, 1)), np.ones((2, 5, 5), bool), [None, cond])
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    attention = {path: x.shape for path, x in trees.flatten(shapes["layers"]["attn"]).items()}
    assert attention == {
        "qkv_einsum/w": (2, 3, 2, 12, 4),
        "qkv_einsum_1/w": (2, 3, 2, 8, 4),
        "attn_vec_einsum/w": (2, 2, 4, 12),
        "attn_vec_einsum_1/w": (2, 2, 4, 8),
    }
    params = jax.tree.map(lambda s: 0.3 * _normal(sum(s.shape), *s.shape), shapes)
    (first, second), _ = model.apply({"params": params}, *inputs)
    assert (first.shape, second.shape) == ((2, 3, 12), (2, 2, 8))
    assert np.all(np.isfinite(first))
    # One token that nobody may see changes nobody but itself.
    hidden = np.ones((2, 5, 5), bool)
    hidden[:, :4, 4] = False
    outputs = []
    for last in (0.0, 1.0):
        seen = xs[1].copy()
        seen[:, 1] += last
        (first, second), _ = model.apply(
            {"params": params}, [xs[0], seen], inputs[1], hidden, inputs[3]
        )
        outputs.append((first, second[:, 0], second[:, 1]))
    for same in (0, 1):
        np.testing.assert_allclose(outputs[0][same], outputs[1][same], atol=1e-6)
    assert np.abs(outputs[0][2] - outputs[1][2]).max() > 1e-3


def test_embeddings_are_rows_times_the_root_of_the_width():
    table = _normal(0, 5, 16)
    tokens = np.array([[3, 0], [4, 4]])
    rows = gemma.Embedder(5, 16).apply({"params": {"input_embedding": table}}, tokens)
    np.testing.assert_allclose(rows, table[tokens] * 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("gemma_7b", "'gemma_7b': expected one of .*'gemma_2b'"),
        ({"width": 8, "depth": 1}, "has the fields"),
        (dataclasses.asdict(TINY) | {"num_kv_heads": 3}, "not a multiple of num_kv_heads 3"),
        (dataclasses.asdict(TINY) | {"head_dim": 5}, "head_dim 5 is odd"),
    ],
)
def test_an_unknown_size_says_what_is_known(variant, message):
    with pytest.raises(ValueError, match=message):
        variants.size(variant)


def test_a_size_is_named_given_or_spelt_out():
    assert variants.size("gemma_2b").width == 2048
    assert variants.size(TINY) is TINY
    assert variants.size(dataclasses.asdict(TINY)) == TINY
