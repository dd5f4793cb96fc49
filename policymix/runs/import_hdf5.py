"""Demonstrations in HDF5 files → a LeRobot dataset."""

import contextlib
import itertools
import pathlib

from policymix import files, metrics, processes
from policymix.data import recordings, writer

SOURCE = "imported.json"


def run(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    layout: str = "",
    fps: int | None = 0,
    task: str = "",
    video: bool = True,
    swap_channels: bool = False,
    skip_bad: bool = False,
    version: str = "v3.0",
    codec: str = "av1",
    overwrite: bool = False,
    dry_run: bool = False,
    num_workers: int = 0,
) -> None:
    """Writes the demonstrations of a file, or of all .hdf5 and .h5 files in a folder, as a dataset.

    data/hdf5_layouts.py tells what becomes of each layout. Beside the dataset's own files stands
    imported.json: where every episode comes from, and the filter keys of robomimic as lists of
    episodes.

    Args:
      layout: libero, robomimic or aloha; "": recognised.
      fps: frames a second; 0: what the files say, else 20 (LIBERO, robomimic) or 50 (ALOHA).
      task: the instruction of all episodes, in place of their own.
      video: whether pictures become videos in `codec`; else PNG in the data files, without loss.
      swap_channels: whether red and blue are stored the other way round.
      skip_bad: whether demonstrations with something wrong are left out, told and counted.
      num_workers: threads that read ahead of the writer; 0: one per core. In memory are the episode
        that is written, and at most a GiB, or one episode, of the next.

    Raises:
      ValueError, OSError: bad arguments or files, output that exists, or a disk without room.
    """
    source, output = files.local(source), files.local(output)
    files.check_apart(output, [source])
    files.check_output(output, overwrite=overwrite, ours=_is_dataset)
    options = recordings.Options(layout, fps or 0, task, swap_channels, skip_bad)
    found = recordings.scan(source, options)
    features = found.features("video" if video else "image")
    _print_plan(found, features, source, output)
    frames = sum(demo.length for demo in found.demos)
    files.check_space(output, frames * found.frame_bytes(pictures=not video))
    if dry_run:
        print("dry run: nothing was written")
        return
    with writer.Writer(
        output,
        fps=found.fps,
        features=features,
        robot_type=found.robot_type,
        overwrite=overwrite,
        version=version,
        codec=codec,
    ) as dataset:
        kept = _write(dataset, found, skip_bad, not video, num_workers or processes.num_cores())
        _write_source(dataset.folder / SOURCE, found, source, kept)
    frames = sum(found.demos[i].length for i in kept)
    skipped = f"; {len(found.bad)} skipped" if found.bad else ""
    print(f"{len(kept)} episodes, {frames:,} frames written to {output}{skipped}")


def _write(
    dataset: writer.Writer,
    found: recordings.Recording,
    skip_bad: bool,
    as_files: bool,
    num_workers: int,
) -> list[int]:
    """Writes all demos that are whole; returns which."""
    kept, places = [], {demo: number for number, demo in enumerate(found.demos)}

    def prepare(demo: recordings.Demo, arrays: dict) -> writer.Prepared:
        return dataset.prepare(arrays, demo.task, number=places[demo])

    ready = recordings.read_all(found, as_files=as_files, num_workers=num_workers, then=prepare)
    with contextlib.closing(ready), metrics.Progress("importing", len(found.demos)) as shown:
        for demo, prepared in ready:
            if isinstance(prepared, ValueError):
                if not skip_bad:
                    raise prepared
                found.bad.append(str(prepared))
                print(f"skipped: {prepared}")
            else:
                dataset.add(prepared)
                kept.append(places[demo])
            del prepared  # it may be large, and the next one is read now
            shown.step()
    if not kept:
        raise ValueError(f"no demonstration could be imported; the first: {found.bad[0]}")
    return kept


def _write_source(
    path: pathlib.Path, found: recordings.Recording, source: pathlib.Path, kept: list[int]
) -> None:
    episode_of = {number: episode for episode, number in enumerate(kept)}
    demos = [found.demos[number] for number in kept]
    files.write_json(
        path,
        {
            "source": str(source),
            "layout": found.layout,
            "episodes": [{"file": str(demo.file), "demo": demo.group} for demo in demos],
            "splits": {
                name: [episode_of[n] for n in numbers if n in episode_of]
                for name, numbers in found.splits.items()
            },
            "skipped": found.bad,
        },
    )


def _print_plan(
    found: recordings.Recording, features: dict, source: pathlib.Path, output: pathlib.Path
) -> None:
    frames = sum(demo.length for demo in found.demos)
    num_files = len({demo.file for demo in found.demos})
    print(
        f"{source}: {found.layout}, {num_files} file{'s' * (num_files > 1)}, "
        f"{len(found.demos)} episodes, {frames:,} frames, {found.fps} a second; into {output}"
    )
    for name, field in found.fields.items():
        kind = f"{features[name]['dtype']}: " if field.is_picture else ""
        print(f"  {name}: {kind}{field}")
    if found.left_out:
        print(f"  left out: {', '.join(found.left_out)}")
    for sentence, demos in itertools.islice(_by_task(found).items(), 20):
        print(f"  task {sentence!r}: {demos} episodes")
    if (more := len(_by_task(found)) - 20) > 0:
        print(f"  and {more} more tasks")
    for name, numbers in found.splits.items():
        print(f"  split {name}: {len(numbers)} episodes")
    for note in found.notes[:10]:
        print(f"  note: {note}")
    if len(found.notes) > 10:
        print(f"  and {len(found.notes) - 10} more notes of this kind")
    for wrong in found.bad:
        print(f"skipped: {wrong}")


def _by_task(found: recordings.Recording) -> dict[str, int]:
    counted: dict[str, int] = {}
    for demo in found.demos:
        counted[demo.task] = counted.get(demo.task, 0) + 1
    return counted


def _is_dataset(path: pathlib.Path) -> bool:
    return (path / "meta" / "info.json").is_file()
