"""The rows of `make bench` that train: the whole loop beside its compiled step alone.

What is trained is a small policy with one camera of 96 pixels, at a batch whose step takes some 50
ms on two cores; the data is written on the spot.
"""

import contextlib
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from policymix import memory, metrics, sharding
from policymix.runs import data_rows, train, training_loop
from policymix.runs.measurements import REPEATS, Measurement, Row

_STEPS, _SKIPPED = 40, 3  # of a loop; of these the first are still filling its queues
_BATCH = 64


def loop_row(policy: ml_collections.ConfigDict) -> list[Row]:
    """Steps of the loop, with its data and metrics, beside the same steps on one batch that is
    there: what the host adds.
    """
    with data_rows.Temporary() as folder:
        config = _config(policy, folder)
        ours, theirs = [], []
        for number in range(REPEATS):
            with _prepared(config, folder / f"run{number}") as (run, state):
                ours.append(_loop(run, state).whole)
            with _prepared(config, folder / f"bare{number}") as (run, state):
                theirs.append(_bare(run, state))
    row = Row("the loop of training, beside its step", _median(ours), _median(theirs))
    added = row.ours.wall / row.theirs.wall - 1
    per_step = 1e3 * row.theirs.wall / (_STEPS - _SKIPPED)
    return [row._replace(note=f"steps of {per_step:.0f} ms; the host adds {added:.1%}")]


def feeding_row(policy: ml_collections.ConfigDict) -> list[Row]:
    """The loop fed by two threads that decode pictures for every batch, beside decoded ones."""
    with data_rows.Temporary() as folder:
        sides: dict[int, list[Measurement]] = {0: [], 1000: []}
        waits = []
        for number in range(REPEATS):
            for cache_mb, found in sides.items():
                config = _config(policy, folder)
                config.data.update({"cache_mb": cache_mb, "num_threads": 2})
                workdir = folder / f"{cache_mb}-{number}"
                with _prepared(config, workdir) as (run, state):
                    found.append(_loop(run, state).whole)
                if not cache_mb:
                    waits += [r["data_wait"] for r in metrics.read(workdir / "metrics.jsonl")][1:]
    row = Row("two threads feeding 96-px pictures", *(_median(side) for side in sides.values()))
    told = f"waiting for data: {statistics.median(waits):.1%} of the time"
    return [row._replace(note=told)]


def saving_row(policy: ml_collections.ConfigDict) -> list[Row]:
    """The steps that save a checkpoint, beside those that do not."""
    with data_rows.Temporary() as folder:
        config = _config(policy, folder)
        config.train.update({"save_every": 10, "max_to_keep": 2})
        saving, usual = [], []
        for number in range(REPEATS):
            with _prepared(config, folder / f"run{number}") as (run, state):
                steps = _loop(run, state).steps
            saving += steps[9::10]
            usual += [s for n, s in enumerate(steps) if n >= _SKIPPED and n % 10 != 9]
    sides = (Measurement(statistics.median(side), 0.0) for side in (saving, usual))
    row = Row("a step that saves, beside one that does not", *sides)
    return [row._replace(note=f"{row.ours.wall / row.theirs.wall:.2f} of a usual step")]


@dataclasses.dataclass(frozen=True)
class _Timed:
    """Of one loop: all its steps but the first, and each by itself, in seconds."""

    whole: Measurement
    steps: list[float]


def _config(policy: ml_collections.ConfigDict, folder: pathlib.Path) -> ml_collections.ConfigDict:
    """The policy with a camera, on data that is there from the first call on."""
    config, sizes = policy.copy_and_resolve_references(), data_rows.Sizes()
    path = folder / "data"
    if not path.exists():
        data_rows.pictured(path, sizes, (96, 96), "image")
    config.model.update({"image_keys": ("camera",), "image_resolution": (96, 96)})
    config.model.update({"siglip_variant": "mu/16", "siglip_depth": 2})
    config.model.update({"action_dim": data_rows.DIM, "proprio_dim": data_rows.DIM})
    config.data.update({"path": str(path), "held_out": 0.0, "tokenizer": "words"})
    config.data.cameras = {"camera": "camera"}
    config.train.update({"batch_size": _BATCH, "num_steps": _STEPS, "decay_steps": _STEPS})
    config.train.update({"warmup_steps": 5, "log_every": 10, "save_every": _STEPS})
    config.train.update({"keep_period": 0, "eval_every": 0, "rollout_every": 0, "wandb": ""})
    return config


@contextlib.contextmanager
def _prepared(config, workdir: pathlib.Path) -> Iterator[tuple[training_loop.Run, Any]]:
    memory.keep_freed()
    with train.prepared(config, workdir, devices=jax.devices()[:1]) as ready:
        yield ready


def _loop(run: training_loop.Run, state) -> _Timed:
    """Goes through a run; a step lasts from one call of the compiled step to the next."""
    wall, cpu = [], []

    def step_fn(*args):
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
        return run.step_fn(*args)

    training_loop.go(dataclasses.replace(run, step_fn=step_fn), state)
    whole = Measurement(wall[-1] - wall[_SKIPPED - 1], cpu[-1] - cpu[_SKIPPED - 1])
    return _Timed(whole, np.diff(wall).tolist())


def _bare(run: training_loop.Run, state) -> Measurement:
    """As many steps on one batch, none read before the last."""
    batch = sharding.put(run.pipeline.batch(0, _BATCH), sharding.batch(run.mesh))
    key, rate = jax.random.key(0), np.float32(1e-4)
    for _ in range(_SKIPPED):
        state, _ = run.step_fn(state, batch, key, rate)
    jax.block_until_ready(state)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(_STEPS - _SKIPPED):
        state, _ = run.step_fn(state, batch, key, rate)
    jax.block_until_ready(state)
    return Measurement(time.perf_counter() - wall, time.process_time() - cpu)


def _median(measured: list[Measurement]) -> Measurement:
    return Measurement(*(statistics.median(m[k] for m in measured) for k in (0, 1)))
