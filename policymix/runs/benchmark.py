"""The rows of `make bench`: ours and a straightforward program, interleaved on the same machine."""

import dataclasses
import functools
import multiprocessing
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from policymix import memory, processes, trees
from policymix.checkpoints import store, streaming
from policymix.mixing import objective as objective_lib
from policymix.models import flow, pi0
from policymix.reports import tables
from policymix.runs import policies, rollouts
from policymix.sim import envs, workers
from policymix.structs import Batch
from policymix.training import optimizers
from policymix.training import state as training
from policymix.transforms import normalize

_REPEATS = 3
_STEPS, _EPISODES, _EPISODE_STEPS = 50, 100, 64
_LEAVES, _ELEMENTS = 16, 4 * 2**20  # 16 leaves of 16 MB: a checkpoint of 268 MB


class Measurement(NamedTuple):
    """Medians of one side of a row; memory is None where both sides share a process."""

    wall: float
    cpu: float
    peak: int | None = None


def run(config: pi0.Pi0Config, small: ml_collections.ConfigDict, rows: Sequence[str]) -> str:
    """Measures the named rows, or all, on freshly initialised models; returns the table.

    Args:
      config: the model of `gradient` and `sampling`; small: the policy of `training` and
        `rollouts`, whole.
    """
    chosen = rows or list(ROWS)
    if unknown := [row for row in chosen if row not in ROWS]:
        raise ValueError(f"--rows: {unknown[0]!r} is not a row; there are {', '.join(ROWS)}")
    lines = []
    for row in chosen:
        ours, theirs = ROWS[row](small if row in ("training", "rollouts") else config)
        lines.append(
            [
                row,
                f"{ours.wall:.3f} / {theirs.wall:.3f}",
                f"{ours.cpu:.3f} / {theirs.cpu:.3f}",
                f"{theirs.wall / ours.wall:.2f} ×",
                "" if ours.peak is None else f"{ours.peak / 1e6:.0f} / {theirs.peak / 1e6:.0f}",
            ]
        )
    header = ["ours / straightforward", "wall s", "CPU s", "faster", "peak MB"]
    device = jax.devices()[0]
    told = f"{device.device_kind} ({device.platform}), medians of {_REPEATS}"
    return f"{told}\n{tables.table(lines, header)}"


def _interleaved(*sides: Callable[[], Measurement]) -> tuple[Measurement, ...]:
    runs = [[side() for side in sides] for _ in range(_REPEATS)]
    return tuple(
        Measurement(
            *(None if v[0] is None else statistics.median(v) for v in zip(*side, strict=True))
        )
        for side in zip(*runs, strict=True)
    )


def _here(function: Callable[[], jax.Array]) -> Callable[[], Measurement]:
    """Times a call in this process; the first, which compiles, is not counted."""
    jax.block_until_ready(function())

    def measure():
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        return Measurement(time.perf_counter() - wall, time.process_time() - cpu)

    return measure


def _apart(function: Callable[..., None], *args) -> Callable[[], Measurement]:
    """Times a call in a process of its own, whose peak memory is then that call's."""

    def measure():
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, function, args))
        process.start()
        sender.close()
        try:
            return Measurement(*receiver.recv())
        except EOFError:
            raise OSError(f"the process of {function.__name__} died (out of memory?)") from None
        finally:
            process.join()

    return measure


def _child(sender, function, args) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    function(*args)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    sender.send((wall, cpu, memory.peak_bytes()))


def _average_streamed(paths: list[str]) -> None:
    opened = [store.open_params(path) for path in paths]
    streaming.combine(opened, np.full(len(paths), 1 / len(paths)), paths)


def _average_stacked(paths: list[str]) -> None:
    """All checkpoints in memory, each leaf stacked in float64: the way of kai0's program."""
    loaded = [trees.flatten(store.load_params(path)) for path in paths]
    for leaf in loaded[0]:
        np.average(np.stack([flat[leaf] for flat in loaded], dtype=np.float64), axis=0).astype(
            np.float32
        )


def _row_average(_: pi0.Pi0Config) -> tuple[Measurement, ...]:
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for k in range(3):
            rng = np.random.default_rng(k)
            leaves = {
                f"leaf_{i}": rng.standard_normal(_ELEMENTS, np.float32) for i in range(_LEAVES)
            }
            paths.append(str(pathlib.Path(folder) / str(k)))
            store.save_params(leaves, paths[-1])
        return _interleaved(_apart(_average_streamed, paths), _apart(_average_stacked, paths))


def _example(config: pi0.Pi0Config) -> Batch:
    actions = jnp.ones((2, config.action_horizon, config.action_dim))
    return Batch(pi0.example_observation(config, 2), actions)


def _row_coefficient_gradient(config: pi0.Pi0Config) -> tuple[Measurement, ...]:
    """The gradient in three coefficients over four batches."""
    params, batch = [pi0.init(config, jax.random.key(k)) for k in range(3)], _example(config)
    loss_fn = functools.partial(pi0.loss, config)
    batches, key, c = [batch] * 4, jax.random.key(0), jnp.full(3, 1 / 3)
    ours = objective_lib.in_memory(loss_fn, params, batches, key)
    keys = jax.random.split(key, 4)
    through = jax.jit(jax.grad(lambda c, b, k: loss_fn(trees.combine(c, params), b, k)[0]))
    return _interleaved(
        _here(lambda: ours.value_and_grad(c)),
        _here(lambda: sum(through(c, b, k) for b, k in zip(batches, keys, strict=True)) / 4),
    )


def _row_sampling(config: pi0.Pi0Config) -> tuple[Measurement, ...]:
    """Ten flow steps with the prefix's keys and values kept, against ten whole passes."""
    params, batch = pi0.init(config, jax.random.key(0)), _example(config)
    noise = jnp.ones_like(batch.actions)
    kept = jax.jit(functools.partial(pi0.sample_actions, config))

    @jax.jit
    def whole(params, observation, noise):
        step = functools.partial(pi0.velocity, config, params, observation)
        return flow.integrate(step, noise, 10)

    return _interleaved(
        _here(lambda: kept(params, batch.observation, noise=noise)),
        _here(lambda: whole(params, batch.observation, noise)),
    )


def _row_training(config: ml_collections.ConfigDict) -> tuple[Measurement, ...]:
    """Steps of the whole update, layers unrolled and kept, against scanned and rematerialised."""
    model = policies.model_config(config, why="a benchmark")
    rng, size = np.random.default_rng(0), config.train.batch_size
    batch = Batch(
        pi0.example_observation(model, size).replace(
            proprio=rng.standard_normal((size, model.proprio_dim), np.float32)
        ),
        rng.standard_normal((size, model.action_horizon, model.action_dim), np.float32),
    )

    def steps(model):
        optimizer = optimizers.adamw()
        state = training.init(pi0.init(model, jax.random.key(0)), optimizer, ema=False)
        loss_fn = functools.partial(pi0.loss, model)
        step = jax.jit(
            functools.partial(training.update, loss_fn=loss_fn, optimizer=optimizer),
            donate_argnums=0,
        )

        def run():
            after, key = jax.tree.map(jnp.copy, state), jax.random.key(1)
            for _ in range(_STEPS):
                after, _ = step(after, batch, key, np.float32(1e-3))
            return after.params

        return _here(run)

    memory.keep_freed()
    return _interleaved(*(steps(dataclasses.replace(model, remat=r)) for r in (False, True)))


def _row_rollouts(config: ml_collections.ConfigDict) -> tuple[Measurement, ...]:
    """Episodes of ten tasks, one call for all that live, against one episode after another."""
    model = policies.model_config(config, why="a benchmark")
    config = config.copy_and_resolve_references()
    config.evaluate.max_steps = _EPISODE_STEPS
    tasks = envs.parse_all(config.evaluate.env)
    episodes = [(task, k) for task in tasks for k in range(_EPISODES // len(tasks))]
    prompts = {task: envs.make(task).prompt for task in tasks}
    sizes = {"state": model.proprio_dim, "actions": model.action_dim}
    stats = {key: normalize.NormStats(np.zeros(d), np.ones(d)) for key, d in sizes.items()}
    with tempfile.TemporaryDirectory() as folder, workers.Pool(processes.num_cores()) as pool:
        path = pathlib.Path(folder) / "0"
        store.write_step(pi0.init(model, jax.random.key(0)), path, stats, "bench")
        policy = policies.Policy(config, model, str(path))

        def together():
            rollouts.roll_out(policy, pool, episodes, config, prompts)

        def apart():
            for episode in episodes:
                rollouts.roll_out(policy, pool, [episode], config, prompts)

        return _interleaved(_here(together), _here(apart))


ROWS = {
    "average": _row_average,  # of 3 Orbax checkpoints of 268 MB each, without writing
    "gradient": _row_coefficient_gradient,  # in 3 coefficients, over 4 batches of 2
    "training": _row_training,  # 50 steps at batch 64 of the small policy
    "rollouts": _row_rollouts,  # 100 episodes of 64 steps of the small policy
    "sampling": _row_sampling,  # 2 action chunks, 10 flow steps
}
