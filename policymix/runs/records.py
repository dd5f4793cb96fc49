"""Files record.csv beside a dataset's metadata: notes on its episodes, which go where they go.

kai0 keeps such files (`meta/v1_record.csv`) with a column `video` that ends in the episode's number
(`episode_000012.mp4`), and its splits hold the rows of their episodes, numbered anew.
"""

import csv
import io
import pathlib
import re
from collections.abc import Iterable, Sequence

from policymix import files
from policymix.data import lerobot

_VIDEO = re.compile(r".*_(\d+)\.[^./]*|.*_(\d+)")
_WHOLE = re.compile(r"\s*(\d+)(?:\.0*)?\s*")  # pandas writes 3.0 if one is missing
_NUMBER, _NAME = "episode_index", "video"

Table = tuple[list[str], list[dict[str, str]]]  # names of the columns, rows


def write(folder: pathlib.Path, episodes: Sequence[tuple[lerobot.Dataset, int]]) -> None:
    """Writes the files `*record.csv` of all sources' folders `meta` into `folder`.

    Rows are attributed by a column `episode_index`, or else by the number at the end of a column
    `video`; those of the given episodes are kept, and get the episode's new number: its position
    in `episodes`. Files with a row that names no episode are copied whole, which is said. Files of
    the same name of several sources follow one another, with the columns of both. Empty ones are
    left out.

    Raises:
      ValueError: a file that is no CSV in UTF-8.
    """
    found: dict[pathlib.Path, Table] = {}
    for dataset in dict.fromkeys(dataset for dataset, _ in episodes):
        numbers = {old: new for new, (d, old) in enumerate(episodes) if d is dataset}
        for name, (names, rows) in read(dataset).items():
            known, kept = found.setdefault(name, ([], []))
            known += [name for name in names if name not in known]
            if None in (named := [_episode(row) for row in rows]):
                print(f"{dataset.path / 'meta' / name}: a row names no episode, so all are copied")
                kept += rows
            else:
                kept += _of(rows, named, numbers)
    for name, (names, rows) in found.items():
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, names, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        files.write_whole(folder / name, text.getvalue().encode())


def read(dataset: lerobot.Dataset) -> dict[pathlib.Path, Table]:
    """The files `*record.csv` of a dataset, by their places in its folder `meta`. Raises as
    `write`.
    """
    meta = dataset.path / "meta"
    paths = [path for path in sorted(meta.rglob("*record.csv")) if path.is_file()]
    found = {path.relative_to(meta): _read(path) for path in paths}
    return {place: table for place, table in found.items() if table[0]}


def _read(path: pathlib.Path) -> Table:
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        names, *rows = [row for row in lines if row] or [[]]
        table = [dict(zip(names, row, strict=True)) for row in rows]
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is no table with a line of names and as many values in every line "
            f"({files.reason(error)}); mend it, or move it out of the dataset"
        ) from error
    return names, table


def _of(rows: list[dict], named: list[int], numbers: dict[int, int]) -> Iterable[dict[str, str]]:
    """The rows of the episodes in `numbers` {old: new}; `named` says of which each is."""
    kept = [(numbers[old], row) for old, row in zip(named, rows, strict=True) if old in numbers]
    return [row | _renumbered(row, new) for new, row in kept]


def _episode(row: dict[str, str]) -> int | None:
    if _NUMBER in row:
        match = _WHOLE.fullmatch(row[_NUMBER])
        return int(match[1]) if match else None
    match = _VIDEO.fullmatch(row.get(_NAME, ""))
    return int(match[1] or match[2]) if match else None


def _renumbered(row: dict[str, str], number: int) -> dict[str, str]:
    """What the columns that tell the episode say of its new number."""
    said = {_NUMBER: str(number)} if _NUMBER in row else {}
    if _VIDEO.fullmatch(row.get(_NAME, "")):
        said[_NAME] = f"episode_{number:06d}{pathlib.PurePath(row[_NAME]).suffix}"
    return said
