"""Pictures that a dataset keeps in its data files: features of dtype image, PNG or JPEG."""

import concurrent.futures
import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from policymix import metrics
from policymix.data import lerobot

THREADS = min(8, os.cpu_count() or 1)  # decoders let go of Python's lock
_CHANNEL = ("channel", "channels")


def load(dataset: lerobot.Dataset, key: str) -> np.ndarray:
    """All pictures of a feature of dtype image: uint8 [num_frames, hh, ww, 3].

    Raises:
      ValueError: no such feature, a video, another shape than declared, or a damaged picture.
    """
    where = f"{dataset.path}: {key!r}"
    check_is_image(dataset, key)
    shape = size(dataset.features[key], where)
    images = np.empty((dataset.num_frames, *shape, 3), np.uint8)

    def fill(item: tuple[int, bytes]) -> None:
        frame, data = item
        images[frame] = decode(data, shape, f"{where}, frame {frame}")

    first = 0
    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        metrics.Progress(f"reading {key}", dataset.num_frames) as shown,
    ):
        for pictures in _by_file(dataset, key):  # one file at a time, so that few wait in memory
            for _ in pool.map(fill, enumerate(pictures, first)):
                shown.step()
            first += len(pictures)
    return images


def stored(dataset: lerobot.Dataset, key: str) -> Iterator[bytes]:
    """The pictures of all frames, in order, as they lie in the data files. Raises as `load`."""
    check_is_image(dataset, key)
    for pictures in _by_file(dataset, key):
        yield from pictures


def check_is_image(dataset: lerobot.Dataset, key: str) -> None:
    """ValueError unless the dataset has a feature `key` of dtype image, its frames in order."""
    if key not in dataset.features:
        dataset.column(key)  # explains which features there are
    dtype = dataset.features[key]["dtype"]
    if dtype == "video":
        raise ValueError(
            f"{dataset.path}: {key!r} is a video, and videos are not read yet; record or convert "
            "it with dtype image"
        )
    if dtype != "image":
        raise ValueError(
            f"{dataset.path}: {key!r} has dtype {dtype}, expected image; the dataset's cameras "
            f"are {dataset.camera_keys}"
        )
    dataset.column("index")  # a frame is found by its row: the order is checked there


def size(feature: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(hh, ww) of a feature of dtype image. ValueError unless it declares three channels."""
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
    try:
        with Image.open(io.BytesIO(data)) as image:
            if found := _differs(image, shape):
                raise ValueError(found)
            return np.asarray(image)
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
    return ValueError(
        f"{where}: {len(data)} bytes that are no picture as declared ({error}); copy or record "
        "the dataset again"
    )


def _by_file(dataset: lerobot.Dataset, key: str) -> Iterator[list[bytes]]:
    """The stored pictures of one data file after another."""
    first = 0
    for column in dataset.stored(key):
        if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
            raise ValueError(
                f"{dataset.path}: {key!r} is stored as {column.type}, expected pictures as "
                "struct<bytes: binary, path: string>"
            )
        pictures = pc.struct_field(column, "bytes").to_pylist()
        if None in pictures:
            raise ValueError(
                f"{dataset.path}: {key!r}, frame {first + pictures.index(None)}, has no bytes, "
                "only a path at best; write the dataset again with the pictures inside"
            )
        yield pictures
        first += len(pictures)


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
