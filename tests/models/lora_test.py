"""Low-rank updates: OpenPI's numbers, and what a merged weight computes.

testdata/openpi/lora.npz holds inputs, parameters and outputs of `Einsum` and `FeedForward` in
OpenPI's models/lora.py, rank 2 and alpha 3; renewed by applying them to normal numbers.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.models import attention, gemma, lora
from tests import oracle

GOLDEN = dict(np.load(oracle.TESTDATA / "openpi/lora.npz"))
LORA = lora.Lora(rank=2, alpha=3.0)
EQUATIONS = {
    "q_einsum": "btd,ndh->btnh",
    "kv_einsum": "btd,ikdh->ibtkh",
    "attn_vec_einsum": "btnh,nhd->btd",
}


def golden(name):
    """(inputs, outputs, parameters) of one module."""
    found = {k.partition("/")[2]: v for k, v in GOLDEN.items() if k.startswith(f"{name}/")}
    return found.pop("x"), found.pop("y"), found


@pytest.mark.parametrize("name", EQUATIONS)
def test_einsums_are_openpis(name):
    x, y, params = golden(name)
    module = attention.Einsum(params["w"].shape, jax.nn.initializers.zeros, LORA)
    np.testing.assert_allclose(module.apply({"params": params}, EQUATIONS[name], x), y, atol=1e-5)


def test_feed_forward_is_openpis_and_not_scaled():
    x, y, params = golden("mlp")
    found = gemma.FeedForward(params["linear"].shape[0], LORA).apply({"params": params}, x)
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EQUATIONS)
def test_an_update_is_a_change_of_the_weight(name):
    """What merging relies on; the heads of attn_vec_einsum share one B."""
    x, y, params = golden(name)
    b = params["lora_b"]
    if name == "attn_vec_einsum":
        b = b.sum(axis=0, keepdims=True)
    merged = params["w"] + LORA.scale * params["lora_a"] @ b
    np.testing.assert_allclose(jnp.einsum(EQUATIONS[name], x, merged), y, rtol=1e-4, atol=1e-4)


def frozen(*loras):
    paths = [
        "PaliGemma/llm/layers/attn/q_einsum/w",
        "PaliGemma/llm/layers/attn/q_einsum/lora_a",
        "PaliGemma/llm/layers/mlp_1/linear",
        "PaliGemma/llm/layers/mlp_1/linear_lora_b",
        "PaliGemma/img/head/kernel",
        "state_proj/bias",
    ]
    regexes = lora.freeze(*loras)
    return [i for i, p in enumerate(paths) if any(re.fullmatch(r, p) for r in regexes)]


def test_what_has_updates_keeps_its_weights():
    assert frozen(None, None) == []
    assert frozen(LORA, None) == [0]
    assert frozen(None, LORA) == [2]
    assert frozen(LORA, LORA) == [0, 2]


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        lora.Lora(0)
