"""Training: a config and a working directory in, a series of checkpoints out, resumed to the exact
step.
"""

import contextlib
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence

import jax
import ml_collections

from policymix import distributed, files, memory, trees
from policymix.checkpoints import assets, layout, series
from policymix.models import pi0
from policymix.runs import (
    budget,
    first_params,
    held_out,
    metadata,
    policies,
    rollouts,
    train_settings,
    training_loop,
    workdirs,
)
from policymix.runs import pipeline as pipeline_lib
from policymix.training.state import TrainState

_SECTIONS = ("model", "data", "train")  # of the config, as recorded beside a run
# What a resumed run may change without becoming another run.
_FREE = (
    *("num_steps", "log_every", "save_every", "keep_period", "max_to_keep", "eval_every"),
    *("eval_batches", "rollout_every", "tensorboard", "wandb", "fsdp_devices", "shard", "offload"),
    *("num_threads", "num_processes", "cache_mb"),
)


def train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> TrainState | None:
    """Trains until config.train.num_steps, from the latest checkpoint in `workdir` if there is one.

    Leaves `WORKDIR/<step>/{params,train_state,assets}`, `config.json`, `metrics.jsonl`,
    `report.html` and, unless config.train.tensorboard is off, `tensorboard/`. SIGTERM ends it after
    the step that is being done, which is saved. `devices` are all there are unless given.

    Raises:
      ValueError, OSError: bad config, data or workdir. FloatingPointError: the loss is not finite.
    """
    with prepared(config, workdir, devices=devices, overwrite=overwrite, dry_run=dry_run) as ready:
        return training_loop.go(*ready) if ready else None


@contextlib.contextmanager
def prepared(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Iterator[tuple[training_loop.Run, TrainState] | None]:
    """All that `train` does before its first step: what `training_loop.go` takes; None for
    `dry_run`.
    """
    config = metadata.complete(config, rate=True)
    model = policies.model_config(config, why="training")
    workdir = files.local(workdir)
    update = train_settings.update_of(config, model)
    mesh = train_settings.mesh_of(config.train, devices)
    rates = train_settings.learning_rates(config.train)
    record = {section: config[section].to_dict() for section in _SECTIONS}
    _check_workdir(config, workdir, record, overwrite=overwrite)
    latest = None if overwrite else series.latest_step(workdir)
    distributed.agreed(json.dumps(record, sort_keys=True), "the config")
    distributed.agreed(latest, f"the latest step in {workdir}")
    resumed = None if latest is None else workdir / str(latest)
    pipeline = pipeline_lib.Pipeline(config, model, resumed)
    pipeline.check_trains()
    if config.train.rollout_every:
        rollouts.check_playable(config, policies.Live(str(workdir), {}, pipeline.encoder))
    like = train_settings.state_shapes(update, model)
    places = train_settings.state_places(update, mesh, like)
    _print_plan(config, model, update, pipeline, like, mesh, workdir)
    filled = None if resumed else first_params.fill(config, model)
    key = jax.random.key(config.train.seed)
    if dry_run:
        _print_budget(config, update, pipeline, like, places, mesh, key)
        print("dry run: nothing was computed, nothing was written")
        yield None
        return
    _check_space(config, workdir, like, overwrite=overwrite)
    memory.keep_freed()
    t = config.train
    with workdirs.taken(workdir, record, overwrite=overwrite), contextlib.ExitStack() as opened:
        saved = series.Series(workdir, max_to_keep=t.max_to_keep, keep_period=t.keep_period or None)
        opened.callback(saved.close)
        if resumed:
            state = saved.restore(like, places)
            print(f"resumed from step {latest} of {workdir}")
        else:
            params = first_params.place(filled, model, update, places.params, key)
            start = functools.partial(train_settings.start, update)
            state = jax.jit(start, out_shardings=places, donate_argnums=0)(params)
        ancestor = resumed or t.init_from
        inherited = assets.trainings_of(ancestor) if ancestor else []
        run = training_loop.Run(
            config=config,
            workdir=workdir,
            pipeline=pipeline,
            mesh=mesh,
            step_fn=train_settings.compiled(update, model, pipeline.encoder.seen, mesh),
            rates=rates,
            saved=saved,
            beside=series.Assets(pipeline.norm_stats, [*pipeline.trainings(), *inherited]),
            held_out=_held_out(config, pipeline, mesh),
        )
        yield run, state


def _check_workdir(config, workdir: pathlib.Path, record, *, overwrite: bool) -> None:
    workdirs.check(
        workdir,
        record,
        command="train.py",
        free=_FREE,
        inputs=(config.train.init_from, *config.data.path.split(","), config.data.norm_stats),
        overwrite=overwrite,
    )


def _check_space(config, workdir: pathlib.Path, like: TrainState, *, overwrite: bool) -> None:
    """While a checkpoint is written the ones before it stay."""
    size = trees.nbytes(like.policy_params) + trees.nbytes(like.rest())
    there = len(layout.steps_of(workdir)) if workdir.exists() and not overwrite else 0
    files.check_space(workdir, size * max(1, config.train.max_to_keep + 1 - there))


def _held_out(config, pipeline, mesh) -> held_out.HeldOut | None:
    if not config.train.eval_every:
        return None
    found = held_out.HeldOut(config, pipeline.encoder.seen, pipeline, mesh)
    return found if found else None


def _print_plan(config, model, update, pipeline, like: TrainState, mesh, workdir) -> None:
    devices = mesh.devices.flat
    total = trees.num_params(pi0.shapes(model))
    flat = trees.flatten(pi0.shapes(model))
    still = sum(math.prod(flat[path].shape) for path in update.frozen)
    data = "; ".join(
        f"data {source.dataset.path}: {len(source.train_episodes)} episodes to train on, "
        f"{len(source.held_out_episodes)} held out, {source.dataset.num_frames} frames in all"
        for source in pipeline.sources
    )
    t = config.train
    print(
        f"{mesh.size} × {devices[0].device_kind} as {dict(mesh.shape)}; "
        f"{'π0.5' if model.pi05 else 'π0'} of {total:,} parameters ({still:,} frozen, kept in "
        f"{update.frozen_dtype}), computed in {model.dtype}; state "
        f"{trees.nbytes(like) / 1e6:,.1f} MB\n"
        f"{data}; norm stats from {pipeline.norm_stats_from}\n"
        f"{t.num_steps} steps of {t.batch_size} by {t.optimizer}; checkpoints in {workdir}"
    )


def _print_budget(config, update, pipeline, like: TrainState, places, mesh, key) -> None:
    """What a step needs, of shapes: of examples, two are looked at."""
    loss_fn = policies.loss_fn(pipeline.encoder.seen, augment=update.augment)
    size = config.train.batch_size
    batch = budget.with_rows(pipeline.batch(0, min(size, 2)), size)
    parts = budget.parts(
        like,
        loss_fn,
        batch,
        key,
        frozen=update.frozen,
        mesh=mesh,
        places=places,
        accumulate=update.accumulate,
    )
    print(budget.table(parts))
