"""Mixing straight from disk: one array of each input at a time, in blocks, never n trees.

Sums are taken in float32 and rounded once to the output dtype. The same pass measures how far the
inputs lie apart.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from policymix import trees
from policymix.checkpoints.store import Leaf

_BLOCK = 2**20  # elements: small enough for the cache, large enough that Python does not matter


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
    for path in progress(list(by_path)):
        leaves = [flat[path] for flat in flats]
        out_dtype = dtype[path] if isinstance(dtype, Mapping) else dtype or widest(leaves)
        arrays = [leaf.read() for leaf in leaves]
        params[path], leaf_gram, leaf_norm = _combine_arrays(
            arrays, np.float32(by_path[path]), out_dtype
        )
        if not np.isfinite(params[path]).all():
            raise _not_finite(path, arrays, names, out_dtype)
        gram += leaf_gram
        square_norm += leaf_norm
    return Mixed(trees.unflatten(params), gram, square_norm)


def widest(leaves: Sequence[Leaf]) -> np.dtype:
    """The dtype that holds all of the leaves' values (bfloat16 and float16 meet in float32)."""
    return functools.reduce(jnp.promote_types, [leaf.dtype for leaf in leaves])


def _combine_arrays(arrays: Sequence[np.ndarray], coefficients: np.ndarray, dtype) -> tuple:
    """One array of the mix, and its share of the Gram matrix and of ‖θ_0‖²."""
    out = np.empty(arrays[0].shape, dtype)
    flat_out, flats = out.reshape(-1), [array.reshape(-1) for array in arrays]
    gram, square_norm = np.zeros((len(arrays),) * 2), 0.0
    for block in _blocks(out.size):
        rows = [flat[block].astype(np.float32, copy=False) for flat in flats]
        total = coefficients[0] * rows[0]
        for c, row in zip(coefficients[1:], rows[1:], strict=True):
            total += c * row
        flat_out[block] = total.astype(dtype, copy=False)
        square_norm += float(np.vdot(rows[0], rows[0]))
        apart = np.stack([row - rows[0] for row in rows])
        gram += apart @ apart.T
    return out, gram, square_norm


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK))


def _not_finite(path: str, arrays: Sequence[np.ndarray], names: Sequence[str], dtype) -> ValueError:
    for array, name in zip(arrays, names, strict=True):
        if bad := int(np.size(array) - np.isfinite(array).sum()):
            return ValueError(
                f"{name}: {path!r} holds {bad} values that are NaN or infinite; the checkpoint's "
                "training diverged "
                "or the file is damaged, so it cannot be mixed"
            )
    return ValueError(
        f"the mix of {path!r} does not fit into {np.dtype(dtype)}; choose a wider config.mix.dtype"
    )
