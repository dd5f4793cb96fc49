"""Tables of a dataset: parquet and JSON lines, read with one clear error for each thing wrong."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from policymix import files

VERSIONS = ("v2.0", "v2.1", "v3.0")  # of LeRobot's datasets
AGAIN = "copy or download the dataset again"
_THREADS = min(8, os.cpu_count() or 1)  # readers let go of Python's lock
_LARGEST = 2**53  # that numbers in JSON are exact to
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_FIELD = re.compile(r"\{(\w+)(?::0?\d{0,2}d)?\}")


@contextlib.contextmanager
def parquet(path: pathlib.Path) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file; what pyarrow cannot read becomes one ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {AGAIN}")
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: expected a whole parquet file, found {path.stat().st_size} bytes that "
            f"cannot be read ({reason}); {AGAIN}"
        ) from error


def read(path: pathlib.Path, needed: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """The columns `needed` of a parquet file, and those of `optional` that it has."""
    with parquet(path) as file:
        return file.read(columns=_names(path, file, needed, optional))


def batches(path: pathlib.Path, name: str, size: int) -> Iterator[pa.Array]:
    """One column of a parquet file, `size` rows at a time, so that few wait in memory."""
    with parquet(path) as file:
        for batch in file.iter_batches(size, columns=_names(path, file, [name])):
            yield batch.column(0)


def _names(
    path: pathlib.Path, file: pq.ParquetFile, needed: Sequence[str], optional: Sequence[str] = ()
) -> list[str]:
    have = file.schema_arrow.names
    if missing := [name for name in needed if name not in have]:
        raise ValueError(f"{path} lacks the columns {missing}; it has {have[:16]}")
    return [*needed, *(name for name in optional if name in have)]


def column_names(path: pathlib.Path) -> list[str]:
    """The columns of a parquet file."""
    with parquet(path) as file:
        return file.schema_arrow.names


def rows(
    path: pathlib.Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows of a table in parquet or JSON lines, with at least the columns `needed`."""
    if path.suffix == ".parquet":
        return read(path, needed, optional).to_pylist()
    return list(_lines(path, needed))


def _lines(path: pathlib.Path, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {AGAIN}")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON ({error}); {AGAIN}") from None
            if not isinstance(row, dict) or any(key not in row for key in needed):
                raise ValueError(f"{path}, line {number}: expected {needed}, found {row!r}")
            yield row


def num_rows(paths: Sequence[pathlib.Path]) -> dict[pathlib.Path, int]:
    """{file: its rows}, from the footers alone. Raises as `parquet` for the first that is wrong."""

    def count(path: pathlib.Path) -> int:
        with parquet(path) as file:
            return file.metadata.num_rows

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(paths, pool.map(count, paths), strict=True))


def num_bytes(path: pathlib.Path, name: str) -> int:
    """What a column of a parquet file takes in memory, from the footer alone."""
    with parquet(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        return sum(
            group.column(i).total_uncompressed_size
            for group in groups
            for i in range(group.num_columns)
            if f"{group.column(i).path_in_schema}.".startswith(f"{name}.")
        )


def find(folder: pathlib.Path, pattern: str, example: pathlib.Path | None) -> list[pathlib.Path]:
    """The parquet files that match, sorted, numbers of any width as numbers; hidden files are
    passed over. FileNotFoundError, naming `example`, where there are none.
    """
    found = [file for file in folder.glob(pattern) if not file.name.startswith(".")]
    if not found:
        example = example or folder / pattern.replace("*/*", "chunk-000/file-000")
        raise FileNotFoundError(f"{example}: no such file, nor another parquet file; {AGAIN}")
    return sorted(found, key=lambda f: (len(f.parent.name), f.parent.name, len(f.name), f.name))


def place(folder: pathlib.Path, template: str, where: str, values: Mapping[str, Any]) -> str:
    """Where in `folder` a file is, by a template as "data/chunk-{chunk_index:03d}/….parquet".

    Raises:
      ValueError: a template that `values` do not fill, or a path that leads out of the folder;
        `where` says what declares it.
    """
    fields = _FIELD.findall(template) if isinstance(template, str) else []
    known = fields and not set(_FIELD.sub("", template)) & {"{", "}"} and set(fields) <= {*values}
    try:
        filled = template.format(**values) if known else ""
    except ValueError:  # text in a field of a number
        filled = ""
    if not filled:
        raise ValueError(
            f"{where} is {template!r}; expected the path of a file of the dataset with the fields "
            f"{', '.join('{' + name + '}' for name in values)}; {AGAIN}"
        )
    path = pathlib.PurePath(filled)
    if path.is_absolute() or ".." in path.parts or "\\" in filled or "\0" in filled:
        raise ValueError(
            f"{where} is {template!r}, which leads to {filled!r}, out of the dataset's folder "
            f"{folder}; such a dataset is not read: write a path inside the folder there"
        )
    return filled


def to_numpy(
    column: pa.ChunkedArray, dtype: np.dtype | None, declared: Sequence[int], where: str
) -> np.ndarray:
    """An arrow column, lists of any kind and depth, as an array.

    Args:
      column: what was read.
      dtype: as declared, None for text.
      declared: the declared shape of one value.
      where: names the file and the feature in errors.

    Returns:
      [rows, *declared], or [rows] where one value is declared as [1]; text is of dtype object.

    Raises:
      ValueError: empty values, or a shape, type or number that contradicts what is declared.
    """
    array, shape = column.combine_chunks(), []
    while True:
        array = array.storage if isinstance(array, pa.ExtensionArray) else array
        if array.null_count and dtype is not None:
            raise ValueError(f"{where} has {array.null_count} empty values; fill them in")
        if not any(is_a(array.type) for is_a in _LISTS):
            break
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) > 1:
            raise ValueError(f"{where} holds lists of several lengths: {sorted(lengths)[:8]}")
        shape += lengths
        array = array.flatten()
    if len(column) and (shape or [1]) != ([*declared] or [1]):
        raise ValueError(f"{where} holds values of shape {shape}, info.json declares {declared}")
    values = array.to_numpy(zero_copy_only=False)
    text = values.dtype == object
    if text != (dtype is None) or not np.can_cast(values.dtype, dtype or object, "same_kind"):
        expected = "string" if dtype is None else dtype
        raise ValueError(f"{where} holds {array.type}, info.json declares {expected}")
    values = _fitting(values, dtype, where) if dtype else values.astype(object)
    return values.reshape(len(column), *([] if list(declared) == [1] else declared))


def _fitting(values: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """Numbers as `dtype`. ValueError where an integer is too large for it, which numpy would wrap;
    a float becomes infinite, which those see who look for numbers that are not finite.
    """
    with np.errstate(over="ignore"):
        found = values.astype(dtype)
    if values.dtype == dtype or dtype.kind == "f":
        return found
    if (wrong := found != values).any():
        raise ValueError(
            f"{where} holds {values[wrong][0]}, which does not fit into {dtype}, as info.json "
            "declares it; declare a wider dtype there"
        )
    return found


def read_info(path: pathlib.Path) -> dict:
    """meta/info.json of a LeRobot dataset, what matters here checked, unknown keys left alone."""
    info = files.read_json(path)
    needed = {"codebase_version", "features", "fps", "total_episodes", "total_frames"}
    if missing := needed - (info.keys() if isinstance(info, dict) else set()):
        raise ValueError(f"{path} lacks {sorted(missing)}; {AGAIN}")
    if info["codebase_version"] not in VERSIONS:
        raise ValueError(
            f"{path}: codebase_version is {info['codebase_version']!r}, expected one of "
            f"{', '.join(VERSIONS)}; convert the dataset with LeRobot's own scripts"
        )
    for key in ("fps", "total_frames", "total_episodes", "chunks_size"):
        value = info[key] if key in needed else info.get(key) or 1  # none is the default
        if type(value) not in (int, float) or not 1 <= value <= _LARGEST or value != value // 1:
            raise ValueError(
                f"{path}: {key} is {files.reason(repr(value))}, expected a whole number, 1 or more"
            )
    features = info["features"] if isinstance(info["features"], dict) else {"?": info["features"]}
    for key, feature in features.items():
        if not isinstance(feature, dict) or not {"dtype", "shape"} <= feature.keys():
            raise ValueError(f"{path}: feature {key!r} needs dtype and shape, found {feature!r}")
        dtype, shape = feature["dtype"], feature["shape"]
        whole = isinstance(shape, list) and all(
            type(n) in (int, float) and 0 <= n <= _LARGEST and n == n // 1 for n in shape
        )
        if not isinstance(dtype, str) or not whole:
            raise ValueError(
                f"{path}: feature {key!r} has dtype {dtype!r} and shape {shape!r}, expected a text "
                "and a list of whole numbers"
            )
    return info


def meta_files(path: pathlib.Path, version: str) -> list[pathlib.Path]:
    """Of a LeRobot dataset: info.json, the table of tasks, the files of the episode table."""
    if version == "v3.0":
        episodes = find(path, "meta/episodes/*/*.parquet", None)
        return [path / "meta" / "info.json", path / "meta" / "tasks.parquet", *episodes]
    return [path / "meta" / name for name in ("info.json", "tasks.jsonl", "episodes.jsonl")]


def tasks(file: pathlib.Path) -> list[str]:
    """The sentences of a table of tasks, by task_index."""
    # In parquet a pandas frame whose index is the sentence: "task", with older writers nameless.
    names = ["task", "__index_level_0__"]
    found = _in_order(rows(file, ["task_index"], names), "task_index", file)
    column = next((name for name in names if found and all(name in row for row in found)), None)
    if column is None:
        raise ValueError(f"{file}: expected rows with task_index and task, found {found[:2]}")
    return [row[column] for row in found]


def episodes(
    table: Sequence[pathlib.Path], needed: Sequence[str], optional: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows of an episode table, by episode_index, from all its files."""
    # Order and types of other columns vary between the files of a table: take what is needed.
    found = [row for file in table for row in rows(file, ["episode_index", *needed], optional)]
    return _in_order(found, "episode_index", table[0])


def episode_stats(
    table: Sequence[pathlib.Path], keys: Container[str] | None = None
) -> list[dict[str, dict[str, np.ndarray]]] | None:
    """{feature: {stat: array}} of every episode of a LeRobot dataset, None where it has none.

    Args:
      table: the files of the episode table; v2.1 has a table of statistics beside it.
      keys: the features that are wanted, None: all. Those of all take much memory.
    """
    if table[0].suffix != ".parquet":
        beside = table[0].with_name("episodes_stats.jsonl")
        if not beside.is_file():
            return None
        told = [
            {"episode_index": row["episode_index"], "stats": _stats_of(row["stats"], keys)}
            for row in _lines(beside, ["episode_index", "stats"])
        ]
        return [row["stats"] for row in _in_order(told, "episode_index", beside)]
    columns = [name for name in column_names(table[0]) if name.startswith("stats/")]
    if not columns:
        return None
    if keys is not None:
        columns = [name for name in columns if name[len("stats/") :].rpartition("/")[0] in keys]
    found = []
    for row in episodes(table, columns):
        found.append({})
        for name in columns:
            key, _, stat = name.removeprefix("stats/").rpartition("/")
            if row[name] is not None:
                found[-1].setdefault(key, {})[stat] = np.asarray(row[name])
    return found


def _stats_of(row: Mapping[str, Any], keys: Container[str] | None) -> dict[str, dict]:
    return {
        key: {name: np.asarray(value) for name, value in stats.items()}
        for key, stats in row.items()
        if keys is None or key in keys
    }


def _in_order(table: list[dict], key: str, path: pathlib.Path) -> list[dict]:
    """Rows sorted by `key`, which must number them 0, 1, 2, ..."""
    found = [row[key] for row in table]
    if set(found) != set(range(len(table))):
        raise ValueError(
            f"{path}: expected {key} 0..{len(table) - 1}, once each, found {found[:16]}"
        )
    return sorted(table, key=lambda row: row[key])
