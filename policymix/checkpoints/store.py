"""Orbax checkpoints, as OpenPI writes them and in every form that it or its users leave behind.

A step directory is `STEP/params` (an Orbax PyTree item), `STEP/assets/<asset_id>/norm_stats.json`,
and in training `STEP/train_state`. The item holds {"params": tree}; trees saved from flax.nnx end
every path in a component `value`. Inside the library a tree is a nested dict without either.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from policymix import files, trees
from policymix.checkpoints import assets, layout
from policymix.structs import Params
from policymix.transforms.normalize import Stats

_ARRAYS = ("jax.Array", "np.ndarray", "scalar")  # Orbax's words for what is stored as an array
_CHUNK_BYTES = 64 * 2**20  # so that a reader can stream a leaf instead of holding it


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array on disk: its shape and dtype are known, its content is read when asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    path: str
    item: pathlib.Path
    _array: tensorstore.TensorStore

    @property
    def nbytes(self) -> int:
        """Bytes when read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The content. ValueError names the key and the directory if the file is damaged."""
        return self.start()()

    def start(self) -> Callable[[], np.ndarray]:
        """Begins to read in the background; the function returned waits for the content."""
        future = self._array.read()

        def wait():
            try:
                return future.result()
            except ValueError as error:
                raise _damaged(self.item, self.path, error) from error

        return wait


def open_params(path: str | os.PathLike) -> dict[str, Any]:
    """The parameter tree with a `Leaf` for every array; nothing but metadata is read."""
    item = layout.find_params(path)
    described = files.read_json(item / "_METADATA")
    try:
        stored = [
            "/".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in described["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] in _ARRAYS
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{item}/_METADATA does not describe an Orbax PyTree (no {error}); it is damaged, or "
            "of a version that is not known here"
        ) from error
    ocdbt = (item / "manifest.ocdbt").exists()
    driver = "zarr3" if described.get("use_zarr3") else "zarr"
    # A chunk that is not there is a lost file, unless its writer left out chunks of zeros.
    sparse = not described.get("store_array_data_equal_to_fill_value", False)
    context = tensorstore.Context()
    opened = {}
    for name in stored:
        kvstore = {"driver": "file", "path": f"{item}/"}
        if ocdbt:
            kvstore = {"driver": "ocdbt", "base": kvstore}
        kvstore["path"] = ("" if ocdbt else f"{item}/") + name.replace("/", ".") + "/"
        opened[name] = tensorstore.open(
            {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": sparse},
            read=True,
            open=True,
            context=context,
        )
    leaves = {}
    for name, future in opened.items():
        try:
            array = future.result()
        except ValueError as error:
            raise _damaged(item, name, error) from error
        leaves[name] = Leaf(tuple(array.shape), array.dtype.numpy_dtype, name, item, array)
    return trees.unflatten(_canonical(leaves, item))


def _canonical(leaves: Mapping[str, Leaf], item: pathlib.Path) -> dict[str, Leaf]:
    """Drops the leading `params` and, where every path ends in it, the trailing `value`."""
    if not leaves or not all(name.startswith("params/") for name in leaves):
        raise ValueError(
            f"{item}: expected one tree under the key 'params', found the keys "
            f"{sorted({name.split('/')[0] for name in leaves})}"
        )
    leaves = {name.removeprefix("params/"): leaf for name, leaf in leaves.items()}
    # Only if all do: SigLIP's attention has a module that is itself called `value`.
    if all(name.endswith("/value") for name in leaves):
        leaves = {name.removesuffix("/value"): leaf for name, leaf in leaves.items()}
    return leaves


def unwritten(path: pathlib.Path, error: Exception) -> OSError:
    """What tensorstore says when a write fails, without the pages it adds."""
    reason = str(error).split(" [tensorstore_spec")[0].split("\n")[0]
    return OSError(f"cannot write {path}: {reason}; the disk may be full or a limit reached")


def _damaged(item: pathlib.Path, name: str, error: Exception) -> ValueError:
    reason = str(error).split(" [tensorstore_spec")[0].split("\n")[0]
    return ValueError(f"{item}: cannot read {name!r}; a file is missing or damaged ({reason})")


def load_params(path: str | os.PathLike, dtype: Any = None) -> dict[str, Any]:
    """Reads a checkpoint's parameters.

    Args:
      path: a step directory, its `params`, or the output of a mix.
      dtype: floating-point leaves are cast to it; None keeps the stored dtype.

    Returns:
      Nested dict of numpy arrays, keys as in OpenPI's tree.

    Raises:
      FileNotFoundError, ValueError: nothing there, not a checkpoint, or damaged; the message names
        the path and key.
    """
    params = jax.tree.map(Leaf.read, open_params(path))
    return params if dtype is None else trees.cast(params, dtype)


def save_params(
    params: Params,
    path: str | os.PathLike,
    norm_stats: Stats | None = None,
    asset_id: str | None = None,
) -> None:
    """Writes a step directory that OpenPI loads: parameters, and norm stats as its assets.

    The directory appears whole or not at all. Raises FileExistsError if it is there already.
    """
    path = files.local(path)
    files.check_output(path, overwrite=False)
    with files.whole_directory(path) as partial:
        write_step(params, partial / "step", norm_stats, asset_id)
        _unpack(partial / "step", partial)


def write_step(
    params: Params, path: pathlib.Path, norm_stats: Stats | None = None, asset_id: str | None = None
) -> None:
    """Writes a step directory into a directory that is itself still being made."""
    if (norm_stats is None) != (asset_id is None):
        raise ValueError("norm_stats and asset_id go together: give both or neither")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler("params")) as checkpointer:
        try:
            checkpointer.save(path, args=ocp.args.Composite(params=save_args(params)))
        except ValueError as error:
            raise unwritten(path, error) from error
    if norm_stats is not None:
        assets.write_norm_stats(path / "assets" / asset_id / assets.NORM_STATS, norm_stats)


def to_item(tree: Mapping[str, Any]) -> dict[str, Any]:
    """OpenPI's params item: {"params": tree}, every path with a trailing `value`."""
    return {"params": jax.tree.map(lambda leaf: {"value": leaf}, dict(tree))}


def from_item(item: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `to_item`."""
    flat = trees.flatten(item["params"])
    return trees.unflatten({path.removesuffix("/value"): leaf for path, leaf in flat.items()})


def save_args(params: Params) -> ocp.args.PyTreeSave:
    """How Orbax is to save a params item: in chunks that a reader can stream."""
    item = to_item(params)
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), item)
    return ocp.args.PyTreeSave(item, save_args=chunked)


def _unpack(source: pathlib.Path, target: pathlib.Path) -> None:
    for child in list(source.iterdir()):
        child.rename(target / child.name)
    source.rmdir()
