"""Small checkpoints of every kind, and what the libraries of their formats read in them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
import tensorstore
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from policymix import trees
from policymix.checkpoints import items

INDEX = "model.safetensors.index.json"


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    half = normal(6, 40).astype(ml_dtypes.bfloat16)
    found = {"a/w": normal(6, 20, 8), "a/b": normal(20), "half/w": half}
    return found | {"scalar": np.array(seed + 1, np.float32), "ids": np.arange(7, dtype=np.int32)}


def tensors(seed: int) -> dict[str, np.ndarray]:
    found = {name.replace("/", "."): array for name, array in arrays(seed).items()}
    found |= {"flag": np.array([True, False]), "empty": np.zeros((0, 4), np.float32)}
    return found | {"f16": np.full(3, seed, np.float16)}


def single(path: pathlib.Path, seed: int) -> None:
    safetensors.numpy.save_file(tensors(seed), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text('{"type": "some"}')


def shards(path: pathlib.Path, seed: int) -> None:
    content, names = tensors(seed), list(tensors(seed))
    places = {}
    for k, part in enumerate((names[:3], names[3:]), 1):
        file = f"model-0000{k}-of-00002.safetensors"
        safetensors.numpy.save_file({n: content[n] for n in part}, path / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def orbax(*, split: bool = False, **options):
    """As orbax-checkpoint writes it; with `split`, each matrix in four chunks, as of four hosts."""

    def write(path: pathlib.Path, seed: int) -> None:
        flat = arrays(seed)
        mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
        for name, array in flat.items() if split else ():
            if array.ndim > 1:
                spec = PartitionSpec(*[None] * (array.ndim - 2), "b", "a")
                flat[name] = jax.device_put(array, NamedSharding(mesh, spec))
        tree = trees.unflatten({f"{name}/value": array for name, array in flat.items()})
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(path / "params", {"params": tree})

    return write


def own(path: pathlib.Path, seed: int) -> None:
    flat = arrays(seed)
    writer = items.ItemWriter(path / "params", {n: (x.shape, x.dtype) for n, x in flat.items()})
    for name, array in flat.items():
        writer.write(name, 0, array.reshape(-1))
    writer.finish_step(path)


KINDS = {
    "single": single,
    "shards": shards,
    "ocdbt": orbax(),
    "files": orbax(use_ocdbt=False),
    "split": orbax(split=True),
    "files-split": orbax(split=True, use_ocdbt=False),
    "zarr3": orbax(use_zarr3=True),
    "files-zarr3": orbax(use_ocdbt=False, use_zarr3=True),
    "own": own,
}
TORCH = ("single", "shards")


def files_in(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def state(path: pathlib.Path) -> dict:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files_in(path)}


def _read_shard(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not (path / INDEX).exists():
        return safetensors.numpy.load_file(path / "model.safetensors")
    places = json.loads((path / INDEX).read_text())["weight_map"]
    files = {name: safetensors.numpy.load_file(path / name) for name in set(places.values())}
    return {tensor: files[name][tensor] for tensor, name in places.items()}


def _read_item(item: pathlib.Path, *, zarr3: bool) -> dict[str, np.ndarray]:
    found = {}
    for name in arrays(0):
        key, base = f"params.{name.replace('/', '.')}.value/", {"driver": "file"}
        kvstore = base | {"path": f"{item}/{key}"}
        if (item / "manifest.ocdbt").exists():
            base |= {"path": f"{item}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": key}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
        spec["fill_missing_data_reads"] = False
        found[name] = tensorstore.open(spec, read=True, open=True).result().read().result()
    return found


def by_others(kind: str, path: pathlib.Path) -> dict[str, np.ndarray]:
    if kind in TORCH:
        return _read_shard(path)
    return _read_item(path / "params", zarr3=kind.endswith("zarr3"))


def average(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if not (jnp.issubdtype(a.dtype, np.floating) and jnp.issubdtype(b.dtype, np.floating)):
        np.testing.assert_array_equal(a, b)
        return a
    dtype = np.dtype(jnp.promote_types(a.dtype, b.dtype))
    wide = np.promote_types(np.float32, dtype if dtype.itemsize == 8 else np.float32).type
    with np.errstate(all="ignore"):
        return (a.astype(wide) * wide(0.5) + b.astype(wide) * wide(0.5)).astype(dtype)
