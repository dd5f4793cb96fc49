"""TFRecord files, read and written without TensorFlow.

A record is the length of its data (u64, little-endian), a checksum of these eight bytes (u32), the
data, and a checksum of the data (u32). A checksum is CRC-32C, rotated right by 15 bits, plus
0xA282EAD8: TensorFlow's tsl/lib/io/record_writer.h and tsl/lib/hash/crc32c.h.
"""

import contextlib
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import google_crc32c

from policymix import files

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
OVERHEAD = _HEADER.size + _FOOTER.size  # bytes of a record beside its data
_BUFFER = 1 << 20
_AGAIN = "copy or download the file again"


class Record(NamedTuple):
    """A record: its number in the file, where its data begins in bytes, the masked checksum of the
    data as it is stored, and the data.
    """

    number: int
    offset: int
    checksum: int
    data: bytes


class DamagedRecord(ValueError):
    """A record that cannot be used. `number` says which; the ones after it can still be read if
    `go_on` is true: only its data was wrong, its length was not.
    """

    def __init__(self, message: str, number: int, go_on: bool):
        super().__init__(message)
        self.number, self.go_on = number, go_on


def masked_crc(data: bytes | memoryview) -> int:
    """The checksum of a record's data as TFRecord files store it."""
    crc = google_crc32c.value(bytes(data) if isinstance(data, memoryview) else data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read(path: pathlib.Path, *, check: bool = True) -> Iterator[Record]:
    """The records of a file, in order, one at a time in memory.

    Args:
      check: whether the checksum of the data is; that of the length always is.

    Raises:
      FileNotFoundError: there is no such file.
      DamagedRecord: a ValueError that names file, record and byte, for what is cut off or whose
        checksum is wrong. What follows can be read with `read_on`.
    """
    yield from _read(path, check=check, bad=None)


def read_on(
    path: pathlib.Path, bad: list[DamagedRecord], *, check: bool = True
) -> Iterator[Record]:
    """As `read`, but damaged records are left out, and appended to `bad`; behind one whose length
    is wrong or that is cut off nothing can be found any more.
    """
    yield from _read(path, check=check, bad=bad)


def _read(path: pathlib.Path, *, check: bool, bad: list[DamagedRecord] | None) -> Iterator[Record]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_AGAIN}")
    with path.open("rb", buffering=_BUFFER) as file:
        size, number, offset = os.fstat(file.fileno()).st_size, 0, 0
        while offset < size:
            try:
                record = _next(file, path, number, offset, size, check)
            except DamagedRecord as error:
                if bad is None:
                    raise
                bad.append(error)
                if not error.go_on:
                    return
                record = None
            if record is not None:
                yield record
            offset = file.tell()
            number += 1
            del record  # so that two never lie in memory


def _next(
    file: BinaryIO, path: pathlib.Path, number: int, offset: int, size: int, check: bool
) -> Record:
    where = f"{path}, record {number} (from byte {offset} on)"
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise _cut_off(where, _HEADER.size, len(header), number)
    length, expected = _HEADER.unpack(header)
    if masked_crc(header[:8]) != expected:
        raise DamagedRecord(
            f"{where}: the checksum of its length is wrong, so that the rest of the file cannot be "
            f"read; {_AGAIN}",
            number,
            go_on=False,
        )
    if (left := size - offset - OVERHEAD) < length:
        raise _cut_off(where, length, max(0, left), number)
    data = file.read(length)
    (expected,) = _FOOTER.unpack(file.read(_FOOTER.size))
    if check and (found := masked_crc(data)) != expected:
        raise DamagedRecord(
            f"{where}: the checksum of its {length:,} bytes is {found:#010x}, expected "
            f"{expected:#010x}; {_AGAIN}",
            number,
            go_on=True,
        )
    return Record(number, offset + _HEADER.size, expected, data)


def _cut_off(where: str, expected: int, found: int, number: int) -> DamagedRecord:
    return DamagedRecord(
        f"{where}: the file is cut off, expected {expected:,} bytes, found {found:,}; {_AGAIN}",
        number,
        go_on=False,
    )


class Writer:
    """Appends records to a file that is being made: put it in place by renaming when it is whole.

    Attributes:
      num_bytes: of all records' data, what tfds calls numBytes.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.num_bytes = file, 0

    def write(self, data: bytes) -> None:
        """Appends one record."""
        header = struct.pack("<Q", len(data))
        self._file.write(header + _FOOTER.pack(masked_crc(header)))
        self._file.write(data)
        self._file.write(_FOOTER.pack(masked_crc(data)))
        self.num_bytes += len(data)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[Writer]:
    """A writer of the file `path`, which is there, whole, when the block ends, or not at all.

    Raises:
      OSError: it cannot be written, or the disk is full; names the file.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb", buffering=_BUFFER) as file:
            yield Writer(file)
        partial.replace(path)
    except OSError as error:
        if error.errno not in files.NO_ROOM:
            raise
        raise files.no_room(path, error.errno) from error
    finally:
        partial.unlink(missing_ok=True)
