"""The directory of a run: whose it is, and whether a run that goes on there is the same one."""

import contextlib
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from policymix import distributed, files, trees

_RECORD = "config.json"


def check(
    workdir: pathlib.Path,
    record: Mapping[str, Any],
    *,
    command: str,
    free: Collection[str],
    inputs: Iterable[str],
    overwrite: bool,
) -> None:
    """Refuses a workdir that is not this run's, or that --overwrite may not replace.

    Args:
      record: the sections of the config that decide the run, as `write` keeps them.
      command: the main that runs. free: fields that a run that goes on may change.
      inputs: what the run reads; those that are URLs, or "", are no concern.

    Raises:
      ValueError, OSError: the workdir is another run's, another program's, or lies in an input.
    """
    if overwrite or not workdir.exists():
        files.check_apart(workdir, [path for path in inputs if path and "://" not in path])
    if not workdir.exists():
        files.check_output(workdir, overwrite=False)
        return
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise PermissionError(f"--workdir {workdir} is not writable: choose another, or chmod it")
    if files.is_empty(workdir):
        return
    path = workdir / _RECORD
    known = files.read_json(path) if path.is_file() else {}
    if not isinstance(known, dict) or set(known) != set(record):
        raise FileExistsError(
            f"--workdir {workdir} exists and is not a run of {command}; choose another"
        )
    if overwrite:
        return
    old, new = trees.flatten(known), trees.flatten(record)
    changed = [
        f"{path.replace('/', '.')}: {old.get(path)!r} then, {new.get(path)!r} now"
        for path in sorted(old.keys() | new.keys())
        if _as_list(old.get(path)) != _as_list(new.get(path)) and path.split("/")[-1] not in free
    ]
    if changed:
        raise ValueError(
            f"{workdir} was begun with another config ({'; '.join(changed)}): choose another "
            "--workdir, or pass --overwrite to start again"
        )


@contextlib.contextmanager
def taken(workdir: pathlib.Path, record: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
    """The directory for this run alone until the block ends, its record in it; the first process
    makes it, and with `overwrite` makes it anew. FileExistsError where another run has it.
    """
    distributed.sync("checked")  # by all processes, while it is as it was
    with contextlib.ExitStack() as held:
        if distributed.is_first():
            if overwrite and workdir.exists():
                with files.holding(workdir):
                    files.remove(workdir)
            workdir.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.holding(workdir))
            files.write_json(workdir / _RECORD, record)
        distributed.sync("workdir")
        distributed.seen_by_all(workdir / _RECORD)
        yield


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
