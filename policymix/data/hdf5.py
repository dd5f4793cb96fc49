"""Arrays of demonstrations in HDF5 files, checked before they are handed out.

Nothing outside the file is followed: HDF5 knows links to other files, and arrays whose bytes lie in
any file that they name.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Iterator

import h5py
import numpy as np
from PIL import Image

from policymix import files
from policymix.data import pictures

_BLOCK = 32  # pictures that are in memory as they are stored
_UNREADABLE = "it cannot be read; the file may be damaged, or it is a link that leads nowhere"
_COLOURS = ("height", "width", "channel")


@dataclasses.dataclass(frozen=True)
class Field:
    """A feature of a dataset, and where a demo has it.

    Attributes:
      keys: arrays [T, …] of the demo, joined along their last axis.
      kind: numbers, flags (0 and 1), pixels (uint8 [T, hh, ww, 3]) or coded (T JPEG or PNG files).
      dtype, shape: of the feature in one frame. names: of its dimensions.
      order: of pictures, the steps along height, width and channels; -1 turns an axis round.
    """

    keys: tuple[str, ...]
    kind: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None = None
    order: tuple[int, int, int] = (1, 1, 1)

    def __str__(self) -> str:
        told = f"{self.dtype} {list(self.shape)} from {' + '.join(self.keys)}"
        if self.kind == "coded":
            told += ", JPEG"
        if self.order[:2] != (1, 1):
            told += ", turned by 180 degrees" if self.order[0] < 0 else ", mirrored"
        return told + ", channels swapped" * (self.order[2] < 0)

    @property
    def is_picture(self) -> bool:
        return self.kind in ("pixels", "coded")

    @property
    def is_turned(self) -> bool:
        return self.order != (1, 1, 1)

    @property
    def frame_bytes(self) -> int:
        """Of one frame in memory."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[h5py.File]:
    """An HDF5 file. What the library raises inside the block becomes a ValueError of the file."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (OSError, RuntimeError, KeyError) as error:
        why = files.reason(error).strip("'\"")
        if "signature not found" in why:
            raise ValueError(f"{path} is no HDF5 file ({why}); name another") from error
        raise ValueError(
            f"{path} cannot be read as HDF5: {why}; it may be truncated or damaged, copy or "
            "download it again"
        ) from error


def natural(name: str) -> list:
    """For an order in which demo_2 comes before demo_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def inside(group: h5py.Group) -> list[str]:
    """What there is in a group, in natural order."""
    return sorted(group, key=natural)


def attribute(group: h5py.Group, name: str) -> str:
    """A text that stands beside a group; "" where there is none."""
    value = group.attrs.get(name, "")
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return value if isinstance(value, str) else ""


def described(group: h5py.Group, name: str) -> dict:
    """A JSON object that stands beside a group; empty where there is none that can be read."""
    try:
        value = json.loads(attribute(group, name) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class Group:
    """The arrays of one demo.

    Args:
      name: of a group of the file; "/": the file itself.
      where: how errors call the demo.
    """

    def __init__(self, file: h5py.File, name: str, where: str):
        self.where, self._file = where, file.filename
        found = file.get(name)
        if found is None:
            raise ValueError(f"{where}: {_UNREADABLE}")
        if not isinstance(found, h5py.Group):
            raise ValueError(f"{where}: expected a group {name!r}, found {found!r}")
        self.group = found

    def has(self, key: str) -> bool:
        """Whether there is something of that name, also if it cannot be read."""
        return key in self.group

    def inside(self) -> list[str]:
        """What a message shows of it."""
        return inside(self.group)[:20]

    def arrays(self, key: str = "") -> list[str]:
        """Names of the arrays in the group `key`, and of what cannot be read, in natural order;
        none without the group.
        """
        group = self._get(key) if key else self.group
        names = inside(group) if isinstance(group, h5py.Group) else []
        return [name for name in names if not isinstance(group.get(name), h5py.Group)]

    def _get(self, key: str):
        """None where nothing is. ValueError for what is there and cannot be read."""
        found = self.group.get(key)
        for path in (key.rpartition("/")[0], key) if found is None else ():
            if path and self.has(path) and self.group.get(path) is None:
                raise ValueError(f"{self.where}: {path!r}: {_UNREADABLE}")
        return found

    def array(self, key: str) -> h5py.Dataset:
        """ValueError unless it is there, as [T, …], and lies in the file itself."""
        found = self._get(key)
        if not isinstance(found, h5py.Dataset):
            parent = key.rpartition("/")[0]
            near = self.group.get(parent) if parent else None
            there = f"in {parent} there are" if isinstance(near, h5py.Group) else "it holds"
            near = near if isinstance(near, h5py.Group) else self.group
            raise ValueError(f"{self.where}: no array {key!r}; {there} {inside(near)[:30]}")
        if found.file.filename != self._file or found.external or found.is_virtual:
            raise ValueError(
                f"{self.where}: {key!r} lies outside the file, and such links are not followed; "
                "copy everything into one file (h5repack)"
            )
        if found.ndim == 0:
            raise ValueError(f"{self.where}: {key!r} is a single value, expected one a frame")
        return found

    def length(self, fields: dict[str, Field]) -> int:
        """T. ValueError unless it is the same for all, and not 0."""
        lengths = {
            key: int(self.array(key).shape[0]) for field in fields.values() for key in field.keys
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"{self.where}: expected as many frames of every array, found {lengths}"
            )
        length = next(iter(lengths.values()))
        if not length:
            raise ValueError(f"{self.where}: no frames; an episode has one or more")
        return length

    def numbers(self, *keys: str, size: int = 0, names=()) -> Field:
        """Arrays [T, n], joined along n. `size`: how many numbers a frame must have, if that is
        known. Reals become float32; whole numbers and bools stay what they are.
        """
        width, dtypes = 0, set()
        for key in keys:
            array = self.array(key)
            if array.dtype.kind not in "fiub" or array.ndim > 2:
                raise ValueError(
                    f"{self.where}: {key!r} is {array.dtype} {list(array.shape)}, expected numbers "
                    "[frames, n]"
                )
            width += array.shape[1] if array.ndim == 2 else 1
            dtypes.add("float32" if array.dtype.kind == "f" else array.dtype.name)
        if not width or size not in (0, width):
            raise ValueError(
                f"{self.where}: {' + '.join(keys)} have {width} numbers a frame, expected "
                f"{size or '1 or more'}"
            )
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        dtype = "int64" if dtype == "uint64" else dtype  # the largest there is in a dataset
        return Field(
            keys, "numbers", dtype, (width,), tuple(names) if len(names) == width else None
        )

    def real(self, *keys: str, **known) -> Field:
        """As `numbers`, float32 whatever is stored."""
        return dataclasses.replace(self.numbers(*keys, **known), dtype="float32")

    def flags(self, key: str) -> Field:
        """One number a frame, 0 or 1, as a bool."""
        return dataclasses.replace(self.numbers(key, size=1), kind="flags", dtype="bool")

    def picture(
        self, key: str, order: tuple[int, int, int], *, coded: bool = False
    ) -> Field | None:
        """None where an array holds no colour pictures, nor, if they may be, `coded` ones."""
        array = self.array(key)
        if array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3:
            shape = array.shape[1:]
            return Field((key,), "pixels", "uint8", tuple(map(int, shape)), _COLOURS, order)
        rows = array.dtype == np.uint8 and array.ndim == 2
        lines = array.ndim == 1 and h5py.check_vlen_dtype(array.dtype) == np.uint8
        if not (coded and (rows or lines)):
            return None
        where = f"{self.where}: {key!r}"
        shape = _coded_shape(_cut(array[0]), f"{where}, frame 0") if len(array) else (0, 0)
        return Field((key,), "coded", "uint8", (*shape, 3), _COLOURS, order)

    def values(self, field: Field, *, as_files: bool) -> np.ndarray | list[bytes]:
        """A feature of all frames: [T, *shape]; with `as_files`, pictures are T PNG or JPEG files.

        Coded pictures that are not turned stay the files that they are in any case.

        Raises:
          ValueError: a number that is not finite or no flag, a picture that cannot be decoded.
        """
        if field.is_picture:
            images = self._images(field, as_files)
            if as_files or (field.kind == "coded" and not field.is_turned):
                return list(images)
            found = np.empty((len(self.array(field.keys[0])), *field.shape), np.uint8)
            for frame, image in enumerate(images):
                found[frame] = image
            return found
        parts = [self.array(key)[()] for key in field.keys]
        for key, part in zip(field.keys, parts, strict=True):
            self._check_numbers(key, part, field)
        joined = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=-1)
        return joined.astype(field.dtype)

    def _check_numbers(self, key: str, part: np.ndarray, field: Field) -> None:
        if field.kind == "flags":
            wrong, what = (part != 0) & (part != 1), "is no flag, expected 0 or 1"
        elif part.dtype.kind == "u" and field.dtype == "int64":
            wrong, what = part > np.iinfo(np.int64).max, "does not fit into int64"
        else:
            with np.errstate(over="ignore"):
                wrong, what = ~np.isfinite(part.astype(field.dtype)), "is not a finite float32"
        if wrong.any():
            place = tuple(int(n) for n in np.argwhere(wrong)[0])
            at = f" at {list(place[1:])}" if place[1:] else ""
            raise ValueError(
                f"{self.where}: {key!r}, frame {place[0]}: {part[place]}{at} {what}; repair or "
                "leave out the demonstration"
            )

    def _images(self, field: Field, as_files: bool) -> Iterator[np.ndarray | bytes]:
        """The pictures of all frames in order, a block in memory at a time."""
        key = field.keys[0]
        array = self.array(key)
        high, wide, deep = field.order
        block = max(_BLOCK, array.chunks[0] if array.chunks else 0)  # none is unpacked twice
        for first in range(0, len(array), block):
            for frame, stored in enumerate(array[first : first + block], first):
                if field.kind == "coded":
                    data, where = _cut(stored), f"{self.where}: {key!r}, frame {frame}"
                    stored = pictures.decode(data, field.shape[:2], where)  # whole, or told
                    if not field.is_turned:
                        yield data
                        continue
                image = np.ascontiguousarray(stored[::high, ::wide, ::deep])
                yield pictures.png(image) if as_files else image


def _cut(row: np.ndarray) -> bytes:
    """A JPEG or PNG file without the zeros that fill its row up; neither ends with one itself."""
    return row.tobytes().rstrip(b"\0")


def _coded_shape(data: bytes, where: str) -> tuple[int, int]:
    """(hh, ww)"""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size[::-1]
    except Exception as error:  # damaged data makes decoders fail in many ways
        raise ValueError(
            f"{where}: {len(data)} bytes that are no picture ({files.reason(error)})"
        ) from error
