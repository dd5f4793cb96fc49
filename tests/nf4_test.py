"""Four bits: their levels, what they cost, and that they come back as they were."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from policymix import nf4, sharding, trees

NORMAL = np.random.default_rng(0).standard_normal((3, 2, 40, 48)).astype(np.float32)
FLOATS = st.one_of(
    *(st.floats(-(2.0**e), 2.0**e, width=32, allow_subnormal=False) for e in (100, 0, -96)),
    st.just(0.0),
)


def same(a: nf4.Nf4, b: nf4.Nf4) -> None:
    assert a.matrix == b.matrix
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.scales.view(jnp.uint16), b.scales.view(jnp.uint16))


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(arrays.arrays(np.float32, (2, 3, 50), elements=FLOATS))
def test_what_came_out_of_four_bits_goes_back_unchanged(leaf):
    once = nf4.quantize(leaf)
    twice = nf4.quantize(nf4.dequantize(once))
    same(once, twice)


def test_errors_are_those_of_normal_numbers():
    error = np.asarray(nf4.dequantize(nf4.quantize(NORMAL)), np.float32) - NORMAL
    assert 0.068 < np.abs(error).mean() < 0.078
    assert np.sqrt(np.square(error).mean()) < 0.1
    largest = np.abs(NORMAL.reshape(-1, nf4.BLOCK)).max(axis=1)
    widest = np.diff(nf4.LEVELS).max() / 2
    assert (np.abs(error.reshape(-1, nf4.BLOCK)).max(axis=1) <= (widest + 2**-7) * largest).all()


def test_each_number_becomes_the_nearest_level():
    leaf = np.linspace(-1, 1, 64, dtype=np.float32)[None, :]
    found = nf4.dequantize(nf4.quantize(leaf))
    nearest = np.argmin(np.abs(leaf[0][:, None] - np.asarray(nf4.LEVELS)[None, :]), axis=1)
    expected = np.asarray(nf4.LEVELS, np.float32)[nearest].astype(jnp.bfloat16)
    np.testing.assert_array_equal(found[0], expected)


def test_a_layer_of_a_stack_is_that_layer():
    stack = nf4.quantize(NORMAL)
    for number in range(len(NORMAL)):
        layer = jax.tree.map(lambda leaf, i=number: leaf[i], stack)
        same(layer, nf4.quantize(NORMAL[number], leading=0))
        same(layer, jax.tree.map(lambda leaf: leaf[0], nf4.quantize(NORMAL[number][None])))
        np.testing.assert_array_equal(nf4.dequantize(layer), nf4.dequantize(stack)[number])
        assert layer.shape == NORMAL.shape[1:]


def test_a_matrix_that_ends_within_a_block():
    leaf = NORMAL[:, 0, :5, :18]
    made = nf4.quantize(leaf)
    assert (made.shape, made.codes.shape, made.scales.shape) == (leaf.shape, (3, 64), (3, 2))
    error = np.abs(np.asarray(nf4.dequantize(made), np.float32) - leaf)
    assert error.max() < 0.16 * np.abs(leaf).max()


def test_bytes_and_what_trees_see():
    tree = {"a": {"w": nf4.quantize(NORMAL)}, "b": jnp.zeros((2,), jnp.bfloat16)}
    assert trees.nbytes(tree) == NORMAL.size * 4.25 / 8 + 4
    assert trees.num_params(tree) == NORMAL.size + 2
    assert list(trees.flatten(tree)) == ["a/w", "b"]
    wide = {"a": {"w": NORMAL}, "b": np.zeros(2)}
    assert trees.difference(tree, wide) is None
    assert "a/w" in trees.difference(tree, {"a": {"w": NORMAL[:2]}, "b": np.zeros(2)})


def test_shapes_take_the_place_of_arrays():
    shape = jax.ShapeDtypeStruct(NORMAL.shape, jnp.float32)
    found = nf4.quantize(shape)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), nf4.quantize(NORMAL)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), found
    )
    assert nf4.dequantize(found) == jax.ShapeDtypeStruct(NORMAL.shape, jnp.bfloat16)
    assert nf4.dequantize(shape) is shape


def test_outside_of_compiled_functions_nothing_but_the_result_is_made(monkeypatch):
    """One matrix of a large policy is gigabytes."""
    made, seen = nf4.quantize(NORMAL), []
    stack = jnp.stack
    monkeypatch.setattr(jnp, "stack", lambda *a, **k: seen.append(stack(*a, **k)) or seen[-1])
    nf4._dequantize.clear_cache()
    nf4.dequantize(made)
    assert seen
    assert all(isinstance(x, jax.core.Tracer) for x in seen)


def test_whole_trees():
    tree = {"w": nf4.quantize(NORMAL), "b": jnp.ones((3,))}
    wide = nf4.dequantized(tree)
    assert wide["b"] is tree["b"]
    assert (wide["w"].shape, wide["w"].dtype) == (NORMAL.shape, jnp.bfloat16)


def test_split_over_devices_it_is_the_same():
    place = NamedSharding(sharding.mesh(4), PartitionSpec(None, "fsdp"))
    made = nf4.quantize(NORMAL)
    spread = jax.device_put(made, place)
    np.testing.assert_array_equal(nf4.dequantize(spread), nf4.dequantize(made))


def test_within_jit_scan_and_checkpoint():
    made, x = nf4.quantize(NORMAL[:, 0, :, :40]), jnp.ones((40,))

    @jax.jit
    def run(made, x):
        @jax.checkpoint
        def layer(x, matrix):
            return jnp.tanh(nf4.dequantize(matrix).astype(jnp.float32) @ x), None

        return jax.lax.scan(layer, x, made)[0].sum()

    def plain(x):
        for matrix in nf4.dequantize(made).astype(jnp.float32):
            x = jnp.tanh(matrix @ x)
        return x.sum()

    found, expected = jax.value_and_grad(run, argnums=1)(made, x), jax.value_and_grad(plain)(x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("PaliGemma/llm/layers/attn/q_einsum/w", (2, 8, 64, 16), True),
        ("PaliGemma/llm/layers/attn/attn_vec_einsum_1/w", (2, 8, 16, 64), True),
        ("PaliGemma/llm/layers/mlp_1/gating_einsum", (2, 2, 64, 128), True),
        ("PaliGemma/llm/layers/mlp/linear", (2, 128, 64), True),
        ("PaliGemma/llm/layers/mlp/linear", (2, 64, 8), False),  # too small
        ("PaliGemma/llm/layers/mlp/linear", (2, 999, 63), False),
        ("PaliGemma/llm/layers/mlp/linear_lora_a", (2, 1280, 64), False),
        ("PaliGemma/llm/layers/attn/q_einsum/lora_b", (2, 8, 64, 64), False),
        ("PaliGemma/llm/layers/pre_attention_norm_1/Dense_0/kernel", (2, 64, 192), False),
        ("PaliGemma/llm/layers/pre_ffw_norm/scale", (2, 8192), False),
        ("PaliGemma/llm/embedder/input_embedding", (512, 64, 64), False),
        ("PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel", (2, 64, 128), True),
        ("PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/bias", (2, 64, 128), False),
        ("PaliGemma/img/head/kernel", (64, 128), False),
        ("action_in_proj/kernel", (64, 128), False),
    ],
)
def test_what_four_bits_are_meant_for(path, shape, expected):
    assert nf4.suits(path, jax.ShapeDtypeStruct(shape, jnp.float32)) == expected


def test_numbers_that_are_none_stay_visible():
    leaf = np.array(NORMAL[:, 0])
    leaf[1, 0, 0] = np.nan
    found = np.asarray(nf4.dequantize(nf4.quantize(leaf)), np.float32)
    assert np.isnan(found).any(axis=(1, 2)).tolist() == [False, True, False]
