"""GELU and LayerNorm in one are flax's, forwards and backwards."""

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
    params = layer.init(jax.random.key(0), x)["params"]
    found = layer.apply({"params": params}, x)
    assert found.dtype == jnp.bfloat16
    y = np.asarray(x, np.float64)  # so far out gelu is the identity
    expected = (y - y.mean(-1, keepdims=True)) / y.std(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.05)
