"""What lies beside a checkpoint's parameters: norm stats, and the episodes it was trained on."""

import json
import os
import pathlib
from typing import Any

import numpy as np

from policymix import files
from policymix.transforms.normalize import NormStats, Stats

NORM_STATS = "norm_stats.json"
EPISODES = "episodes.json"


def read_norm_stats(path: pathlib.Path) -> Stats:
    """OpenPI's norm_stats.json → {"state": NormStats, "actions": NormStats}."""
    if not path.is_file():
        raise FileNotFoundError(f"norm stats {path} do not exist")
    content = files.read_json(path)
    try:
        return {
            key: NormStats(**{
                field: None if entry.get(field) is None else np.asarray(entry[field], np.float64)
                for field in ("mean", "std", "q01", "q99")
            })
            for key, entry in content["norm_stats"].items()
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected "
            f"{{'norm_stats': {{'state': {{mean, std, q01, q99}}, 'actions': …}}}} ({error})"
        ) from error


def write_norm_stats(path: pathlib.Path, stats: Stats) -> None:
    """Writes OpenPI's schema; numbers keep all their digits."""
    entries = {
        key: {
            field: None
            if getattr(entry, field) is None
            else np.asarray(getattr(entry, field)).tolist()
            for field in ("mean", "std", "q01", "q99")
        }
        for key, entry in stats.items()
    }
    files.write_whole(path, json.dumps({"norm_stats": entries}, indent=2, allow_nan=False).encode())


def find(checkpoint: str | os.PathLike, name: str) -> dict[str, pathlib.Path]:
    """Files called `name` beside a checkpoint, by asset id; "" where it lies beside the step
    (kai0's place).

    Looks into `assets/<asset_id>/` of the step, then into the step's parent; asset ids may contain
    slashes.
    """
    step = _step_directory(pathlib.Path(checkpoint).absolute())
    root = step / "assets"
    found = {str(p.parent.relative_to(root)): p for p in sorted(root.rglob(name))}
    if not found and (step.parent / name).is_file():
        found = {"": step.parent / name}
    return found


def _step_directory(path: pathlib.Path) -> pathlib.Path:
    if path.name == "params":
        return path.parent
    if not (path / "params").exists():  # the output of a mix, or a run with a single step
        steps = [p for p in path.glob("[0-9]*") if (p / "params").exists()]
        if len(steps) == 1:
            return steps[0]
    return path


def norm_stats_of(
    checkpoint: str | os.PathLike, asset_id: str | None = None
) -> tuple[str, Stats] | None:
    """(asset id, norm stats) of a checkpoint; None if it has none. Several need an `asset_id` to
    choose.
    """
    found = find(checkpoint, NORM_STATS)
    if not found:
        return None
    if asset_id is not None and "" not in found:
        if asset_id not in found:
            raise ValueError(
                f"{checkpoint} has norm stats for {list(found)}, not for asset_id {asset_id!r}"
            )
        return asset_id, read_norm_stats(found[asset_id])
    if len(found) > 1:
        raise ValueError(
            f"{checkpoint} has norm stats for {list(found)}; choose one with config.data.asset_id"
        )
    ((name, path),) = found.items()
    return name or asset_id or "mixed", read_norm_stats(path)


def episodes_of(checkpoint: str | os.PathLike) -> dict[str, Any] | None:
    """{"fingerprint", "episodes", "path"} that training recorded; None for checkpoints from
    elsewhere.
    """
    found = find(checkpoint, EPISODES)
    return files.read_json(next(iter(found.values()))) if found else None
