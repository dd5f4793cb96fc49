"""Orbax items: directories with one tree of arrays, as OpenPI writes and reads them.

The item holds {"params": tree}; trees saved from flax.nnx end every path in a component `value`.
Inside the library a tree has neither. What is written here has the layout that Orbax gives
it, but chunks of 8 MiB that follow each other in C order, so that the next reader can stream, and
it is written as it comes, so that no array is ever held.
"""

import collections
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore

from policymix import files
from policymix.checkpoints import leaves, zarr

_ARRAYS = ("jax.Array", "np.ndarray", "scalar")  # Orbax's words for what is stored as an array
_RATIO = 2**16  # of sizes, at most: a block of 128 kB takes zstd, the densest here, four bytes
_CHUNK = 2**23  # bytes
_FILE = 2**26  # bytes after which OCDBT begins another data file: it keeps one in memory


def open_item(item: pathlib.Path) -> dict[str, zarr.ZarrLeaf]:
    """The arrays of an item by their paths; nothing but metadata is read.

    Raises:
      ValueError: it is not an item with one tree of parameters, or damaged.
    """
    described = files.read_json(item / "_METADATA")
    try:
        stored = [
            "/".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in described["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] in _ARRAYS
        ]
        "".join(stored).encode()  # JSON can hold halves of letters, tensorstore's names cannot
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{item}/_METADATA does not describe an Orbax PyTree (no {files.reason(error)}); it is "
            "damaged, or of a version that is not known here"
        ) from error
    names = _canonical(stored, item)
    database = zarr.Database(item)
    # A chunk that is not there is a lost file, unless its writer left out chunks of zeros.
    sparse = not described.get("store_array_data_equal_to_fill_value", False)
    opened = {
        path: database.begin(name, path, zarr3=bool(described.get("use_zarr3")), sparse=sparse)
        for path, name in names.items()
    }
    found = {path: database.leaf(path, opening) for path, opening in opened.items()}
    if not sparse:
        _check_size(found, item)
    return found


def _check_size(found: Mapping[str, zarr.ZarrLeaf], item: pathlib.Path) -> None:
    """ValueError where metadata claims more than the files can hold: nobody is to allocate that."""
    stored = sum(path.stat().st_size for path in item.rglob("*") if path.is_file())
    claimed = sum(leaf.nbytes for leaf in found.values())
    if claimed > stored * _RATIO:
        largest = max(found.values(), key=lambda leaf: leaf.nbytes)
        raise zarr.damaged(
            item,
            largest.path,
            f"it is said to be {largest.dtype} {largest.shape}, {largest.nbytes:,} bytes, and all "
            f"files together have {stored:,}",
        )


def _canonical(stored: list[str], item: pathlib.Path) -> dict[str, str]:
    """Path → stored name: without the leading `params` and, where every path ends in it, the
    trailing `value`.
    """
    if not stored or not all(name.startswith("params/") for name in stored):
        raise ValueError(
            f"{item}: expected one tree under the key 'params', found the keys "
            f"{sorted({name.split('/')[0] for name in stored})}"
        )
    if twice := [name for name, count in collections.Counter(stored).items() if count > 1]:
        raise ValueError(f"{item}: _METADATA names {twice[0]!r} twice; it is damaged")
    # Only if all do: SigLIP's attention has a module that is itself called `value`.
    suffix = "/value" if all(name.endswith("/value") for name in stored) else ""
    return {name.removeprefix("params/").removesuffix(suffix): name for name in stored}


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """A chunk of at most 8 MiB that is one range of the array in C order."""
    chunk = list(shape)
    for axis in range(len(shape)):
        inner = math.prod(shape[axis + 1 :]) * itemsize
        if inner * shape[axis] <= _CHUNK:
            break
        fits = max(1, _CHUNK // inner)
        if fits == 1:
            chunk[axis] = 1
            continue
        divisors = [d for d in range(fits, 0, -1) if shape[axis] % d == 0]
        chunk[axis] = divisors[0] if divisors[0] * 2 > fits else fits
        break
    return tuple(max(size, 1) for size in chunk)


class ItemWriter(leaves.Sink):
    """Writes an item into a directory that is still being made; it is one after `finish`."""

    def __init__(self, item: pathlib.Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        """`shapes`: (shape, dtype) by path."""
        self.item, self._shapes = item, dict(shapes)
        self._started = time.time_ns()
        item.mkdir(parents=True)
        context = tensorstore.Context()
        try:
            opened = {
                path: tensorstore.open(self._spec(path), context=context) for path in self._shapes
            }
            self._arrays = {path: future.result() for path, future in opened.items()}
        except ValueError as error:
            raise unwritten(item, error) from error

    def _spec(self, path: str) -> dict[str, Any]:
        shape, dtype = self._shapes[path]
        return {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": zarr.directory(self.item),
                "path": f"{_key(path)}/",
                # As Orbax has it; small values lie in the tree itself.
                "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 10**8},
                "target_data_file_size": _FILE,
            },
            "metadata": {
                "shape": list(shape),
                "chunks": list(chunk_shape(shape, dtype.itemsize)),
                "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
                "compressor": {"id": "zstd", "level": 1},
                "fill_value": None,
                "order": "C",
            },
            "create": True,
            "open": True,
            # Zeros are written too: a chunk that is missing is then always a lost one.
            "store_data_equal_to_fill_value": True,
        }

    def block(self, path: str) -> int:
        shape, dtype = self._shapes[path]
        chunk = chunk_shape(shape, dtype.itemsize)
        # Chunks that do not divide their axis are written a whole axis at a time, or the next block
        # would begin in the middle of one.
        uneven = [k for k, (size, of) in enumerate(zip(chunk, shape, strict=True)) if of % size]
        if uneven and math.prod(shape[: uneven[0]]) > 1:
            return math.prod(shape[uneven[0] :])
        return math.prod(chunk)

    def write(self, path: str, start: int, values: np.ndarray) -> None:
        shape, dtype = self._shapes[path]
        chunk = chunk_shape(shape, dtype.itemsize)
        wide = [i for i, size in enumerate(chunk) if size > 1]
        axis = wide[0] if wide else max(len(shape) - 1, 0)
        inner = math.prod(shape[axis + 1 :])
        done, pending = 0, []
        while done < len(values) and shape:
            outer, inside = divmod(start + done, inner * shape[axis])
            first = inside // inner
            last = min(first + chunk[axis], shape[axis])
            index = np.unravel_index(outer, shape[:axis]) if axis else ()
            where = (*map(int, index), slice(first, last))
            count = (last - first) * inner
            part = values[done : done + count].reshape(last - first, *shape[axis + 1 :])
            pending.append(self._arrays[path][where].write(part))
            done += count
        if not shape:
            pending.append(self._arrays[path].write(values.reshape(())))
        try:
            for future in pending:
                future.result()
        except ValueError as error:
            raise unwritten(self.item, error) from error

    def finish(self) -> None:
        entries, arrays = {}, []
        for path, (shape, dtype) in self._shapes.items():
            keys = ("params", *path.split("/"), "value")
            entries[str(keys)] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {
                    "value_type": "np.ndarray",
                    "skip_deserialize": False,
                    "write_shape": list(shape),
                },
            }
            chunk = list(chunk_shape(shape, dtype.itemsize))
            arrays.append(
                {
                    "array_metadata": {
                        "param_name": _key(path),
                        "write_shape": list(shape),
                        "chunk_shape": chunk,
                        "ext_metadata": None,
                    }
                }
            )
        (self.item / "array_metadatas").mkdir()
        metadatas = self.item / "array_metadatas" / "process_0"
        metadatas.write_text(json.dumps({"array_metadatas": arrays}))
        # Last: without it a directory is no item.
        files.write_json(
            self.item / "_METADATA",
            {
                "tree_metadata": entries,
                "use_ocdbt": True,
                "use_zarr3": False,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            },
        )

    def finish_step(self, step: pathlib.Path) -> None:
        """Also says of the step around the item that it is whole, as Orbax's manager does."""
        self.finish()
        handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
        files.write_json(
            step / "_CHECKPOINT_METADATA",
            {
                "item_handlers": {self.item.name: handler},
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": self._started,
                "commit_timestamp_nsecs": time.time_ns(),
                "custom_metadata": {},
            },
        )


def _key(path: str) -> str:
    return ".".join(("params", *path.split("/"), "value"))


def unwritten(path: pathlib.Path, error: Exception) -> OSError:
    """What to say when tensorstore cannot write; a full disk's error is that of any other file."""
    for code in files.NO_ROOM:
        if os.strerror(code) in str(error):
            return files.no_room(path, code)
    return OSError(f"cannot write {path}: {files.reason(error)}")
