"""Checkpoints that things happen to while they are mixed."""

import os
import pathlib

import numpy as np
import orbax.checkpoint as ocp

from configs import common
from policymix import trees
from policymix.checkpoints import layout, safetensors, store
from policymix.runs import mix

FORMS = ("safetensors", "shards", "orbax", "one-chunk")
TWO = ("safetensors", "orbax")


def arrays(seed=0, size=60_000, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {"a/w": rng.standard_normal((size // 100, 100)), "a/b": rng.standard_normal(7)}
    found |= {"c": rng.standard_normal(size), "scalar": np.array(1.0 + seed)}
    return {name: array.astype(dtype) for name, array in found.items()}


def save(path: pathlib.Path, form: str, flat: dict[str, np.ndarray]) -> str:
    """Writes a checkpoint: ours, or a whole array in one chunk, as Orbax itself leaves them."""
    path.mkdir(parents=True)
    if form == "one-chunk":
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(path / "params", {"params": trees.unflatten(flat)})
    elif form == "orbax":
        store.write_step(trees.unflatten(flat), path)
    else:
        flat = {name.replace("/", "."): array for name, array in flat.items()}
        cut = len(flat) // 2 if form == "shards" else len(flat)
        parts = [part for part in (tuple(flat)[:cut], tuple(flat)[cut:]) if part]
        names = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
        names = names if form == "shards" else [layout.TENSORS]
        described = tuple(zip(names, parts, strict=True))
        safetensors.write(path, flat, safetensors.Layout(described, {}, index=form == "shards"))
    return str(path)


def pair(root: pathlib.Path, form: str, **options) -> tuple[str, str]:
    return tuple(save(root / f"in{k}", form, arrays(k, **options)) for k in (0, 1))


def run(checkpoints, out, **fields):
    return mix.mix(common.get_config(), mix.Request(tuple(checkpoints), out, **fields))


def names(path: pathlib.Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def state(path: pathlib.Path) -> dict:
    """Everything in a directory: content, and when it was last written."""
    return {
        p: (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in [path, *sorted(path.rglob("*"))]
    }


def cut(path: pathlib.Path) -> None:
    for file in [p for p in path.rglob("*") if p.is_file() and p.stat().st_size > 10_000]:
        os.truncate(file, 1000)
