"""One writer for what a run has to say: a line on stdout, `metrics.jsonl`, TensorBoard and W&B; the
speed of a loop, and progress on long steps.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import tqdm

from policymix import files, memory, trackers

FILE = "metrics.jsonl"  # of a run
_T = TypeVar("_T")
_LARGE = 10**4  # totals beyond it are shown as fractions


class Writer:
    """Appends one JSON line per call to `metrics.jsonl`, prints the same as text, and passes it on.

    Lines are written at once: a killed run keeps all but perhaps its last line, and `Writer` drops
    a torn last line, and lines of steps after `resume_step`, before it appends. The first line
    after a resumption has "resumed": `resume_step`.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        resume_step: int = 0,
        num_steps: int = 0,
        tensorboard: bool = False,
        wandb: str = "",
        run_name: str = "",
        config: Any = None,
        active: bool = True,
    ):
        """Opens everything.

        Args:
          num_steps: of the whole run, for the line on stdout; 0: not said.
          tensorboard: whether event files go to `directory`/tensorboard.
          wandb: a Weights & Biases project, "" for none; run_name and config: of its run.
          active: False writes nothing anywhere: processes but the first.

        Raises:
          OSError: a package that is not installed, or a disk that is full or not writable.
        """
        self._file, self._trackers, self._num_steps = None, [], num_steps
        self._path = directory / FILE
        self._note = {"resumed": resume_step} if resume_step else {}
        if not active:
            return
        trackers.check(tensorboard=tensorboard, wandb=wandb)
        kept = read(self._path, before=resume_step + 1) if self._path.exists() else ()
        files.write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = self._path.open("ab", buffering=0)
        if tensorboard:
            with _naming(directory / "tensorboard"):
                board = trackers.TensorBoard(directory / "tensorboard", resume_step=resume_step)
            self._trackers.append(board)
        if wandb:
            self._trackers.append(trackers.WandB(directory, wandb, name=run_name, config=config))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(failed=kind is not None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes scalars under flat names ("train/loss"). OSError for a full disk."""
        if self._file is None:
            return
        values = {name: float(value) for name, value in values.items()}
        # JSON has no word for NaN; null keeps the line readable by every parser.
        known = {name: v if math.isfinite(v) else None for name, v in values.items()}
        row, self._note = {"step": step} | known | self._note, {}
        with _naming(self._path):
            text = memoryview((json.dumps(row) + "\n").encode())
            while text:  # a disk that fills up may take a part
                text = text[self._file.write(text) :]
        tqdm.tqdm.write(line(step, values, self._num_steps), file=sys.stdout)
        for tracker in self._trackers:
            with _naming(self._path.parent / "tensorboard"):
                tracker.write(step, values)

    def close(self, *, failed: bool = False) -> None:
        """May be called again. `failed`: the run ends by an error, which W&B is told, and which a
        disk that is still full does not hide. All is closed before the first error is raised.
        """
        file, self._file = self._file, None
        opened, self._trackers = self._trackers, []
        closers = [functools.partial(tracker.close, failed=failed) for tracker in opened]
        errors = []
        for close in [file.close, *closers] if file else closers:
            try:
                with _naming(self._path.parent):
                    close()
            except Exception as error:
                errors.append(error)
        if errors and not failed:
            raise errors[0]


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Says of a failed write what was being written."""
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        if code in files.NO_ROOM:
            raise files.no_room(path, code) from error
        raise OSError(
            code, f"cannot write {path}: {files.reason(error.strerror or error)}"
        ) from error


def line(step: int, values: Mapping[str, float], num_steps: int = 0) -> str:
    """The metrics of a step as people read them: what every run has first, the others by name."""
    rest = dict(values)
    if "samples_per_second" in rest:
        rest.pop("steps_per_second", None)
    for name in _UNTOLD:
        rest.pop(name, None)
    told = [tell(rest.pop(name)) for name, tell in _TOLD.items() if name in rest]
    told += [f"{name} {value:.4g}" for name, value in rest.items()]
    return "  ".join([f"step {step}/{num_steps}" if num_steps else f"step {step}", *told])


def span(seconds: float) -> str:
    """A duration in two units: 3 h 12 min."""
    if not math.isfinite(seconds):
        return "unknown"
    seconds = round(seconds)
    for unit, size, lower, parts in _SPANS:
        if seconds >= size:
            whole, rest = divmod(seconds, size)
            return f"{whole} {unit}" + (f" {rest // parts} {lower}" if rest // parts else "")
    return f"{seconds} s"


_SPANS = (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))


def size(count: float) -> str:
    """Bytes as people read them: 21.3 GB."""
    if not math.isfinite(count):
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


_TOLD = {
    "loss": lambda x: f"loss {x:.4g}",
    "grad_norm": lambda x: f"grad {x:.3g}",
    "learning_rate": lambda x: f"lr {x:.3g}",
    "samples_per_second": lambda x: f"{x:.3g} samples/s" if x < 100 else f"{x:.0f} samples/s",
    "steps_per_second": lambda x: f"{x:.3g} steps/s",
    "data_wait": lambda x: f"data {100 * x:.0f} %",
    "memory_bytes": lambda x: f"mem {size(x)}",
    "eta_seconds": lambda x: f"eta {span(x)}",
}
_UNTOLD = ("param_norm", "host_memory_bytes")  # files have them


def read(path: pathlib.Path, *, before: float = math.inf) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl with step < `before`; a torn last line is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return
        if row["step"] < before:
            yield row


class Meter:
    """The speed of a loop, from line to line."""

    def __init__(self, step: int, now: float, *, batch_size: int, num_steps: int):
        """A loop at `step`, at the time `now` in seconds of any clock, that ends at `num_steps`."""
        self._batch_size, self._num_steps = batch_size, num_steps
        self._last, self._since = (step, now), None
        self._waited = self._paused = 0.0

    def waited(self, seconds: float) -> None:
        """So long the loop stood still for want of a batch."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """So long it did something else: saved, or evaluated. Speeds do not count that, the time
        that is left does.
        """
        self._paused += seconds

    def tell(self, step: int, now: float) -> dict[str, float]:
        """Of the steps since the last call: steps_per_second, samples_per_second, data_wait (a
        share, 0 to 1); and eta_seconds, by all steps since the first call, before which the program
        was compiled.
        """
        steps = step - self._last[0]
        spent = max(now - self._last[1] - self._paused, 1e-9)
        told = {
            "steps_per_second": steps / spent,
            "samples_per_second": steps * self._batch_size / spent,
            "data_wait": min(self._waited / spent, 1.0),
        }
        begun, then = self._since or self._last
        if step > begun:
            told["eta_seconds"] = max(self._num_steps - step, 0) * (now - then) / (step - begun)
        self._last, self._since = (step, now), self._since or (step, now)
        self._waited = self._paused = 0.0
        return told


def memory_used(devices: Iterable[Mapping[str, int] | None] = ()) -> dict[str, float]:
    """{"memory_bytes", "host_memory_bytes"}: the most that any device, and this process, has taken.

    Args:
      devices: their `memory_stats()`; None for those that keep none: host memory is then theirs.
    """
    host = memory.peak_bytes()
    taken = [s.get("peak_bytes_in_use", s.get("bytes_in_use", 0)) for s in devices if s]
    return {"memory_bytes": max(taken, default=0) or host, "host_memory_bytes": host}


class Progress:
    """A bar when stderr is a terminal, else about `lines` lines over the whole (0: none); nothing
    where another of several processes shows it.
    """

    def __init__(self, what: str, total: int, *, lines: int = 10):
        self._what, self._total, self._done = what, total, 0
        shows = self._shows()
        self._every = max(1, math.ceil(total / lines)) if lines and shows else 0
        self._bar, self._lock = None, threading.Lock()
        if shows and sys.stderr.isatty():
            self._bar = tqdm.tqdm(desc=what, total=total, leave=False, unit_scale=total > _LARGE)

    @staticmethod
    def _shows() -> bool:
        if "jax" not in sys.modules:  # alone, and without JAX many a command starts sooner
            return True
        from policymix import distributed

        return distributed.is_first()

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
