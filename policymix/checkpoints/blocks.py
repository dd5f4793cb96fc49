"""Arithmetic on blocks of a few hundred thousand elements: sums in float32, rounded once.

Large blocks of one dtype are summed by a compiled pass. For bfloat16 it takes pairs of elements,
each half of a 32-bit word being a float32 whose lower bits are masked out. What is small, of mixed
dtypes or in float64, numpy sums. The two differ in the last bit of some float32 sums, since the
compiled pass rounds a product and its addition at once, and takes numbers below 1.2e-38 as zero.
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
    """Rounds [m] to the dtype of `out`, to nearest, ties to even (float64 by way of float32 where
    that is bfloat16). May change `values`.
    """
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
        # Both signs have these at the upper end of what their bits mean, signed or not.
        infinity = 0x7F80 if values.dtype == _BFLOAT16 else 0x7C00
        bits = values.view(np.uint16)
        positive, negative = np.max(bits.view(np.int16), initial=0), np.max(bits, initial=0)
        return bool(positive < infinity and negative < infinity + 0x8000)
    # One fast pass tells for all but huge values, whose sum overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        quick = np.einsum("i->", values)
    return bool(np.isfinite(quick) or np.isfinite(values).all())


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """Zeros [size] at an address that XLA takes without copying."""
    raw = np.zeros(size * dtype.itemsize + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size * dtype.itemsize].view(dtype)


class Sum:
    """Σ_k c_k x_k of n blocks in float32 or bfloat16, and whether it is finite, in one pass.

    Attributes:
      rows: n blocks [size] to be filled.
    """

    def __init__(self, n: int, size: int, dtype: np.dtype):
        """`size` is a power of two, 2^10 or more."""
        self.rows = [aligned(size, dtype) for _ in range(n)]
        self._dtype, self._function = dtype, _sum_pairs if dtype == _BFLOAT16 else _sum
        # The same memory as jax knows it: what it holds when a sum is called is what is summed.
        words = [row.view(np.uint32) if dtype == _BFLOAT16 else row for row in self.rows]
        self._words = [jax.dlpack.from_dlpack(row, copy=False) for row in words]

    def __call__(self, coefficients: np.ndarray) -> tuple[np.ndarray, bool]:
        """float32 [n] → (its dtype [size], read-only; whether all of it is finite)."""
        total, signs = self._function(coefficients, self._words)
        finite = bool((np.asarray(signs) >= 0).all())
        return np.asarray(total).view(self._dtype), finite


@functools.cache
def can_compile() -> bool:
    """Whether jax may use this machine's CPU; JAX_PLATFORMS=cuda keeps it from it."""
    try:
        return bool(jax.devices("cpu"))
    except RuntimeError:
        return False


def run_inline() -> None:
    """Compiled calls on a CPU run in the thread that makes them, which saves a change of threads;
    to be called before jax is first used.

    Blocks are summed by several workers at once, none of which has anything else to do meanwhile.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


# One thread per call: the workers already take all cores.
_compiled = functools.partial(
    jax.jit, compiler_options={"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
)
_as_float = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
_as_bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint32)


@_compiled
def _sum(coefficients: jax.Array, rows: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    total = sum(c * row for c, row in zip(coefficients, rows, strict=True))
    return total, _folded((_as_bits(total) & 0x7F800000) + 0x00800000)


@_compiled
def _sum_pairs(coefficients: jax.Array, rows: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    def rounded(total):
        # To nearest, ties to even. NaN stays NaN: the lower bits of these are zero.
        bits = _as_bits(total)
        return bits + 0x7FFF + ((bits >> 16) & 1)

    low = sum(c * _as_float(row << 16) for c, row in zip(coefficients, rows, strict=True))
    high = sum(c * _as_float(row & _UPPER) for c, row in zip(coefficients, rows, strict=True))
    total = (rounded(low) >> 16) | (rounded(high) & _UPPER)
    exponents = (total & 0x7F807F80) + 0x00800080
    return total, _folded(exponents | (exponents << 16))


def _folded(bits: jax.Array) -> jax.Array:
    """uint32 [size] → int32 [256], negative where one of the bits' signs is set: an exponent of
    ones, and one more, carries into it. Halves are laid on each other, which is done in vectors.
    """
    while (half := len(bits) // 2) >= 256:
        bits = bits[:half] | bits[half:]
    return jax.lax.bitcast_convert_type(bits, jnp.int32)
