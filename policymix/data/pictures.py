"""Pictures as bytes and as arrays: PNG and JPEG, and what a dataset declares of them."""

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

THREADS = min(8, os.cpu_count() or 1)  # decoders let go of Python's lock
_CHANNEL = ("channel", "channels")
_JPEG, _PNG, _PNG_ALONE = b"\xff\xd8", b"\x89PNG", ("PNG",)


def size(feature: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(hh, ww) of a feature of dtype image or video. ValueError unless it has three channels."""
    shape = [int(n) for n in feature["shape"]]
    if len(shape) == 3 and min(shape) > 0:
        channels_last = is_channels_last(feature)
        height, width, channels = shape if channels_last else (*shape[1:], shape[0])
        if channels == 3:
            return height, width
    raise ValueError(
        f"{where} declares pictures of shape {shape} with names {feature.get('names')}; only "
        "colour pictures are known here: [height, width, 3], or [3, height, width] with names "
        "that say so"
    )


def is_channels_last(feature: Mapping[str, Any]) -> bool:
    """Whether the shape is (H, W, C): its names say so; without names, the first 3 from the end."""
    names = feature.get("names")
    if isinstance(names, list | tuple) and len(names) == 3:
        return names[2] in _CHANNEL
    return feature["shape"][2] == 3


def decode(data: bytes, shape: tuple[int, int], where: str) -> np.ndarray:
    """PNG or JPEG → uint8 [hh, ww, 3] for shape (hh, ww). ValueError says `where` it was wrong."""
    if data[:2] == _JPEG:
        try:
            if simplejpeg.decode_jpeg_header(data)[:3] in ((*shape, "YCbCr"), (*shape, "RGB")):
                return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass  # explained below
    try:
        # Pillow tries formats in turn, and makes arrays of pictures slowly: bytes are faster.
        with Image.open(
            io.BytesIO(data), formats=_PNG_ALONE if data[:4] == _PNG else None
        ) as image:
            if found := _differs(image, shape):
                raise ValueError(found)
            return np.frombuffer(image.tobytes(), np.uint8).reshape(*shape, 3)
    except Exception as error:  # damaged data makes decoders fail in many ways
        raise _unreadable(data, where, error) from error


def check_header(data: bytes, shape: tuple[int, int], where: str) -> None:
    """ValueError as `decode`, from the first bytes alone: the rest may still be damaged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if found := _differs(image, shape):
                raise ValueError(found)
    except Exception as error:
        raise _unreadable(data, where, error) from error


def png(image: np.ndarray) -> bytes:
    """uint8 [hh, ww, 3] → PNG, the same bytes for the same picture."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"a picture is uint8 [height, width, 3], got {image.dtype} {list(image.shape)}"
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _differs(image: Image.Image, shape: tuple[int, int]) -> str:
    """In words, what is wrong with a picture that should be RGB of shape (hh, ww); "" if nothing"""
    if image.mode == "RGB" and image.size == shape[::-1]:
        return ""
    width, height = image.size
    return f"expected RGB [{shape[0]}, {shape[1]}, 3], found {image.mode} {[height, width]}"


def _unreadable(data: bytes, where: str, error: Exception) -> ValueError:
    why = str(error).partition(" <")[0]  # Pillow says where the bytes lie in memory
    return ValueError(
        f"{where}: {len(data)} bytes that are no picture as declared ({why}); copy or record "
        "the dataset again"
    )


def read_file(path: os.PathLike, resolution: tuple[int, int]) -> np.ndarray:
    """A picture file in the model's resolution: uint8 [hh, ww, 3], stretched bicubically to it, as
    PaliGemma's own processor does.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is damaged or no picture.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the picture {path} does not exist")
    try:
        with Image.open(path) as image:
            height, width = resolution
            scaled = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            return np.asarray(scaled)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
