"""Layers with a backward pass of their own are the ordinary ones, forwards and backwards."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.rl import layers


class Flax(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(x)
        return nn.LayerNorm(dtype=self.dtype, use_fast_variance=False, name="norm")(x)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
@pytest.mark.parametrize("members", [0, 2])
def test_values_and_gradients_are_flaxs(shape, members):
    """Also of an ensemble, under vmap."""
    rng = np.random.default_rng(0)
    lead = (members,) if members else ()
    x = jnp.asarray(rng.standard_normal((*lead, *shape)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((*lead, *shape)), jnp.float32)
    params = {
        k: jnp.asarray(rng.standard_normal((*lead, 8)), jnp.float32) for k in ("scale", "bias")
    }
    dtype = jnp.dtype("float32")

    def ours(params, x):
        return layers.GeluNorm(dtype).apply({"params": params}, x)

    def theirs(params, x):
        return Flax(dtype).apply({"params": {"norm": params}}, x)

    def measured(function):
        whole = jax.vmap(function) if members else function

        def loss(params, x):
            out = whole(params, x)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        measured(ours),
        measured(theirs),
    )


def test_bfloat16_sums_in_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 256)) + 50, jnp.bfloat16)
    layer = layers.GeluNorm(jnp.dtype("bfloat16"))
    params = {"scale": jnp.ones(256), "bias": jnp.zeros(256)}
    found = jax.jit(layer.apply)({"params": params}, x)
    assert found.dtype == jnp.bfloat16
    y = np.asarray(x, np.float64)  # so far out gelu is the identity
    expected = (y - y.mean(-1, keepdims=True)) / y.std(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.05)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_gradients_have_the_dtypes_of_what_they_are_of(dtypes):
    x, scale = (jax.ShapeDtypeStruct((3, 8)[-n:], d) for n, d in zip((2, 1), dtypes, strict=True))

    def loss(*inputs):
        return jnp.sum(layers.gelu_norm(*inputs).astype(jnp.float32))

    found = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), x, scale, scale)
    assert [g.dtype for g in found] == [x.dtype, scale.dtype, scale.dtype]


@pytest.mark.parametrize(("stride", "channels"), [(4, 3), (2, 3), (2, 16)])
def test_convolutions_and_their_gradients_are_the_ordinary_ones(stride, channels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 13, 18, channels), np.float32)
    kernel = rng.standard_normal((2 * stride, 2 * stride, channels, 5), np.float32)

    def ordinary(x, kernel):
        pads, numbers = [(stride // 2, stride // 2)] * 2, ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), pads, dimension_numbers=numbers
        )

    @functools.partial(jax.jit, static_argnums=0)
    def measured(convolution, x, kernel, gradient):
        out, pull = jax.vjp(convolution, x, kernel)
        return out, *pull(gradient)

    gradient = rng.standard_normal(jax.eval_shape(ordinary, x, kernel).shape, np.float32)
    ours = measured(layers.convolve, x, kernel, gradient)
    for a, b in zip(ours, measured(ordinary, x, kernel, gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
