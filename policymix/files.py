"""Output that is either whole or absent, and JSON that says which file was wrong."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_PARTIAL = ".partial-"
_claimed: set[pathlib.Path] = set()  # partial directories of this process
_claim = threading.Lock()
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def local(path: str | os.PathLike) -> pathlib.Path:
    """An absolute path without "~", ".." or links, as every other function here expects it.

    ValueError for what can be no path: a link to itself, or a name with a zero byte.
    """
    try:
        return pathlib.Path(path).expanduser().resolve()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no path ({reason(error)})") from error


def check_apart(path: pathlib.Path, inputs: Iterable[str | os.PathLike]) -> None:
    """ValueError if writing `path` could touch an input, also through "..", links to it, and the
    links that it is made of, as in the caches of hubs.
    """
    path = local(path)
    for source in map(local, inputs):
        for place in (source, *(local(p) for p in source.rglob("*") if p.is_symlink())):
            if path == place or path in place.parents or place in path.parents:
                raise ValueError(
                    f"output {path} overlaps the input {source}; inputs are never written to: "
                    "choose another output"
                )


def check_output(
    path: pathlib.Path, *, overwrite: bool, ours: Callable[[pathlib.Path], bool] | None = None
) -> None:
    """Raises before any work if `path` may not be written.

    Args:
      overwrite: whether what is there may be replaced.
      ours: whether what is there was written by the same command; nothing else is ever replaced.
    """
    if re.match(r"(gs|hf|s3):/", str(path)):
        raise ValueError(
            f"output {path} is not a local path: write to a local disk, and copy it from there"
        )
    path = local(path)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"output {path} exists; pass --overwrite to replace it, or choose another"
        )
    if path.exists() and ours and not ours(path):
        raise FileExistsError(
            f"output {path} exists and was not written by this command, so --overwrite does not "
            "replace it; choose another, or remove it yourself"
        )
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: {parent} is not a writable directory")


def check_space(path: pathlib.Path, needed: int) -> None:
    """OSError if the disk that `path` lies on, or will, has less than `needed` bytes free."""
    existing = next(p for p in (local(path), *local(path).parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{path} needs up to {needed / 1e6:,.1f} MB, and its disk has {free / 1e6:,.1f} MB "
            "free: make room, "
            "or write elsewhere"
        )


def size(path: pathlib.Path) -> int:
    """Bytes of all files in a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@contextlib.contextmanager
def whole_directory(path: pathlib.Path, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yields an empty directory that takes the place of `path` if the block ends without an error.

    A run that is killed leaves at most a hidden `.NAME.partial-PID`, which the next run of the same
    output removes; never a directory that looks complete. With `overwrite` the old directory stays
    until the new one is whole.

    Raises:
      FileExistsError: the output is there, or this process is writing it already.
    """
    path = local(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claiming(path) as partial, _filling(path, partial, overwrite):
        yield partial


@contextlib.contextmanager
def _claiming(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The name of the partial directory, which no other thread is given until the end."""
    partial = path.with_name(f".{path.name}{_PARTIAL}{os.getpid()}")
    with _claim:
        if partial in _claimed:
            raise _is_being_written(path)
        _claimed.add(partial)
    try:
        yield partial
    finally:
        _claimed.discard(partial)


def _is_being_written(path: pathlib.Path) -> FileExistsError:
    return FileExistsError(f"output {path} is being written already; wait, or choose another")


@contextlib.contextmanager
def _filling(path: pathlib.Path, partial: pathlib.Path, overwrite: bool) -> Iterator[None]:
    """Makes the partial directory, and puts it in the place of `path` at the end."""
    _remove_leftovers(path)
    if path.exists() and not overwrite:  # before the work, where a killed run's old output is back
        raise FileExistsError(f"output {path} exists; pass --overwrite to replace it")
    if partial.exists():  # of another machine's process of this number
        raise _is_being_written(path)
    partial.mkdir()
    locks = [_locked(partial)]
    try:
        with _naming(path):
            yield
        if path.exists():
            if not overwrite:
                raise FileExistsError(
                    f"output {path} appeared meanwhile; pass --overwrite to replace it"
                )
            old = path.with_name(f".{path.name}{_PARTIAL}{os.getpid()}-old")
            locks.append(_locked(path))  # the lock goes with it: nobody else puts it back
            path.rename(old)
            try:
                partial.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)  # what is left goes with the next run
        else:
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        for lock in locks:
            if lock is not None:
                os.close(lock)


def _locked(path: pathlib.Path) -> int | None:
    """A descriptor that holds the lock of a directory: processes of other machines, or containers,
    that share the disk see by it that the directory's writer is alive. The kernel lets go, also on
    kill -9. None where the disk has no locks.

    Raises:
      BlockingIOError: another holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


@contextlib.contextmanager
def holding(path: pathlib.Path) -> Iterator[None]:
    """A directory that no other process writes meanwhile. FileExistsError where one does."""
    try:
        lock = _locked(path)
    except BlockingIOError:
        raise FileExistsError(
            f"{path} is being written by another process: wait for it, or choose another"
        ) from None
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Says of a failed write what was written: a full disk's own error does not."""
    try:
        yield
    except OSError as error:
        told = isinstance(error, NoRoomError) and str(path) in str(error)  # not of what is partial
        if error.errno not in NO_ROOM or told:
            raise
        raise no_room(path, error.errno) from error


class NoRoomError(OSError):
    """A full disk, or a limit that is reached; says what was being written."""


def no_room(what: str | pathlib.Path, code: int) -> NoRoomError:
    """What to say of a disk that is full, or of a limit that is reached; `code` is of `NO_ROOM`."""
    message = f"cannot write {what}: {os.strerror(code)}; make room, or write elsewhere"
    return NoRoomError(code, message)


def remove(path: pathlib.Path) -> None:
    """Deletes a directory, which is gone at once for all who look: one that is killed on the way
    leaves a hidden `.NAME.partial-PID` at most, which the next `remove` of the same deletes.
    """
    path = local(path)
    _remove_leftovers(path)
    if path.exists():
        doomed = path.with_name(f".{path.name}{_PARTIAL}{os.getpid()}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def is_empty(path: pathlib.Path) -> bool:
    """Whether a directory holds nothing, or only what a killed `write_whole` left."""
    return not any(not (p.name.startswith(".") and _PARTIAL in p.name) for p in path.iterdir())


def _remove_leftovers(path: pathlib.Path) -> None:
    """Deletes what killed processes left of this output; an old one they displaced is put back."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}{_PARTIAL}*"):
        pid, _, old = leftover.name.rpartition(_PARTIAL)[2].partition("-")
        if not (pid.isdecimal() and leftover.is_dir() and old in ("", "old")):
            continue  # somebody else's
        if _alive(int(pid)) and int(pid) != os.getpid():
            continue
        try:
            lock = _locked(leftover)
        except BlockingIOError:
            continue  # its number says nothing of a process elsewhere
        if lock is not None:
            os.close(lock)
        if old and not path.exists():
            leftover.rename(path)  # killed between the two renames: the old output is the valid one
        else:
            shutil.rmtree(leftover)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file by renaming: readers see the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{_PARTIAL}{os.getpid()}")
    try:
        with _naming(path):
            partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> Any:
    """JSON of a UTF-8 file. ValueError names the file where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not readable JSON ({reason(error)}); it may be truncated"
        ) from error


def reason(error: Exception | str) -> str:
    """What an error says, in one line of printable letters; libraries quote pages of what is wrong
    with a file, and the file itself.
    """
    text = str(error).split(" [tensorstore_spec")[0].strip().split("\n")[0]
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= 300 else f"{text[:300]}…"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Indented UTF-8 JSON. Not a number is refused: JSON has no word for it."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"cannot write {path}: {error}") from error
    write_whole(path, f"{text}\n".encode())
