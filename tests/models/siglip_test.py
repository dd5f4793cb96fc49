"""The vision tower: sizes, patches, and pictures that go through it one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.models import siglip


def test_sizes_are_named_letter_and_patch():
    assert siglip.size("So400m/14") == siglip.Size(1152, 27, 4304, 16, 14)
    assert siglip.size("mu/28", depth=2).depth == 2
    assert siglip.size("B/16").patch == 16


@pytest.mark.parametrize("variant", ["So400m", "huge/14", "B/", "B/0", "B/x"])
def test_an_unknown_size_says_what_is_expected(variant):
    with pytest.raises(ValueError, match="expected SIZE/PATCH, such as 'So400m/14'"):
        siglip.size(variant)


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="width 30 is not divisible by num_heads 4"):
        siglip.Size(30, 1, 8, 4, 14)


def test_there_is_one_token_per_whole_patch_and_pictures_do_not_meet():
    tower = siglip.SigLIP(siglip.Size(8, 1, 16, 2, 4), 6, jnp.float32)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 13, 3)).astype(np.float32)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
    apply = jax.jit(lambda images: tower.apply({"params": params}, images))
    tokens = apply(images)
    assert tokens.shape == (3, 2 * 3, 6)
    changed = images.copy()
    changed[2] = -changed[2]
    np.testing.assert_allclose(apply(changed)[:2], tokens[:2], atol=1e-5)
    assert np.abs(apply(changed)[2] - tokens[2]).max() > 1e-2
    margin = images.copy()
    margin[:, :, 12:] = 0  # beyond the last whole patch
    np.testing.assert_array_equal(apply(margin), tokens)
