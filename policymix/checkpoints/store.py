"""Checkpoints of any format: opened by their headers, and as the library's own trees.

A step directory is `STEP/params` (an Orbax item), `STEP/assets/<asset_id>/norm_stats.json`, and in
training `STEP/train_state`. Inside the library a tree is a nested dict.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from policymix import files, trees
from policymix.checkpoints import (
    assets,
    conversions,
    items,
    keymaps,
    layout,
    leaves,
    npz,
    open_pi_zero,
    processors,
)
from policymix.checkpoints import safetensors as safetensors_lib
from policymix.checkpoints.leaves import Leaf
from policymix.structs import Params
from policymix.transforms.normalize import Stats

FORMATS = ("orbax", *keymaps.NAMINGS)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by its headers.

    Attributes:
      name: its path as given; place: where it lies.
      format: "orbax" for leaves by the paths of our tree, a naming of π0's tensors
        (`keymaps.NAMINGS`), or "safetensors" for any other architecture.
      leaves: by path (Orbax) or tensor name. What LeRobot once kept among the tensors for
        normalisation is apart, in `buffers`.
      files: how tensors are laid out in files; None for Orbax.
      lora: how many low-rank updates were merged.
    """

    name: str
    place: layout.Place
    format: str
    leaves: Mapping[str, Leaf]
    buffers: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)
    files: safetensors_lib.Layout | None = None
    lora: int = 0

    def tree(self, siglip_heads: int | None = None) -> dict[str, Leaf]:
        """Its leaves by the paths of our own tree.

        Raises:
          ValueError: tensors of another architecture than π0's, or some are missing.
        """
        if self.format == "orbax":
            return dict(self.leaves)
        naming = keymaps.naming(self.leaves) if self.format == "safetensors" else self.format
        if naming is None:
            raise ValueError(
                f"{self.name}: its tensors are not named as those of a π0 (such as "
                f"{next(iter(self.leaves), 'none')!r}); they can be mixed by name with others of "
                "their kind, and nothing else"
            )
        return conversions.tree_of(self.leaves, naming, self.name, siglip_heads)


def open_checkpoint(
    path: str | os.PathLike,
    *,
    merge_lora: bool = False,
    lora_scale: Callable[[str], float] = lambda path: 1.0,
) -> Checkpoint:
    """Reads a checkpoint's headers; no array is read.

    Args:
      merge_lora: low-rank updates are added to their weights as they are read.
      lora_scale: alpha / rank of an attention weight's update, by its path; OpenPI's variants have
        1.

    Raises:
      FileNotFoundError, ValueError: nothing there, no checkpoint, or damaged.
    """
    place, name = layout.find(path), str(path)
    if place.kind == "orbax":
        found, lora = items.open_item(place.params), 0
        if merge_lora:
            found, lora = conversions.merge_lora(found, name, lora_scale)
        return Checkpoint(name, place, "orbax", found, lora=lora)
    if place.kind == "npz":
        return Checkpoint(name, place, "orbax", npz.open_archive(place.params))
    if place.kind == "pt":
        return Checkpoint(name, place, "openpi", open_pi_zero.open_tensors(place.params))
    tensors, in_files = safetensors_lib.open_tensors(place.params)
    if lowrank := next((n for n in tensors if "lora_" in n.lower()), None):
        raise ValueError(
            f"{name} holds the low-rank update {lowrank!r}: merge it into the model first, in "
            "Python with peft's merge_and_unload() and save_pretrained()"
        )
    buffers = {n: leaf for n, leaf in tensors.items() if processors.BUFFER.fullmatch(n)}
    rest = {n: leaf for n, leaf in tensors.items() if n not in buffers}
    naming = keymaps.naming(rest)
    if naming not in keymaps.NAMINGS:  # a PaliGemma alone is mixed by name, like any other
        naming = "safetensors"
    return Checkpoint(name, place, naming, rest, buffers, in_files)


def open_params(path: str | os.PathLike, siglip_heads: int | None = None) -> dict[str, Any]:
    """The parameter tree with a leaf for every array; nothing but metadata is read."""
    return trees.unflatten(open_checkpoint(path).tree(siglip_heads))


def load_params(path: str | os.PathLike, dtype: Any = None) -> dict[str, Any]:
    """Reads a checkpoint's parameters, whatever its format.

    Args:
      path: what `layout.find` takes: a step directory, its `params`, a safetensors file or its
        directory, the output of a mix; at gs:// or hf:// too.
      dtype: floating-point leaves are cast to it; None keeps the stored dtype.

    Returns:
      Nested dict of numpy arrays, keys as in OpenPI's tree.

    Raises:
      FileNotFoundError, ValueError: nothing there, not a checkpoint, or damaged; the message names
        the path and key.
    """
    params = jax.tree.map(leaves.Leaf.read, open_params(path))
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
        write_step(params, partial, norm_stats, asset_id)


def write_step(
    params: Params, path: pathlib.Path, norm_stats: Stats | None = None, asset_id: str | None = None
) -> None:
    """Writes a step directory into a directory that is itself still being made."""
    if (norm_stats is None) != (asset_id is None):
        raise ValueError("norm_stats and asset_id go together: give both or neither")
    arrays = {name: np.asarray(array) for name, array in trees.flatten(params).items()}
    writer = items.ItemWriter(
        path / "params", {name: (array.shape, array.dtype) for name, array in arrays.items()}
    )
    for name, array in arrays.items():
        writer.write(name, 0, array.reshape(-1))
    writer.finish_step(path)
    if norm_stats is not None:
        assets.write_norm_stats(path / "assets" / asset_id / assets.NORM_STATS, norm_stats)
