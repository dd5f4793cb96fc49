"""Exact quantiles of data that need not fit into memory.

A quantile lies between two order statistics. Written as an unsigned integer that sorts as the value
does, an order statistic is found digit by digit of 16 bits: one pass counts how many values have
each digit, those before being settled. float32 takes two passes and float64 four (where values are
few twice as many, of 8 bits), each holding a piece of the data and 0.5 MB per dimension and order
statistic that is still apart. Counts of parts of the data add up, whoever counted them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

Block = np.ndarray | tuple[np.ndarray, np.ndarray]  # values [..., d], also with counts [...]
Share = Callable[[], Iterable[Block]]  # begins a pass over some blocks, the same each time
ROWS = 1 << 18  # of a piece
_FEW = 1 << 14  # values of which a pass settles 8 bits: tallies of 16 would take longer to read


def quantiles(
    shares: Sequence[Share],
    fractions: Sequence[float],
    count: int,
    d: int,
    dtype: np.dtype,
    parallel: Callable = map,
) -> np.ndarray:
    """Quantiles in each dimension, interpolated as numpy.quantile does: float64 [q, d].

    Args:
      shares: of the data, in blocks: values [..., d], or (values [..., d], how often each occurs,
        int [...]). All finite.
      parallel: what maps the counting over shares, as a pool of threads does.
      fractions: q of them, within [0, 1].
      count: how many vectors there are, repeated ones included; positive.
      dtype: float32 or float64, whichever holds all values.
    """
    virtual = np.asarray(fractions) * (count - 1)
    below = np.floor(virtual).astype(np.int64)
    ranks = np.concatenate([below, np.minimum(below + 1, count - 1)])
    digit = 8 if count < _FEW else 16
    found = _order_statistics(
        shares, ranks, np.zeros((len(ranks), d), f"u{dtype.itemsize}"), digit, parallel
    )
    low, high = np.split(found.astype(np.float64), 2)
    part = (virtual - below)[:, None]
    step = high - low
    return np.where(part < 0.5, low + step * part, high - step * (1 - part))


def pieces(blocks: Iterable[Block]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Blocks in pieces of `ROWS` or so: (float32 or float64 [n, d], counts [n] or None)."""
    held, rows = [], 0
    for block in blocks:
        held.append(_flat(block))
        rows += len(held[-1][0])
        if rows >= ROWS:
            yield from _pieces(*zip(*held, strict=True))
            held, rows = [], 0
    if rows:
        yield from _pieces(*zip(*held, strict=True))


def _flat(block: Block) -> tuple[np.ndarray, np.ndarray | None]:
    values, counts = block if isinstance(block, tuple) else (block, None)
    values = np.asarray(values)
    if values.dtype != np.float32:
        values = values.astype(np.float64, copy=False)
    if not values.shape[-1]:
        raise ValueError(f"statistics of vectors without a number in them, {values.shape}")
    if counts is not None:
        if np.shape(counts) != values.shape[:-1] or np.min(counts, initial=0) < 0:
            raise ValueError(
                f"counts {np.shape(counts)} must be one for each row of values {values.shape}, "
                "and none below 0"
            )
        counts = np.reshape(counts, -1)
    return values.reshape(-1, values.shape[-1]), counts


def _pieces(values, counts):
    whole = values[0] if len(values) == 1 else np.concatenate(values)
    if counted := any(c is not None for c in counts):
        filled = [np.ones(len(v)) if c is None else c for v, c in zip(values, counts, strict=True)]
        each = np.concatenate(filled)
    for start in range(0, len(whole), ROWS):
        piece = slice(start, start + ROWS)
        yield whole[piece], each[piece] if counted else None


def _order_statistics(
    shares: Sequence[Share], ranks: np.ndarray, found: np.ndarray, digit: int, parallel: Callable
) -> np.ndarray:
    """The values of these ranks (0: the smallest) in each dimension, [len(ranks), d]; each pass
    settles a digit of so many bits. `found` are zeros, of the integers that values become.
    """
    left = np.tile(ranks[:, None], (1, found.shape[1]))  # among values that begin with the settled
    for shift in range(found.itemsize * 8 - digit, -1, -digit):
        settled = [{int(prefix) for prefix in column} for column in found.T]
        counted = parallel(
            functools.partial(_tallies, settled=settled, shift=shift, digit=digit, like=found),
            shares,
        )
        tallies = functools.reduce(_added, counted)
        for dim, tally in enumerate(tallies):
            totals = {prefix: np.cumsum(counts) for prefix, counts in tally.items()}
            for r in range(len(ranks)):
                total = totals[int(found[r, dim])]
                if total[-1] <= left[r, dim]:
                    raise ValueError(
                        "quantiles of blocks: a later pass gave fewer values than the first; each "
                        "call must begin a new pass over the same blocks"
                    )
                held = int(np.searchsorted(total, left[r, dim], side="right"))
                left[r, dim] -= total[held - 1] if held else 0
                found[r, dim] = (int(found[r, dim]) << digit) + held
    return _from_sortable(found)


def _tallies(
    share: Share, *, settled: Sequence[set[int]], shift: int, digit: int, like: np.ndarray
) -> list[dict[int, np.ndarray]]:
    """For each dimension {settled digits: how many values that begin with them have each digit at
    `shift`}.
    """
    upper, size = shift + digit, 1 << digit
    tallies = [{prefix: np.zeros(size, np.int64) for prefix in one} for one in settled]
    for values, counts in pieces(share()):
        keys = _sortable(np.ascontiguousarray(values.T, f"f{like.itemsize}"))
        for row, tally in zip(keys, tallies, strict=True):
            for prefix in tally:
                begins = slice(None) if upper == like.itemsize * 8 else row >> upper == prefix
                digits = (row[begins] >> shift & size - 1).astype(np.int64)
                each = None if counts is None else counts[begins]
                tally[prefix] += np.bincount(digits, each, size).astype(np.int64)
    return tallies


def _added(one: list[dict], other: list[dict]) -> list[dict]:
    return [{k: tally[k] + more[k] for k in tally} for tally, more in zip(one, other, strict=True)]


def _sortable(values: np.ndarray) -> np.ndarray:
    """Floats as unsigned integers in the same order: a negative one has all its bits flipped, any
    other its sign alone.
    """
    raw = values.view(f"u{values.dtype.itemsize}")
    sign = raw.dtype.type(1 << values.dtype.itemsize * 8 - 1)
    return np.where(raw & sign, ~raw, raw | sign)


def _from_sortable(keys: np.ndarray) -> np.ndarray:
    sign = keys.dtype.type(1 << keys.itemsize * 8 - 1)
    return np.where(keys & sign, keys ^ sign, ~keys).view(f"f{keys.itemsize}")
