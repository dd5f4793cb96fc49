"""Stretches of arrays: read from every input in turn, summed, rounded, written."""

import bisect
import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from policymix.checkpoints import blocks
from policymix.checkpoints.leaves import Leaf

COMPILED = "float32", "bfloat16"  # what `blocks.Sum` adds

STEP = 2**17  # elements read from one input at a time, where it is added to the sum alone
# Bytes of all inputs together, and of one, that are summed in one pass: what was read should still
# be in the cache when it is summed, and be worth its calls. A megabyte is as quick while nothing
# else uses the cache, and slower when something does.
_TOGETHER, _MOST = 8 * 2**20, 2**19
_SMALL = 2**17  # fewer elements are not worth a compiled call
_JOB = 2**23  # elements of a job, at least, where nothing asks for more
# Distances are measured on the whole of a job of up to so many elements, and else on about so many
# of them. An odd step, so that no row or column of a matrix is met more often than others.
_WHOLE, _SOME = 2**16, 5000


class Span(NamedTuple):
    """Arrays that lie one after another in every input and in the output, and are mixed alike: they
    are read and written as one.

    Attributes:
      path: of the first, by which the sink knows it.
      starts: the first element of each, and its path.
      inputs: as one, of each input.
    """

    path: str
    starts: Sequence[tuple[int, str]]
    inputs: Sequence[Leaf]
    coefficients: np.ndarray
    dtype: np.dtype

    def at(self, position: int) -> tuple[str, int, int]:
        """The array that holds an element: (path, its first element, the next one's)."""
        number = bisect.bisect_right([start for start, _ in self.starts], position) - 1
        ends = [start for start, _ in self.starts[1:]] + [self.inputs[0].size]
        return self.starts[number][1], self.starts[number][0], ends[number]


def spans(by_path, inputs, dtypes, sink) -> Iterator[Span]:
    """All arrays, joined where they can be. Arguments as those of `streaming.mix`."""
    alike: list[str] = []
    for path, coefficients in by_path.items():
        if alike and not (
            dtypes[path] == dtypes[alike[-1]]
            and _same(coefficients, by_path[alike[-1]])
            and sink.precedes(alike[-1], path)
            and all(flat[alike[-1]].precedes(flat[path]) for flat in inputs)
            and all(is_floating(flat[path].dtype) for flat in inputs)
        ):
            yield _span(alike, by_path, inputs, dtypes)
            alike = []
        alike.append(path)
    if alike:
        yield _span(alike, by_path, inputs, dtypes)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or np.array_equal(a, b)


@functools.cache
def is_floating(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, np.floating)


def _span(alike: Sequence[str], by_path, inputs, dtypes) -> Span:
    first, sizes = alike[0], [inputs[0][path].size for path in alike]
    starts = list(zip([0, *itertools.accumulate(sizes)], alike, strict=False))
    rows = [flat[first] for flat in inputs]
    if len(alike) > 1:
        rows = [leaf.until(sum(sizes), alike[-1]) for leaf in rows]
    return Span(first, starts, rows, np.asarray(by_path[first]), dtypes[first])


class Job(NamedTuple):
    """The elements [start, stop) of a span. `unit`: how many are written at a time."""

    span: Span
    start: int
    stop: int
    unit: int


def split(span: Span, sink) -> Iterator[Job]:
    """The jobs of a span."""
    size, asked = span.inputs[0].size, sink.block(span.path)
    blocks_of = [leaf.block for leaf in span.inputs]
    unit = _multiple(max(asked, _step(span), *blocks_of), asked)
    length = _multiple(max(_JOB, *(leaf.stretch for leaf in span.inputs)), unit)
    begin = 0
    if max(asked, *blocks_of) == 1:  # a short one first, so that all others are written in pages
        begin = sink.before(span.path, unit)
    if 0 < begin < size:
        yield Job(span, 0, begin, unit)
    else:
        begin = 0
    for start in range(begin, max(size, 1), length):
        yield Job(span, start, min(start + length, size), unit)


def plan(by_path, inputs, dtypes, sink) -> list[Job]:
    """All jobs, long ones first, so that the last to end are short. Arguments as of `spans`."""
    jobs = [job for span in spans(by_path, inputs, dtypes, sink) for job in split(span, sink)]
    return sorted(jobs, key=lambda job: job.start - job.stop)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _in_turn(span: Span) -> bool:
    """Whether one input after another is added to the sum: they come in large blocks."""
    return max(leaf.block for leaf in span.inputs) > STEP


def _is_compiled(span: Span) -> bool:
    """Whether the blocks of a span are summed by `blocks.Sum`."""
    same = all(leaf.dtype == span.dtype for leaf in span.inputs)
    large = span.inputs[0].size >= _SMALL
    return same and span.dtype.name in COMPILED and large and blocks.can_compile()


def _step(span: Span) -> int:
    """Elements of each input that are summed at a time."""
    if _in_turn(span):
        return STEP
    return step(len(span.inputs), span.dtype if _is_compiled(span) else np.dtype(np.float32))


def step(n: int, dtype: np.dtype) -> int:
    """Elements of each of n inputs that are summed by one call: a power of two."""
    share = min(max(_TOGETHER // n, 2**16), _MOST)
    return 2 ** (share.bit_length() - 1) // dtype.itemsize


_scratch = threading.local()  # a worker's buffers and compiled sums, kept between jobs


def sum_of(n: int, dtype: np.dtype, size: int = 0) -> blocks.Sum:
    """The worker's sum of n blocks of at least `size` elements, in the smaller of two lengths that
    will do; whole steps by default.
    """
    length = step(n, dtype)
    if 0 < size <= length // 4:
        length //= 4
    sums = _scratch.__dict__.setdefault("sums", {})
    if (n, dtype, length) not in sums:
        sums[n, dtype, length] = blocks.Sum(n, length, dtype)
    return sums[n, dtype, length]


def buffer(name: str, size: int, dtype: np.dtype) -> np.ndarray:
    """[size] of the worker's own memory: fresh pages cost as much as the arithmetic."""
    held = _scratch.__dict__.setdefault("buffers", {})
    if name not in held or held[name].nbytes < size * dtype.itemsize:
        held[name] = np.empty(size * dtype.itemsize, np.uint8)
    return held[name][: size * dtype.itemsize].view(dtype)


def run_all(
    jobs: Sequence[Job], run: Callable[[Job, threading.Event], Any], num_workers: int
) -> list[Any]:
    """Does all jobs, in their order, and returns what `run` made of each.

    The first error ends it: `run` is told by the event.
    """
    shares: list[Any] = [None] * len(jobs)
    stopped, numbers = threading.Event(), iter(range(len(jobs)))

    def work() -> None:
        try:
            for number in numbers:  # which the workers share
                if stopped.is_set():
                    return
                shares[number] = run(jobs[number], stopped)
        except BaseException:
            stopped.set()
            raise

    with futures.ThreadPoolExecutor(num_workers) as pool:
        working = [pool.submit(work) for _ in range(num_workers)]
        try:
            for one in futures.as_completed(working):
                one.result()
        except BaseException:  # also an interrupt, which comes to this thread
            stopped.set()
            raise
    return shares


def run(job: Job, stopped: threading.Event, *, sink, names, progress) -> tuple[np.ndarray, float]:
    """Mixes one job; its share of the Gram matrix and of ‖θ_0‖²."""
    span, sample = job.span, _Sample(job)
    floating = all(is_floating(leaf.dtype) for leaf in span.inputs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))  # what is not finite is told by name
        readers = [stack.enter_context(leaf.opened()) for leaf in span.inputs]
        if not floating:
            add = _Copied(span, readers, names)
        else:
            add = (_InTurn if _in_turn(span) else _Together)(span, readers, sample)
        out = buffer("out", min(job.unit, job.stop - job.start), span.dtype)
        for start in range(job.start, job.stop, job.unit):
            if stopped.is_set():
                break
            block, finite = add.fill(start, out[: job.stop - start])
            if floating and not finite and not blocks.finite(block):
                raise _not_finite(span, start, block, names)
            sink.write(span.path, start, block)
            progress(len(block))
    return sample.products() if floating else (sample.gram, 0.0)


class _Sample:
    """Elements of a job's inputs, from which distances are measured: all, or some of each block."""

    def __init__(self, job: Job):
        n, self._size = len(job.span.inputs), job.stop - job.start
        self._every = self._size // _SOME | 1 if self._size > _WHOLE else 1
        self._wide = _wide(job.span)
        self._parts: list[list[np.ndarray]] = [[] for _ in range(n)]
        self.gram = np.zeros((n, n))

    def take(self, k: int, block: np.ndarray) -> None:
        """The next block of input k, [m]."""
        self._parts[k].append(block[:: self._every].copy())

    def products(self) -> tuple[np.ndarray, float]:
        """(⟨θ_i - θ_0, θ_j - θ_0⟩ [n, n], ‖θ_0‖²) of the job."""
        if not self._parts[0]:
            return self.gram, 0.0
        wide = [blocks.widen(np.concatenate(parts), self._wide) for parts in self._parts]
        # In float64, and short of its end, so that no finite input has an infinite distance.
        rows = np.clip(np.stack(wide).astype(np.float64), -1e100, 1e100)
        share = self._size / max(rows.shape[1], 1)
        square_norm = share * float(np.einsum("i,i->", rows[0], rows[0]))
        rows -= rows[0].copy()
        # Not BLAS, whose threads would wait for each other beside ours.
        return share * np.einsum("ib,jb->ij", rows, rows), square_norm


def _wide(span: Span) -> np.dtype:
    return blocks.wide_dtype([span.dtype, *(leaf.dtype for leaf in span.inputs)])


class _Together:
    """Fills blocks from all inputs at once."""

    def __init__(self, span: Span, readers, sample: _Sample):
        self._span, self._readers, self._sample = span, readers, sample
        self._wide, self._step = _wide(span), _step(span)
        self._coefficients = span.coefficients.astype(self._wide)
        self._fill = self._fill_compiled if _is_compiled(span) else self._fill_rows

    def fill(self, start: int, out: np.ndarray) -> tuple[np.ndarray, bool]:
        """The block of the mix from `start` on, in `out` or elsewhere; whether it is finite, or
        False where that is unknown.
        """
        if len(out) <= self._step:
            return self._fill(start, out)
        all_finite = True
        for done in range(0, len(out), self._step):
            part = out[done : done + self._step]
            found, finite = self._fill(start + done, part)
            all_finite &= finite
            if found is not part:
                part[...] = found
        return out, all_finite

    def _fill_compiled(self, start: int, out: np.ndarray) -> tuple[np.ndarray, bool]:
        total = sum_of(len(self._readers), out.dtype, len(out))
        for k, (reader, row) in enumerate(zip(self._readers, total.rows, strict=True)):
            reader.read(start, row[: len(out)])
            self._sample.take(k, row[: len(out)])
        found, finite = total(self._coefficients)
        return found[: len(out)], finite

    def _fill_rows(self, start: int, out: np.ndarray) -> tuple[np.ndarray, bool]:
        size, n = len(out), len(self._readers)
        rows = buffer("rows", n * size, self._wide).reshape(n, size)
        for k, (reader, leaf) in enumerate(zip(self._readers, self._span.inputs, strict=True)):
            if leaf.dtype == self._wide:
                reader.read(start, rows[k])
            else:
                raw = buffer("raw", size, leaf.dtype)
                reader.read(start, raw)
                rows[k] = blocks.widen(raw, self._wide)
            self._sample.take(k, rows[k])
        in_place = out.dtype == self._wide
        total = out if in_place else buffer("total", size, self._wide)
        np.einsum("k,kb->b", self._coefficients, rows, out=total)
        if not in_place:
            blocks.round_into(total, out)
        return out, blocks.finite(out)


class _InTurn:
    """Fills blocks from one input after another, so that a block of only one is held."""

    def __init__(self, span: Span, readers, sample: _Sample):
        self._span, self._readers, self._sample = span, readers, sample
        self._wide = _wide(span)
        self._coefficients = span.coefficients.astype(self._wide)

    def fill(self, start: int, out: np.ndarray) -> tuple[np.ndarray, bool]:
        """The block of the mix from `start` on, in `out`; whether it is finite."""
        in_place = out.dtype == self._wide
        total = out if in_place else buffer("total", len(out), self._wide)
        pieces = [slice(at, at + STEP) for at in range(0, len(out), STEP)]
        for k, (reader, leaf) in enumerate(zip(self._readers, self._span.inputs, strict=True)):
            for piece in pieces:
                part = total[piece]
                raw = buffer("raw", len(part), leaf.dtype)
                reader.read(start + piece.start, raw)
                values = blocks.widen(raw, self._wide)
                self._sample.take(k, values)
                if k == 0:
                    np.multiply(values, self._coefficients[0], out=part)
                else:
                    np.multiply(values, self._coefficients[k], out=values)
                    np.add(part, values, out=part)
        for piece in () if in_place else pieces:
            blocks.round_into(total[piece], out[piece])
        return out, blocks.finite(out)


class _Copied:
    """Fills blocks with what all inputs hold alike."""

    def __init__(self, span: Span, readers, names):
        self._span, self._readers, self._names = span, readers, names

    def fill(self, start: int, out: np.ndarray) -> tuple[np.ndarray, bool]:
        inputs = self._span.inputs
        first = np.empty(len(out), inputs[0].dtype)
        self._readers[0].read(start, first)
        for k in range(1, len(self._readers)):
            other = np.empty(len(out), inputs[k].dtype)
            self._readers[k].read(start, other)
            if not np.array_equal(first, other):
                raise ValueError(
                    f"{self._span.path!r} is {first.dtype} in {self._names[0]} and not the same "
                    f"in {self._names[k]}; only floating-point parameters can be mixed"
                )
        out[...] = first
        return out, True


def _not_finite(span: Span, start: int, block: np.ndarray, names: Sequence[str]) -> ValueError:
    """Says which input, and which array, made a block of the mix [size] NaN or infinite."""
    for leaf, name in zip(span.inputs, names, strict=True):
        values = np.empty(len(block), leaf.dtype)
        with leaf.opened() as reader:
            reader.read(start, values)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            path, first, end = span.at(start + bad[0])
            whole = start <= first and end <= start + len(block)
            return ValueError(
                f"{name}: {path!r} holds {int((bad < end - start).sum())} values that are NaN or "
                f"infinite{'' if whole else ' in one block'}; the checkpoint's training diverged "
                "or the file is damaged, so it cannot be mixed"
            )
    path, *_ = span.at(start + int(np.flatnonzero(~np.isfinite(block))[0]))
    return ValueError(
        f"the mix of {path!r} does not fit into {span.dtype}; choose a wider config.mix.dtype"
    )
