"""Validation files from episodes that training never saw."""

import pathlib

import ml_collections

from policymix import files
from policymix.checkpoints import assets
from policymix.data import validation
from policymix.runs import encoding, metadata, policies
from policymix.runs import pipeline as pipeline_lib


def dump(
    config: ml_collections.ConfigDict,
    output: pathlib.Path,
    *,
    num_batches: int = 50,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Writes up to `num_batches` batches from the held-out episodes of config.data.

    Selection and held-out batches come from different episodes, config.mix.held_out of them for the
    latter; with a single episode every batch is for selection, and the file says so.

    Raises:
      ValueError, OSError: bad config or data, too few held-out frames for one batch, or output that
        exists.
    """
    if num_batches < 1:
        raise ValueError(f"--num_batches is {num_batches}; at least 1 is needed")
    files.check_output(output, overwrite=overwrite, ours=pathlib.Path.is_file)
    config = metadata.complete(config, rate=True)
    model = policies.model_config(config, why="a validation file")
    pipeline = pipeline_lib.Pipeline(config, model)
    if len(pipeline.sources) > 1:
        raise ValueError(
            f"config.data.path names {len(pipeline.sources)} datasets; a validation file is of one"
        )
    ((asset_id, stats),) = pipeline.norm_stats.items()
    dataset, episodes = pipeline.sources[0].dataset, pipeline.sources[0].held_out_episodes
    selection, held_out = pipeline.validation(
        batch_size=config.train.batch_size, num_batches=num_batches, held_out=config.mix.held_out
    )
    selection, held_out = (
        [b.replace(observation=encoding.masked(model, b.observation)) for b in batches]
        for batches in (selection, held_out)
    )
    meta = {
        "path": str(dataset.path),
        "fingerprint": dataset.fingerprint(),
        "episodes": episodes,
        "asset_id": asset_id,
    } | assets.norm_stats_json(stats)
    print(
        f"{dataset.path}: {len(selection)} batches of {config.train.batch_size} to "
        f"select on and {len(held_out)} held out, from the episodes {episodes}; "
        f"norm stats from {pipeline.norm_stats_from}"
    )
    if dry_run:
        print("dry run: nothing was written")
        return
    validation.save(output, selection, held_out, meta)
    print(f"written to {output}")
