"""Timing two programs side by side: interleaved on the same machine, medians."""

import importlib
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from policymix import memory

REPEATS = 3


class Measurement(NamedTuple):
    """Medians of one side of a row; memory is None where both sides share a process."""

    wall: float
    cpu: float
    peak: int | None = None


class Row(NamedTuple):
    """A line of the table: ours beside another program. `note`: what else was found."""

    name: str
    ours: Measurement
    theirs: Measurement
    note: str = ""


def interleaved(*sides: Callable[[], Measurement], repeats: int = 0) -> tuple[Measurement, ...]:
    """Medians of every side, measured in turn."""
    runs = [[side() for side in sides] for _ in range(repeats or REPEATS)]
    return tuple(
        Measurement(
            *(None if v[0] is None else statistics.median(v) for v in zip(*side, strict=True))
        )
        for side in zip(*runs, strict=True)
    )


def here(function: Callable[[], Any]) -> Callable[[], Measurement]:
    """Times a call in this process; the first, which compiles, is not counted."""
    import jax  # not for processes that are measured: it takes memory

    jax.block_until_ready(function())

    def measure():
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        return Measurement(time.perf_counter() - wall, time.process_time() - cpu)

    return measure


def apart(side: str, *args: Any) -> Callable[[], Measurement]:
    """Times what `side` prepares, in a process of its own whose peak memory is then its own.

    Args:
      side: "module:function"; the function takes `args` and returns what is timed.
    """

    def measure():
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, side, args))
        process.start()
        sender.close()
        try:
            return Measurement(*receiver.recv())
        except EOFError:
            raise OSError(f"the process of {side} died (out of memory?)") from None
        finally:
            process.join()

    return measure


def _child(sender, side: str, args) -> None:
    module, _, name = side.partition(":")
    run = getattr(importlib.import_module(module), name)(*args)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    sender.send((wall, cpu, memory.peak_bytes()))
