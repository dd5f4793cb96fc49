"""An array on disk, of whatever format: its shape and dtype are known, its content is read when
asked for, whole or from front to back in blocks.
"""

import abc
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np


class Reader(abc.ABC):
    """Reads one leaf. Not shared between threads; any number may be open on a leaf."""

    @abc.abstractmethod
    def read(self, start: int, out: np.ndarray) -> None:
        """Fills `out`, [size] of the leaf's dtype, with the elements from `start` on, in C order.

        Reads that follow one another are fast; going back may begin again. ValueError names the
        file and the key if it is damaged.
        """

    def close(self) -> None:  # noqa: B027
        """Lets go of what is open."""


class Leaf(abc.ABC):
    """An array on disk.

    Attributes:
      shape, dtype: of the content.
      path: its name in the checkpoint; where: the file or directory, for errors.
      block: elements that are decoded together: reads should begin at its multiples and take that
        many. 1 where any range is as good as another.
      stretch: elements that one reader should read from front to back, from a multiple of it: the
        leaf is one compressed stream, or several.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    path: str
    where: str
    block: int = 1
    stretch: int = 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes when read."""
        return self.size * self.dtype.itemsize

    @abc.abstractmethod
    def reader(self) -> Reader:
        """A new reader; close it."""

    def precedes(self, other: "Leaf") -> bool:
        """Whether the content of another leaf, of the same dtype, comes right behind this one's, so
        that both can be read as one.
        """
        del other
        return False

    def until(self, size: int, last: str) -> "Leaf":
        """A leaf of `size` elements: this one's and those of its followers, down to path `last`.

        For leaves that precede others; no other kind is asked.
        """
        raise NotImplementedError(f"{type(self).__name__} precedes no other leaf")

    @contextlib.contextmanager
    def opened(self) -> Iterator[Reader]:
        """A reader that is closed at the end."""
        reader = self.reader()
        try:
            yield reader
        finally:
            reader.close()

    def read(self) -> np.ndarray:
        """The content, in the leaf's shape. ValueError where it is damaged or does not fit."""
        try:
            out = np.empty(self.size, self.dtype)
            out.reshape(self.shape)
        except (MemoryError, ValueError) as error:
            raise ValueError(
                f"{self.where}: {self.path!r} is said to be {self.dtype} {self.shape}, "
                f"{self.nbytes:,} bytes, which cannot be held: the file may be damaged"
            ) from error
        with self.opened() as reader:
            reader.read(0, out)
        return out.reshape(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Leaf):
    """The first rows of a leaf."""

    whole: Leaf
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.whole.shape[1:])

    dtype = property(lambda self: self.whole.dtype)
    path = property(lambda self: self.whole.path)
    where = property(lambda self: self.whole.where)

    def reader(self) -> Reader:
        return self.whole.reader()


class Slabs(Reader):
    """A reader for leaves that come in slabs: keeps the last slab until its end was read."""

    def __init__(self, leaf: Leaf):
        self._leaf, self._nothing = leaf, np.empty(0, leaf.dtype)
        self._start, self._slab = 0, self._nothing

    @abc.abstractmethod
    def slab(self, position: int) -> tuple[int, np.ndarray]:
        """The slab that holds an element: (its first element, its content [size])."""

    def read(self, start: int, out: np.ndarray) -> None:
        done = 0
        while done < len(out):
            position = start + done
            if not self._start <= position < self._start + len(self._slab):
                self._slab = self._nothing  # let go before the next is read
                self._start, self._slab = self.slab(position)
            inside = position - self._start
            count = min(len(out) - done, len(self._slab) - inside)
            out[done : done + count] = self._slab[inside : inside + count]
            done += count
            if inside + count == len(self._slab):
                self._slab = self._nothing


class Sink(abc.ABC):
    """Where the arrays of a checkpoint are written, in blocks, by any number of threads."""

    def block(self, path: str) -> int:
        """Elements: writes begin at its multiples and hold as many, or all that is left."""
        del path
        return 1

    def before(self, path: str, count: int) -> int:
        """Elements of an array before the first that lies on a multiple of so many in its file: a
        write of `count` that begins there fills whole pages.
        """
        del path, count
        return 0

    def precedes(self, path: str, other: str) -> bool:
        """Whether what is written beyond the end of one array becomes the start of another."""
        del path, other
        return False

    @abc.abstractmethod
    def write(self, path: str, start: int, values: np.ndarray) -> None:
        """Takes the elements [start, start + size) of an array, in C order."""

    def finish(self) -> None:  # noqa: B027
        """Called once all is written; only then may the checkpoint look like one."""

    def close(self) -> None:  # noqa: B027
        """Lets go of what is open, finished or not."""

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Memory(Sink):
    """Keeps the arrays: `arrays` by path."""

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        self.arrays = {path: np.empty(shape, dtype) for path, (shape, dtype) in shapes.items()}

    def write(self, path: str, start: int, values: np.ndarray) -> None:
        self.arrays[path].reshape(-1)[start : start + len(values)] = values
