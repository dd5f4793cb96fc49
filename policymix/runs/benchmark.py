"""The rows of `make bench`: ours and a straightforward program, interleaved on the same machine."""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from policymix import memory, processes, trees
from policymix.checkpoints import store
from policymix.mixing import objective as objective_lib
from policymix.mixing import search as search_lib
from policymix.models import flow, pi0
from policymix.reports import tables
from policymix.runs import (
    data_rows,
    measurements,
    memory_rows,
    mixing_rows,
    model_rows,
    optimizer_rows,
    policies,
    rl_rows,
    rollouts,
    soft_rows,
    training_rows,
)
from policymix.runs.measurements import Row, here, interleaved
from policymix.sim import envs, workers
from policymix.structs import Batch
from policymix.training import optimizers
from policymix.training import state as training
from policymix.transforms import normalize

_STEPS, _EPISODES, _EPISODE_STEPS = 50, 100, 64
_MODELS = mixing_rows.MODELS | model_rows.MODELS | data_rows.SIZES | rl_rows.SIZES | soft_rows.SIZES
_MODELS |= optimizer_rows.SIZES


def run(
    config: pi0.Pi0Config,
    small: ml_collections.ConfigDict,
    rows: Sequence[str],
    models: Mapping[str, Any] = _MODELS,
) -> str:
    """Measures the named rows, or all, on freshly initialised models; returns the table.

    Args:
      config: the model of `gradient` and `sampling`; small: the policy of `training` and
        `rollouts`, whole; models: those of checkpoints on disk, by dtype, and of `model_rows`; the
        sizes of `data_rows`, `rl_rows`, `soft_rows` and `optimizer_rows`.
    """
    chosen = rows or list(ROWS)
    if unknown := [row for row in chosen if row not in ROWS]:
        raise ValueError(f"--rows: {unknown[0]!r} is not a row; there are {', '.join(ROWS)}")
    lines, notes = [], []
    for name in chosen:
        measure, of = ROWS[name]
        for row in measure({"network": config, "policy": small, **models}[of]):
            lines.append(_line(row))
            notes += [f"{row.name}: {row.note}"] if row.note else []
    header = ["ours / theirs", "wall s", "CPU s", "faster", "peak MB"]
    device = jax.devices()[0]
    told = f"{device.device_kind} ({device.platform}), medians of {measurements.REPEATS}"
    return "\n".join([told, tables.table(lines, header), *notes])


def _line(row: Row) -> list[str]:
    ours, theirs = row.ours, row.theirs
    peaks = "" if ours.peak is None else f"{ours.peak / 1e6:.0f} / {theirs.peak / 1e6:.0f}"
    return [
        row.name,
        f"{ours.wall:.3f} / {theirs.wall:.3f}",
        f"{ours.cpu:.3f} / {theirs.cpu:.3f}",
        f"{theirs.wall / ours.wall:.2f} ×",
        peaks,
    ]


def _pair(name: str, *sides) -> list[Row]:
    return [Row(name, *interleaved(*sides))]


def _example(config: pi0.Pi0Config) -> Batch:
    actions = jnp.ones((2, config.action_horizon, config.action_dim))
    return Batch(pi0.example_observation(config, 2), actions)


def _row_coefficient_gradient(config: pi0.Pi0Config) -> list[Row]:
    """The gradient in three coefficients over four batches."""
    params, batch = [pi0.init(config, jax.random.key(k)) for k in range(3)], _example(config)
    loss_fn = functools.partial(pi0.loss, config)
    batches, key, c = [batch] * 4, jax.random.key(0), jnp.full(3, 1 / 3)
    ours = objective_lib.in_memory(loss_fn, params, batches, key)
    keys = jax.random.split(key, 4)
    through = jax.jit(jax.grad(lambda c, b, k: loss_fn(trees.combine(c, params), b, k)[0]))
    return _pair(
        "gradient in three coefficients",
        here(lambda: ours.value_and_grad(c)),
        here(lambda: sum(through(c, b, k) for b, k in zip(batches, keys, strict=True)) / 4),
    )


def _row_coefficients(config: pi0.Pi0Config) -> list[Row]:
    """The two searches on all batches against fifty iterations on one batch each."""
    base, rng = pi0.init(config, jax.random.key(0)), np.random.default_rng(0)
    # As in the oracle of the tests: a base, and three checkpoints at growing distances.
    params = [
        jax.tree.map(
            lambda x, s=s: x + s * rng.standard_normal(x.shape, np.float32) * x.std(), base
        )
        for s in (0.10, 0.15, 0.25)
    ]
    example = _example(config)
    batches = [
        example.replace(actions=rng.standard_normal(example.actions.shape, np.float32))
        for _ in range(4)
    ]
    loss_fn = functools.partial(pi0.loss, config)
    residual_fn = functools.partial(pi0.residual, config)
    objective = objective_lib.in_memory(loss_fn, params, batches, jax.random.key(0), residual_fn)
    found = {}

    def side(name, **settings):
        def search():
            found[name] = getattr(search_lib, name)(objective, 3, **settings)

        return here(search)

    bfgs, gauss_newton, descent = interleaved(
        side("bfgs"), side("gauss_newton"), side("gradient_descent", num_iterations=50)
    )
    told = "; ".join(
        f"{name} {one.loss:.6f} after {one.history[-1]['full_evaluations']:.1f} evaluations"
        for name, one in found.items()
    )
    return [
        Row("coefficients by bfgs against 50 iterations", bfgs, descent, f"losses: {told}"),
        Row("coefficients by gauss_newton against the same", gauss_newton, descent),
    ]


def _row_sampling(config: pi0.Pi0Config) -> list[Row]:
    """Ten flow steps with the prefix's keys and values kept, against ten whole passes."""
    params, batch = pi0.init(config, jax.random.key(0)), _example(config)
    noise = jnp.ones_like(batch.actions)
    kept = jax.jit(functools.partial(pi0.sample_actions, config))

    @jax.jit
    def whole(params, observation, noise):
        step = functools.partial(pi0.velocity, config, params, observation)
        return flow.integrate(step, noise, 10)

    return _pair(
        "sampling",
        here(lambda: kept(params, batch.observation, noise=noise)),
        here(lambda: whole(params, batch.observation, noise)),
    )


def _row_training(config: ml_collections.ConfigDict) -> list[Row]:
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
        optimizer = optimizers.make(optimizers.Settings())
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

        return here(run)

    memory.keep_freed()
    return _pair("training", *(steps(dataclasses.replace(model, remat=r)) for r in (False, True)))


def _row_rollouts(config: ml_collections.ConfigDict) -> list[Row]:
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

        return _pair("rollouts", here(together), here(apart))


ROWS = {  # name: how it is measured, and what it is given
    "float32": (mixing_rows.float32_row, "float32"),
    "bfloat16": (mixing_rows.bfloat16_row, "bfloat16"),
    "orbax": (mixing_rows.orbax_row, "float32"),
    "twenty": (mixing_rows.twenty_row, "float32"),
    "coefficients": (_row_coefficients, "network"),  # of 3 checkpoints, on 4 batches of 2
    "gradient": (_row_coefficient_gradient, "network"),  # in 3 coefficients, over 4 batches of 2
    "training": (_row_training, "policy"),  # 50 steps at batch 64
    "rollouts": (_row_rollouts, "policy"),  # 100 episodes of 64 steps
    "sampling": (_row_sampling, "network"),  # 2 action chunks, 10 flow steps
    "cameras": (model_rows.cameras_row, "sampled"),  # 1 of 3 there
    "all_cameras": (model_rows.all_cameras_row, "sampled"),
    "samples": (model_rows.samples_row, "sampled"),  # 8 of one observation
    "step": (model_rows.step_row, "trained"),  # at batch 1
    "loop_of_training": (training_rows.loop_row, "policy"),  # 40 steps at batch 64, 96-px pictures
    "feeding": (training_rows.feeding_row, "policy"),  # the same, pictures decoded on the way
    "saving": (training_rows.saving_row, "policy"),  # a checkpoint every ten steps
    "adam_8bit": (optimizer_rows.adam_8bit_row, "optimizer"),  # 31 M parameters
    "memory": (memory_rows.memory_row, "policy"),  # four ways to train a π0 of 159 M parameters
    "items": (data_rows.items_row, "data"),  # chunks of 50, no pictures
    "pictures": (data_rows.picture_row, "data"),  # a 96-px PNG each
    "videos": (data_rows.video_row, "data"),  # AV1, in random order and in runs
    "batches": (data_rows.batches_row, "data"),  # of 32, two threads
    "rlds": (data_rows.rlds_row, "data"),  # JPEG at 224 px
    "opening": (data_rows.open_row, "data"),  # a million frames
    "chunk_soft": (soft_rows.soft_row, "soft"),  # an update at 256-px pictures, two cameras
    "chunk_iql": (rl_rows.update_row, "rl"),  # an update at batch 256, 512 × 4 networks
    "loop": (rl_rows.loop_row, "rl"),  # updates in one compiled loop
    "chunks": (rl_rows.act_row, "rl"),  # a policy asked once per chunk, or at every step
}
