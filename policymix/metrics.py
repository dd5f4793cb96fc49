"""One writer for what a run has to say: a line on stdout, `metrics.jsonl`, and progress on long
steps.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import tqdm

from policymix import files, memory

_T = TypeVar("_T")
_LARGE = 10**4  # totals beyond it are shown as fractions


class Writer:
    """Appends one JSON line per call to `metrics.jsonl` and prints the same as text.

    Lines are flushed as they are written: a killed run keeps all but perhaps its last line, and
    `Writer` drops a torn last line, and lines of steps after `resume_step`, before it appends.
    """

    def __init__(self, directory: pathlib.Path, *, resume_step: int = 0):
        self._path = directory / "metrics.jsonl"
        kept = read(self._path, before=resume_step + 1) if self._path.exists() else ()
        files.write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes scalars under flat names ("train/loss")."""
        row = {"step": step} | {name: float(value) for name, value in values.items()}
        # JSON has no word for NaN; null keeps the line readable by every parser.
        self._file.write(
            json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"
        )
        self._file.flush()
        line = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
        tqdm.tqdm.write(f"step {step}  {line}", file=sys.stdout)

    def close(self) -> None:
        self._file.close()


def read(path: pathlib.Path, *, before: float = math.inf) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl with step < `before`; a torn last line is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return
        if row["step"] < before:
            yield row


class Progress:
    """A bar when stderr is a terminal, else about `lines` lines over the whole (0: none)."""

    def __init__(self, what: str, total: int, *, lines: int = 10):
        self._what, self._total, self._done = what, total, 0
        self._every = max(1, math.ceil(total / lines)) if lines else 0
        self._bar, self._lock = None, threading.Lock()
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(desc=what, total=total, leave=False, unit_scale=total > _LARGE)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, count: int = 1) -> None:
        """So many more are done. Threads may call it."""
        with self._lock:
            before, self._done = self._done, self._done + count
            if self._bar is not None:
                self._bar.update(count)
                return
            full = self._done == self._total
            if self._every and (before // self._every < self._done // self._every or full):
                done = f"{self._done}/{self._total}"
                if self._total > _LARGE:
                    done = f"{self._done / self._total:.0%}"
                print(f"{self._what}: {done}", file=sys.stderr, flush=True)


@dataclasses.dataclass
class Cost:
    """What a piece of work took.

    Attributes:
      begun: seconds since 1970. seconds: of wall time. peak_memory_bytes: of its process.
    """

    begun: float
    seconds: float = 0.0
    peak_memory_bytes: int = 0


@contextlib.contextmanager
def costing() -> Iterator[Cost]:
    """Fills in the cost of its block at the end."""
    memory.reset_peak()
    cost, started = Cost(time.time()), time.monotonic()
    yield cost
    cost.seconds = round(time.monotonic() - started, 2)
    cost.peak_memory_bytes = memory.peak_bytes()


def wall_seconds(costs: Iterable[Mapping[str, float]]) -> float:
    """Seconds in which at least one of some pieces of work, each {"begun", "seconds"}, went on."""
    total = end = 0.0
    for cost in sorted(costs, key=lambda cost: cost["begun"]):
        stop = cost["begun"] + cost["seconds"]
        total += max(0.0, stop - max(end, cost["begun"]))
        end = max(end, stop)
    return total


def progress(
    items: Iterable[_T], what: str, *, total: int | None = None, lines: int = 10
) -> Iterator[_T]:
    """Passes items through and shows how far they are."""
    with Progress(what, len(items) if total is None else total, lines=lines) as shown:
        for item in items:
            yield item
            shown.step()
