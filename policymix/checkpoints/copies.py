"""Copies a checkpoint from disk to disk, in blocks, whatever its format and that of the copy."""

import functools
import threading
from collections.abc import Callable, Mapping

import numpy as np

from policymix import processes
from policymix.checkpoints import blocks, leaves
from policymix.checkpoints import jobs as jobs_lib


def copy(
    source: Mapping[str, leaves.Leaf],
    sink: leaves.Sink,
    dtypes: Mapping[str, np.dtype],
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Writes one checkpoint to `sink`, bit for bit where the dtype stays.

    Args:
      dtypes: of the output, by path.

    Returns:
      The paths that hold NaN or infinity, which are copied like any other.

    Raises:
      ValueError: the input is damaged, or a number does not fit the dtype.
    """
    alone = np.ones(1)
    jobs = jobs_lib.plan(dict.fromkeys(source, alone), [source], dtypes, sink)
    run = functools.partial(_run, sink=sink, progress=progress)
    found = jobs_lib.run_all(jobs, run, processes.num_cores())
    return sorted({path for paths in found for path in paths})


def _run(job: jobs_lib.Job, stopped: threading.Event, *, sink, progress) -> list[str]:
    """Copies one job of a single input; the paths of arrays that hold NaN or infinity."""
    span, bad = job.span, set()
    (leaf,) = span.inputs
    with leaf.opened() as reader, np.errstate(all="ignore"):
        raw = jobs_lib.buffer("raw", min(job.unit, job.stop - job.start), leaf.dtype)
        for start in range(job.start, job.stop, job.unit):
            if stopped.is_set():
                break
            block = raw[: job.stop - start]
            reader.read(start, block)
            finite = not jobs_lib.is_floating(leaf.dtype) or blocks.finite(block)
            if not finite:
                where = start + np.flatnonzero(~np.isfinite(block))
                numbers = np.searchsorted([first for first, _ in span.starts], where, "right") - 1
                bad |= {span.starts[number][1] for number in np.unique(numbers)}
            if span.dtype != leaf.dtype:
                raw_block, block = block, jobs_lib.buffer("out", len(block), span.dtype)
                wide = blocks.widen(raw_block, blocks.wide_dtype([leaf.dtype]))
                blocks.round_into(wide.copy(), block)
                if not blocks.finite(block):
                    lost = np.flatnonzero(np.isfinite(raw_block) & ~np.isfinite(block))
                    if len(lost):
                        raise ValueError(
                            f"{leaf.where}: {span.at(start + int(lost[0]))[0]!r} holds numbers "
                            f"that do not fit into {span.dtype}: choose a wider --dtype"
                        )
            sink.write(span.path, start, block)
            progress(len(block))
    return sorted(bad)
