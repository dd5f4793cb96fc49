"""Training: a config and a working directory in, a series of checkpoints out, resumed to the exact
step.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

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
    plan = planned(config, workdir, devices=devices, overwrite=overwrite)
    config, update, pipeline = plan.config, plan.update, plan.pipeline
    _print_plan(plan)
    filled = None if plan.resumed else first_params.fill(config, plan.model)
    if dry_run:
        print(budget.table(plan.memory()))
        print("dry run: nothing was computed, nothing was written")
        yield None
        return
    _check_space(plan, overwrite=overwrite)
    memory.keep_freed()
    t, workdir = config.train, plan.workdir
    with (
        workdirs.taken(workdir, plan.record, overwrite=overwrite),
        contextlib.ExitStack() as opened,
    ):
        saved = series.Series(workdir, max_to_keep=t.max_to_keep, keep_period=t.keep_period or None)
        opened.callback(saved.close)
        if plan.resumed:
            state = saved.restore(plan.like, plan.places)
            print(f"resumed from step {plan.resumed.name} of {workdir}")
        else:
            key = jax.random.key(t.seed)
            params = first_params.place(filled, plan.model, update, plan.places.params, key)
            start = functools.partial(train_settings.start, update)
            state = jax.jit(start, out_shardings=plan.places, donate_argnums=0)(params)
        ancestor = plan.resumed or t.init_from
        inherited = assets.trainings_of(ancestor) if ancestor else []
        seen = pipeline.encoder.seen
        run = training_loop.Run(
            config=config,
            workdir=workdir,
            pipeline=pipeline,
            mesh=plan.mesh,
            step_fn=train_settings.compiled(update, plan.model, seen, plan.mesh),
            rates=plan.rates,
            saved=saved,
            beside=series.Assets(pipeline.norm_stats, [*pipeline.trainings(), *inherited]),
            held_out=_held_out(config, pipeline, plan.mesh),
        )
        yield run, state


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run before anything is computed or written.

    Attributes:
      record: of the config, what is kept beside the run; resumed: the step directory it goes on
        from, or None.
      rates: float32 [num_steps], the learning rate of each.
      like: the train state, of shapes; places: where it lies.
    """

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    model: pi0.Pi0Config
    update: train_settings.Update
    mesh: jax.sharding.Mesh
    rates: np.ndarray
    record: dict[str, Any]
    resumed: pathlib.Path | None
    pipeline: pipeline_lib.Pipeline
    like: TrainState
    places: TrainState

    def check_current(self) -> None:
        """FileExistsError if a run that has ended since then has gone further."""
        latest, planned = series.latest_step(self.workdir), self.resumed and int(self.resumed.name)
        if latest != planned:
            raise FileExistsError(
                f"{self.workdir} was at step {planned} and is at {latest} now: another run was "
                "still writing it; the same command again goes on from there"
            )

    def memory(self) -> dict[str, int]:
        """Bytes that a step needs on each device, by part. Of examples, two are looked at."""
        seen, size = self.pipeline.encoder.seen, self.config.train.batch_size
        return budget.parts(
            self.like,
            policies.loss_fn(seen, augment=self.update.augment),
            budget.with_rows(self.pipeline.batch(0, min(size, 2)), size),
            jax.random.key(self.config.train.seed),
            frozen=self.update.frozen,
            mesh=self.mesh,
            places=self.places,
            accumulate=self.update.accumulate,
        )


def planned(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    overwrite: bool = False,
) -> Plan:
    """What `train` would do. Raises as it does."""
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
    return Plan(
        config, workdir, model, update, mesh, rates, record, resumed, pipeline, like, places
    )


def _check_workdir(config, workdir: pathlib.Path, record, *, overwrite: bool) -> None:
    workdirs.check(
        workdir,
        record,
        command="train.py",
        free=_FREE,
        inputs=(config.train.init_from, *config.data.path.split(","), config.data.norm_stats),
        overwrite=overwrite,
    )


def _check_space(plan: Plan, *, overwrite: bool) -> None:
    """OSError without room for the checkpoints that soon lie there together, one of which is still
    being written; a WARNING without room for those that are kept for good besides.
    """
    t, workdir = plan.config.train, plan.workdir
    first = 0 if plan.resumed is None else int(plan.resumed.name)
    steps = training_loop.saved_steps(t, first)
    stay = [step for step in steps if t.keep_period and step % t.keep_period == 0]
    there = layout.steps_of(workdir) if workdir.exists() and not overwrite else []
    passing = [step for step in there if not t.keep_period or int(step) % t.keep_period]
    room = max(0, t.max_to_keep + 1 - len(passing))
    size = trees.nbytes(plan.like.policy_params) + trees.nbytes(plan.like.rest())
    freed = files.size(workdir) if overwrite and workdir.exists() else 0
    files.check_space(workdir, size * max(1, min(len(steps), room)) - freed)
    try:
        files.check_space(workdir, size * (len(stay) + min(len(steps) - len(stay), room)) - freed)
    except OSError as error:
        print(
            f"WARNING: with the {len(stay)} checkpoints that config.train.keep_period keeps for "
            f"good, {error}"
        )


def _held_out(config, pipeline, mesh) -> held_out.HeldOut | None:
    if not config.train.eval_every:
        return None
    found = held_out.HeldOut(config, pipeline.encoder.seen, pipeline, mesh)
    return found if found else None


def _print_plan(plan: Plan) -> None:
    flat = trees.flatten(pi0.shapes(plan.model))
    still = sum(math.prod(flat[path].shape) for path in plan.update.frozen)
    data = "; ".join(
        f"data {source.dataset.path}: {len(source.train_episodes)} episodes to train on, "
        f"{len(source.held_out_episodes)} held out, {source.dataset.num_frames} frames in all"
        for source in plan.pipeline.sources
    )
    t, mesh = plan.config.train, plan.mesh
    print(
        f"{mesh.size} × {mesh.devices.flat[0].device_kind} as {dict(mesh.shape)}; "
        f"{'π0.5' if plan.model.pi05 else 'π0'} of {trees.num_params(flat):,} parameters "
        f"({still:,} frozen, kept in {plan.update.frozen_dtype}), computed in "
        f"{plan.model.dtype}; state {trees.nbytes(plan.like) / 1e6:,.1f} MB\n"
        f"{data}; norm stats from {plan.pipeline.norm_stats_from}\n"
        f"{t.num_steps} steps of {t.batch_size} by {t.optimizer}; checkpoints in {plan.workdir}"
    )
