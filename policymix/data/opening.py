"""A dataset by its name, whatever its format and wherever it lies."""

import pathlib

from policymix import files, hub
from policymix.data import lerobot, ogbench, rlds

Dataset = lerobot.Dataset | rlds.Dataset | ogbench.Dataset


def open_dataset(
    name: str, *, fps: float = 0, skip_unlabeled: bool = False, skip_bad: bool = False
) -> Dataset:
    """Opens the LeRobot dataset, the RLDS dataset of tfds, or the .npz file of OGBench, at `name`.

    Args:
      name: a local folder or file; or hf:// or gs://, fetched once and verified.
      fps: of RLDS and OGBench; skip_unlabeled, skip_bad: of RLDS, see rlds.open_dataset.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    path = local(name)
    if rlds.is_dataset(path):
        return rlds.open_dataset(path, fps=fps, skip_unlabeled=skip_unlabeled, skip_bad=skip_bad)
    if ogbench.is_dataset(path):
        return ogbench.open_dataset(path, fps=fps)
    return lerobot.open_dataset(path)


def local(name: str) -> pathlib.Path:
    """Where a dataset lies on this disk, once it is there."""
    return hub.fetch(name, ignore=()) if hub.is_remote(name) else files.local(name)
