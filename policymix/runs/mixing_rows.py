"""The rows of `make bench` that mix checkpoints of a gigabyte on disk: ours, the floor of reading
and writing, and the straightforward programs.

A side runs in a process of its own, so that its peak memory is its own; what is timed begins when
everything is imported and compiled.
"""

import dataclasses
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence

import jax
import ml_dtypes
import numpy as np

from policymix import memory, processes, trees
from policymix.checkpoints import blocks, items, jobs, keymaps, safetensors, streaming
from policymix.models import pi0
from policymix.runs import measurements


def _model(width: int, vocab_size: int) -> pi0.Pi0Config:
    """π0.5 with the depth, and the proportions of its arrays, of the real one."""
    gemma = {"depth": 18, "num_heads": 8, "num_kv_heads": 1, "head_dim": 64}
    return pi0.Pi0Config(
        paligemma_variant={"width": width, "mlp_dim": 8 * width, **gemma},
        action_expert_variant={"width": width // 2, "mlp_dim": 2 * width, **gemma},
        siglip_variant="S/14",
        siglip_depth=27,
        vocab_size=vocab_size,
        pi05=True,
    )


# Files of 1.2 GB in float32, and of 1 GB in bfloat16.
MODELS = {"float32": _model(560, 53_000), "bfloat16": _model(800, 60_000)}
_MEGABYTE = 2**20


def tensor_shapes(model: pi0.Pi0Config) -> dict[str, tuple[int, ...]]:
    """The tensors of a PyTorch checkpoint of a model, all of them, in OpenPI's naming."""
    shapes = {path: leaf.shape for path, leaf in trees.flatten(pi0.shapes(model)).items()}
    made = keymaps.tensors(shapes)
    found = {piece.name: piece.tensor for one in made.values() for piece in one.pieces}
    return found | {name: shape for name, (_, shape) in keymaps.extra_tensors(shapes).items()}


def write_tensors(directory: pathlib.Path, model: pi0.Pi0Config, dtype, seed: int) -> str:
    """A safetensors checkpoint of random numbers, written as it comes; returns its path."""
    directory.mkdir(parents=True)
    shapes = {name: (shape, np.dtype(dtype)) for name, shape in tensor_shapes(model).items()}
    layout = safetensors.Layout((("model.safetensors", tuple(shapes)),), {"format": "pt"}, False)
    with safetensors.TensorWriter(directory, shapes, layout) as sink:
        _fill(sink, shapes, seed)
        sink.finish()
    return str(directory / "model.safetensors")


def _fill(sink, shapes, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name, (shape, dtype) in shapes.items():
        size = int(np.prod(shape))
        for start in range(0, size, 2**24):
            values = rng.standard_normal(min(2**24, size - start), np.float32)
            values *= 0.02
            sink.write(name, start, values.astype(dtype))


def write_item(directory: pathlib.Path, model: pi0.Pi0Config, seed: int) -> str:
    """An Orbax item as OpenPI writes it, by Orbax itself: one chunk per array."""
    import orbax.checkpoint as ocp

    rng = np.random.default_rng(seed)
    tree = trees.unflatten(
        {
            f"params/{path}/value": 0.02 * rng.standard_normal(leaf.shape, np.float32)
            for path, leaf in trees.flatten(pi0.shapes(model)).items()
        }
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, tree)
    return str(directory)


# Sides: each prepares, then returns what is timed.


def mix_tensors(paths: Sequence[str], output: str) -> Callable[[], None]:
    """Ours: safetensors → safetensors."""
    memory.keep_freed()
    blocks.run_inline()
    n = len(paths)
    for dtype in {leaf.dtype for leaf in _opened(paths[0])[0].values()}:
        for size in (0, 1):  # compiles
            jobs.sum_of(n, dtype, size)(np.ones(n, np.float32))

    def run():
        opened = [_opened(path) for path in paths]
        tensors, layout = opened[0]
        dtypes = {name: leaf.dtype for name, leaf in tensors.items()}
        shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in tensors.items()}
        with safetensors.TensorWriter(_fresh(output), shapes, layout) as sink:
            inputs = [found for found, _ in opened]
            streaming.mix(inputs, coefficients(n), paths, sink, dtypes)
            sink.finish()

    return run


def coefficients(n: int) -> np.ndarray:
    """[n] that are no round numbers, whose sums often lie half way between two of bfloat16."""
    c = np.linspace(1.0, 1.7, n) ** 1.3
    return c / c.sum()


def _opened(path: str):
    return safetensors.open_tensors(pathlib.Path(path))


def _fresh(output: str) -> pathlib.Path:
    path = pathlib.Path(output)
    path.mkdir()
    return path


def read_and_write(paths: Sequence[str], output: str) -> Callable[[], None]:
    """The floor: all inputs read and one written, a megabyte at a time, with as many threads."""
    workers = min(processes.num_cores(), 8)

    def run():
        size = os.path.getsize(paths[0])
        inputs = [os.open(path, os.O_RDONLY) for path in paths]
        target = os.open(_fresh(output) / "out", os.O_RDWR | os.O_CREAT)
        os.ftruncate(target, size)
        share = -(-size // workers)

        def work(k: int) -> None:
            buffer = memoryview(bytearray(_MEGABYTE))
            for start in range(k * share, min((k + 1) * share, size), _MEGABYTE):
                for descriptor in inputs:
                    count = os.preadv(descriptor, [buffer], start)
                os.pwrite(target, buffer[:count], start)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for descriptor in (*inputs, target):
            os.close(descriptor)

    return run


def stack_tensors(paths: Sequence[str], output: str) -> Callable[[], None]:
    """All in memory, each array stacked in float64 and averaged: the way of kai0's program."""
    import safetensors.numpy as reference

    def run():
        loaded = [reference.load_file(path) for path in paths]
        mixed = {
            name: np.average(np.stack([one[name] for one in loaded], dtype=np.float64), axis=0)
            .astype(np.float32)
            for name in loaded[0]
        }  # fmt: skip
        reference.save_file(mixed, _fresh(output) / "model.safetensors")

    return run


def mix_items(paths: Sequence[str], output: str) -> Callable[[], None]:
    """Ours: Orbax → Orbax."""

    def run():
        inputs = [items.open_item(pathlib.Path(path)) for path in paths]
        shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in inputs[0].items()}
        dtypes = {path: dtype for path, (_, dtype) in shapes.items()}
        with items.ItemWriter(pathlib.Path(output), shapes) as sink:
            n = len(paths)
            streaming.mix(inputs, coefficients(n), paths, sink, dtypes)
            sink.finish()

    return run


def restore_and_save(paths: Sequence[str], output: str) -> Callable[[], None]:
    """As many restores by Orbax, one after another, and one save."""
    import orbax.checkpoint as ocp

    def run():
        with ocp.PyTreeCheckpointer() as checkpointer:
            for path in paths:
                restored = None  # let go before the next
                restored = checkpointer.restore(path)
            checkpointer.save(output, restored)

    return run


def correctly_rounded(paths: Sequence[str], mixed: str) -> float:
    """The fraction of a bfloat16 mix's elements that are the rounded sum in float64, of the first
    million of each tensor.
    """
    opened, (result, _) = [_opened(path)[0] for path in paths], _opened(mixed)
    right = count = 0
    for name, leaf in result.items():
        size = min(leaf.size, 10**6)
        rows = []
        for one in (*(found[name] for found in opened), leaf):
            rows.append(np.empty(size, leaf.dtype))
            with one.opened() as reader:
                reader.read(0, rows[-1])
        c = coefficients(len(opened))
        exact = sum(k * row.astype(np.float64) for k, row in zip(c, rows, strict=False))
        right += int((exact.astype(leaf.dtype) == rows[-1]).sum())
        count += size
    return right / count


# Rows


def _sides(names: Sequence[str], paths: Sequence[str], folder: pathlib.Path):
    """Measures the named sides, each writing to a directory that is removed before the next."""

    def fresh(name):
        inner = measurements.apart(f"{__name__}:{name}", list(paths), str(folder / "out"))

        def measure():
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()  # or one side would wait for what another left to be written
            return inner()

        return measure

    return measurements.interleaved(*map(fresh, names))


def _tensors(dtype, count: int, model: pi0.Pi0Config, folder: pathlib.Path) -> list[str]:
    return [write_tensors(folder / str(k), model, dtype, k) for k in range(count)]


def float32_row(model: pi0.Pi0Config) -> list[measurements.Row]:
    """3 safetensors → 1 in float32: ours, the floor, and stacks in float64."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        paths = _tensors(np.float32, 3, model, folder)
        sides = ["mix_tensors", "read_and_write", "stack_tensors"]
        ours, floor, stacked = _sides(sides, paths, folder)
    return [
        measurements.Row("float32 against reading and writing", ours, floor),
        measurements.Row("float32 against float64 stacks", ours, stacked),
    ]


def bfloat16_row(model: pi0.Pi0Config) -> list[measurements.Row]:
    """3 safetensors → 1 in bfloat16: ours and the floor."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        paths = _tensors(ml_dtypes.bfloat16, 3, model, folder)
        floor, ours = _sides(["read_and_write", "mix_tensors"], paths, folder)
        right = correctly_rounded(paths, str(folder / "out" / "model.safetensors"))
    note = f"{right:.3%} of the elements correctly rounded"
    return [measurements.Row("bfloat16 against reading and writing", ours, floor, note)]


def orbax_row(model: pi0.Pi0Config) -> list[measurements.Row]:
    """3 Orbax items of one chunk per array → 1: ours, and 3 restores with one save."""
    largest = max(leaf.size for leaf in jax.tree.leaves(pi0.shapes(model))) * 4
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        paths = [write_item(folder / str(k) / "params", model, k) for k in range(3)]
        ours, theirs = _sides(["mix_items", "restore_and_save"], paths, folder)
        again = [str(folder / "again" / str(k)) for k in range(3)]
        for k, path in enumerate(again):
            mix_items(paths[k:] + paths[:k], path)()
        chunked, _ = _sides(["mix_items", "restore_and_save"], again, folder)
    note = f"the largest array is {largest / 1e6:.0f} MB"
    return [
        measurements.Row("Orbax as OpenPI writes it", ours, theirs, note),
        measurements.Row("Orbax as we write it", chunked, theirs),
    ]


def twenty_row(model: pi0.Pi0Config) -> list[measurements.Row]:
    """20 safetensors → 1, and as many bytes in 3 at a time: both per input read."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        small = dataclasses.replace(model, vocab_size=model.vocab_size // 4, siglip_depth=4)
        paths = _tensors(np.float32, 20, small, folder)
        (many,) = _sides(["mix_tensors"], paths, folder)
        (few,) = _sides(["mix_tensors"], paths[:3], folder)
    size = sum(np.prod(shape) for shape in tensor_shapes(small).values()) * 4
    per = [(side.wall / (n + 1)) for side, n in ((many, 20), (few, 3))]
    note = f"of {size / 1e6:.0f} MB each: {per[0]:.3f} s per checkpoint moved, with 3 {per[1]:.3f}"
    return [measurements.Row("20 inputs against 3", many, few, note)]
