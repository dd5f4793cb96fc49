"""Normalisation statistics of the data that training sees, as a file of their own."""

import pathlib

import ml_collections
import numpy as np

from policymix import files
from policymix.checkpoints import assets
from policymix.reports import tables
from policymix.runs import encoding, metadata, policies
from policymix.runs import pipeline as pipeline_lib
from policymix.transforms import normalize


def write(
    config: ml_collections.ConfigDict,
    output: pathlib.Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> normalize.Stats:
    """Computes the statistics of config.data's training episodes and writes norm_stats.json.

    Statistics that the config names elsewhere (data.norm_stats, train.init_from) are passed over.

    Args:
      output: a file that ends in .json, else the directory to put norm_stats.json into.

    Raises:
      ValueError, OSError: bad config or data, or output that exists.
    """
    path = files.local(output)
    path = path if path.suffix == ".json" and not path.is_dir() else path / assets.NORM_STATS
    files.check_output(path, overwrite=overwrite, ours=_is_norm_stats)
    config = metadata.complete(config, rate=True).copy_and_resolve_references()
    model = policies.model_config(config, why="the length of action chunks")
    if config.data.held_out == 1:
        raise ValueError(
            "config.data.held_out is 1, which leaves no training episodes to take statistics from: "
            "lower it"
        )
    config.data.norm_stats = config.train.init_from = ""
    # Statistics need no pictures.
    config.data.cameras = dict.fromkeys(model.image_keys, encoding.ABSENT)
    pipeline = pipeline_lib.Pipeline(config, model)
    if len(pipeline.norm_stats) > 1:
        raise ValueError(
            f"the mixture {config.data.mixture!r} has statistics of its own for each of "
            f"{', '.join(pipeline.norm_stats)}: training computes them; or name one dataset with "
            "config.data.path"
        )
    (stats,) = pipeline.norm_stats.values()
    print(describe(stats))
    if dry_run:
        print("dry run: nothing was written")
        return stats
    assets.write_norm_stats(path, stats)
    print(f"written to {path}")
    return stats


def describe(stats: normalize.Stats) -> str:
    """A line per dimension, and a warning that names those that never change."""
    rows, constant = [], []
    for key, entry in stats.items():
        for d, values in enumerate(_by_dimension(entry)):
            rows.append([f"{key}[{d}]", *(f"{value:.6g}" for value in values)])
        constant += [f"{key}[{d}]" for d in normalize.constant_dims(entry)]
    table = tables.table(rows, ["", *normalize.FIELDS])
    if not constant:
        return table
    return (
        f"{table}\nWARNING: {', '.join(constant)} never change in these episodes; whatever else "
        "they are at the robot will be normalised to huge numbers"
    )


def _by_dimension(entry: normalize.NormStats) -> np.ndarray:
    """[d, 4], in the order of normalize.FIELDS."""
    return np.stack([getattr(entry, field) for field in normalize.FIELDS], axis=1)


def _is_norm_stats(path: pathlib.Path) -> bool:
    try:
        assets.read_norm_stats(path)
    except (ValueError, OSError):
        return False
    return True
