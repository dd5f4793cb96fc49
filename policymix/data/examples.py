"""tf.train.Example, the message that RLDS keeps an episode in, read and written without protobuf.

An Example is a map from keys ("steps/observation/image_0") to a list of bytes, of float32 or of
int64: tensorflow/core/example/{example,feature}.proto, in protobuf's wire format.
"""

from collections.abc import Container, Iterator, Mapping, Sequence

import numpy as np

_FIXED, _PACKED = 5, 2  # wire types


class BytesList(Sequence):
    """A list of bytes inside a message, without copies.

    Attributes:
      ranges: int64 [n, 2], where each begins in the message, and its length.
    """

    def __init__(self, buffer: bytes, ranges: np.ndarray):
        self._view, self.ranges = memoryview(buffer), ranges

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, index):
        start, length = self.ranges[index].tolist()
        return self._view[start : start + length]

    def __iter__(self) -> Iterator[memoryview]:
        for start, length in self.ranges.tolist():
            yield self._view[start : start + length]

    def tolist(self) -> list[bytes]:
        return [bytes(item) for item in self]


Values = BytesList | np.ndarray | None  # None: a feature without a value


def parse(data: bytes, only: Container[str] | None = None) -> dict[str, Values]:
    """An Example → {key: BytesList, float32 [n] or int64 [n]}; float32 may be views of `data`.

    Args:
      only: features to read, with what is stored beside them ("KEY/shape"); None for all.

    Raises:
      ValueError: it is none; says where it goes wrong.
    """
    return {
        key: _feature(data, *span)
        for key, span in _entries(data)
        if only is None or key in only or key.rpartition("/")[0] in only
    }


def replace(data: bytes, new: Mapping[str, Sequence[bytes]]) -> bytes:
    """An Example with some features replaced by lists of bytes, all others as they are, bit for
    bit and in their order. ValueError as `parse`, and for a key that it has not.
    """
    spans, view, parts = list(_entries(data)), memoryview(data), []
    if lacking := sorted(new.keys() - {key for key, _ in spans}):
        raise ValueError(f"the example lacks {lacking}")
    for key, (start, end) in spans:  # joined once: an episode is large
        value = _bytes_list(new[key]) if key in new else view[start:end]
        head = _field(1, key.encode()) + _head(2, len(value))
        parts += [_head(1, len(head) + len(value)), head, value]
    return b"".join([_head(1, sum(map(len, parts))), *parts])


def serialize(features: Mapping[str, Sequence[bytes] | np.ndarray]) -> bytes:
    """{key: list of bytes, or an array of floats, integers or bools} → an Example."""
    parts = []
    for key, values in features.items():
        if not isinstance(values, np.ndarray):
            value = _bytes_list(values)
        elif values.dtype.kind == "f":
            value = _field(2, _field(1, values.astype("<f4").tobytes()))
        else:
            numbers = (_varint(int(n) & 0xFFFFFFFFFFFFFFFF) for n in values.ravel())
            value = _field(3, _field(1, b"".join(numbers)))
        parts.append(_entry(key, value))
    return _field(1, b"".join(parts))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _head(number: int, length: int) -> bytes:
    return _varint(number << 3 | _PACKED) + _varint(length)


def _field(number: int, content: bytes) -> bytes:
    return _head(number, len(content)) + content


def _entry(key: str, value: bytes) -> bytes:
    return _field(1, _field(1, key.encode()) + _field(2, value))


def _bytes_list(items: Sequence[bytes]) -> bytes:
    return _field(1, b"".join(_field(1, item) for item in items))


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: (number, wire type, where its content begins, ends)."""
    place = start
    try:
        while place < end:
            tag, place = _read_varint(data, place)
            kind = tag & 7
            length = {1: 8, _FIXED: 4}.get(kind, 0)
            if kind == _PACKED:
                length, place = _read_varint(data, place)
            elif kind == 0:
                length = _read_varint(data, place)[1] - place
            elif not length:
                raise IndexError
            if place + length > end:
                raise IndexError
            yield tag >> 3, kind, place, place + length
            place += length
    except IndexError:
        raise ValueError(
            f"expected a tf.train.Example, found bytes that are none, from byte {place} of "
            f"{len(data)} on"
        ) from None


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        if (shift := shift + 7) > 63:
            raise IndexError


def _entries(data: bytes) -> Iterator[tuple[str, tuple[int, int]]]:
    """The keys of an Example, and where the Feature of each begins and ends."""
    for number, kind, start, end in _fields(data, 0, len(data)):
        if (number, kind) != (1, _PACKED):
            continue
        for _, _, first, last in _fields(data, start, end):
            key, span = "", (first, first)
            for part, _, low, high in _fields(data, first, last):
                if part == 1:
                    key = data[low:high].decode("utf-8", "backslashreplace")
                else:
                    span = low, high
            yield key, span


def _feature(data: bytes, start: int, end: int) -> Values:
    for number, kind, low, high in _fields(data, start, end):
        if kind == _PACKED and number in (1, 2, 3):
            return (_read_bytes, _read_floats, _read_ints)[number - 1](data, low, high)
    return None


def _read_bytes(data: bytes, start: int, end: int) -> BytesList:
    ranges, place = [], start
    try:
        while place < end:  # by hand: an episode has thousands, and they all look alike
            if data[place] != 1 << 3 | _PACKED:
                raise IndexError
            length, place = data[place + 1], place + 2
            if length > 127:
                length, place = _read_varint(data, place - 1)
            ranges.append((place, length))
            place += length
        if place > end:
            raise IndexError
    except IndexError:
        raise ValueError(f"found a list of bytes that is damaged at byte {place}") from None
    return BytesList(data, np.array(ranges, np.int64).reshape(-1, 2))


def _read_floats(data: bytes, start: int, end: int) -> np.ndarray:
    parts = []
    for _, kind, low, high in _fields(data, start, end):
        if kind not in (_PACKED, _FIXED) or (high - low) % 4:
            raise ValueError(f"found {high - low} bytes that are no floats, from byte {low} on")
        parts.append(np.frombuffer(data, "<f4", (high - low) // 4, low))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _read_ints(data: bytes, start: int, end: int) -> np.ndarray:
    parts = []
    for _, kind, low, high in _fields(data, start, end):
        if kind not in (_PACKED, 0):
            raise ValueError(f"found {high - low} bytes that are no integers, from byte {low} on")
        parts.append(_varints(np.frombuffer(data, np.uint8, high - low, low), low))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _varints(raw: np.ndarray, place: int) -> np.ndarray:
    """Packed varints, uint8 [bytes] → int64 [n]: seven bits a byte, the lowest first; a byte below
    128 ends a number.
    """
    ends = raw < 128
    if ends.all():
        return raw.astype(np.int64)
    last = np.flatnonzero(ends)
    first = np.concatenate([[0], last[:-1] + 1])
    if not ends[-1] or (last - first).max() > 9:
        raise ValueError(f"found integers that are damaged, from byte {place} on")
    shifts = 7 * (np.arange(len(raw)) - np.repeat(first, last - first + 1)).astype(np.uint64)
    bits = (raw & 127).astype(np.uint64) << shifts
    return np.bitwise_or.reduceat(bits, first).view(np.int64)
