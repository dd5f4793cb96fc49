"""Mixing straight from disk: one array of each input at a time, in blocks, never n trees.

Sums are taken in float32 (float64 for float64 inputs) and rounded once to the output dtype. The
same pass measures how far the inputs lie apart.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from policymix import trees
from policymix.checkpoints.store import Leaf

_BLOCK = 2**16  # elements: small enough for the cache, large enough that Python does not matter
_AHEAD = 2**28  # bytes: leaves up to this size, over all inputs, are read one step ahead


class Mixed(NamedTuple):
    """A mix, and the geometry of its inputs.

    Attributes:
      params: nested dict of numpy arrays.
      gram: float64 [n, n], ⟨θ_i - θ_0, θ_j - θ_0⟩ over all parameters.
      square_norm: float64 [], ‖θ_0‖².
    """

    params: dict[str, Any]
    gram: np.ndarray
    square_norm: float


def combine(
    opened: Sequence[Mapping[str, Any]],
    coefficients: Any,
    names: Sequence[str],
    *,
    dtype: Any = None,
    progress=iter,
) -> Mixed:
    """Σ_k c_k θ_k of checkpoints on disk.

    Args:
      opened: n trees of `store.Leaf` of equal structure and shapes.
      coefficients: [n], or {path regex: [n]}.
      names: what to call the inputs in errors.
      dtype: of the output; a dtype for all leaves, a tree of dtypes by path, or None for the widest
        of the inputs'.
      progress: wraps the list of paths, to show how far the work is.

    Raises:
      ValueError: an input is damaged, or holds NaN or infinity; the message names the input and the
        key.
    """
    flats = [trees.flatten(tree) for tree in opened]
    by_path = trees.coefficients_by_path(coefficients, list(flats[0]), len(flats))
    n, params = len(flats), {}
    gram, square_norm = np.zeros((n, n)), 0.0
    for path, arrays in _read_ahead(flats, progress(list(by_path))):
        leaves = [flat[path] for flat in flats]
        out_dtype = dtype[path] if isinstance(dtype, Mapping) else dtype or widest(leaves)
        if not jnp.issubdtype(out_dtype, np.floating):
            raise ValueError(
                f"{names[0]}: {path!r} is {out_dtype}; only floating-point parameters can be mixed"
            )
        with np.errstate(all="ignore"):  # what is not finite is told below, by name
            params[path], leaf_gram, leaf_norm = _combine_arrays(
                arrays, np.asarray(by_path[path]), out_dtype
            )
        if not np.isfinite(params[path]).all():
            raise _not_finite(path, arrays, names, out_dtype)
        gram += leaf_gram
        square_norm += leaf_norm
    return Mixed(trees.unflatten(params), gram, square_norm)


def _read_ahead(flats: Sequence[Mapping[str, Leaf]], paths: Iterable[str]) -> Iterator[tuple]:
    """(path, one array per input), reading the inputs at once and small leaves one step ahead."""
    previous = None
    for path in paths:
        leaves = [flat[path] for flat in flats]
        small = sum(leaf.nbytes for leaf in leaves) <= _AHEAD
        if previous and not small:  # what was read ahead is let go before the big one is read
            yield previous[0], [read() for read in previous[1]]
            previous = None
        started = path, [leaf.start() for leaf in leaves]
        if previous:
            yield previous[0], [read() for read in previous[1]]
        previous = started
    if previous:
        yield previous[0], [read() for read in previous[1]]


def widest(leaves: Sequence[Leaf]) -> np.dtype:
    """The dtype that holds all of the leaves' values (bfloat16 and float16 meet in float32)."""
    return functools.reduce(jnp.promote_types, [leaf.dtype for leaf in leaves])


def _combine_arrays(arrays: Sequence[np.ndarray], coefficients: np.ndarray, dtype) -> tuple:
    """One array of the mix, and its share of the Gram matrix and of ‖θ_0‖²."""
    out = np.empty(arrays[0].shape, dtype)
    flat_out, flats = out.reshape(-1), [array.reshape(-1) for array in arrays]
    gram, square_norm = np.zeros((len(arrays),) * 2), 0.0
    wide = np.dtype(jnp.promote_types(widest(arrays), np.float32))
    coefficients = coefficients.astype(wide)
    # Scratch that stays in the cache: without it most of the time goes to memory that is used once.
    total, product = np.empty((2, _BLOCK), wide)
    apart = np.zeros((len(arrays), _BLOCK), wide)
    for block in _blocks(out.size):
        size = block.stop - block.start
        first = flats[0][block].astype(wide, copy=False)
        np.multiply(first, coefficients[0], out=total[:size])
        for k in range(1, len(flats)):
            row = flats[k][block].astype(wide, copy=False)
            np.multiply(row, coefficients[k], out=product[:size])
            np.add(total[:size], product[:size], out=total[:size])
            np.subtract(row, first, out=apart[k, :size])
        flat_out[block] = total[:size]
        square_norm += float(np.vdot(first, first))
        gram += apart[:, :size] @ apart[:, :size].T
    return out, gram, square_norm


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK))


def _not_finite(path: str, arrays: Sequence[np.ndarray], names: Sequence[str], dtype) -> ValueError:
    for array, name in zip(arrays, names, strict=True):
        if bad := int(np.size(array) - np.isfinite(array).sum()):
            return ValueError(
                f"{name}: {path!r} holds {bad} values that are NaN or infinite; the checkpoint's "
                "training diverged or the file is damaged, so it cannot be mixed"
            )
    return ValueError(
        f"the mix of {path!r} does not fit into {np.dtype(dtype)}; choose a wider config.mix.dtype"
    )
