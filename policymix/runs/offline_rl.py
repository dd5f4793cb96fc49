"""Chunk-level offline reinforcement learning: a config and a working directory in, a series of
checkpoints out, resumed to the exact step, noise and batch.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from policymix import distributed, files, memory, metrics, sharding, trees
from policymix.checkpoints import assets, series, store
from policymix.data import loader
from policymix.rl import learner as learner_lib
from policymix.rl.config import LearnerConfig
from policymix.rl.state import State
from policymix.runs import (
    chunk_policies,
    learners,
    metadata,
    policies,
    proposals,
    rollouts,
    transitions,
    workdirs,
)

# What a resumed run may change without becoming another run.
_FREE = (
    *("num_steps", "num_epochs", "log_every", "save_every", "keep_period", "max_to_keep"),
    *("rollout_every", "updates_per_call", "num_threads", "num_processes", "cache_mb"),
)
_LEAST_EFFECTIVE = 0.1  # of a batch; below it a policy learns from a few of its chunks


@dataclasses.dataclass(frozen=True)
class _Plan:
    """When a run does what, in steps."""

    last: int
    log_every: int
    save_every: int
    rollout_every: int
    keep_period: int
    per_epoch: int

    def due(self, step: int, every: int) -> bool:
        """Whether something that is done every so many steps, 0: never, is done after this one."""
        return every > 0 and (step % every == 0 or step == self.last)

    def calls(self, first: int, most: int) -> Iterator[tuple[int, int]]:
        """(step, updates of the call that begins there): at most `most`, and none goes past a step
        at which something is to be done.
        """
        stops = [n for n in (self.log_every, self.save_every, self.rollout_every) if n]
        while first < self.last:
            end = min([self.last, first + most] + [(first // n + 1) * n for n in stops])
            yield first, end - first
            first = end


def train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> State | None:
    """Trains critic, value and policy on chunks of config.data, as config.offline_rl says, from the
    latest checkpoint in `workdir` if there is one.

    Leaves `WORKDIR/<step>/{params,train_state,assets}`, `config.json` and `metrics.jsonl`; the
    params hold every network, and act in evaluate.py.

    Raises:
      ValueError, OSError: bad config, data or workdir. FloatingPointError: a loss is not finite.
    """
    asked, config, workdir = config, learners.complete(config), files.local(workdir)
    learner = learners.settings(config)
    _check_settings(config)
    record = learners.record(config, learner)
    _check_workdir(config, workdir, record, overwrite=overwrite)
    latest = None if overwrite else series.latest_step(workdir)
    resumed = None if latest is None else workdir / str(latest)
    data = transitions.Transitions(config, learner, resumed)
    plan = _plan(config.offline_rl, data)
    mesh = sharding.mesh(1, devices)
    _check_batch(config.offline_rl.batch_size, mesh)
    start = functools.partial(learner_lib.init, learner)
    like = jax.eval_shape(start, jax.random.key(0))
    header = None if resumed else _open_start(config.offline_rl.init_from, learner)
    proposing = _Proposing(asked, config, data) if config.offline_rl.proposals else None
    if plan.rollout_every:
        acting = chunk_policies.Live(str(workdir), learner, {}, data.encoder)
        rollouts.check_playable(config, acting)
    _print_plan(config, learner, data, plan, like, mesh, workdir)
    if dry_run:
        if not proposing:  # which a dry run does not let propose
            example = data.batch(0, config.offline_rl.batch_size)
            update = functools.partial(learner_lib.update, learner)
            jax.eval_shape(update, like, example, jax.random.key(0))
        print("dry run: nothing was computed, nothing was written")
        return None
    files.check_space(workdir, trees.nbytes(like))
    memory.keep_freed()
    r = config.offline_rl
    with workdirs.taken(workdir, record, overwrite=overwrite), contextlib.ExitStack() as opened:
        if proposing:
            data.propose(proposing.made(workdir))
        keep_period = plan.keep_period or None
        saved = series.Series(workdir, max_to_keep=r.max_to_keep, keep_period=keep_period)
        opened.callback(saved.close)
        places = jax.tree.map(lambda _: sharding.replicated(mesh), like)
        if resumed:
            state = saved.restore(like, places)
            print(f"resumed from step {latest} of {workdir}")
        else:
            state = jax.jit(start, out_shardings=places)(jax.random.key(r.seed))
            state = _started(state, header, places)
        ancestor = resumed or r.init_from
        inherited = assets.trainings_of(ancestor) if ancestor else []
        beside = series.Assets(data.norm_stats, [*data.trainings(), *inherited])
        run = _Run(config, learner, data, plan, mesh, workdir)
        return run.go(state, saved, beside)


class _Run:
    """The steps of a run. Metrics are read one call late, so that the device never waits."""

    def __init__(self, config, learner: LearnerConfig, data, plan: _Plan, mesh, workdir):
        self._config, self._learner, self._data = config, learner, data
        self._plan, self._mesh, self._workdir = plan, mesh, workdir
        self._warned = False
        self._held_out = data.held_out_batch(config.offline_rl.batch_size)

    def go(self, state: State, saved: series.Series, beside: series.Assets) -> State:
        """Steps until the last, and saves on the way."""
        r, plan = self._config.offline_rl, self._plan
        first = int(state.step)
        if first >= plan.last:
            print(f"step {first} is reached already; the run ends at {plan.last}")
            return state
        root_key = jax.random.fold_in(jax.random.key(r.seed), 1)  # apart from the key of init
        pending, logged, end = None, (first, time.monotonic()), first
        calls = list(plan.calls(first, r.updates_per_call))
        update = _compiled(self._learner, self._mesh)
        made = self._batches(first, calls)
        with (
            metrics.Writer(self._workdir, resume_step=first, num_steps=plan.last) as writer,
            distributed.Stop(first) as stop,
            metrics.Progress("training", plan.last - first, lines=0) as shown,
        ):
            for (step, count), batch in zip(calls, made, strict=True):
                state, values = update(state, batch, root_key)
                if pending:
                    logged = self._tell(writer, *pending, logged)
                end = step + count
                pending = (end, values)
                stopping = stop.requested(end)
                saves = stopping or plan.due(end, plan.save_every)
                plays = not stopping and plan.due(end, plan.rollout_every)
                if saves or plays:  # a diverged state is not worth keeping
                    logged, pending = self._tell(writer, *pending, logged), None
                if saves:
                    saved.save(state, beside)
                    self._judge(writer, end, state, root_key)
                if plays:
                    writer.write(end, self._roll_out(state.params))
                shown.step(count)
                if stopping:
                    print(f"stopped after step {end} of {plan.last}: the same command goes on")
                    break
            saved.wait()
        print(f"step {end} written to {self._workdir / str(end)}")
        return state

    def _batches(self, first: int, calls: Sequence[tuple[int, int]]) -> Iterator[Any]:
        """A stack of batches for each call, placed on the devices ahead of it."""
        shard = (jax.process_index(), jax.process_count())
        r = self._config.offline_rl
        made = self._data.batches(first, self._plan.last, r.batch_size, shard)
        place = functools.partial(sharding.put, place=_stacked(self._mesh))
        stacks = (
            jax.tree.map(lambda *rows: np.stack(rows), *itertools.islice(made, count))
            for _, count in calls
        )
        return loader.placed(stacks, place)

    def _tell(self, writer, step: int, values, last: tuple[int, float]) -> tuple[int, float]:
        """Writes a line where one is due; `last` is the step and the time of the one before."""
        _check_finite(step, values, last[0])
        if not self._plan.due(step, self._plan.log_every):
            return last
        now = time.monotonic()
        rate = (step - last[0]) / max(now - last[1], 1e-9)
        told = {"epoch": step / self._plan.per_epoch, "steps_per_second": rate}
        writer.write(step, dict(values) | told)
        effective = float(values.get("policy/effective_batch", 1.0))
        if effective < _LEAST_EFFECTIVE and not self._warned:
            self._warned = True
            print(
                f"WARNING: at step {step} the policy learns from {effective:.1%} of its batch "
                "(policy/effective_batch): raise config.offline_rl.temperature, or lower max_weight"
            )
        return step, now

    def _judge(self, writer, step: int, state: State, root_key: jax.Array) -> None:
        """Writes the metrics of an update on held-out chunks that is not made."""
        if self._held_out is None:
            return
        told = _judged(self._learner)(state, self._held_out, root_key)
        kept = {f"held_out/{k}": v for k, v in told.items() if not k.endswith("grad_norm")}
        writer.write(step, kept)

    def _roll_out(self, params) -> dict[str, float]:
        """Success in the simulator of config.evaluate."""
        name = str(self._workdir)
        policy = chunk_policies.Live(name, self._learner, params, self._data.encoder)
        return rollouts.play(policy, self._config)


@functools.cache
def _compiled(learner: LearnerConfig, mesh: jax.sharding.Mesh):
    """The jitted call: some updates, one after another."""
    place = sharding.replicated(mesh)
    update = functools.partial(learner_lib.update_many, learner)
    return jax.jit(update, donate_argnums=0, out_shardings=(place, place))


@functools.cache
def _judged(learner: LearnerConfig):
    """The metrics of an update that is not made."""
    return jax.jit(lambda *args: learner_lib.update(learner, *args)[1])


def _stacked(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Examples, the second axis, split over all devices."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, sharding.AXES))


def _check_finite(step: int, values, last: int) -> None:
    if not math.isfinite(float(values["loss"])):
        wrong = [name for name, value in values.items() if not math.isfinite(float(value))]
        raise FloatingPointError(
            f"{', '.join(wrong)} not finite at step {step} (steps {last + 1} to {step} are "
            "suspect): lower config.offline_rl.learning_rate or entropy_temperature, or raise "
            "temperature; the last checkpoint is intact"
        )


def _plan(r: ml_collections.ConfigDict, data: transitions.Transitions) -> _Plan:
    per_epoch = data.steps_per_epoch(r.batch_size)
    unit = per_epoch if r.num_epochs else 1
    return _Plan(
        last=r.num_epochs * per_epoch or r.num_steps,
        log_every=r.log_every,
        save_every=r.save_every * unit,
        rollout_every=r.rollout_every * unit,
        keep_period=r.keep_period * unit,
        per_epoch=per_epoch,
    )


def _open_start(name: str, learner: LearnerConfig):
    """The headers of what training starts from. ValueError if they are another learner's."""
    if not name:
        return None
    header = store.open_params(name)
    chunk_policies.check(learner, header, name)
    return header


def _started(state: State, header, places: State) -> State:
    """A fresh state, or one that starts at the parameters of a checkpoint, targets too."""
    if header is None:
        return state
    params = jax.device_put(policies.read_params(header), places.params)
    targets = {name: jax.tree.map(lambda x: x.copy(), params[name]) for name in state.targets}
    return state.replace(params=params, targets=targets)


class _Proposing:
    """What config.offline_rl.proposals, a checkpoint, proposes for every frame."""

    def __init__(self, asked: ml_collections.ConfigDict, config, data: transitions.Transitions):
        """Nothing is made yet. ValueError or OSError for a checkpoint that cannot propose.

        Args:
          asked: the config as it was given, whose section `data` is the proposing policy's.
        """
        r = config.offline_rl
        self._data = data
        asked = metadata.complete(asked, checkpoints=(r.proposals,))
        self._propose = functools.partial(
            proposals.propose,
            asked,
            policies.model_config(asked, why="config.offline_rl.proposals"),
            r.proposals,
            horizon=r.action_horizon,
            num_proposals=r.num_proposals,
            seed=r.seed,
        )
        for source in data.sources:
            self._propose(source, directory=None)

    def made(self, workdir: pathlib.Path) -> list[proposals.Normalized]:
        """Dataset by dataset: made here, or found where an earlier run left them."""
        return [
            proposals.Normalized(
                self._propose(source, directory=workdir / "proposals" / str(number)),
                self._data.encoder,
                source,
            )
            for number, source in enumerate(self._data.sources)
        ]


def _check_settings(config: ml_collections.ConfigDict) -> None:
    """ValueError for numbers that no run can have, before anything is created."""
    r = config.offline_rl
    for name in (
        "batch_size", "num_steps", "log_every", "save_every", "max_to_keep", "updates_per_call",
        "num_proposals",
    ):  # fmt: skip
        if r[name] < 1:
            raise ValueError(f"config.offline_rl.{name} is {r[name]}; at least 1 is needed")
    for name in ("seed", "num_epochs", "keep_period", "rollout_every"):
        if r[name] < 0:
            raise ValueError(f"config.offline_rl.{name} is {r[name]}; it may not be negative")
    if r.chunk_source == "policy" and not r.proposals:
        raise ValueError(
            "config.offline_rl.chunk_source is 'policy', which needs the checkpoint that proposes "
            "chunks: name it with config.offline_rl.proposals"
        )
    if r.seed >= 2**32:
        raise ValueError(f"config.offline_rl.seed is {r.seed}; seeds end at {2**32 - 1}")


def _check_batch(batch_size: int, mesh: jax.sharding.Mesh) -> None:
    if batch_size % mesh.size:
        raise ValueError(
            f"config.offline_rl.batch_size is {batch_size}, which the {mesh.size} devices cannot "
            "share equally"
        )


def _check_workdir(config, workdir: pathlib.Path, record, *, overwrite: bool) -> None:
    r, data = config.offline_rl, config.data
    workdirs.check(
        workdir,
        record,
        command="offline_rl.py",
        free=_FREE,
        inputs=(r.init_from, r.proposals, *data.path.split(","), data.norm_stats),
        overwrite=overwrite,
    )


def _print_plan(config, learner, data, plan: _Plan, like: State, mesh, workdir) -> None:
    device = mesh.devices.flat[0].device_kind
    sizes = ", ".join(f"{name} {trees.num_params(p):,}" for name, p in like.params.items())
    print(
        f"{mesh.size} × {device}; {learner.algorithm}, {learner.policy} policy, chunks of "
        f"{learner.action_horizon} actions of {learner.action_dim} numbers; parameters: {sizes}; "
        f"computed in {learner.dtype}; state {trees.nbytes(like) / 1e6:,.1f} MB",
        *data.describe(),
        f"norm stats from {data.norm_stats_from}",
        f"{plan.last} steps of {config.offline_rl.batch_size}, {plan.per_epoch} per epoch; "
        f"checkpoints in {workdir}",
        sep="\n",
    )
