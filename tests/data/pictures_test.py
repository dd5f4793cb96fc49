import io

import numpy as np
import pytest
from PIL import Image

from policymix.data import pictures


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def _jpeg(image, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_png_is_lossless_and_always_the_same(image):
    data = pictures.png(image)
    assert data.startswith(b"\x89PNG")
    assert data == pictures.png(image.copy())
    np.testing.assert_array_equal(pictures.decode(data, (6, 8), "here"), image)
    for wrong in (image.astype(np.float32), image[..., :1], image[None]):
        with pytest.raises(ValueError, match="a picture is uint8"):
            pictures.png(wrong)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_decoded_as_pillow_does(subsampling, progressive):
    ramp = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    data = _jpeg(ramp, quality=80, subsampling=subsampling, progressive=progressive)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(opened)
    np.testing.assert_array_equal(pictures.decode(data, (40, 60), "here"), expected)


@pytest.mark.parametrize("make", [pictures.png, lambda image: _jpeg(image, quality=100)])
@pytest.mark.parametrize("part", [slice(0, 0), slice(0, 60), slice(0, -30), slice(9, None)])
def test_damaged_bytes_are_named(image, make, part):
    with pytest.raises(ValueError, match=r"^here: \d+ bytes that are no picture .* copy or record"):
        pictures.decode(make(image)[part], (6, 8), "here")


@pytest.mark.parametrize("make", [pictures.png, _jpeg])
def test_another_shape_than_declared_is_named(image, make):
    said = r"^here: .*expected RGB \[8, 6, 3\], found RGB \[6, 8\]"
    for check in (pictures.decode, pictures.check_header):
        check(make(image), (6, 8), "here")
        with pytest.raises(ValueError, match=said):
            check(make(image), (8, 6), "here")


def test_other_colours_are_named(image):
    buffer = io.BytesIO()
    Image.fromarray(image).convert("P").save(buffer, "PNG")
    for data, mode in ((_jpeg(image, "L"), "L"), (buffer.getvalue(), "P")):
        with pytest.raises(ValueError, match=rf"expected RGB \[6, 8, 3\], found {mode} \[6, 8\]"):
            pictures.decode(data, (6, 8), "here")


@pytest.mark.parametrize(
    ("shape", "names", "size"),
    [
        ([6, 8, 3], None, (6, 8)),
        ([3, 6, 8], None, (6, 8)),
        ([6, 8, 3], ["height", "width", "channel"], (6, 8)),
        ([3, 6, 8], ["channels", "height", "width"], (6, 8)),
        ([3, 8, 3], ["channels", "height", "width"], (8, 3)),
        ([3.0, 8.0, 3.0], ["height", "width", "channels"], (3, 8)),
    ],
)
def test_sizes_as_declared(shape, names, size):
    assert pictures.size({"shape": shape, "names": names}, "here") == size


@pytest.mark.parametrize("shape", [[6, 8, 1], [6, 8], [6, 0, 3], [1, 6, 8, 3]])
def test_shapes_that_are_no_colour_pictures(shape):
    with pytest.raises(ValueError, match=r"^here declares pictures of shape .* only colour"):
        pictures.size({"shape": shape, "names": None}, "here")
