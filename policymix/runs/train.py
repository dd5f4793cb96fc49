"""Training: a config and a working directory in, a series of checkpoints out, resumed to the exact
step.
"""

import functools
import math
import pathlib
import time
from collections.abc import Sequence

import jax
import ml_collections

from policymix import files, memory, metrics, sharding, trees
from policymix.checkpoints import assets, keymaps, series, store
from policymix.data import loader
from policymix.models import lora, pi0, recognize
from policymix.runs import metadata, policies, workdirs
from policymix.runs import pipeline as pipeline_lib
from policymix.training import optimizers
from policymix.training import state as state_lib
from policymix.training.state import TrainState

_SECTIONS = ("model", "data", "train")  # of the config, as recorded beside a run
# What a resumed run may change without becoming another run.
_FREE = (
    *("num_steps", "log_every", "save_every", "keep_period", "max_to_keep", "fsdp_devices"),
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

    Leaves `WORKDIR/<step>/{params,train_state,assets}`, `config.json` and `metrics.jsonl`.
    `devices` are all there are unless given.

    Raises:
      ValueError, OSError: bad config, data or workdir. FloatingPointError: the loss is not finite.
    """
    config = metadata.complete(config, rate=True)
    model = policies.model_config(config, why="training")
    workdir = files.local(workdir)
    _check_settings(config.train)
    record = {section: config[section].to_dict() for section in _SECTIONS}
    workdirs.check(
        workdir,
        record,
        command="train.py",
        free=_FREE,
        inputs=(config.train.init_from, *config.data.path.split(","), config.data.norm_stats),
        overwrite=overwrite,
    )
    latest = None if overwrite else series.latest_step(workdir)
    resumed = None if latest is None else workdir / str(latest)
    pipeline = pipeline_lib.Pipeline(config, model, resumed)
    pipeline.check_trains()
    mesh = _mesh(config.train, devices)
    shapes = pi0.shapes(model)
    settings = _optimizer_settings(config, model)
    optimizer = _optimizer(model, *settings)
    rates = _learning_rates(config.train)
    start = functools.partial(state_lib.init, optimizer=optimizer, ema=config.train.ema_decay > 0)
    key = jax.random.key(config.train.seed)
    like = jax.eval_shape(start, shapes)
    places = sharding.parameters(mesh, like)
    _print_plan(config, model, pipeline, like, mesh, workdir)
    seen = pipeline.encoder.seen
    loss_fn = policies.loss_fn(seen, augment=config.data.augment)
    filled = None if resumed else _fill(config, model, like)
    if dry_run:
        jax.eval_shape(loss_fn, like.params, pipeline.batch(0, config.train.batch_size), key)
        print("dry run: nothing was computed, nothing was written")
        return None
    files.check_space(workdir, trees.nbytes(like))
    memory.keep_freed()
    if overwrite and workdir.exists():
        files.remove(workdir)
    workdirs.write(workdir, record)
    saved = series.Series(
        workdir, max_to_keep=config.train.max_to_keep, keep_period=config.train.keep_period or None
    )
    try:
        if resumed:
            state = saved.restore(like, places)
            print(f"resumed from step {latest} of {workdir}")
        else:
            params = _initial_params(filled, model, like, places, key)
            state = jax.jit(start, out_shardings=places)(params)
        step_fn = _compiled(
            model,
            seen,
            mesh,
            *_optimizer_settings(config, model),
            config.train.ema_decay,
            config.data.augment,
        )
        ancestor = resumed or config.train.init_from
        inherited = assets.trainings_of(ancestor) if ancestor else []
        beside = series.Assets(pipeline.norm_stats, [*pipeline.trainings(), *inherited])
        return _loop(config, workdir, pipeline, beside, mesh, saved, state, step_fn, rates)
    finally:
        saved.close()


def _loop(config, workdir, pipeline, beside, mesh, saved, state, step_fn, rates) -> TrainState:
    """The steps. Metrics are read one step late, so that the device never waits for the host."""
    # Apart from the key of init.
    root_key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
    first, last = int(state.step), config.train.num_steps
    if first >= last:
        print(f"step {first} is reached already; config.train.num_steps is {last}")
        return state
    writer = metrics.Writer(workdir, resume_step=first)
    pending, logged = None, (first, time.monotonic())
    place = functools.partial(sharding.put, place=sharding.batch(mesh))
    shard = (jax.process_index(), jax.process_count())
    made = pipeline.batches(first, last, config.train.batch_size, shard)
    steps = zip(range(first, last), loader.placed(made, place), strict=True)
    for step, batch in metrics.progress(steps, "training", total=last - first, lines=0):
        state, values = step_fn(state, batch, root_key, rates[step])
        if pending and (pending[0] % config.train.log_every == 0):
            logged = _log(writer, *pending, logged)
        pending = (step + 1, values)
        if (step + 1) % config.train.save_every == 0 or step + 1 == last:
            _check_finite(*pending)  # a diverged state is not worth keeping
            saved.save(state, beside)
    _log(writer, *pending, logged)
    writer.close()
    saved.wait()
    print(f"step {last} written to {workdir / str(last)}")
    return state


def _log(writer, step: int, values, last: tuple[int, float]) -> tuple[int, float]:
    """Writes a line; `last` is the step and the time of the one before."""
    _check_finite(step, values)
    now = time.monotonic()
    rate = (step - last[0]) / max(now - last[1], 1e-9)
    writer.write(step, dict(values) | {"steps_per_second": rate})
    return step, now


def _check_finite(step: int, values) -> None:
    if not math.isfinite(float(values["loss"])):
        raise FloatingPointError(
            f"the loss is {float(values['loss'])} at step {step}: lower "
            "config.train.learning_rate, or look for outliers in the data; the last checkpoint "
            "is intact"
        )


def _mesh(t: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None) -> jax.sharding.Mesh:
    mesh = sharding.mesh(t.fsdp_devices, devices)
    if t.batch_size % mesh.size:
        raise ValueError(
            f"config.train.batch_size is {t.batch_size}, which the {mesh.size} devices cannot "
            "share equally"
        )
    return mesh


def _check_settings(t: ml_collections.ConfigDict) -> None:
    """ValueError for numbers that no run can have, before anything is created."""
    for name in (
        "batch_size",
        "num_steps",
        "log_every",
        "save_every",
        "max_to_keep",
        "fsdp_devices",
    ):
        if t[name] < 1:
            raise ValueError(f"config.train.{name} is {t[name]}; at least 1 is needed")
    for name in ("seed", "warmup_steps", "keep_period", "weight_decay"):
        if not t[name] >= 0:
            raise ValueError(f"config.train.{name} is {t[name]}; it may not be negative")
    for name in ("learning_rate", "final_learning_rate", "clip_norm"):
        if not (0 <= t[name] < math.inf):
            raise ValueError(f"config.train.{name} is {t[name]}; expected a number of at least 0")
    if not 0 <= t.ema_decay < 1:
        raise ValueError(f"config.train.ema_decay is {t.ema_decay}; expected 0 (off) to below 1")


def _optimizer_settings(
    config: ml_collections.ConfigDict, model: pi0.Pi0Config
) -> tuple[float, float, tuple[str, ...]]:
    return config.train.weight_decay, config.train.clip_norm, _freeze(config, model)


def _freeze(config: ml_collections.ConfigDict, model: pi0.Pi0Config) -> tuple[str, ...]:
    """Regexes of what stays as it is; beside low-rank updates, what OpenPI keeps fixed."""
    return (*config.train.freeze, *pi0.freeze(model))


def _optimizer(
    model: pi0.Pi0Config, weight_decay: float, clip_norm: float, freeze: tuple[str, ...]
):
    optimizer = optimizers.adamw(weight_decay=weight_decay, clip_norm=clip_norm)
    return optimizers.freeze(optimizer, pi0.shapes(model), freeze)


@functools.cache
def _compiled(
    model: pi0.Pi0Config,
    seen: pi0.Pi0Config,
    mesh: jax.sharding.Mesh,
    weight_decay: float,
    clip_norm: float,
    freeze: tuple[str, ...],
    ema_decay: float,
    augment: bool,
):
    """The jitted step; runs of one process that differ in data or learning rate share it. `seen` is
    the model with the cameras that are there.
    """
    optimizer = _optimizer(model, weight_decay, clip_norm, freeze)
    start = functools.partial(state_lib.init, optimizer=optimizer, ema=ema_decay > 0)
    places = sharding.parameters(mesh, jax.eval_shape(start, pi0.shapes(model)))
    step_fn = functools.partial(
        state_lib.update,
        loss_fn=policies.loss_fn(seen, augment=augment),
        optimizer=optimizer,
        ema_decay=ema_decay,
        frozen=frozenset(optimizers.frozen_paths(pi0.shapes(model), freeze)),
    )
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))


def _learning_rates(t: ml_collections.ConfigDict):
    schedule = optimizers.schedule(
        learning_rate=t.learning_rate,
        final_learning_rate=t.final_learning_rate,
        warmup_steps=t.warmup_steps,
        decay_steps=t.decay_steps,
    )
    return optimizers.learning_rates(schedule, t.num_steps)


def _initial_params(filled: trees.Filled | None, model, like: TrainState, places: TrainState, key):
    """Parameters on their devices: loaded ones leaf by leaf, the others fresh."""
    init = jax.jit(functools.partial(pi0.init, model), out_shardings=places.params)
    if filled is None:
        return init(key)
    fresh = trees.flatten(init(key)) if filled.fresh else {}

    def put(path, leaf, shape, place):
        if path in fresh and path in filled.fresh:
            return fresh[path]
        return jax.device_put(leaf.read().astype(shape.dtype), place)

    return trees.map_with_path(put, filled.tree, like.params, places.params)


def _fill(
    config: ml_collections.ConfigDict, model: pi0.Pi0Config, like: TrainState
) -> trees.Filled | None:
    """The headers of config.train.init_from in the model's tree; says what comes from where."""
    if not config.train.init_from:
        print(f"all {len(jax.tree.leaves(like.params))} arrays are newly initialised")
        return None
    header = store.open_params(config.train.init_from, model.siglip_heads)
    may_miss = [*config.train.init_missing, lora.PARAMETERS]
    if "action_in_proj" not in header:  # a PaliGemma, whose vocabulary may be padded
        may_miss += keymaps.NOT_PALIGEMMA
        header = policies.cut_vocabulary(header, model.vocab_size)
    try:
        filled = trees.fill(like.params, header, may_miss=tuple(may_miss))
    except ValueError as error:
        kind = recognize.describe(header)
        raise ValueError(f"{config.train.init_from} holds {kind}; {error}") from error
    print(
        f"from {config.train.init_from}: {len(filled.loaded)} arrays loaded, {len(filled.fresh)} "
        f"newly initialised{_some(filled.fresh)}, {len(filled.ignored)} "
        f"ignored{_some(filled.ignored)}"
    )
    return filled


def _some(paths: list[str]) -> str:
    if not paths:
        return ""
    return f" ({', '.join(paths[:3])}{', …' if len(paths) > 3 else ''})"


def _print_plan(config, model, pipeline, like: TrainState, mesh, workdir: pathlib.Path) -> None:
    devices = mesh.devices.flat
    total = trees.num_params(like.params)
    frozen = optimizers.frozen_paths(like.params, _freeze(config, model))
    flat = trees.flatten(like.params)
    still = sum(math.prod(flat[path].shape) for path in frozen)
    size = trees.nbytes(like)
    data = "; ".join(
        f"data {source.dataset.path}: {len(source.train_episodes)} episodes to train on, "
        f"{len(source.held_out_episodes)} held out, {source.dataset.num_frames} frames in all"
        for source in pipeline.sources
    )
    print(
        f"{mesh.size} × {devices[0].device_kind} as {dict(mesh.shape)}; "
        f"{'π0.5' if model.pi05 else 'π0'} of "
        f"{total:,} parameters ({still:,} frozen), computed in {model.dtype}; state "
        f"{size / 1e6:,.1f} MB\n"
        f"{data}; norm stats from {pipeline.norm_stats_from}\n"
        f"{config.train.num_steps} steps of {config.train.batch_size}; checkpoints in {workdir}"
    )
