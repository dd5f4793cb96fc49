"""A dataset by its name, whatever its format and wherever it lies."""

import pathlib

from policymix import files, hub
from policymix.data import lerobot, rlds

Dataset = lerobot.Dataset | rlds.Dataset


def open_dataset(
    name: str, *, fps: float = 0, skip_unlabeled: bool = False, skip_bad: bool = False
) -> Dataset:
    """Opens the LeRobot dataset, or the RLDS dataset of tfds, at `name`.

    Args:
      name: a local folder; or hf:// or gs://, fetched once and verified.
      fps, skip_unlabeled, skip_bad: of RLDS, see rlds.open_dataset.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    path = local(name)
    if rlds.is_dataset(path):
        return rlds.open_dataset(path, fps=fps, skip_unlabeled=skip_unlabeled, skip_bad=skip_bad)
    return lerobot.open_dataset(path)


def local(name: str) -> pathlib.Path:
    """Where a dataset lies on this disk, once it is there."""
    return hub.fetch(name, ignore=()) if hub.is_remote(name) else files.local(name)
