"""Demonstrations in HDF5 files, found and read as episodes of a LeRobot dataset."""

import collections
import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import h5py

from policymix import files, metrics
from policymix.data import hdf5, hdf5_layouts

_AHEAD = 2**30  # bytes of pictures that may wait for the writer
_MANY = 20  # files, which take a while to look into


@dataclasses.dataclass(frozen=True)
class Demo:
    """A group of a file ("/": all of it), its number of frames, and its instruction."""

    file: pathlib.Path
    group: str
    length: int
    task: str

    def __str__(self) -> str:
        return _where(self.file, self.group)


@dataclasses.dataclass
class Recording:
    """All demonstrations of a source: files, and demos in a file, in the order of their numbers.

    Attributes:
      fps: frames a second. robot_type: as in LeRobot's info.json, or None.
      fields: {feature: Field}, the same for every demo; of those that differ, what most have.
      left_out: arrays of the first of these demos that are in no feature.
      splits: {filter key of robomimic: indices of demos, ascending}.
      rates: {frames a second: a file that says so, or whose layout does}.
      bad: what is wrong with the demos that were skipped. notes: what a user should know.
    """

    layout: str = ""
    fps: int = 0
    robot_type: str | None = None
    fields: dict[str, hdf5.Field] = dataclasses.field(default_factory=dict)
    demos: list[Demo] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    splits: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    rates: dict[float, str] = dataclasses.field(default_factory=dict)
    bad: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def frame_bytes(self, *, pictures: bool = True) -> int:
        """Of one frame in memory, with its pictures or without."""
        fields = self.fields.values()
        return sum(field.frame_bytes for field in fields if pictures or not field.is_picture)

    def features(self, picture: str) -> dict[str, dict]:
        """As data/writer takes them. `picture`: the dtype of pictures, video or image."""
        return {
            name: {
                "dtype": picture if field.is_picture else field.dtype,
                "shape": list(field.shape),
                "names": list(field.names) if field.names else None,
            }
            for name, field in self.fields.items()
        }


@dataclasses.dataclass
class _Kind:
    """Demos of the same features, by their numbers; all else as in `Recording`."""

    fields: dict[str, hdf5.Field]
    left_out: list[str]
    robot_type: str | None
    demos: list[int] = dataclasses.field(default_factory=list)
    rates: dict[float, str] = dataclasses.field(default_factory=dict)


class _SourceError(ValueError):
    """Wrong with the source as a whole: no demo of it can be skipped to help."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to read a source.

    Attributes:
      layout: one of hdf5_layouts.NAMES; "": what the first file looks like.
      fps: frames a second; 0: the control_freq that a file names, else 20 for LIBERO (OpenPI wrote
        10, half its rate) and robomimic, and 50 for ALOHA.
      task: the instruction of all demos, in place of their own.
      swap_channels: whether the pictures are stored as BGR.
      skip_bad: whether demos that something is wrong with are left out, and told in `bad`.
    """

    layout: str = ""
    fps: int = 0
    task: str = ""
    swap_channels: bool = False
    skip_bad: bool = False

    def __post_init__(self):
        if self.layout not in ("", *hdf5_layouts.NAMES) or self.fps < 0 or self.fps % 1 != 0:
            raise ValueError(
                f"layout={self.layout!r}, fps={self.fps}: layout is empty or one of "
                f"{', '.join(hdf5_layouts.NAMES)}; fps is a whole number, 0 for the source's own"
            )


def scan(source: str | pathlib.Path, options: Options = Options()) -> Recording:
    """What a file holds, or all .hdf5 and .h5 files in a folder; of arrays, only their shapes.

    Raises:
      ValueError, OSError: names file, demo and key, what was expected, and what is there.
    """
    found, kinds, source = Recording(), [], files.local(source)
    paths = _paths(source)
    lines = 10 if len(paths) > _MANY else 0
    for path in metrics.progress(paths, "looking into files", lines=lines):
        try:
            with hdf5.opened(path) as file:
                _scan_file(file, path, found, kinds, options)
        except ValueError as error:
            if not options.skip_bad or isinstance(error, _SourceError):
                raise
            found.bad.append(str(error))
    if not found.demos:
        wrong = f"; skipped: {'; '.join(found.bad[:3])}" if found.bad else ""
        raise ValueError(f"{source}: no demonstration to import{wrong}")
    _keep_most(found, kinds)
    found.fps = int(options.fps) or _rate(found, source)
    return found


def _keep_most(found: Recording, kinds: list[_Kind]) -> None:
    """Keeps the demos whose features most have; the others are bad."""
    most = max(kinds, key=lambda kind: len(kind.demos))  # the first of equals
    for name in ("fields", "left_out", "robot_type", "rates"):
        setattr(found, name, getattr(most, name))
    for kind in kinds:
        for number in kind.demos if kind is not most else ():
            found.bad.append(_differs(found.demos[number], kind, found.demos[most.demos[0]], most))
    new = {old: number for number, old in enumerate(most.demos)}
    found.demos = [found.demos[old] for old in most.demos]
    for key, numbers in found.splits.items():
        found.splits[key] = [new[number] for number in numbers if number in new]


def _rate(found: Recording, source: pathlib.Path) -> int:
    """Frames a second, on which all files must agree."""
    rate = next(iter(found.rates))
    if len(found.rates) > 1 or rate < 1 or rate != rate // 1:
        raise ValueError(
            f"{source}: expected one whole number as the rate of all files, found {found.rates}; "
            "say which fps it is"
        )
    return int(rate)


def read(recording: Recording, demo: Demo, *, as_files: bool) -> dict:
    """{feature: [T, *shape]} of one demo; pictures are T PNG or JPEG files `as_files`.

    Raises:
      ValueError: damaged data, a number that is not finite, a picture that cannot be decoded.
    """
    with hdf5.opened(demo.file) as file:
        group = hdf5.Group(file, demo.group, str(demo))
        if group.length(recording.fields) != demo.length:
            raise ValueError(f"{demo}: its length changed meanwhile; is it still being recorded?")
        return {
            name: group.values(field, as_files=as_files) for name, field in recording.fields.items()
        }


def read_all(
    recording: Recording,
    *,
    as_files: bool,
    num_workers: int,
    then: Callable[[Demo, dict], Any] = lambda _, arrays: arrays,
) -> Iterator[tuple[Demo, Any]]:
    """Every demo in order, with `then(demo, what was read of it)`; by threads while earlier ones
    are written: as many as there are threads, and at most a GiB, or one. A demo that cannot be read
    comes with the ValueError that says what is wrong with it.
    """

    def job(demo: Demo) -> Any:
        return then(demo, read(recording, demo, as_files=as_files))

    most = max(1, _AHEAD // recording.frame_bytes())
    waiting: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        try:
            for demo in recording.demos:
                while waiting and (
                    len(waiting) > num_workers
                    or sum(d.length for d, _ in waiting) + demo.length > most
                ):
                    yield _next(waiting)
                waiting.append((demo, pool.submit(job, demo)))
            while waiting:
                yield _next(waiting)
        finally:
            pool.shutdown(cancel_futures=True)


def _next(waiting: collections.deque) -> tuple[Demo, Any]:
    demo, future = waiting.popleft()
    try:
        return demo, future.result()
    except ValueError as error:
        return demo, error


def _where(path: pathlib.Path, group: str) -> str:
    return str(path) if group == "/" else f"{path}, {group}"


def _paths(source: pathlib.Path) -> list[pathlib.Path]:
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist; expected an HDF5 file, or a folder with .hdf5 files"
        )
    if source.is_file():
        return [source]
    found = [path for path in source.rglob("[!.]*") if path.suffix in (".hdf5", ".h5")]
    if not found:
        there = sorted(path.name for path in source.iterdir())[:20]
        raise ValueError(f"{source} has no .hdf5 or .h5 file in it; there are {there}")
    return sorted(found, key=lambda path: hdf5.natural(path.relative_to(source).as_posix()))


def _scan_file(
    file: h5py.File, path: pathlib.Path, found: Recording, kinds: list[_Kind], options: Options
) -> None:
    """Adds the demos of a file to `found`, and to one of `kinds`."""
    layout = hdf5_layouts.recognised(file, path, options.layout)
    if found.demos and layout.name != found.layout:
        raise _SourceError(
            f"{path} looks like {layout.name}, and {found.demos[0].file} like {found.layout}; "
            "import one kind at a time"
        )
    found.layout = layout.name
    rate, robot = layout.header(file)
    index = {}
    for name in layout.demos(file):
        try:
            group = hdf5.Group(file, name, _where(path, name))
            fields = layout.fields(group, file, options.swap_channels)
            length = group.length(fields)
            kind = next((kind for kind in kinds if kind.fields == fields), None)
            if not kind:
                kind = _Kind(fields, _left_out(group.group, fields), robot)
                kinds.append(kind)
                if len(kinds) > 1 and not options.skip_bad:
                    raise ValueError(_differs(group.where, kind, found.demos[0], kinds[0]))
        except ValueError as error:
            if not options.skip_bad:
                raise
            found.bad.append(str(error))
            continue
        kind.rates.setdefault(rate, str(path))
        sentence, note = (
            (options.task, "") if options.task else layout.task(path, file, group.group)
        )
        if note and note not in found.notes:
            found.notes.append(note)
        index[name.removeprefix("data/")] = len(found.demos)
        kind.demos.append(len(found.demos))
        found.demos.append(Demo(path, name, length, sentence))
    _add_splits(file, path, found, index, options.skip_bad)


def _differs(demo: Demo | str, kind: _Kind, first: Demo, most: _Kind) -> str:
    """What to say of a demo that has not the features of the others."""
    ours, theirs = (
        {name: str(field) for name, field in one.fields.items()} for one in (kind, most)
    )
    told = [
        f"{n!r} is {theirs.get(n, 'not there')}, here {ours.get(n, 'not there')}"
        for n in {**theirs, **ours}
        if ours.get(n) != theirs.get(n)
    ]
    return f"{demo} differs from {first}: {'; '.join(told[:3])}; import them one after the other"


def _left_out(group: h5py.Group, fields: dict[str, hdf5.Field]) -> list[str]:
    """Arrays of a demo that are in no feature."""
    used, names = {key for field in fields.values() for key in field.keys}, []

    def visit(name: str, found) -> None:
        if isinstance(found, h5py.Dataset) and name not in used:
            names.append(name)

    group.visititems(visit)
    return sorted(names, key=hdf5.natural)


def _add_splits(
    file: h5py.File, path: pathlib.Path, found: Recording, index: dict[str, int], skip_bad: bool
) -> None:
    """Adds the filter keys of a robomimic file, as indices of demos."""
    if not isinstance(file.get("mask"), h5py.Group):
        return
    mask = hdf5.Group(file, "mask", str(path))
    for key in mask.arrays():
        array = mask.array(key)
        names = [n.decode() if isinstance(n, bytes) else str(n) for n in array[()].ravel()]
        if not skip_bad and (unknown := [name for name in names if name not in index]):
            raise ValueError(
                f"{path}: mask/{key} names {unknown[:5]}, and data has no such demo; it has "
                f"{list(index)[:10]}"
            )
        numbers = {index[name] for name in names if name in index}
        found.splits[key] = sorted({*found.splits.get(key, ()), *numbers})
