"""The rows of `make bench` about memory: what trainings need at their peak, beside what
`train.py --dry_run` foresees and what XLA plans for the compiled step.

Each trains the same π0 a few steps in a process of its own, from a checkpoint. What a process needs
besides, Python, JAX and compiled programs, is that of one more, which does the same with a network
of as many layers that is much smaller; it is taken off. So the last is of a CPU, on which the
process's memory is the device's.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from policymix import sharding, trees
from policymix.checkpoints import store
from policymix.models import pi0
from policymix.runs import data_rows, policies, train, train_settings
from policymix.runs.measurements import Row, apart, interleaved

_STEPS, _BATCH = 3, 2
# Of the language model, which is twice as wide as the action expert; of the process taken off.
_WIDTH, _SMALL = 1024, 64
_DEPTH = 8
_LOW_RANK = {"lora": {"rank": 16}}
# What both experts have, and config.train; as in the table of docs/training.md.
_WAYS = {
    "all of it": ({}, {}),
    "8-bit AdamW": ({}, {"optimizer": "adamw_8bit"}),
    "low-rank updates": (_LOW_RANK, {"frozen_dtype": "bfloat16", "ema_decay": 0.0}),
    "the same, the rest in 4 bits": (_LOW_RANK, {"frozen_dtype": "nf4", "ema_decay": 0.0}),
}


def memory_row(policy: ml_collections.ConfigDict) -> list[Row]:
    """Every way of training, beside that of all parameters by AdamW."""
    names, found, told = [], [], []
    with data_rows.Temporary() as folder:
        data_rows.pictured(folder / "data", data_rows.Sizes(), (96, 96), "image")
        for name, way in _WAYS.items():
            config, small = (_config(policy, folder, width, *way) for width in (_WIDTH, _SMALL))
            sides = (
                apart(f"{__name__}:prepare", side.to_dict(), str(folder / "run"))
                for side in (config, small)
            )
            ours, least = interleaved(*sides, repeats=1)
            found.append(ours._replace(peak=max(0, ours.peak - least.peak)))
            plan = train.planned(config, folder / "none", devices=_device())
            foreseen, planned = sum(plan.memory().values()), _planned_by_xla(plan)
            count = trees.num_params(pi0.shapes(plan.model))
            names.append(f"training {count / 1e6:.0f} M: {name}")
            told.append(f"foreseen {foreseen / 1e6:,.0f} MB, XLA's plan {planned / 1e6:,.0f}")
    return [
        Row(
            *(name, one, found[0]),
            f"{words}, at the peak of the process {one.peak / 1e6:,.0f}; one run",
        )
        for name, one, words in zip(names, found, told, strict=True)
    ]


def _planned_by_xla(plan: train.Plan) -> int:
    """Bytes of the step's arguments and of what it needs besides."""
    seen = plan.pipeline.encoder.seen
    step = train_settings.compiled(plan.update, plan.model, seen, plan.mesh)
    batch, key = plan.pipeline.batch(0, _BATCH), jax.random.key(0)
    analysis = step.lower(plan.like, batch, key, np.float32(0)).compile().memory_analysis()
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def prepare(config: dict[str, Any], workdir: str) -> Callable[[], Any]:
    """The first steps of a run, in the process that they have to themselves."""

    def run():
        given = ml_collections.ConfigDict(config)
        path = pathlib.Path(workdir)
        with train.prepared(given, path, devices=_device(), overwrite=True) as (run, state):
            batch = sharding.put(run.pipeline.batch(0, _BATCH), sharding.batch(run.mesh))
            for _ in range(_STEPS):
                state, _ = run.step_fn(state, batch, jax.random.key(0), np.float32(1e-4))
            jax.block_until_ready(state)

    return run


def _device() -> list[jax.Device]:
    return jax.devices()[:1]


def _config(
    policy: ml_collections.ConfigDict, folder: pathlib.Path, width: int, experts, settings
) -> ml_collections.ConfigDict:
    config = policy.copy_and_resolve_references()
    heads = {"depth": _DEPTH, "num_heads": 4, "num_kv_heads": 1, "head_dim": width // 4}
    for name, size in (("paligemma_variant", width), ("action_expert_variant", width // 2)):
        config.model[name] = {"width": size, "mlp_dim": 4 * size, **heads}
    config.model.update({"image_keys": ("camera",), "image_resolution": (96, 96)})
    config.model.update({"siglip_variant": "mu/16", "siglip_depth": 2})
    config.model.update({"action_dim": data_rows.DIM, "proprio_dim": data_rows.DIM, "remat": True})
    config.data.update({"path": str(folder / "data"), "held_out": 0.0, "tokenizer": "words"})
    config.data.cameras = {"camera": "camera"}
    config.train.update({"batch_size": _BATCH, "eval_every": 0, "rollout_every": 0, "wandb": ""})
    config.train.init_from = str(_base(config, folder / f"base{width}"))
    for name in ("paligemma_variant", "action_expert_variant"):
        config.model[name].update(experts)
    config.train.update(settings)
    return config


def _base(config: ml_collections.ConfigDict, path: pathlib.Path) -> pathlib.Path:
    """A checkpoint to start from; written the first time."""
    if not path.exists():
        rng = np.random.default_rng(0)
        model = policies.model_config(config, why="a benchmark")
        draw = functools.partial(rng.standard_normal, dtype=np.float32)
        store.write_step(jax.tree.map(lambda s: draw(s.shape) / 64, pi0.shapes(model)), path)
    return path
