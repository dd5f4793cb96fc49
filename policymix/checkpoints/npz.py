"""Checkpoints in numpy's .npz, as big_vision publishes PaliGemma: read member by member, from front
to back, never as a whole.

The format is numpy's (numpy.lib.format) within a zip; nothing in it is unpickled.
"""

import dataclasses
import pathlib
import zipfile

import numpy as np

from policymix.checkpoints import leaves

_TOP = "params/"  # big_vision keeps parameters below it
_ROOT = "PaliGemma/"


@dataclasses.dataclass(frozen=True, eq=False)
class Member(leaves.Leaf):
    """An array of the archive."""

    shape: tuple[int, ...]
    dtype: np.dtype
    path: str
    file: pathlib.Path
    name: str

    @property
    def where(self) -> str:
        return str(self.file)

    @property
    def stretch(self) -> int:
        return max(self.size, 1)

    def reader(self) -> leaves.Reader:
        return _Reader(self)


class _Reader(leaves.Reader):
    def __init__(self, leaf: Member):
        self._leaf, self._archive = leaf, zipfile.ZipFile(leaf.file)
        self._rewind()

    def _rewind(self) -> None:
        self._stream = self._archive.open(self._leaf.name)
        _header(self._stream)
        self._at = 0

    def read(self, start: int, out: np.ndarray) -> None:
        leaf = self._leaf
        if start < self._at:
            self._rewind()
        try:
            self._stream.seek((start - self._at) * leaf.dtype.itemsize, 1)
            view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
            while done < len(view):
                count = self._stream.readinto(view[done:])
                if not count:
                    raise ValueError("it ends early")
                done += count
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{leaf.file}: {leaf.path!r} cannot be read ({error}); the file is damaged, fetch "
                "it again"
            ) from error
        self._at = start + len(out)

    def close(self) -> None:
        self._stream.close()
        self._archive.close()


def _header(stream) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype; the stream stands at the first element then."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"version {version} of numpy's format is not known")
    shape, by_columns, dtype = read[version](stream)
    if dtype.hasobject or (by_columns and len(shape) > 1):
        raise ValueError(f"it holds {dtype} {'by columns' if by_columns else ''}")
    return shape, dtype


def open_archive(file: pathlib.Path) -> dict[str, leaves.Leaf]:
    """The leaves of a PaliGemma, by the paths of our tree.

    Raises:
      ValueError: no .npz, or none of big_vision's; damaged.
    """
    found: dict[str, leaves.Leaf] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                key = name.removesuffix(".npy")
                if not key.startswith((_TOP + "img/", _TOP + "llm/")):
                    continue
                with archive.open(name) as stream:
                    shape, dtype = _header(stream)
                path = _ROOT + key.removeprefix(_TOP)
                found[path] = Member(shape, dtype, path, file, name)
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} cannot be read as .npz: {error}; fetch it again") from error
    if not found:
        raise ValueError(
            f"{file} holds no arrays named params/img/… and params/llm/…: it is not a PaliGemma as "
            "big_vision publishes it"
        )
    return found
