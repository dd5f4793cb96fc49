"""One writer for what a run has to say: a line on stdout, `metrics.jsonl`, and progress on long
steps.
"""

import json
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import tqdm

from policymix import files

_T = TypeVar("_T")


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


def progress(
    items: Iterable[_T], what: str, *, total: int | None = None, lines: int = 10
) -> Iterator[_T]:
    """Passes items through, with a bar when stderr is a terminal.

    Elsewhere it prints about `lines` lines over the whole, or none where the caller prints its own.
    """
    if total is None:
        total = len(items)
    if sys.stderr.isatty():
        yield from tqdm.tqdm(items, desc=what, total=total, leave=False)
        return
    every = max(1, math.ceil(total / lines)) if lines else 0
    for done, item in enumerate(items, 1):
        yield item
        if every and (done % every == 0 or done == total):
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
