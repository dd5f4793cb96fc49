"""Pictures: to the model's size, and OpenPI's augmentation of them in training.

b batch, hh ww height and width. Pictures are RGB, channels last: uint8 in 0..255 or float32 in
[-1, 1].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from policymix.structs import Array
from policymix.transforms import compose

# What OpenPI asks of augmax, and what augmax adds unasked: hue, and a chance of no colour at all.
CROP = 0.95  # of each side
DEGREES = 5.0  # rotation to either side
BRIGHTNESS = 0.3
CONTRAST = 0.4
HUE = 0.1  # augmax's default, of a turn
COLOUR_CHANCE = 0.5  # augmax's default
_NUM_COLOUR_KEYS = 5


def resize_with_pad(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Uint8 [..., hh, ww, 3] → uint8 [..., height, width, 3], the aspect kept, black around.

    A side becomes int(side / max(ww / width, hh / height)), by Pillow's bilinear filter, which
    averages over the area where it shrinks; int(half) of the border is on top and at the left.
    Pictures of the right size are given back as they are. Source: openpi_client/image_tools.py;
    every bit agrees under the same Pillow. (13, unlike 11, does not always filter along rows first,
    and then rounds up to one grey level apart.)
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(
            f"pictures to resize are {images.dtype} {images.shape}; expected uint8 [..., height, "
            "width, 3]"
        )
    *lead, hh, ww, _ = images.shape
    if (hh, ww) == (height, width):
        return images
    if not min(hh, ww, height, width) > 0:
        raise ValueError(f"pictures of {hh} × {ww} cannot be resized to {height} × {width}")
    ratio = max(ww / width, hh / height)
    inner_height, inner_width = int(hh / ratio), int(ww / ratio)
    if not min(inner_height, inner_width):
        raise ValueError(f"pictures of {hh} × {ww} leave nothing to see at {height} × {width}")
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    resized = np.zeros((*lead, height, width, 3), np.uint8)
    inner = resized.reshape(-1, height, width, 3)[
        :, top : top + inner_height, left : left + inner_width
    ]
    for target, image in zip(inner, images.reshape(-1, hh, ww, 3), strict=True):
        scaled = Image.fromarray(image).resize(
            (inner_width, inner_height), Image.Resampling.BILINEAR
        )
        target[:] = np.asarray(scaled)
    return resized


@dataclasses.dataclass(frozen=True)
class Resize(compose.Transform):
    """`resize_with_pad` of every camera's pictures. What it takes away the inverse cannot give
    back, and leaves the pictures as they are.
    """

    height: int
    width: int

    def apply(self, example: compose.Example) -> dict[str, Any]:
        images = {
            camera: resize_with_pad(pictures, self.height, self.width)
            for camera, pictures in example.get("images", {}).items()
        }
        return {**example, "images": images} if images else dict(example)

    def invert(self, example: compose.Example) -> dict[str, Any]:
        return dict(example)


def augment(
    key: jax.Array, images: Mapping[str, Array], *, wrist: str = "wrist"
) -> dict[str, jax.Array]:
    """OpenPI's augmentation, pictures and keys alike those of its `preprocess_observation`.

    Each example has one key for all its cameras. Cameras whose name does not contain `wrist` lose
    a random 5 % of each side, are scaled back, and rotated by up to 5 degrees, black where nothing
    was seen; half of all pictures change in brightness, contrast and hue. (OpenPI asks for
    saturation too; augmax 0.4.1, which it calls, computes that and drops it.)

    Args:
      key: typed; a step's.
      images: {camera: [b, hh, ww, 3]}, uint8 or float in [-1, 1].

    Returns:
      {camera: float32 [b, hh, ww, 3]} in [-1, 1].

    Raises:
      ValueError: pictures of another dtype, or a key that is not typed.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"expected a key of jax.random.key, found an array of {key.dtype}")
    return {
        camera: _augmented(jax.random.clone(key), pictures, moved=wrist not in camera)
        for camera, pictures in images.items()
    }


def _augmented(key: jax.Array, pictures: Array, moved: bool) -> jax.Array:
    pictures = jnp.asarray(pictures)
    if pictures.dtype != jnp.uint8 and not jnp.issubdtype(pictures.dtype, jnp.floating):
        raise ValueError(f"pictures of {pictures.dtype}; expected uint8, or floats in [-1, 1]")
    if pictures.dtype == jnp.uint8:
        pictures = pictures.astype(jnp.float32) / 255.0 * 2.0 - 1.0

    def one(key, picture):
        # augmax splits a key for its two chains, each once more for what is in the chain.
        keys = jax.random.split(key, 2 if moved else 1)
        if moved:
            picture = _sample(picture, *_coordinates(keys[0], *picture.shape[:2]))
        return _recoloured(jax.random.split(keys[-1], 1)[0], picture)

    unit = pictures.astype(jnp.float32) / 2.0 + 0.5
    return jax.vmap(one)(jax.random.split(key, len(unit)), unit) * 2.0 - 1.0


def _coordinates(key: jax.Array, hh: int, ww: int) -> tuple[jax.Array, jax.Array]:
    """Where each pixel is taken from: rows and columns, float32 [hh, ww] each."""
    crop_key, _, turn_key = jax.random.split(key, 3)
    crop_hh, crop_ww = int(hh * CROP), int(ww * CROP)
    limit = jnp.array([(hh - crop_hh) / 2, (ww - crop_ww) / 2])
    centre = jax.random.uniform(crop_key, [2], minval=-limit, maxval=limit)
    most = np.deg2rad(DEGREES)
    angle = jax.random.uniform(turn_key, minval=-most, maxval=most)
    y = (jnp.arange(hh) - (hh / 2 - 0.5))[:, None]
    x = (jnp.arange(ww) - (ww / 2 - 0.5))[None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    scale_y, scale_x = crop_hh / hh, crop_ww / ww
    rows = scale_y * cos * y + scale_y * sin * x + centre[0] + (hh / 2 - 0.5)
    columns = scale_x * cos * x - scale_x * sin * y + centre[1] + (ww / 2 - 0.5)
    return rows, columns


def _sample(picture: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Bilinear interpolation of [hh, ww, 3] at [hh', ww'] places; black outside.

    Each place looks up its four neighbours at once, and with them where they lie. Compiled code may
    compute a coordinate anew for every use, and round it to two sides of a pixel: a neighbour of
    one and the share of another would be a wrong colour.
    """
    hh, ww = picture.shape[:2]
    framed = jnp.pad(picture, ((1, 1), (1, 1), (0, 0)))
    corners = [framed[:-1, :-1], framed[:-1, 1:], framed[1:, :-1], framed[1:, 1:]]
    place = jnp.mgrid[-1:hh, -1:ww].astype(jnp.float32)  # of the upper left one
    table = jnp.concatenate([*corners, place.transpose(1, 2, 0)], axis=-1).reshape(-1, 14)
    top = jnp.clip(jnp.floor(rows), -1, hh - 1).astype(jnp.int32) + 1
    left = jnp.clip(jnp.floor(columns), -1, ww - 1).astype(jnp.int32) + 1
    found = jnp.take(table, top * (ww + 1) + left, axis=0, mode="clip")
    down, right = rows - found[..., 12], columns - found[..., 13]
    shares = [
        jnp.maximum(1 - jnp.abs(down - dy), 0) * jnp.maximum(1 - jnp.abs(right - dx), 0)
        for dy in (0, 1)
        for dx in (0, 1)
    ]
    return sum(found[..., 3 * i : 3 * i + 3] * share[..., None] for i, share in enumerate(shares))


def _recoloured(key: jax.Array, picture: jax.Array) -> jax.Array:
    """[hh, ww, 3] in [0, 1] → the same: value, contrast and hue of HSV changed, or nothing."""
    keys = jax.random.split(jax.random.clone(key), _NUM_COLOUR_KEYS)
    drawn = [
        jax.random.uniform(k, minval=-most, maxval=most)
        for k, most in zip(keys[:3], (BRIGHTNESS, CONTRAST, HUE), strict=True)
    ]
    brightness, contrast, turn = drawn
    hue, saturation, value = _hsv(picture)
    value = _brightened(value, brightness)
    value = _contrasted(value, contrast)
    changes = jax.random.bernoulli(key, COLOUR_CHANCE)  # with a key already split, as augmax does
    return jnp.where(changes, _rgb(hue + turn, saturation, value), picture)


def _hsv(picture: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hue in turns, saturation and value, [hh, ww] each."""
    red, green, blue = (picture[..., i] for i in range(3))
    value = jnp.maximum(jnp.maximum(red, green), blue)
    spread = value - jnp.minimum(jnp.minimum(red, green), blue)
    # The colour that is largest, the first of equals, says which sixth of the turn it is near.
    offset = jnp.where(
        (red >= green) & (red >= blue),
        green - blue,
        jnp.where(green >= blue, blue - red, red - green),
    )
    sixth = jnp.where((red >= green) & (red >= blue), 0.0, jnp.where(green >= blue, 2.0, 4.0))
    hue = jnp.where(spread == 0, 0.0, (sixth + offset / jnp.where(spread == 0, 1.0, spread)) / 6)
    return hue, spread / jnp.where(value == 0, 1.0, value), value


def _rgb(hue: jax.Array, saturation: jax.Array, value: jax.Array) -> jax.Array:
    """[hh, ww, 3] of hue in turns, saturation and value, [hh, ww] each."""
    channels = []
    for n in (5.0, 3.0, 1.0):
        k = jnp.mod(n + hue * 6, 6)
        channels.append(value - value * saturation * jnp.clip(jnp.minimum(k, 4 - k), 0, 1))
    return jnp.stack(channels, axis=-1)


def _brightened(value: jax.Array, amount: jax.Array) -> jax.Array:
    """Towards 0 or 1 by |amount|."""
    return jnp.where(amount < 0, value * (1 + amount), value * (1 - amount) + amount)


def _contrasted(value: jax.Array, amount: jax.Array) -> jax.Array:
    """[0, 1] → [0, 1], of slope s = tan((amount + 1) π / 4) in the middle and 1 / s at the ends."""
    slope = jnp.tan((amount + 1) * (jnp.pi / 4))
    bend = slope / (2 * (1 + slope))  # augmax writes (s - s²) / (2 (1 - s²)), undefined at s = 1
    ends = jnp.where(value < bend, value / slope, value / slope + 1 - 1 / slope)
    middle = slope * (value - 0.5) + 0.5
    return jnp.where((value < bend) | (value > 1 - bend), ends, middle)
