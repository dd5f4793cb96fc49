"""Stretches of one array: read from every input in turn, summed, rounded, written."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from policymix.checkpoints import blocks
from policymix.checkpoints.leaves import Leaf

STEP = 2**17  # elements read from one input at a time, where it is added to the sum alone
# Elements of all inputs together that are summed in one pass: small enough for the cache, and large
# enough that a pass is worth its call, which costs more where it is a compiled one.
_TOGETHER, _TOGETHER16 = 2**20, 2**22
_SMALL16 = 2**17  # fewer are not worth a compiled call
_JOB = 2**24  # elements of a job, at least, where nothing asks for more
# Distances are measured on a whole job of up to so many elements, and else on its first ones.
_WHOLE, _SOME = 2**16, 2**14


class Job(NamedTuple):
    """The elements [start, stop) of one array. `unit`: how many are written at a time."""

    path: str
    inputs: Sequence[Leaf]
    coefficients: np.ndarray
    dtype: np.dtype
    start: int
    stop: int
    unit: int


def split(path, inputs, coefficients, dtype, sink) -> Iterator[Job]:
    """The jobs of one array."""
    size, asked = inputs[0].size, sink.block(path)
    blocks_of = [leaf.block for leaf in inputs]
    unit = _multiple(max(asked, _step(inputs, dtype), *blocks_of), asked)
    length = _multiple(max(_JOB, *(leaf.stretch for leaf in inputs)), unit)
    for start in range(0, max(size, 1), length):
        yield Job(path, inputs, coefficients, dtype, start, min(start + length, size), unit)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _in_turn(inputs: Sequence[Leaf]) -> bool:
    """Whether one input after another is added to the sum: they come in large blocks."""
    return max(leaf.block for leaf in inputs) > STEP


def _is_16(inputs: Sequence[Leaf], dtype: np.dtype) -> bool:
    """Whether the blocks of an array are summed by `blocks.Sum16`."""
    same = all(leaf.dtype == dtype for leaf in inputs)
    return same and dtype.name == "bfloat16" and inputs[0].size >= _SMALL16


def _step(inputs: Sequence[Leaf], dtype: np.dtype) -> int:
    """Elements of each input that are summed at a time."""
    if _in_turn(inputs):
        return STEP
    return step16(len(inputs)) if _is_16(inputs, dtype) else _power(_TOGETHER // len(inputs), 18)


def step16(n: int) -> int:
    """Elements of each of n bfloat16 inputs that are summed by one call."""
    return _power(_TOGETHER16 // n, 20)


def _power(size: int, most: int) -> int:
    """The power of two up to `size`, at least 2^14 and at most 2^most."""
    return 2 ** min(max(size.bit_length() - 1, 14), most)


_scratch = threading.local()  # a worker's buffers and compiled sums, kept between jobs


def sum16(n: int, size: int = 0) -> blocks.Sum16:
    """The worker's sum of n blocks of at least `size` elements, in the smaller of two lengths that
    will do; whole steps by default.
    """
    step = step16(n)
    length = step if not 0 < size <= step // 4 else step // 4
    sums = _scratch.__dict__.setdefault("sums", {})
    if (n, length) not in sums:
        sums[n, length] = blocks.Sum16(n, length)
    return sums[n, length]


def _buffer(name: str, size: int, dtype: np.dtype) -> np.ndarray:
    """[size] of the worker's own memory: fresh pages cost as much as the arithmetic."""
    held = _scratch.__dict__.setdefault("buffers", {})
    if name not in held or held[name].nbytes < size * dtype.itemsize:
        held[name] = np.empty(size * dtype.itemsize, np.uint8)
    return held[name][: size * dtype.itemsize].view(dtype)


def run(job: Job, sink, names, progress, stopped) -> tuple[np.ndarray, float]:
    """Does a job; returns its share of the Gram matrix and of ‖θ_0‖²."""
    geometry = _Distances(job)
    floating = all(jnp.issubdtype(leaf.dtype, np.floating) for leaf in job.inputs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))  # what is not finite is told by name
        readers = [stack.enter_context(leaf.opened()) for leaf in job.inputs]
        if not floating:
            add = _Copied(job, readers, names)
        else:
            add = (_InTurn if _in_turn(job.inputs) else _Together)(job, readers, geometry)
        out = _buffer("out", min(job.unit, job.stop - job.start), job.dtype)
        for start in range(job.start, job.stop, job.unit):
            if stopped.is_set():
                break
            block = add.fill(start, out[: min(job.unit, job.stop - start)])
            if floating and not blocks.finite(block):
                raise _not_finite(job, start, len(block), names)
            sink.write(job.path, start, block)
            progress(len(block))
    return geometry.gram, geometry.square_norm


class _Distances:
    """⟨θ_i - θ_0, θ_j - θ_0⟩ and ‖θ_0‖² of a job, from its first elements."""

    def __init__(self, job: Job):
        n, self._size = len(job.inputs), job.stop - job.start
        self.gram, self.square_norm = np.zeros((n, n)), 0.0
        self.count = self._size if self._size <= _WHOLE else _SOME

    def take(self, rows: np.ndarray) -> None:
        """[n, count] elements of the inputs."""
        # In float64, and short of its end, so that no finite input has an infinite distance.
        rows = np.clip(rows.astype(np.float64), -1e100, 1e100)
        share = self._size / max(rows.shape[1], 1)
        self.square_norm = share * float(np.einsum("i,i->", rows[0], rows[0]))
        rows -= rows[0].copy()
        # Not BLAS, whose threads would wait for each other beside ours.
        self.gram = share * np.einsum("ib,jb->ij", rows, rows)


class _Together:
    """Fills blocks from all inputs at once."""

    def __init__(self, job: Job, readers, geometry: _Distances):
        self._job, self._readers, self._geometry = job, readers, geometry
        self._pairs = _is_16(job.inputs, job.dtype)
        dtypes = [leaf.dtype for leaf in job.inputs]
        self._wide = blocks.wide_dtype([job.dtype, *dtypes])
        self._coefficients = job.coefficients.astype(self._wide)
        self._step = _step(job.inputs, job.dtype)

    def fill(self, start: int, out: np.ndarray) -> np.ndarray:
        """The block of the mix from `start` on, in `out` or elsewhere."""
        function = self._fill_pairs if self._pairs else self._fill_rows
        if len(out) <= self._step:
            return function(start, out)
        for done in range(0, len(out), self._step):
            part = out[done : done + self._step]
            if (found := function(start + done, part)) is not part:
                part[...] = found
        return out

    def _fill_pairs(self, start: int, out: np.ndarray) -> np.ndarray:
        total = sum16(len(self._readers), len(out))
        for reader, row in zip(self._readers, total.rows, strict=True):
            reader.read(start, row[: len(out)])
        if start == self._job.start:
            some = [row[: self._geometry.count] for row in total.rows]
            self._geometry.take(np.stack([blocks.widen(row, self._wide) for row in some]))
        return total(self._coefficients)[: len(out)]

    def _fill_rows(self, start: int, out: np.ndarray) -> np.ndarray:
        size, n = len(out), len(self._readers)
        rows = _buffer("rows", n * size, self._wide).reshape(n, size)
        for reader, leaf, row in zip(self._readers, self._job.inputs, rows, strict=True):
            if leaf.dtype == self._wide:
                reader.read(start, row)
            else:
                raw = _buffer("raw", size, leaf.dtype)
                reader.read(start, raw)
                row[...] = blocks.widen(raw, self._wide)
        in_place = out.dtype == self._wide
        total = out if in_place else _buffer("total", size, self._wide)
        np.einsum("k,kb->b", self._coefficients, rows, out=total)
        if start == self._job.start:
            self._geometry.take(rows[:, : self._geometry.count])
        if not in_place:
            blocks.round_into(total, out)
        return out


class _InTurn:
    """Fills blocks from one input after another, so that a block of only one is held."""

    def __init__(self, job: Job, readers, geometry: _Distances):
        self._job, self._readers, self._geometry = job, readers, geometry
        self._wide = blocks.wide_dtype([job.dtype, *(leaf.dtype for leaf in job.inputs)])
        self._coefficients = job.coefficients.astype(self._wide)

    def fill(self, start: int, out: np.ndarray) -> np.ndarray:
        """The block of the mix from `start` on, in `out`."""
        size, first = len(out), start == self._job.start
        in_place = out.dtype == self._wide
        total = out if in_place else _buffer("total", size, self._wide)
        some = np.empty((len(self._readers), self._geometry.count if first else 0), self._wide)
        for k, (reader, leaf) in enumerate(zip(self._readers, self._job.inputs, strict=True)):
            raw = _buffer("raw", size, leaf.dtype)
            reader.read(start, raw)
            values = blocks.widen(raw, self._wide)
            some[k] = values[: some.shape[1]]
            if k == 0:
                np.multiply(values, self._coefficients[0], out=total)
            else:
                np.multiply(values, self._coefficients[k], out=values)
                np.add(total, values, out=total)
        if first:
            self._geometry.take(some)
        if not in_place:
            blocks.round_into(total, out)
        return out


class _Copied:
    """Fills blocks with what all inputs hold alike."""

    def __init__(self, job: Job, readers, names):
        self._job, self._readers, self._names = job, readers, names

    def fill(self, start: int, out: np.ndarray) -> np.ndarray:
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
        return out


def _not_finite(job: Job, start: int, size: int, names: Sequence[str]) -> ValueError:
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
