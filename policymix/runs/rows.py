"""Frames of a LeRobot dataset, read from its data files an episode at a time."""

import itertools
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from policymix.data import lerobot, tables


class Rows:
    """Columns of the data files, a row group at a time: a whole column may not fit in memory.

    Threads may share it. Pictures are the bytes that are stored.

    Raises:
      ValueError: files that are damaged, or lack a column or have another than declared.
    """

    def __init__(self, dataset: lerobot.Dataset, names: Sequence[str]):
        dataset.column("index")  # a frame is found by its row: the order is checked there
        self._dataset, self._names = dataset, names
        self._groups: list[tuple[pathlib.Path, int]] = []
        starts = [0]
        for path in dataset.data_files:
            with tables.parquet(path) as file:
                for group in range(file.num_row_groups):
                    self._groups.append((path, group))
                    starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
        self._starts = np.array(starts)
        self._last: tuple[int, pa.Table] | None = None  # large groups hold many episodes
        self._lock = threading.Lock()

    def get(self, first: int, end: int) -> dict[str, Any]:
        """{name: values of the frames first..end-1}, pictures as the bytes that are stored."""
        found: dict[str, list] = {name: [] for name in self._names}
        group = int(np.searchsorted(self._starts, first, side="right")) - 1
        while self._starts[group] < end:
            start = int(self._starts[group])
            table = self._group(group).slice(max(0, first - start), end - max(first, start))
            for name in self._names:
                found[name].append(self._values(name, table[name], self._groups[group][0]))
            group += 1
        return {
            name: list(itertools.chain(*parts)) if isinstance(parts[0], list) else _joined(parts)
            for name, parts in found.items()
        }

    def _group(self, number: int) -> pa.Table:
        with self._lock:  # all would read a large group at once
            if self._last is None or self._last[0] != number:
                path, group = self._groups[number]
                with tables.parquet(path) as file:
                    if missing := set(self._names) - set(file.schema_arrow.names):
                        raise ValueError(f"{path} lacks the columns {sorted(missing)}")
                    self._last = number, file.read_row_group(group, self._names)
            return self._last[1]

    def _values(self, name: str, column: pa.ChunkedArray, path: pathlib.Path) -> Any:
        feature, where = self._dataset.features[name], f"{path}: {name!r}"
        if name not in self._dataset.camera_keys:
            dtype = np.dtype(feature["dtype"]) if name in self._dataset.numeric_keys else None
            return tables.to_numpy(column, dtype, [int(n) for n in feature["shape"]], where)
        if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
            raise ValueError(
                f"{where} is stored as {column.type}, expected pictures as struct<bytes: binary, "
                "path: string>"
            )
        found = pc.struct_field(column, "bytes").to_pylist()
        if None in found:
            raise ValueError(
                f"{where} has frames without bytes, only a path at best; write the dataset again "
                "with the pictures inside"
            )
        return found


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
