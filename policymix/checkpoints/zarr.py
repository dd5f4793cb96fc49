"""Arrays as Orbax stores them: zarr chunks in an OCDBT database, or as plain files.

A slab is what the chunks of one step along the first split axis cover: a range in C order that is
decoded together. Where it is one large zstd chunk, as OpenPI's checkpoints have it (the largest
leaf of π0.5 is one of 4.8 GB), or several side by side along one further axis, as runs with FSDP
leave them, it is decoded as a stream and never held.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import tensorstore

from policymix import files
from policymix.checkpoints import leaves

_HELD = 2**24  # bytes: slabs up to this size are decoded whole
_PIECE = 2**20  # elements decoded from a stream at a time
# Bytes that a chunk may have beyond those of its array: tensorstore allocates a chunk whole, and
# where there is no such memory it ends the process.
_PADDED = 2**26
_DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "bfloat16", "float16", "float32", "float64",
)  # fmt: skip
# What tensorstore and pyarrow raise at damaged content.
_REFUSED = (ValueError, TypeError, IndexError, OverflowError, NotImplementedError, OSError)


class Span(NamedTuple):
    """Where the bytes of a chunk lie."""

    file: pathlib.Path
    offset: int
    length: int


class _Grid(NamedTuple):
    """Chunks side by side: the axes along which there are several, and a span for each index."""

    split: Sequence[int]
    spans: Mapping[tuple[int, ...], Span]


@dataclasses.dataclass(frozen=True, eq=False)
class ZarrLeaf(leaves.Leaf):
    """An array of an Orbax item."""

    shape: tuple[int, ...]
    dtype: np.dtype
    path: str
    item: pathlib.Path
    _array: tensorstore.TensorStore
    _database: "Database"

    @property
    def where(self) -> str:
        return str(self.item)

    @functools.cached_property
    def _chunk(self) -> tuple[int, ...]:
        return tuple(self._array.chunk_layout.read_chunk.shape) or ()

    @functools.cached_property
    def _axis(self) -> int:
        """The first axis along which a chunk extends."""
        wide = [i for i, size in enumerate(self._chunk) if size > 1]
        return wide[0] if wide else max(len(self.shape) - 1, 0)

    @functools.cached_property
    def slab_size(self) -> int:
        """Elements of a slab."""
        if not self.shape:
            return 1
        a = self._axis
        return min(self._chunk[a], self.shape[a]) * math.prod(self.shape[a + 1 :])

    @property
    def block(self) -> int:
        return 1 if self._grid else self.slab_size

    @property
    def stretch(self) -> int:
        return self.slab_size

    @functools.cached_property
    def _grid(self) -> "_Grid | None":
        """The streams of a leaf that is one large slab of zstd chunks; None where it is read in
        slabs.
        """
        large = self.slab_size * self.dtype.itemsize > _HELD and self.slab_size == self.size
        if not self.shape or not large:
            return None
        described = self._array.spec().to_json()
        metadata = described.get("metadata", {})
        plain = metadata.get("order") == "C" and not metadata.get("filters")
        if described["driver"] != "zarr" or not plain:
            return None
        if (metadata.get("compressor") or {}).get("id") != "zstd":
            return None
        counts = [-(-s // c) for s, c in zip(self.shape, self._chunk, strict=True)]
        split = [i for i, count in enumerate(counts) if count > 1] or [self._axis]
        whole = [s == c * n for s, c, n in zip(self.shape, self._chunk, counts, strict=True)]
        if not all(w for i, w in enumerate(whole) if i != split[-1]):
            return None  # padded along more than the last of them
        name, separator = self._database.name(self.path), metadata.get("dimension_separator", ".")
        try:
            spans = {
                tuple(index[i] for i in split): self._database.span(
                    f"{name}/{separator.join(map(str, index))}"
                )
                for index in np.ndindex(*counts)
            }
        except _REFUSED as error:
            raise self.damaged(error) from error
        return None if None in spans.values() else _Grid(split, spans)

    def reader(self) -> leaves.Reader:
        return _Streams(self, self._grid) if self._grid else _Slabs(self)

    def damaged(self, error: Exception | str) -> ValueError:
        """What to say when the content cannot be read."""
        return damaged(self.item, self.path, error)


def damaged(item: pathlib.Path, path: str, error: Exception | str) -> ValueError:
    """What to say when a key of an item cannot be read."""
    reason = files.reason(error)
    return ValueError(f"{item}: cannot read {path!r}; a file is missing or damaged ({reason})")


class _Slabs(leaves.Slabs):
    def slab(self, position: int) -> tuple[int, np.ndarray]:
        leaf = self._leaf
        try:
            if not leaf.shape:
                return 0, leaf._array.read().result().reshape(1)
            a = leaf._axis
            inner, step = math.prod(leaf.shape[a + 1 :]), leaf._chunk[a]
            outer, inside = divmod(position, inner * leaf.shape[a])
            first = inside // inner // step * step
            index = np.unravel_index(outer, leaf.shape[:a]) if a else ()
            where = (*map(int, index), slice(first, min(first + step, leaf.shape[a])))
            content = leaf._array[where].read().result()
        except _REFUSED as error:
            raise leaf.damaged(error) from error
        return (outer * leaf.shape[a] + first) * inner, content.reshape(-1)


class _Streams(leaves.Reader):
    """Decodes zstd chunks that lie side by side, all at once, from front to back.

    A row is what lies along the last split axis and beyond it; it passes through one stream after
    another. Rows that follow each other stay in the same streams for a run.
    """

    def __init__(self, leaf: ZarrLeaf, grid: _Grid):
        self._leaf, self._grid = leaf, grid
        axis = grid.split[-1]
        inner, chunk = math.prod(leaf.shape[axis + 1 :]), leaf._chunk[axis]
        count = -(-leaf.shape[axis] // chunk)
        # Elements of a row in each of its streams; the last one is padded.
        self._stored = chunk * inner
        self._valid = [min(chunk, leaf.shape[axis] - j * chunk) * inner for j in range(count)]
        self._width = sum(self._valid)
        self._outer = leaf.shape[:axis]
        self._run = math.prod(self._outer)
        if len(grid.split) > 1:
            before = grid.split[-2]
            self._run = leaf._chunk[before] * math.prod(leaf.shape[before + 1 : axis])
        self._position, self._streams = leaf.size, {}
        self._rest = np.empty(0, leaf.dtype)

    def read(self, start: int, out: np.ndarray) -> None:
        if start < self._position:
            self._begin()
        while self._position < start:  # what is skipped is decoded all the same
            self._fill(np.empty(min(_PIECE, start - self._position), self._leaf.dtype))
        self._fill(out)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams = {}

    def _begin(self) -> None:
        self.close()
        self._position, self._rest = 0, self._rest[:0]
        try:
            for index, span in self._grid.spans.items():
                # The span alone: what follows it in the file belongs to another chunk.
                raw = pyarrow.OSFile(str(span.file)).get_stream(span.offset, span.length)
                self._streams[index] = pyarrow.CompressedInputStream(raw, "zstd")
        except _REFUSED as error:
            raise self._leaf.damaged(error) from error

    def _of_row(self, row: int) -> list[pyarrow.CompressedInputStream]:
        """The streams that a row passes through."""
        leaf, index = self._leaf, np.unravel_index(row, self._outer) if self._outer else ()
        first = tuple(int(index[i]) // leaf._chunk[i] for i in self._grid.split[:-1])
        return [self._streams[(*first, j)] for j in range(len(self._valid))]

    def _fill(self, out: np.ndarray) -> None:
        done = 0
        while done < len(out):
            if self._width >= _PIECE:
                count = self._part_of_row(out[done:])
            else:
                count = self._part_of_rest(out[done:])
            done += count
            self._position += count
        if self._position == self._leaf.size:
            self._check_ends()

    def _check_ends(self) -> None:
        """A chunk that holds more than it should is of another shape or dtype, or damaged."""
        for stream in self._streams.values():
            try:
                more = stream.read(1)
            except _REFUSED as error:
                raise self._leaf.damaged(error) from error
            if more:
                raise self._leaf.damaged("its compressed content is longer than its shape")

    def _part_of_row(self, out: np.ndarray) -> int:
        """Decodes straight to its place what is left of a row in one stream; returns how much."""
        row, inside = divmod(self._position, self._width)
        number = min(inside // self._stored, len(self._valid) - 1)
        left = number * self._stored + self._valid[number] - inside
        stream, count = self._of_row(row)[number], min(left, len(out))
        self._decode(stream, out[:count])
        if count == left and self._valid[number] < self._stored:
            padding = np.empty(self._stored - self._valid[number], self._leaf.dtype)
            self._decode(stream, padding)
        return count

    def _part_of_rest(self, out: np.ndarray) -> int:
        """Joins some rows of several streams; what `out` has no room for waits in `_rest`."""
        if not len(self._rest):
            row = self._position // self._width
            rows = max(1, min(_PIECE // self._width, self._run - row % self._run))
            joined = np.empty((rows, self._width), self._leaf.dtype)
            column, piece = 0, np.empty(rows * self._stored, self._leaf.dtype)
            for stream, valid in zip(self._of_row(row), self._valid, strict=True):
                self._decode(stream, piece)
                joined[:, column : column + valid] = piece.reshape(rows, -1)[:, :valid]
                column += valid
            self._rest = joined.reshape(-1)
        count = min(len(out), len(self._rest))
        out[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _decode(self, stream: pyarrow.CompressedInputStream, out: np.ndarray) -> None:
        target, done = memoryview(out.view(np.uint8)), 0
        try:
            while done < len(target):
                count = stream.readinto(target[done:])
                if not count:
                    raise self._leaf.damaged("its compressed content ends early")
                done += count
        except OSError as error:
            raise self._leaf.damaged(error) from error


class Database:
    """The chunks of an item: in OCDBT, or as files."""

    def __init__(self, item: pathlib.Path):
        self.item = item
        self.ocdbt = (item / "manifest.ocdbt").exists()
        self._context = tensorstore.Context()
        self._names: dict[str, str] = {}

    def name(self, path: str) -> str:
        """The key under which an array is stored."""
        return self._names[path]

    def begin(self, stored: str, path: str, *, zarr3: bool, sparse: bool) -> tensorstore.Future:
        """Begins to open an array by its name in the item, which will be known as `path`."""
        self._names[path] = stored.replace("/", ".")
        kvstore = directory(self.item)
        if self.ocdbt:
            kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{self._names[path]}/"}
        else:
            kvstore["path"] += f"{self._names[path]}/"
        spec = {
            "driver": "zarr3" if zarr3 else "zarr",
            "kvstore": kvstore,
            "fill_missing_data_reads": sparse,
        }
        try:
            return tensorstore.open(spec, read=True, open=True, context=self._context)
        except _REFUSED as error:  # a name that tensorstore cannot take
            raise damaged(self.item, path, error) from error

    def leaf(self, path: str, opening: tensorstore.Future) -> ZarrLeaf:
        """The array that `begin` began to open. ValueError if it is damaged."""
        try:
            array = opening.result()
        except _REFUSED as error:
            raise damaged(self.item, path, error) from error
        shape, dtype = tuple(array.shape), array.dtype
        if dtype.name not in _DTYPES:
            raise ValueError(
                f"{self.item}: {path!r} has dtype {dtype.name}; {', '.join(_DTYPES)} are known. "
                "Convert the checkpoint to bfloat16 or float32 first"
            )
        limit = math.prod(shape) * dtype.numpy_dtype.itemsize + _PADDED
        layout = array.chunk_layout
        for chunk in (layout.read_chunk.shape, layout.write_chunk.shape):
            if chunk and math.prod(chunk) * dtype.numpy_dtype.itemsize > limit:
                raise damaged(self.item, path, f"chunks of {tuple(chunk)} for an array of {shape}")
        return ZarrLeaf(shape, dtype.numpy_dtype, path, self.item, array, self)

    def span(self, key: str) -> Span | None:
        """Where the bytes of a key lie; None if that cannot be told."""
        if self.ocdbt:
            return self._spans.get(key)
        file = self.item / key
        return Span(file, 0, file.stat().st_size) if file.is_file() else None

    @functools.cached_property
    def _spans(self) -> Mapping[str, Span]:
        """The values that lie in data files, by key, where the root node lists them all."""
        base = tensorstore.KvStore.open(directory(self.item)).result()
        manifest = tensorstore.ocdbt.dump(base).result()
        if not manifest.get("versions"):
            return {}
        node = tensorstore.ocdbt.dump(base, manifest["versions"][-1]["root"]["location"]).result()
        if node["height"]:
            return {}
        found = {}
        for entry in node["entries"]:
            if location := entry.get("indirect_value"):
                # value:BASE:FILE:OFFSET:LENGTH, both names relative to the item
                _, base_path, file, offset, length = location.split(":")
                span = Span(self.item / (base_path + file), int(offset), int(length))
                found[entry["key"].decode()] = span
        return found


def directory(path: pathlib.Path) -> dict[str, Any]:
    """tensorstore's word for a directory; in a URL some letters of its name would need escapes."""
    return {"driver": "file", "path": f"{path}/"}
