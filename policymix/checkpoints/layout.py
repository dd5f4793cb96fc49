"""Where things lie: the parameters of a checkpoint, however its path is given, and the directory
around them.
"""

import functools
import glob
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from policymix import files, hub

TENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Place(NamedTuple):
    """A checkpoint on disk.

    Attributes:
      kind: "orbax", "safetensors", "npz" (big_vision's PaliGemma) or "pt" (open-pi-zero's).
      params: the Orbax item, the file, or the index of its shards.
      directory: where its assets lie: the step directory, or that of the file.
    """

    kind: str
    params: pathlib.Path
    directory: pathlib.Path


@functools.cache
def _fetched(url: str) -> pathlib.Path:
    return hub.fetch(url)


def local(path: str | os.PathLike) -> pathlib.Path:
    """The absolute local path; what lies at gs:// or hf:// is fetched first, once."""
    return _fetched(str(path)) if hub.is_remote(str(path)) else files.local(path)


def find(path: str | os.PathLike) -> Place:
    """The checkpoint at a path: a step directory, its `params`, a safetensors file or its
    directory, a LeRobot run, or the output of a mix.

    Raises:
      FileNotFoundError, ValueError: nothing there, no checkpoint, or several.
    """
    return _find(path, ())


def _find(path: str | os.PathLike, above: tuple[pathlib.Path, ...]) -> Place:
    """`find` inside the directories `above`, which links may lead back to."""
    if not str(path):
        raise ValueError(
            "a checkpoint's path is empty; lists are written a,b,c, with no comma at the end"
        )
    path, given = local(path), path
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {given} does not exist")
    if path in above:
        raise ValueError(f"{path} is not a checkpoint: its links lead back to itself")
    if (path / "_METADATA").is_file():
        return Place("orbax", path, path.parent if path.name == "params" else path)
    if (path / "params" / "_METADATA").is_file():
        return Place("orbax", path / "params", path)
    if path.is_file() and path.suffix in (".npz", ".pt"):
        return Place(path.suffix[1:], path, path.parent)
    if tensors := _tensors(path):
        return Place("safetensors", tensors, tensors.parent)
    for inner in (path / "pretrained_model", path / "checkpoints" / "last"):  # LeRobot's runs
        if inner.is_dir():
            return _find(inner, (*above, path))
    steps = steps_of(path)
    if len(steps) == 1:
        return _find(path / steps[0], (*above, path))
    if steps:
        raise ValueError(
            f"{path} holds the steps {', '.join(steps)}; say which, as {path / steps[-1]}"
        )
    if sweep := sorted(p.name for p in path.glob("merge_ratio=*")):
        raise ValueError(
            f"{path} holds the mixes {', '.join(sweep)}; say which, as {path / sweep[0]}"
        )
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"{path} is a PEFT adapter without the model it belongs to: merge it first, in Python "
            "with peft's merge_and_unload() and save_pretrained()"
        )
    raise ValueError(
        f"{path} is not a checkpoint: expected a step directory with params/_METADATA, that "
        f"params directory, or a directory with {TENSORS}"
    )


def directory_of(path: str | os.PathLike) -> pathlib.Path:
    """Where a checkpoint's assets lie; also of a directory that has assets and no parameters."""
    path = local(path)
    if path.name == "params":
        return path.parent
    if (path / "assets").is_dir() or (path / "params").is_dir():
        return path
    if len(steps := steps_of(path)) == 1:
        return path / steps[0]
    try:
        return find(path).directory
    except (ValueError, OSError):
        return path


def _tensors(path: pathlib.Path) -> pathlib.Path | None:
    """The file or index that a safetensors checkpoint is reached by; None if there is none."""
    if path.is_file():
        if path.name.endswith((".safetensors", ".safetensors.index.json")):
            return path
        raise ValueError(
            f"{path} is a file, and neither .safetensors nor .npz nor .pt; it is no checkpoint"
        )
    for name in (INDEX, TENSORS):
        if (path / name).exists():
            return path / name
    beside = ("policy_preprocessor", "policy_postprocessor", "adapter_model", "optimizer")
    found = sorted(path.glob("*.safetensors.index.json")) or sorted(
        p for p in path.glob("*.safetensors") if not p.name.startswith(beside)
    )
    if len(found) > 1:
        raise ValueError(
            f"{path} holds {', '.join(p.name for p in found)} and no {INDEX}; say which file is "
            "the checkpoint"
        )
    return found[0] if found else None


def steps_of(directory: pathlib.Path) -> list[str]:
    """The names of numbered directories that hold parameters, in order of the numbers, without
    unfinished ones.
    """
    found = (p.name for p in directory.glob("[0-9]*") if (p / "params").is_dir())
    return sorted((name for name in found if name.isdecimal()), key=int)


def expand(paths: Sequence[str]) -> tuple[str, ...]:
    """Paths with `*`, `?` or `[` → the checkpoints that they match, steps in the order of numbers.

    What a pattern matches besides checkpoints, such as logs and a link to the last step, is left
    out. ValueError if no checkpoint is left.
    """
    found: list[str] = []
    for path in paths:
        literal = hub.is_remote(path) or pathlib.Path(path).exists() or not glob.has_magic(path)
        if literal:
            found.append(path)
            continue
        matched = [p for p in glob.glob(os.path.expanduser(path)) if _is_checkpoint(p)]
        matched.sort(key=lambda p: (_number(p), p))
        distinct = {files.local(p): p for p in reversed(matched)}  # a link comes after its target
        kept = [p for p in matched if p in distinct.values()]
        if not kept:
            raise ValueError(f"--checkpoints: {path!r} matches no checkpoint")
        found += kept
    return tuple(found)


def _is_checkpoint(path: str) -> bool:
    try:
        find(path)
    except (ValueError, OSError):
        return False
    return True


def _number(path: str) -> float:
    """The number a step is called by; what is not called by one comes last."""
    name = pathlib.Path(path).name
    return float(name) if name.isdecimal() else float("inf")
