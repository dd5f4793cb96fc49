"""A job of many stages: what is done is not done again, and each is timed."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from policymix import files, metrics
from policymix.runs import lanes

_FOLDER, _MARK = "stages", "stages/.job"  # the mark is what makes a directory such a job's


class Stage(NamedTuple):
    """A part of a job.

    Attributes:
      settings: whatever its result depends on, as JSON can hold it.
      function: makes its output; it must replace one that a killed run left behind.
      apart: whether it may run beside those next to it that are so too, in another process: its
        function must be picklable then.
    """

    name: str
    settings: Mapping[str, Any]
    function: Callable[[], Any]
    apart: bool = False


class Stages:
    """Stages under one directory, each recorded when it is whole.

    A job that is killed goes on after its last whole stage. A stage that was made with other
    settings is an error, not something to reuse.

    Attributes:
      told: [{"name", "begun", "seconds", "peak_memory_bytes", "reused"}] of all, in their order.
    """

    def __init__(self, directory: pathlib.Path, *, fresh: bool = False):
        """`fresh` removes the directory first, if it is that of such a job."""
        self.directory, self.told = files.local(directory), []
        self._records = self.directory / _FOLDER
        if self.directory.exists() and any(p.is_file() for p in self.directory.rglob("*")):
            if not (self.directory / _MARK).is_file():
                raise FileExistsError(
                    f"{self.directory} exists and holds something else; choose another --output"
                )
            if fresh:
                files.remove(self.directory)
        files.check_output(self.directory, overwrite=True)
        files.write_whole(self.directory / _MARK, b"")

    def run(self, plan: Sequence[Stage]) -> None:
        """Runs the stages that are not recorded as done with the same settings."""
        told: dict[str, dict[str, Any]] = {}
        self._places = {
            stage.name: f"[{k}/{len(plan)}] {stage.name}" for k, stage in enumerate(plan, 1)
        }
        for apart, neighbours in itertools.groupby(plan, lambda stage: stage.apart):
            group, todo = list(neighbours), []
            for stage in group:
                if cost := self._done(stage):
                    told[stage.name] = {**cost, "reused": True}
                    print(f"{self._places[stage.name]}: reused", flush=True)
                else:
                    todo.append(stage)
            # By the whole group: also the last one of a resumed job runs on as many cores.
            num_lanes = lanes.count(len(group)) if apart else 1
            run = self._beside_each_other if num_lanes > 1 else self._in_turn
            for stage, cost in run(todo, num_lanes):
                cost = dataclasses.asdict(cost)
                record = {"settings": _jsonable(stage.settings), "cost": cost}
                files.write_json(self._record(stage), record)
                told[stage.name] = {**cost, "reused": False}
                print(f"{self._places[stage.name]}: {cost['seconds']:.1f} s", flush=True)
        self.told = [{"name": stage.name, **told[stage.name]} for stage in plan]

    def _in_turn(self, todo: Sequence[Stage], num_lanes: int):
        del num_lanes
        for stage in todo:
            print(f"\n{self._places[stage.name]}", flush=True)
            with metrics.costing() as cost:
                stage.function()
            yield stage, cost

    def _beside_each_other(self, todo: Sequence[Stage], num_lanes: int):
        if not todo:
            return
        by_name = {stage.name: stage for stage in todo}
        names = ", ".join(self._places[name] for name in by_name)
        print(f"\n{num_lanes} side by side: {names}", flush=True)
        for name, cost in lanes.run([(s.name, s.function) for s in todo], num_lanes):
            yield by_name[name], cost

    def _record(self, stage: Stage) -> pathlib.Path:
        return self._records / f"{stage.name}.json"

    def _done(self, stage: Stage) -> dict[str, Any] | None:
        """What a stage took when it was done; None where it was not."""
        if not self._record(stage).is_file():
            return None
        record, settings = files.read_json(self._record(stage)), _jsonable(stage.settings)
        if record["settings"] != settings:
            raise ValueError(
                f"{stage.name} in {self.directory} was made with other settings "
                f"({_differences(record['settings'], settings)}): start over with FRESH=1 "
                "(--fresh), or choose another --output"
            )
        return record["cost"]


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
