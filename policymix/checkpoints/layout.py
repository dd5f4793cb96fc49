"""Where things lie: the parameters of a checkpoint, however its path is given, and the step around
them.
"""

import os
import pathlib

from policymix import files


def find_params(path: str | os.PathLike) -> pathlib.Path:
    """The Orbax item with the parameters: of a step directory, of `params` itself, or of a mix."""
    if "://" in str(path):
        raise ValueError(f"checkpoint {path} is remote; copy it to a local directory and give that")
    if not str(path):
        raise ValueError(
            "a checkpoint's path is empty; lists are written a,b,c, with no comma at the end"
        )
    path = files.local(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    for candidate in (path, path / "params"):
        if (candidate / "_METADATA").is_file():
            return candidate
    if (path / "model.safetensors").exists() or path.suffix == ".safetensors":
        raise ValueError(
            f"{path} is a safetensors checkpoint; an Orbax checkpoint is expected here"
        )
    steps = steps_of(path)
    if len(steps) == 1:
        return find_params(path / str(steps[0]))
    if steps:
        raise ValueError(f"{path} holds the steps {steps}; say which, as {path / str(steps[-1])}")
    if sweep := sorted(p.name for p in path.glob("merge_ratio=*")):
        raise ValueError(
            f"{path} holds the mixes {', '.join(sweep)}; say which, as {path / sweep[0]}"
        )
    raise ValueError(
        f"{path} is not a checkpoint: expected a step directory with params/_METADATA, or that "
        "params directory"
    )


def steps_of(directory: pathlib.Path) -> list[int]:
    """The numbered directories that hold parameters, in order, without unfinished ones."""
    return sorted(
        int(p.name)
        for p in directory.glob("[0-9]*")
        if p.name.isdigit() and (p / "params").is_dir()
    )


def find_step(path: str | os.PathLike) -> pathlib.Path:
    """The directory around a checkpoint's `params`, where its `assets` lie."""
    step = files.local(path)
    if step.name == "params":
        return step.parent
    steps = [] if (step / "params").is_dir() else steps_of(step)
    return step / str(steps[0]) if len(steps) == 1 else step
