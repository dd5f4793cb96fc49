"""π0 with frozen matrices in 4 bits: the policy of the numbers that they stand for, in less
memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix import nf4, structs, trees
from policymix.models import lora, pi0, siglip, variants

DEPTH = 6  # of which one layer in its numbers is much less than all
TRAINED = ("lora", "img/embedding")  # a gradient through every layer, of either stack


@functools.cache
def model(pi05=False):
    size = variants.Size(
        width=96,
        depth=DEPTH,
        mlp_dim=384,
        num_heads=4,
        num_kv_heads=1,
        head_dim=48,
        lora=lora.Lora(2),
    )
    return pi0.Pi0Config(
        paligemma_variant=size,
        action_expert_variant=size,
        siglip_variant=siglip.Size(96, DEPTH, 384, 4, 14),
        vocab_size=32,
        pi05=pi05,
        action_dim=4,
        action_horizon=4,
        max_token_len=4,
        image_keys=("base_0_rgb",),
        image_resolution=(28, 28),
        dtype="float32",
    )


@functools.cache
def halves(pi05=False):
    """(trained leaves, frozen leaves in 4 bits and bfloat16), flat. Nothing starts at zero."""
    rng = np.random.default_rng(1)
    flat = {
        path: 0.05 * rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in trees.flatten(pi0.shapes(model(pi05))).items()
    }
    trained = {path: leaf for path, leaf in flat.items() if any(t in path for t in TRAINED)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}

    @jax.jit  # once for all is quicker than for each
    def narrow(frozen):
        return {
            path: nf4.quantize(leaf) if nf4.suits(path, leaf) else leaf.astype(jnp.bfloat16)
            for path, leaf in frozen.items()
        }

    return trained, narrow(frozen)


@functools.cache
def batch():
    pictures = np.random.default_rng(2).uniform(-1, 1, (2, 28, 28, 3)).astype(np.float32)
    observation = pi0.example_observation(model(), 2).replace(images={"base_0_rgb": pictures})
    return structs.Batch(observation, jnp.ones((2, 4, 4)))


def arguments(pi05):
    return *halves(pi05), batch(), jax.random.key(0)


def loss(trained, frozen, batch, key, *, pi05):
    return pi0.loss(model(pi05), trees.unflatten({**frozen, **trained}), batch, key)[0]


@functools.cache
def compiled(pi05=False, *, wide=False):
    """(loss, gradients) of the trained leaves, and what it takes; `wide` with all layers at once in
    their numbers.
    """

    def run(trained, frozen, *others):
        frozen = nf4.dequantized(frozen) if wide else frozen
        return jax.value_and_grad(functools.partial(loss, pi05=pi05))(trained, frozen, *others)

    return jax.jit(run).lower(*arguments(pi05)).compile()


def test_every_matrix_of_the_layers_is_in_four_bits():
    trained, frozen = halves()
    found = [path for path, leaf in frozen.items() if isinstance(leaf, nf4.Nf4)]
    assert len(found) == 6 + 2 * 5  # of the vision tower, of each expert
    shapes = pi0.shapes(model())
    share = trees.nbytes([frozen[path] for path in found]) / sum(
        4 * np.prod(leaf.shape) for path, leaf in trees.flatten(shapes).items() if path in found
    )
    assert share == pytest.approx(4.25 / 32, rel=1e-6)
    pi0.check_params(model(), trees.unflatten({**frozen, **trained}))


@pytest.mark.parametrize("pi05", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_the_numbers(pi05):
    (value, grads), (expected, plain) = (
        compiled(pi05, wide=wide)(*arguments(pi05)) for wide in (False, True)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in plain.values())
    for path, leaf in plain.items():
        np.testing.assert_allclose(grads[path], leaf, rtol=1e-3, atol=1e-5 * np.abs(leaf).max())


def test_one_layer_at_a_time_is_wide():
    few, many = (
        compiled(False, wide=wide).memory_analysis().temp_size_in_bytes for wide in (False, True)
    )
    matrices = [leaf for leaf in halves()[1].values() if isinstance(leaf, nf4.Nf4)]
    wide = 2 * sum(np.prod(leaf.shape) for leaf in matrices)  # in bfloat16
    assert few < many - wide / 2
    assert few < wide


@pytest.mark.slow
@pytest.mark.parametrize("pi05", [False, True])
def test_sampled_actions_are_those_of_the_numbers(pi05):
    params = trees.unflatten({**halves(pi05)[0], **halves(pi05)[1]})
    noise = jnp.ones((2, 4, 4))
    found, expected = (
        pi0.sample_actions(model(pi05), p, batch().observation, noise=noise, num_flow_steps=2)
        for p in (params, nf4.dequantized(params))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
