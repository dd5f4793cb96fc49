"""Resizing, bit for bit Pillow's and OpenPI's; augmentation, OpenPI's for the same key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.transforms import images
from tests.transforms import openpi_golden as golden

laws = settings(deadline=None, max_examples=40)
sides = st.integers(1, 40)
augment = jax.jit(images.augment, static_argnames="wrist")
CHANGED, PLAIN = "base_0_rgb", "left_wrist_0_rgb"


def scaled(image, size, axis):
    """Pillow's bilinear filter along one axis, from its description: a triangle that is as wide as
    the larger of the two pixels, its shares rounded to 22 bits, the sum rounded to 8.
    """
    source = image.shape[axis]
    if source == size:
        return image
    ratio = source / size
    width = max(ratio, 1.0)
    out = []
    for i in range(size):
        centre = (i + 0.5) * ratio
        first, last = max(int(centre - width + 0.5), 0), min(int(centre + width + 0.5), source)
        distance = np.abs((np.arange(first, last) - centre + 0.5) / width)
        shares = np.maximum(1 - distance, 0)
        fixed = (shares / sum(shares.tolist()) * 2**22 + 0.5).astype(np.int64)
        taken = np.take(image, range(first, last), axis=axis).astype(np.int64)
        total = np.tensordot(fixed, np.moveaxis(taken, axis, 0), axes=1)
        out.append(np.clip((total + 2**21) >> 22, 0, 255).astype(np.uint8))
    return np.stack(out, axis=axis)


@laws
@given(sides, sides, sides, sides)
def test_resizing_is_the_filter_and_a_black_border(hh, ww, height, width):
    """Pillow filters along rows first; from 13 on along the axis that leaves the least to do."""
    image = golden.picture(hh, ww)
    ratio = max(ww / width, hh / height)
    inner_height, inner_width = int(hh / ratio), int(ww / ratio)
    if not min(inner_height, inner_width):
        with pytest.raises(ValueError, match="leave nothing to see"):
            images.resize_with_pad(image, height, width)
        return
    found = images.resize_with_pad(image, height, width).copy()
    assert found.shape == (height, width, 3)
    top, left = int((height - inner_height) / 2), int((width - inner_width) / 2)
    inner = np.s_[top : top + inner_height, left : left + inner_width]
    rows_first = scaled(scaled(image, inner_width, 1), inner_height, 0)
    columns_first = scaled(scaled(image, inner_height, 0), inner_width, 1)
    assert any(np.array_equal(found[inner], e) for e in (rows_first, columns_first))
    found[inner] = 0
    assert not found.any()


@pytest.mark.parametrize("sizes", golden.SIZES)
def test_resizing_is_openpis(sizes):
    """Golden pictures by Pillow 11, one grey level apart where a newer one filters along the other
    axis first. `tests/transforms/openpi_golden.py` says how to renew them.
    """
    hh, ww, height, width = sizes
    image = golden.picture(hh, ww)
    batch = images.resize_with_pad(np.stack([[image, 255 - image]] * 2), height, width)
    assert batch.shape == (2, 2, height, width, 3)
    with np.load(golden.PATH) as expected:
        apart = batch[1, 0].astype(int) - expected[f"resized/{hh}x{ww}"]
    assert np.abs(apart).max() <= 1


@laws
@given(sides, sides, st.integers(0, 3))
def test_pictures_of_the_right_size_are_given_back(hh, ww, n):
    given_ = np.stack([golden.picture(hh, ww)] * n) if n else golden.picture(hh, ww)
    assert images.resize_with_pad(given_, hh, ww) is given_


def test_what_is_no_picture_is_refused():
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 5), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            images.resize_with_pad(wrong, 8, 8)
    with pytest.raises(ValueError, match="of 0 × 4 cannot be resized"):
        images.resize_with_pad(np.zeros((0, 4, 3), np.uint8), 8, 8)
    assert images.resize_with_pad(np.zeros((0, 4, 4, 3), np.uint8), 8, 8).shape == (0, 8, 8, 3)


def test_the_transform_resizes_every_camera():
    example = {"images": {"a": golden.picture(9, 5), "b": golden.picture(8, 8)}, "state": 1}
    made = images.Resize(8, 8).apply(example)
    assert made["state"] == 1
    assert {c: p.shape for c, p in made["images"].items()} == dict.fromkeys("ab", (8, 8, 3))
    assert images.Resize(8, 8).invert(made) == made
    assert images.Resize(8, 8).apply({"state": 1}) == {"state": 1}


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_augmentation_is_openpis_for_the_same_key(compiled, dtype):
    """Golden pictures by augmax: `tests/transforms/openpi_golden.py` says how to renew them."""
    given_ = golden.pictures()
    if dtype == np.float32:
        given_ = {c: p.astype(np.float32) / 255 * 2 - 1 for c, p in given_.items()}
    function = augment if compiled else images.augment
    found = function(jax.random.key(golden.KEY), given_)
    with np.load(golden.PATH) as expected:
        for camera in golden.CAMERAS:
            assert found[camera].dtype == jnp.float32
            theirs = expected[f"augmented/{camera}"]
            np.testing.assert_allclose(found[camera], theirs, atol=2e-5)


def test_augmentation_takes_typed_keys_and_bytes_or_floats():
    pictures = {CHANGED: np.zeros((1, 8, 8, 3), np.int32)}
    with pytest.raises(ValueError, match="pictures of int32; expected uint8, or floats"):
        images.augment(jax.random.key(0), pictures)
    with pytest.raises(ValueError, match=r"a key of jax.random.key, found an array of uint32"):
        images.augment(jax.random.PRNGKey(0), golden.pictures())


def test_the_golden_examples_show_every_case():
    given_ = golden.pictures()[PLAIN].astype(np.float32) / 255 * 2 - 1
    with np.load(golden.PATH) as expected:
        moved = np.abs(expected[f"augmented/{PLAIN}"] - given_).max(axis=(1, 2, 3))
    assert (moved > 0.05).any()
    assert (moved < 1e-5).any()


def test_cameras_share_keys_and_wrists_keep_their_geometry():
    ramp = np.broadcast_to(np.arange(40, 200, 4, dtype=np.uint8)[:, None, None], (40, 40, 3))
    batch = np.stack([ramp] * 16)
    found = augment(jax.random.key(0), {CHANGED: batch, "base_1_rgb": batch, PLAIN: batch})
    np.testing.assert_array_equal(found[CHANGED], found["base_1_rgb"])
    wrist = np.asarray(found[PLAIN])
    assert (np.ptp(wrist, axis=2) < 1e-6).all()  # rows stayed rows
    assert (np.ptp(np.asarray(found[CHANGED]), axis=2).max(axis=(1, 2)) > 0.01).all()
    other = augment(jax.random.key(0), {"hand": batch}, wrist="hand")
    np.testing.assert_array_equal(other["hand"], wrist)
    assert len({w.tobytes() for w in wrist}) > 4  # a key for each example


@laws
@given(st.integers(0, 2**32 - 1))
def test_augmented_pictures_stay_in_range(seed):
    picture = np.random.default_rng(seed).integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
    picture[0, :6] = 0  # no hue, no saturation
    picture[1, :6] = 255
    found = augment(jax.random.key(seed), {CHANGED: picture, PLAIN: picture})
    for made in found.values():
        assert np.isfinite(made).all()
        assert float(np.abs(made).max()) <= 1 + 1e-5


def test_places_between_pixels_are_interpolated_and_outside_is_black():
    picture = jnp.asarray(golden.picture(5, 6), jnp.float32)
    rows = jnp.array([[1.0, 1.5, -0.25, 4.75, -1.0, 9.0, 2.0]])
    columns = jnp.array([[2.0, 2.0, 3.0, 0.0, 1.0, 1.0, -7.5]])
    found = images._sample(picture, rows, columns)[0]
    half = (picture[1, 2] + picture[2, 2]) / 2
    expected = [picture[1, 2], half, 0.75 * picture[0, 3], 0.25 * picture[4, 0], *jnp.zeros((3, 3))]
    np.testing.assert_allclose(found, jnp.stack(expected), atol=1e-4)
