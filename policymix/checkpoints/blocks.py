"""Arithmetic on blocks of a few hundred thousand elements: sums in float32, rounded once.

numpy is fast for float32 (its loops run at the speed of the cache). For bfloat16 it has none:
blocks are added in one compiled pass over pairs of elements, each half of a 32-bit word being a
float32 whose lower bits are masked out.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_UPPER = np.uint32(0xFFFF0000)


def wide_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """What sums are taken in: float32, or float64 where an array has it."""
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def widen(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """[m] in float32 or float64; the array itself where it is that already."""
    if values.dtype == _BFLOAT16 and dtype == np.float32:
        bits = values.view(np.uint16).astype(np.uint32)
        np.left_shift(bits, 16, out=bits)
        return bits.view(np.float32)
    return values.astype(dtype, copy=False)


def round_into(values: np.ndarray, out: np.ndarray) -> None:
    """Rounds [m] to the dtype of `out`, to nearest, ties to even. May change `values`."""
    if out.dtype != _BFLOAT16 or values.dtype != np.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = values
        return
    bits = values.view(np.uint32)
    lowest = np.right_shift(bits, 16)
    np.bitwise_and(lowest, 1, out=lowest)
    np.add(lowest, 0x7FFF, out=lowest)
    if not np.isfinite(values).all():  # a carry would make numbers of some NaN
        lowest[~np.isfinite(values)] = 0
    np.add(bits, lowest, out=bits)
    np.right_shift(bits, 16, out=bits)
    out.view(np.uint16)[...] = bits


def finite(values: np.ndarray) -> bool:
    """Whether [m] holds neither NaN nor infinity."""
    if values.dtype.itemsize == 2:
        exponent = 0x7F80 if values.dtype == _BFLOAT16 else 0x7C00
        return bool((values.view(np.uint16) & 0x7FFF).max(initial=0) < exponent)
    # One fast pass tells for all but huge values, whose squares overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        quick = np.einsum("i,i->", values, values)
    return bool(np.isfinite(quick) or np.isfinite(values).all())


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """Zeros [size] at an address that XLA takes without copying."""
    raw = np.zeros(size * dtype.itemsize + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size * dtype.itemsize].view(dtype)


class Sum16:
    """Σ_k c_k x_k of n blocks of bfloat16, in one pass over pairs of elements.

    Attributes:
      rows: n blocks [size] to be filled.
    """

    def __init__(self, n: int, size: int):
        """`size` is even."""
        self.rows = [aligned(size, _BFLOAT16) for _ in range(n)]
        self._pairs = [row.view(np.uint32) for row in self.rows]

    def __call__(self, coefficients: np.ndarray) -> np.ndarray:
        """float32 [n] → bfloat16 [size], read-only."""
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.asarray(_sum_pairs(coefficients, self._pairs)).view(_BFLOAT16)


@jax.jit
def _sum_pairs(coefficients: jax.Array, rows: Sequence[jax.Array]) -> jax.Array:
    as_float = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)

    def rounded(total):
        # To nearest, ties to even. NaN stays NaN: the lower bits of these are zero.
        bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
        return bits + 0x7FFF + ((bits >> 16) & 1)

    low = sum(c * as_float(row << 16) for c, row in zip(coefficients, rows, strict=True))
    high = sum(c * as_float(row & _UPPER) for c, row in zip(coefficients, rows, strict=True))
    return (rounded(low) >> 16) | (rounded(high) & _UPPER)
