"""A job of many stages: what is done is not done again, and each is timed."""

import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from policymix import files, memory

_FOLDER = "stages"


class Stages:
    """Stages under one directory, each recorded when it is whole.

    A job that is killed goes on after its last whole stage. A stage that was made with other
    settings is an error, not something to reuse.

    Attributes:
      told: [{"name", "seconds", "peak_memory_bytes", "reused"}] so far.
    """

    def __init__(self, directory: pathlib.Path, total: int, *, fresh: bool = False):
        """`fresh` removes the directory first, if it is that of such a job."""
        self.directory, self.told = files.local(directory), []
        self._records, self._total = self.directory / _FOLDER, total
        if self.directory.exists() and any(self.directory.iterdir()):
            if not self._records.is_dir():
                raise FileExistsError(
                    f"{self.directory} exists and holds something else; choose another --output"
                )
            if fresh:
                shutil.rmtree(self.directory)
        files.check_output(self.directory, overwrite=True)
        self._records.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, settings: Mapping[str, Any], function: Callable[[], Any]) -> None:
        """Runs one stage, unless it is recorded as done with the same settings.

        Args:
          settings: whatever the stage's result depends on, as JSON can hold it.
          function: makes the stage's output; it must replace one that a killed run left behind.
        """
        path, settings = self._records / f"{name}.json", _jsonable(settings)
        heading = f"[{len(self.told) + 1}/{self._total}] {name}"
        if path.is_file():
            record = files.read_json(path)
            if record["settings"] != settings:
                raise ValueError(
                    f"{name} in {self.directory} was made with other settings "
                    f"({_differences(record['settings'], settings)}): start over with FRESH=1 "
                    "(--fresh), or choose another --output"
                )
            print(f"{heading}: reused", flush=True)
            self.told.append({"name": name, **record["cost"], "reused": True})
            return
        print(f"\n{heading}", flush=True)
        memory.reset_peak()
        started = time.monotonic()
        function()
        cost = {
            "seconds": round(time.monotonic() - started, 2),
            "peak_memory_bytes": memory.peak_bytes(),
        }
        files.write_json(path, {"settings": settings, "cost": cost})
        self.told.append({"name": name, **cost, "reused": False})
        print(f"{heading}: {cost['seconds']:.1f} s", flush=True)


def _jsonable(value: Any) -> Any:
    """Tuples as lists, paths as text: what comes back from a JSON file."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return str(value) if isinstance(value, pathlib.Path) else value


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in changed[:3])
