"""Mixing straight from disk to disk: a block of each input at a time, never a tree.

A job is a stretch of one array, or of several that lie together: its blocks are read from every
input in turn, summed in float32 (float64 for float64 inputs), rounded once to the output dtype, and
written. Several workers overlap reading, arithmetic and writing; what they hold does not depend on
how large the checkpoints are, nor on how many there are. The same pass measures how far the inputs
lie apart.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from policymix import processes, trees
from policymix.checkpoints import blocks, leaves
from policymix.checkpoints import jobs as jobs_lib
from policymix.checkpoints.leaves import Leaf
from policymix.mixing import objective as objective_lib
from policymix.structs import LossFn

_WORKERS = 8  # more do not help a disk


class Geometry(NamedTuple):
    """How the inputs of a mix lie to each other.

    Attributes:
      gram: float64 [n, n], ⟨θ_i - θ_0, θ_j - θ_0⟩ over all parameters; of stretches with more than
        2^16 elements, estimated from about one in two thousand, evenly spread.
      square_norm: float64 [], ‖θ_0‖², likewise.
    """

    gram: np.ndarray
    square_norm: float


class Mixed(NamedTuple):
    """A mix in memory, as a nested dict of numpy arrays, and the geometry of its inputs."""

    params: dict[str, Any]
    gram: np.ndarray
    square_norm: float


def combine(
    opened: Sequence[Mapping[str, Any]],
    coefficients: Any,
    names: Sequence[str],
    *,
    dtype: Any = None,
) -> Mixed:
    """Σ_k c_k θ_k of checkpoints on disk, into memory. Arguments and errors as those of `mix`.

    Args:
      opened: n nested dicts of leaves.
      dtype: of the output; a dtype for all leaves, a dict of dtypes by path, or None for the widest
        of the inputs'.
    """
    flats = [trees.flatten(tree) for tree in opened]
    shapes = {}
    for path, leaf in flats[0].items():
        chosen = dtype.get(path) if isinstance(dtype, Mapping) else dtype
        shapes[path] = leaf.shape, np.dtype(chosen or widest([flat[path] for flat in flats]))
    sink = leaves.Memory(shapes)
    dtypes = {path: kind for path, (_, kind) in shapes.items()}
    geometry = mix(flats, coefficients, names, sink, dtypes)
    return Mixed(trees.unflatten(sink.arrays), *geometry)


def widest(arrays: Sequence[Any]) -> np.dtype:
    """The dtype that holds all values of arrays (bfloat16 and float16 meet in float32)."""
    widest_yet = arrays[0].dtype
    for array in arrays[1:]:
        widest_yet = jnp.promote_types(widest_yet, array.dtype)
    return np.dtype(widest_yet)


def mix(
    inputs: Sequence[Mapping[str, Leaf]],
    coefficients: Any,
    names: Sequence[str],
    sink: leaves.Sink,
    dtypes: Mapping[str, np.dtype],
    *,
    progress: Callable[[int], None] = lambda count: None,
    num_workers: int = 0,
) -> Geometry:
    """Σ_k c_k θ_k of checkpoints on disk, written to `sink` as it comes.

    Arrays that are not floating-point, such as indices, are copied; they must be equal.

    Args:
      inputs: n dicts of leaves by path, of equal paths and shapes.
      coefficients: [n], or {path regex: [n]}.
      names: what to call the inputs in errors.
      dtypes: of the output, by path.
      progress: called with the number of elements of each block that is done.
      num_workers: threads; 0 is one per core, up to eight.

    Raises:
      ValueError: an input is damaged, or holds NaN or infinity; the message names the input and the
        key. Whatever was written until then is not to be used.
    """
    by_path = trees.coefficients_by_path(coefficients, list(inputs[0]), len(inputs))
    jobs = jobs_lib.plan(by_path, inputs, dtypes, sink)
    workers = num_workers or min(processes.num_cores(), _WORKERS)
    run = functools.partial(jobs_lib.run, sink=sink, names=names, progress=progress)
    shares = jobs_lib.run_all(jobs, run, workers)
    # In the order of the jobs, so that the same mix has the same numbers.
    gram, square_norm = np.zeros((len(inputs),) * 2), 0.0
    for job_gram, job_norm in shares:
        gram += job_gram
        square_norm += job_norm
    return Geometry(gram, square_norm)


def objective(
    loss_fn: LossFn,
    inputs: Sequence[Mapping[str, Leaf]],
    batches: Sequence[Any],
    key: jax.Array,
    residual_fn: objective_lib.ResidualFn | None = None,
    *,
    names: Sequence[str],
    place: Callable[[dict[str, Any]], Any] = lambda tree: jax.tree.map(jnp.asarray, tree),
) -> objective_lib.Objective:
    """The objective of checkpoints that do not fit in memory, as `mixing.objective.in_memory`.

    One mix is held, and a gradient or a direction beside it. An evaluation reads the n checkpoints
    once for the mix, and once more for what is projected on them.

    Args:
      inputs: n dicts of leaves by the paths of the tree that `loss_fn` takes.
      names: what to call the inputs in errors.
      place: puts a tree of numpy arrays on the devices.
    """
    source = _OnDisk(tuple(inputs), tuple(names), place)
    return objective_lib.of_source(loss_fn, source, batches, key, residual_fn)


class _OnDisk(NamedTuple):
    """A `mixing.objective.Source` of checkpoints on disk."""

    inputs: tuple[Mapping[str, Leaf], ...]
    names: tuple[str, ...]
    place: Callable[[dict[str, Any]], Any]

    @property
    def n(self) -> int:
        return len(self.inputs)

    @property
    def held(self) -> bool:
        return False

    def combine(self, groups: tuple[str, ...], coefficients: Sequence[Any]) -> Any:
        by_group = dict(zip(groups, map(np.asarray, coefficients), strict=True))
        return self.place(combine(self.inputs, by_group, self.names).params)

    def along(self, k: int) -> tuple[Any, Any, np.float32]:
        rows, c = ([0], [1.0]) if k == 0 else ([0, k], [-1.0, 1.0])
        inputs, names = ([those[row] for row in rows] for those in (self.inputs, self.names))
        params = self.place(combine(inputs, np.array(c), names, dtype=np.float32).params)
        return params, params, np.float32(0)

    def project(self, groups: tuple[str, ...], grads: Any) -> list[jax.Array]:
        flat = trees.flatten(grads)
        rules = [(group, i) for i, group in enumerate(groups)]
        group_of = trees.match(rules, list(flat), what="coefficients")
        totals = np.zeros((len(groups), self.n))
        with futures.ThreadPoolExecutor(min(processes.num_cores(), _WORKERS)) as pool:
            dots = pool.map(lambda path: self._dots(path, np.asarray(flat[path])), flat)
            for path, dot in zip(flat, dots, strict=True):
                totals[group_of[path]] += dot
        return [jnp.asarray(total, jnp.float32) for total in totals]

    def _dots(self, path: str, grad: np.ndarray) -> np.ndarray:
        """⟨grad, θ_k⟩ of one array for every k, [n]."""
        grad, totals = grad.reshape(-1), np.zeros(self.n)
        for k, flat in enumerate(self.inputs):
            leaf = flat[path]
            step = max(jobs_lib.STEP, leaf.block)
            buffer = np.empty(min(step, leaf.size), leaf.dtype)
            with leaf.opened() as reader:
                for start in range(0, leaf.size, step):
                    block = buffer[: leaf.size - start]
                    reader.read(start, block)
                    ours = blocks.widen(grad[start : start + step], np.dtype(np.float32))
                    values = blocks.widen(block, np.dtype(np.float32))
                    totals[k] += np.einsum("i,i->", values, ours)
        return totals
