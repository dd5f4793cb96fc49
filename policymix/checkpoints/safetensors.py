"""Safetensors files, one or in shards with an index: read in place, written in place.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the length of a
JSON header, the header, and the arrays one after another. Everything a header says is checked
before any array is read; names of files in an index are never followed out of their directory.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from policymix import files, trees
from policymix.checkpoints import conversions, keymaps, leaves
from policymix.checkpoints import layout as layout_lib
from policymix.models import pi0, recognize
from policymix.structs import Params

_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class TensorLeaf(leaves.Leaf):
    """A tensor of a safetensors file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    path: str
    file: pathlib.Path
    offset: int

    @property
    def where(self) -> str:
        return str(self.file)

    def reader(self) -> leaves.Reader:
        return _Reader(self)

    def precedes(self, other: leaves.Leaf) -> bool:
        return (
            isinstance(other, TensorLeaf)
            and other.offset == self.offset + self.nbytes
            and other.dtype == self.dtype
            and (other.file is self.file or other.file == self.file)
        )

    def until(self, size: int, last: str) -> "TensorLeaf":
        return dataclasses.replace(self, shape=(size,), path=f"{self.path} ... {last}")


class _Reader(leaves.Reader):
    def __init__(self, leaf: TensorLeaf):
        self._leaf = leaf
        self._descriptor = os.open(leaf.file, os.O_RDONLY)

    def read(self, start: int, out: np.ndarray) -> None:
        leaf, target = self._leaf, memoryview(out.view(np.uint8))
        offset = leaf.offset + start * out.itemsize
        while target:
            try:
                count = os.preadv(self._descriptor, [target], offset)
            except OSError as error:  # of a disk that fails; the system does not say which file
                raise OSError(
                    f"{leaf.file}: {leaf.path!r} cannot be read: {error.strerror}"
                ) from error
            if not count:
                raise ValueError(
                    f"{leaf.file}: {leaf.path!r} ends early; the file was cut while it was read"
                )
            target, offset = target[count:], offset + count

    def close(self) -> None:
        os.close(self._descriptor)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How tensors are laid out in files, so that a mix can be written like its inputs.

    Attributes:
      shards: (file name, its tensors in the order of their bytes) of each file.
      metadata: what the header of the first says of itself, such as {"format": "pt"}.
      index: whether there is an index.
    """

    shards: tuple[tuple[str, tuple[str, ...]], ...]
    metadata: Mapping[str, str]
    index: bool


def open_tensors(file: pathlib.Path) -> tuple[dict[str, TensorLeaf], Layout]:
    """The tensors of a file, or of the shards of an index, by name; only headers are read.

    Raises:
      ValueError, OSError: damaged, truncated, of an unknown dtype, or the index and its shards do
        not agree.
    """
    if file.suffix != ".json":
        tensors, metadata = _open_file(file)
        return tensors, Layout(((file.name, tuple(tensors)),), metadata, index=False)
    places = _read_index(file)
    shards, found, metadata = [], {}, {}
    for name in dict.fromkeys(places.values()):
        tensors, metadata_here = _open_file(file.parent / name)
        metadata = metadata or metadata_here
        expected = {tensor for tensor, place in places.items() if place == name}
        if tensors.keys() != expected:
            apart = sorted(tensors.keys() ^ expected)
            raise ValueError(
                f"{file.parent / name} and {file.name} disagree about {len(apart)} tensors, such "
                f"as {apart[0]!r}: a shard was replaced or belongs to another checkpoint"
            )
        shards.append((name, tuple(tensors)))
        found |= tensors
    return found, Layout(tuple(shards), metadata, index=True)


def files_of(file: pathlib.Path) -> list[pathlib.Path]:
    """The files with tensors: the one, or the shards of an index."""
    if file.suffix != ".json":
        return [file]
    return [file.parent / name for name in dict.fromkeys(_read_index(file).values())]


def _read_index(file: pathlib.Path) -> dict[str, str]:
    """Tensor name → shard, each shard a file beside the index."""
    content = files.read_json(file)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{file} has no 'weight_map' from tensors to shards; it is no index")
    for tensor, name in places.items():
        if not _is_file_name(name):
            raise ValueError(
                f"{file}: {tensor!r} is said to lie in {files.reason(repr(name))}; shards must be "
                "files beside the index"
            )
    missing = [n for n in dict.fromkeys(places.values()) if not (file.parent / n).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{file} names {len(missing)} shards that are not there, such as "
            f"{file.parent / missing[0]}: download them"
        )
    return places


def _is_file_name(name: Any) -> bool:
    """Whether this can be a shard: a file's name, of a length and of letters that names can have,
    and no other file's that a mix writes.
    """
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not {"/", "\\", "\0"} & set(name)
        and len(name.encode(errors="replace")) <= 255
    )


def _open_file(file: pathlib.Path) -> tuple[dict[str, TensorLeaf], dict[str, str]]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ValueError(
                f"{file}: expected a safetensors header of up to {max(size - 8, 0):,} bytes, its "
                f"length is given as {length:,}: the file is truncated, damaged, or something else"
            )
        raw = opened.read(length)
    header = _parse(raw, file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError(f"{file}: '__metadata__' is not what it should be, names and texts")
    found, end = {}, 0
    entries = {name: _entry(name, entry, file) for name, entry in header.items()}
    for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if begin != end:
            raise ValueError(
                f"{file}: {name!r} begins at byte {begin:,}, the one before it ends at {end:,}: "
                "the header is damaged"
            )
        found[name] = TensorLeaf(shape, dtype, name, file, 8 + length + begin)
        end = stop
    if 8 + length + end != size:
        raise ValueError(
            f"{file} has {size:,} bytes, its header describes {8 + length + end:,}: the file is "
            "truncated or damaged; download it again"
        )
    return found, metadata


def _parse(raw: bytes, file: pathlib.Path) -> dict[str, Any]:
    def unique(pairs):
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        if re.search(rb"\\u[dD]", raw):  # halves of letters, which no file can be written with
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: the safetensors header is not readable ({files.reason(error)})"
        ) from error
    if not isinstance(header, dict) or raw[:1] != b"{":
        raise ValueError(f"{file}: the safetensors header is not a JSON object")
    return header


def _entry(name: str, entry: Any, file: pathlib.Path) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one tensor, checked."""
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or type(kind) is not str:
            raise ValueError(f"dtype {kind!r}, numbers {numbers}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: the header's entry of {name!r} is not a tensor's ({files.reason(error)})"
        ) from error
    if kind not in _DTYPES:
        raise ValueError(
            f"{file}: {name!r} has dtype {files.reason(kind)}; {', '.join(_DTYPES)} are known. "
            "Convert the checkpoint to bfloat16 or float32 first"
        )
    dtype = _DTYPES[kind]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{file}: {name!r} is {kind} {tuple(shape)}, {math.prod(shape) * dtype.itemsize:,} "
            f"bytes, but has {end - begin:,}: the header is damaged"
        )
    return dtype, tuple(shape), begin, end


class TensorWriter(leaves.Sink):
    """Writes files of a known layout into a directory that is still being made."""

    def __init__(
        self,
        directory: pathlib.Path,
        shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        layout: Layout,
    ):
        """`shapes`: (shape, dtype) by tensor name; all of them, and no more, are in the layout."""
        self._directory, self._shapes, self._layout = directory, dict(shapes), layout
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        for name, tensors in layout.shards:
            self._begin(name, tensors)

    def _begin(self, name: str, tensors: Sequence[str]) -> None:
        header: dict[str, Any] = {}
        if self._layout.metadata:
            header["__metadata__"] = dict(self._layout.metadata)
        end = 0
        for tensor in tensors:
            shape, dtype = self._shapes[tensor]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[tensor] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)  # so that arrays are aligned
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(self._directory / name, flags, 0o644)
        self._descriptors.append(descriptor)
        _write_all(descriptor, memoryview(len(raw).to_bytes(8, "little") + raw), 0)
        os.ftruncate(descriptor, 8 + len(raw) + end)
        for tensor in tensors:
            begin, _ = header[tensor]["data_offsets"]
            self._places[tensor] = descriptor, 8 + len(raw) + begin

    def before(self, path: str, count: int) -> int:
        itemsize = self._shapes[path][1].itemsize
        return -self._places[path][1] % (count * itemsize) // itemsize

    def precedes(self, path: str, other: str) -> bool:
        descriptor, offset = self._places[path]
        shape, dtype = self._shapes[path]
        return self._places[other] == (descriptor, offset + math.prod(shape) * dtype.itemsize)

    def write(self, path: str, start: int, values: np.ndarray) -> None:
        descriptor, offset = self._places[path]
        source = memoryview(np.ascontiguousarray(values).view(np.uint8))
        _write_all(descriptor, source, offset + start * values.dtype.itemsize)

    def finish(self) -> None:
        if self._layout.index:
            total = sum(math.prod(s) * d.itemsize for s, d in self._shapes.values())
            places = {t: name for name, tensors in self._layout.shards for t in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            files.write_json(self._directory / layout_lib.INDEX, index)
        self.close()

    def close(self) -> None:
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)


def _write_all(descriptor: int, source: memoryview, offset: int) -> None:
    """A disk that is nearly full takes a part first; only the next call says so."""
    while source:
        count = os.pwrite(descriptor, source, offset)
        source, offset = source[count:], offset + count


def write(
    directory: pathlib.Path, arrays: Mapping[str, np.ndarray], layout: Layout | None = None
) -> None:
    """Writes tensors into a directory that is still being made; one file without a `layout`."""
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    single = Layout(((layout_lib.TENSORS, tuple(arrays)),), {"format": "pt"}, index=False)
    with TensorWriter(directory, shapes, layout or single) as writer:
        for name, array in arrays.items():
            writer.write(name, 0, np.ascontiguousarray(array).reshape(-1))
        writer.finish()


def load_params(path: str | os.PathLike, model_config: pi0.Pi0Config) -> dict[str, Any]:
    """A π0's PyTorch checkpoint as our tree: nested dict of numpy arrays.

    Args:
      path: a file, the index of shards, or their directory, in any of `keymaps.NAMINGS`.

    Raises:
      ValueError, OSError: it is damaged, or not the parameters of this model.
    """
    place = layout_lib.find(path)
    if place.kind != "safetensors":
        raise ValueError(f"{path} is an Orbax checkpoint; read it with checkpoints.store")
    tensors, _ = open_tensors(place.params)
    naming = keymaps.naming(tensors)
    if naming is None:
        raise ValueError(f"{path}: its tensors are not named as those of a π0")
    heads = model_config.siglip_heads
    found = trees.unflatten(conversions.tree_of(tensors, naming, str(path), heads))
    recognize.check(pi0.shapes(model_config), found, str(path))
    return jax.tree.map(leaves.Leaf.read, found)


def save_params(params: Params, path: str | os.PathLike, naming: str = "openpi") -> None:
    """Writes PATH/model.safetensors with a π0's parameters under PyTorch names.

    The tied head is written beside the embedding, and zeros for the action expert's head, which π0
    never asks. The directory appears whole or not at all; FileExistsError if it is there already.
    """
    path = files.local(path)
    files.check_output(path, overwrite=False)
    flat = {name: np.asarray(array) for name, array in trees.flatten(params).items()}
    shapes = {name: array.shape for name, array in flat.items()}
    arrays = {
        piece.name: piece.to_tensor(flat[name][piece.index])
        for name, made in keymaps.tensors(shapes).items()
        for piece in made.pieces
    }
    twins = {head: embedding for embedding, head in keymaps.TIED.items()}
    for name, (kind, shape) in keymaps.extra_tensors(shapes).items():
        like = arrays[twins[name]] if kind == "tied" else flat["action_in_proj/bias"]
        arrays[name] = like if kind == "tied" else np.zeros(shape, like.dtype)
    with files.whole_directory(path) as partial:
        write(partial, {keymaps.rename(n, "openpi", naming): a for n, a in arrays.items()})
