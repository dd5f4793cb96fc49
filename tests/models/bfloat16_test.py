"""Computing in bfloat16, against OpenPI's bfloat16.

OpenPI's own code, compiled by another jax or not at all, is as far from these numbers as ours is
(mean |Δv_t| 0.0033 over 96 examples, both): one program has many roundings. So two things are
tested: how far we are, and that we are as far from OpenPI's float32 numbers as its own bfloat16 is,
which tells computing in a wider dtype, or a narrower one, at some place.

testdata/openpi/*/oracle_bfloat16.npz are outputs of OpenPI at the inputs of oracle_float32.npz.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.models import attention, network, pi0
from tests import oracle

# The largest and the mean distance to OpenPI's bfloat16, and the range of our mean distance to its
# float32 over its own. Wrong roundings made on purpose leave them in at least one of both models.
LIMITS = {
    "prefix_tokens": (0.03, 5e-4, 0.95, 1.05),
    "prefix_out": (0.08, 0.0065, 0.95, 1.05),
    "suffix_out": (0.05, 0.0031, 0.88, 1.13),
    "v_t": (0.025, 0.0040, 0.75, 1.35),
    "sample_actions": (0.007, 0.0012, 0.7, 1.4),
}


def everything(self, observation, x_t, t):
    """Tokens and outputs of both experts."""
    prefix, prefix_valid = self.embed_prefix(observation)
    suffix, suffix_valid, blocks, cond = self.embed_suffix(observation, x_t, t)
    blocks = jnp.concatenate([jnp.zeros(prefix.shape[1], bool), blocks])
    valid = jnp.concatenate([prefix_valid, suffix_valid], axis=1)
    positions = self.prefix_positions(prefix_valid), self.positions(prefix_valid, suffix_valid)
    (prefix_out, suffix_out), _ = self.PaliGemma.llm(
        [prefix, suffix],
        jnp.concatenate(positions, axis=1),
        network.attention_mask(valid, blocks),
        [None, cond],
    )
    names = "prefix_tokens", "suffix_tokens", "prefix_out", "suffix_out"
    return dict(zip(names, (prefix, suffix, prefix_out, suffix_out), strict=True))


@pytest.mark.parametrize("model", oracle.MODELS)
def test_bfloat16_rounds_as_openpi_does(model):
    config = dataclasses.replace(oracle.config(model), dtype="bfloat16")
    params, observation = oracle.params(model), oracle.observation(model)
    wide = oracle.forward(model)
    half = np.load(oracle.OPENPI / model / "oracle_bfloat16.npz")
    x_t, t = wide["out/x_t"], wide["in/time"]

    @jax.jit
    def run(params):
        tree = {"params": params}
        found = network.Pi0(config).apply(tree, observation, x_t, t, method=everything)
        return found | {"v_t": pi0.velocity(config, params, observation, x_t, t)}

    found = run(params)
    noise = wide["in/noise"]
    found["sample_actions"] = pi0.sample_actions(config, params, observation, noise=noise)
    for name in ("prefix_tokens", "prefix_out", "suffix_out"):
        assert found[name].dtype == jnp.bfloat16
    # What stands before and after the transformer is computed in float32.
    np.testing.assert_allclose(found["suffix_tokens"], half["out/suffix_tokens"], rtol=0, atol=1e-5)
    assert np.mean(found["v_t"] == found["v_t"].astype(jnp.bfloat16)) < 0.1
    for name, (largest, mean, low, high) in LIMITS.items():
        arrays = found[name], half[f"out/{name}"], wide[f"out/{name}"]
        ours, theirs, exact = (np.asarray(array, np.float64) for array in arrays)
        error = np.abs(ours - theirs)
        assert error.max() < largest, name
        assert error.mean() < mean, name
        ratio = np.abs(ours - exact).mean() / np.abs(theirs - exact).mean()
        assert low < ratio < high, (name, ratio)


def test_logits_and_softmax_are_float32_where_the_rest_is_bfloat16():
    """Large logits tell: in bfloat16 the error is 0.2."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 2, jnp.bfloat16)

    q = draw(2, 7, 1, 8, 16)
    pairs = [(draw(2, s, 1, 16), draw(2, s, 1, 16) / 2) for s in (40, 7)]
    mask = rng.uniform(size=(2, 7, 47)) > 0.2
    keys, values = (
        np.concatenate([np.asarray(pair[i], np.float64) for pair in pairs], axis=1) for i in (0, 1)
    )
    logits = np.einsum("btkgh,bskh->btkgs", np.asarray(q, np.float64), keys)
    logits = np.where(mask[:, :, None, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    exact = np.einsum("btkgs,bskh->btkgh", weights, values).reshape(2, 7, 8, 16)
    found = jax.jit(attention._attend, static_argnums=3)(q, pairs, mask, None)
    assert np.abs(np.asarray(found, np.float64) - exact).max() < 0.03
