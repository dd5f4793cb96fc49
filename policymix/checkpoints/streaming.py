"""Mixing straight from disk to disk: a block of each input at a time, never a tree.

A job is a stretch of one array: its blocks are read from every input in turn, summed in float32
(float64 for float64 inputs), rounded once to the output dtype, and written. Several workers
overlap reading, arithmetic and writing; what they hold does not depend on how large the
checkpoints are, nor on how many there are. The same pass measures how far the inputs lie apart.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from policymix import processes, trees
from policymix.checkpoints import blocks, leaves
from policymix.checkpoints.leaves import Leaf

_STEP = 2**17  # elements read and summed at a time: small enough for the cache
_BUDGET16 = 2**22  # elements of bfloat16 over all inputs: a pass is a compiled call there
_SMALL16 = 2**17  # fewer are not worth a call
_JOB = 2**24  # elements of a job, at least, where nothing asks for more
_WORKERS = 8  # more do not help a disk
_WHOLE, _PART = 2**18, 16  # distances: arrays up to so large whole, of others one part in so many


class Geometry(NamedTuple):
    """How the inputs of a mix lie to each other.

    Attributes:
      gram: float64 [n, n], ⟨θ_i - θ_0, θ_j - θ_0⟩ over all parameters; of arrays with more than
        2^18 elements, estimated from the first sixteenth of every block.
      square_norm: float64 [], ‖θ_0‖², likewise.
    """

    gram: np.ndarray
    square_norm: float


class Mixed(NamedTuple):
    """A mix in memory, as a nested dict of numpy arrays, and the geometry of its inputs."""

    params: dict[str, Any]
    gram: np.ndarray
    square_norm: float


def combine(
    opened: Sequence[Mapping[str, Any]],
    coefficients: Any,
    names: Sequence[str],
    *,
    dtype: Any = None,
) -> Mixed:
    """Σ_k c_k θ_k of checkpoints on disk, into memory. Arguments and errors as those of `mix`.

    Args:
      opened: n nested dicts of leaves.
      dtype: of the output; a dtype for all leaves, a dict of dtypes by path, or None for the widest
        of the inputs'.
    """
    flats = [trees.flatten(tree) for tree in opened]
    shapes = {}
    for path, leaf in flats[0].items():
        chosen = dtype.get(path) if isinstance(dtype, Mapping) else dtype
        shapes[path] = leaf.shape, np.dtype(chosen or widest([flat[path] for flat in flats]))
    sink = leaves.Memory(shapes)
    dtypes = {path: kind for path, (_, kind) in shapes.items()}
    geometry = mix(flats, coefficients, names, sink, dtypes)
    return Mixed(trees.unflatten(sink.arrays), *geometry)


def widest(arrays: Sequence[Any]) -> np.dtype:
    """The dtype that holds all values of arrays (bfloat16 and float16 meet in float32)."""
    widest_yet = arrays[0].dtype
    for array in arrays[1:]:
        widest_yet = jnp.promote_types(widest_yet, array.dtype)
    return np.dtype(widest_yet)


def mix(
    inputs: Sequence[Mapping[str, Leaf]],
    coefficients: Any,
    names: Sequence[str],
    sink: leaves.Sink,
    dtypes: Mapping[str, np.dtype],
    *,
    progress: Callable[[int], None] = lambda count: None,
    num_workers: int = 0,
) -> Geometry:
    """Σ_k c_k θ_k of checkpoints on disk, written to `sink` as it comes.

    Arrays that are not floating-point, such as indices, are copied; they must be equal.

    Args:
      inputs: n dicts of leaves by path, of equal paths and shapes.
      coefficients: [n], or {path regex: [n]}.
      names: what to call the inputs in errors.
      dtypes: of the output, by path.
      progress: called with the number of elements of each block that is done.
      num_workers: threads; 0 is one per core, up to eight.

    Raises:
      ValueError: an input is damaged, or holds NaN or infinity; the message names the input and the
        key. Whatever was written until then is not to be used.
    """
    by_path = trees.coefficients_by_path(coefficients, list(inputs[0]), len(inputs))
    jobs = [
        job
        for path in by_path
        for job in _split(
            path, [flat[path] for flat in inputs], np.asarray(by_path[path]), dtypes[path], sink
        )
    ]
    # Long ones first, so that the last to end are short.
    jobs.sort(key=lambda job: job.start - job.stop)
    gram, square_norm = np.zeros((len(inputs),) * 2), 0.0
    stopped = threading.Event()
    with futures.ThreadPoolExecutor(num_workers or min(processes.num_cores(), _WORKERS)) as pool:
        running = [pool.submit(_run, job, sink, names, progress, stopped) for job in jobs]
        try:
            for done in futures.as_completed(running):
                job_gram, job_norm = done.result()
                gram += job_gram
                square_norm += job_norm
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return Geometry(gram, square_norm)


class _Job(NamedTuple):
    """The elements [start, stop) of one array. `unit`: how many are written at a time."""

    path: str
    inputs: Sequence[Leaf]
    coefficients: np.ndarray
    dtype: np.dtype
    start: int
    stop: int
    unit: int


def _split(path, inputs, coefficients, dtype, sink) -> Iterator[_Job]:
    """The jobs of one array."""
    size, asked = inputs[0].size, sink.block(path)
    step = _step16(len(inputs)) if _is_16(inputs, dtype) else _STEP
    unit = _multiple(max(asked, step, *(leaf.block for leaf in inputs)), asked)
    length = _multiple(max(_JOB, *(leaf.stretch for leaf in inputs)), unit)
    for start in range(0, max(size, 1), length):
        yield _Job(path, inputs, coefficients, dtype, start, min(start + length, size), unit)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _is_16(inputs: Sequence[Leaf], dtype: np.dtype) -> bool:
    """Whether the blocks of an array are summed by `blocks.Sum16`."""
    same = all(leaf.dtype == dtype for leaf in inputs)
    free = max(leaf.block for leaf in inputs) == 1
    return same and dtype.name == "bfloat16" and free and inputs[0].size >= _SMALL16


def _step16(n: int) -> int:
    """Elements of each of n inputs that are summed by one call: about four million over all."""
    return max(2**16, min(2**20, 2 ** (_BUDGET16 // n).bit_length() // 2))


_scratch = threading.local()  # a worker's compiled sum and its buffers, kept between jobs


def _sum16(n: int) -> blocks.Sum16:
    if getattr(_scratch, "n", None) != n:
        _scratch.n, _scratch.sum = n, blocks.Sum16(n, _step16(n))
    return _scratch.sum


def _run(job: _Job, sink, names, progress, stopped) -> tuple[np.ndarray, float]:
    """Does a job; returns its share of the Gram matrix and of ‖θ_0‖²."""
    n = len(job.inputs)
    geometry = _Distances(n, whole=job.inputs[0].size <= _WHOLE)
    floating = [jnp.issubdtype(leaf.dtype, np.floating) for leaf in job.inputs]
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(leaf.opened()) for leaf in job.inputs]
        if not all(floating):
            add = _Copied(job, readers, names)
        elif _is_16(job.inputs, job.dtype):
            add = _Pairs(job, readers, geometry)
        else:
            add = _Summed(job, readers, geometry)
        out = np.empty(min(job.unit, job.stop - job.start), job.dtype)
        for start in range(job.start, job.stop, job.unit):
            if stopped.is_set():
                break
            block = out[: min(job.unit, job.stop - start)]
            add.fill(start, block)
            if all(floating) and not blocks.finite(block):
                raise _not_finite(job, start, len(block), names)
            sink.write(job.path, start, block)
            progress(len(block))
    return geometry.gram, geometry.square_norm


class _Distances:
    """Adds up ⟨θ_i - θ_0, θ_j - θ_0⟩ and ‖θ_0‖² over what it is shown."""

    def __init__(self, n: int, *, whole: bool):
        self.gram, self.square_norm, self._whole = np.zeros((n, n)), 0.0, whole

    def count(self, size: int) -> int:
        """How many of the first elements of a block to show."""
        return size if self._whole else -(-size // _PART)

    def add(self, rows: np.ndarray, size: int) -> None:
        """Takes [n, count(size)] of a block of `size` elements, and changes it."""
        share = size / rows.shape[1]
        self.square_norm += share * float(np.einsum("i,i->", rows[0], rows[0]))
        rows -= rows[0].copy()
        self.gram += share * (rows @ rows.T)


class _Pairs:
    """Fills blocks from bfloat16 inputs."""

    def __init__(self, job: _Job, readers, geometry: _Distances):
        self._readers, self._geometry = readers, geometry
        self._coefficients = job.coefficients.astype(np.float32)
        self._sum, self._step = _sum16(len(readers)), _step16(len(readers))

    def fill(self, start: int, out: np.ndarray) -> None:
        for done in range(0, len(out), self._step):
            size = min(self._step, len(out) - done)
            for reader, row in zip(self._readers, self._sum.rows, strict=True):
                reader.read(start + done, row[:size])
            shown = self._geometry.count(size)
            rows = np.empty((len(self._readers), shown), np.float32)
            for k, row in enumerate(self._sum.rows):
                rows[k] = blocks.widen(row[:shown], rows.dtype)
            with np.errstate(all="ignore"):
                self._geometry.add(rows, size)
            out[done : done + size] = self._sum(self._coefficients)[:size]


class _Summed:
    """Fills blocks from inputs of any floating-point dtypes, one input after another."""

    def __init__(self, job: _Job, readers, geometry: _Distances):
        self._readers, self._geometry = readers, geometry
        self._wide = blocks.wide_dtype([job.dtype, *(leaf.dtype for leaf in job.inputs)])
        self._coefficients = job.coefficients.astype(self._wide)
        self._step = min(
            max(_STEP, *(leaf.block for leaf in job.inputs)), max(1, job.stop - job.start)
        )
        self._buffers = [np.empty(self._step, leaf.dtype) for leaf in job.inputs[:1]]
        self._dtypes = [leaf.dtype for leaf in job.inputs]
        self._total = np.empty(self._step, self._wide)

    def fill(self, start: int, out: np.ndarray) -> None:
        in_place = out.dtype == self._wide
        for done in range(0, len(out), self._step):
            target = out[done : done + self._step]
            size = len(target)
            total = target if in_place else self._total[:size]
            shown = self._geometry.count(size)
            rows = np.empty((len(self._readers), shown), self._wide)
            for k, (reader, dtype) in enumerate(zip(self._readers, self._dtypes, strict=True)):
                raw = self._buffer(dtype)[:size]
                reader.read(start + done, raw)
                values = blocks.widen(raw, self._wide)
                rows[k] = values[:shown]
                with np.errstate(all="ignore"):  # what is not finite is told later, by name
                    if k == 0:
                        np.multiply(values, self._coefficients[0], out=total)
                    else:
                        np.multiply(values, self._coefficients[k], out=values)
                        np.add(total, values, out=total)
            with np.errstate(all="ignore"):
                self._geometry.add(rows, size)
            if not in_place:
                blocks.round_into(total, target)

    def _buffer(self, dtype: np.dtype) -> np.ndarray:
        """One buffer serves all inputs of a dtype in turn."""
        for buffer in self._buffers:
            if buffer.dtype == dtype:
                return buffer
        self._buffers.append(np.empty(self._step, dtype))
        return self._buffers[-1]


class _Copied:
    """Fills blocks with what all inputs hold alike."""

    def __init__(self, job: _Job, readers, names):
        self._job, self._readers, self._names = job, readers, names

    def fill(self, start: int, out: np.ndarray) -> None:
        first = np.empty(len(out), self._job.inputs[0].dtype)
        self._readers[0].read(start, first)
        for k in range(1, len(self._readers)):
            other = np.empty(len(out), self._job.inputs[k].dtype)
            self._readers[k].read(start, other)
            if not np.array_equal(first, other):
                raise ValueError(
                    f"{self._job.path!r} is {first.dtype} in {self._names[0]} and not the same in "
                    f"{self._names[k]}; only floating-point parameters can be mixed"
                )
        out[...] = first


def _not_finite(job: _Job, start: int, size: int, names: Sequence[str]) -> ValueError:
    for leaf, name in zip(job.inputs, names, strict=True):
        values = np.empty(size, leaf.dtype)
        with leaf.opened() as reader:
            reader.read(start, values)
        if bad := int(size - np.isfinite(values).sum()):
            return ValueError(
                f"{name}: {job.path!r} holds {bad} values that are NaN or infinite"
                f"{' in one block' if size < leaf.size else ''}; the checkpoint's training "
                "diverged or the file is damaged, so it cannot be mixed"
            )
    return ValueError(
        f"the mix of {job.path!r} does not fit into {job.dtype}; choose a wider config.mix.dtype"
    )
