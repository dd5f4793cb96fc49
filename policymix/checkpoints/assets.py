"""What lies beside a checkpoint's parameters: norm stats, and the episodes it was trained on."""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from policymix import files
from policymix.checkpoints import layout, processors, safetensors
from policymix.transforms.normalize import FIELDS, NormStats, Stats

NORM_STATS = "norm_stats.json"
EPISODES = "episodes.json"


def read_norm_stats(path: pathlib.Path) -> Stats:
    """OpenPI's norm_stats.json → {"state": NormStats, "actions": NormStats}."""
    if not path.is_file():
        raise FileNotFoundError(f"norm stats {path} do not exist")
    return parse_norm_stats(files.read_json(path), str(path))


def parse_norm_stats(content: Any, where: str) -> Stats:
    """{"norm_stats": …} as JSON gives it → statistics. ValueError says `where` it was wrong."""
    try:
        return {
            key: NormStats(*(_array(entry.get(field)) for field in FIELDS))
            for key, entry in content["norm_stats"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{where}: expected {{'norm_stats': {{'state': {{mean, std, q01, q99}}, 'actions': "
            f"…}}}} ({error})"
        ) from error


def _array(values: Any) -> np.ndarray | None:
    if values is None:
        return None
    array = np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError("a statistic is NaN or infinite")
    return array


def norm_stats_json(stats: Stats) -> dict[str, Any]:
    """OpenPI's schema, numbers with all their digits."""
    return {
        "norm_stats": {
            key: {
                field: None
                if (values := getattr(entry, field)) is None
                else np.asarray(values).tolist()
                for field in FIELDS
            }
            for key, entry in stats.items()
        }
    }


def write_norm_stats(path: pathlib.Path, stats: Stats) -> None:
    """Writes norm_stats.json in OpenPI's schema."""
    files.write_json(path, norm_stats_json(stats))


def find(checkpoint: str | os.PathLike, name: str) -> dict[str, pathlib.Path]:
    """Files called `name` beside a checkpoint, by asset id; "" where it lies beside the step.

    Looks into `assets/<asset_id>/` of the step (ids may contain slashes), then beside the
    parameters, then into the step's parent, which is kai0's place.
    """
    step = layout.directory_of(checkpoint)
    root = step / "assets"
    found = {str(p.parent.relative_to(root)): p for p in sorted(root.rglob(name))}
    for beside in (step / name, step.parent / name):
        if not found and beside.is_file():
            found = {"": beside}
    return found


def norm_stats_of(
    checkpoint: str | os.PathLike, asset_id: str | None = None
) -> tuple[str, Stats] | None:
    """(asset id, norm stats), None if there are none; `asset_id` chooses among several.

    Those of OpenPI come first, then those that LeRobot keeps with its processors, or kept among
    the model's tensors.
    """
    found = find(checkpoint, NORM_STATS)
    if not found:
        stats = _lerobots(checkpoint)
        return None if stats is None else (asset_id or "mixed", stats)
    if asset_id in found:
        return asset_id, read_norm_stats(found[asset_id])
    if len(found) > 1:
        raise ValueError(
            f"{checkpoint} has norm stats for {', '.join(found)}; choose one with "
            "--config.data.asset_id"
        )
    ((name, path),) = found.items()
    return name or asset_id or "mixed", read_norm_stats(path)


def _lerobots(checkpoint: str | os.PathLike) -> Stats | None:
    directory = layout.directory_of(checkpoint)
    if stats := processors.read(directory):
        return stats
    try:
        place = layout.find(checkpoint)
    except (ValueError, OSError):
        return None
    if place.kind != "safetensors":
        return None
    return processors.read_buffers(safetensors.open_tensors(place.params)[0])


def trainings_of(checkpoint: str | os.PathLike) -> list[dict[str, Any]]:
    """What a checkpoint and its ancestors were trained on: [{"fingerprint", "episodes", "path"}].

    Training writes its own episodes and inherits those of the checkpoint it started from; a mix
    inherits those of its inputs. Empty for checkpoints from elsewhere.
    """
    found = []
    for path in find(checkpoint, EPISODES).values():
        content = files.read_json(path)
        try:
            found += merge_trainings(content["trainings"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected {{'trainings': [{{fingerprint, episodes, path}}, …]}} ({error})"
            ) from error
    return merge_trainings(found)


def merge_trainings(trainings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per dataset, with all of its episodes that occur."""
    merged: dict[str, dict[str, Any]] = {}
    for training in trainings:
        known = merged.setdefault(training["fingerprint"], training | {"episodes": []})
        known["episodes"] = sorted({*known["episodes"], *training["episodes"]})
    return list(merged.values())


def write_episodes(path: pathlib.Path, trainings: Iterable[dict[str, Any]]) -> None:
    """Writes episodes.json; several accounts of one dataset become one."""
    files.write_json(path, {"trainings": merge_trainings(trainings)})
