"""The loss of a mix as a function of its coefficients.

With θ(c) = Σ_k c_k θ_k, one backward pass gives every derivative: ∂L/∂c_k = ⟨∂L/∂θ, θ_k⟩.
`jax.grad` through `trees.combine` is the same number; the dot products are taken leaf by leaf in
float32, so they stay exact for bfloat16 trees, follow the sharding of the parameters, and may be
kept apart by groups of paths at no cost.

Where the loss is the mean square of a residual r, as in flow matching, forward mode gives the
columns J_k = ∂r/∂c_k = (∂r/∂θ) θ_k one at a time, and with them the curvature of Gauss and Newton.
n checkpoints, G groups.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

from policymix import trees as tree_lib
from policymix.structs import LossFn, Metrics, Params, PyTree

Coefficients = Any  # [n] array, or {path regex: [n] array}
ResidualFn = Callable[[Params, Any, jax.Array], jax.Array]  # residual_fn(params, batch, key)


class Objective(NamedTuple):
    """Pure functions of the coefficients.

    Attributes:
      value: (c, batch=None) → mean loss over all batches, or the loss of one batch by number.
      value_and_grad: (c, batch=None) → (loss, ∂loss/∂c with the structure of c).
      gauss_newton: (c, batch=None, on_simplex=False, proceed=None) → (loss, gradient 2 Jᵀr / N
        [n G], curvature 2 JᵀJ / N [n G, n G]) of a loss rᵀr / N, N the number of elements of r,
        with the groups of c one after another; numpy, float64. `on_simplex` leaves out, for each
        group, the direction in which all its coefficients grow together: one column less to
        compute, and the numbers then hold only for changes that leave the sum of every group as it
        is. `proceed` is asked with the loss, which the first column brings along, whether the other
        columns are wanted; if not, gradient and curvature are None.
      num_batches: how many batches there are; searches step through them.
    """

    value: Callable[..., jax.Array]
    value_and_grad: Callable[..., tuple[jax.Array, Coefficients]]
    gauss_newton: Callable[..., tuple[float, np.ndarray, np.ndarray]]
    num_batches: int


def in_memory(
    loss_fn: LossFn,
    trees: Sequence[Params],
    batches: Sequence[PyTree],
    key: jax.Array,
    residual_fn: ResidualFn | None = None,
) -> Objective:
    """The objective of checkpoints that fit in memory, whole or sharded.

    Every candidate meets the same noise: batch i is always evaluated with the same key, so that
    differences in loss are differences between models.

    Args:
      loss_fn: (params, batch, key) → (loss [], metrics).
      trees: n parameter trees of equal structure.
      batches: validation batches, each as `loss_fn` takes them.
      key: one key, folded with the number of the batch; or an array of keys, one per batch, used as
        they are.
      residual_fn: (params, batch, key) → any array whose mean square is the loss of `loss_fn`;
        without it there is no `gauss_newton`.
    """
    for index, tree in enumerate(trees[1:], 1):
        tree_lib.check_same(trees[0], tree, names=("checkpoint 0", f"checkpoint {index}"))
    return of_source(loss_fn, _Held(tuple(trees)), batches, key, residual_fn)


class Source(Protocol):
    """Where n parameter trees come from: memory, or a disk.

    Attributes:
      n: how many there are.
      held: whether they are in memory, so that a projection reads no disk.
    """

    n: int
    held: bool

    def combine(self, groups: tuple[str, ...], coefficients: Sequence[jax.Array]) -> Params:
        """θ(c), with [n] coefficients for each group of paths."""

    def project(self, groups: tuple[str, ...], grads: Params) -> list[jax.Array]:
        """⟨grads, θ_k⟩ for every k, [n] for each group of paths."""

    def along(self, k: int) -> tuple[Params, Params, np.float32]:
        """(a, b, less) with a - less b = θ_k - θ_0, or θ_0 for k = 0."""


class _Held(NamedTuple):
    """Trees in memory, whole or sharded."""

    trees: tuple[Params, ...]

    @property
    def n(self) -> int:
        return len(self.trees)

    @property
    def held(self) -> bool:
        return True

    def combine(self, groups, coefficients) -> Params:
        return _combine(groups, coefficients, self.trees)

    def project(self, groups, grads) -> list[jax.Array]:
        return _project(groups, grads, self.trees)

    def along(self, k: int) -> tuple[Params, Params, np.float32]:
        return self.trees[k], self.trees[0], np.float32(k > 0)


def of_source(
    loss_fn: LossFn,
    source: Source,
    batches: Sequence[PyTree],
    key: jax.Array,
    residual_fn: ResidualFn | None = None,
) -> Objective:
    """The objective of trees wherever they are; arguments as those of `in_memory`."""
    if not batches:
        raise ValueError("an objective needs at least one validation batch")
    keys = list(
        key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(batches)))
    )
    if len(keys) != len(batches):
        raise ValueError(f"{len(batches)} batches need {len(batches)} keys, got {len(keys)}")

    def mean(function, c, batch):
        """The mean of function(loss_fn, θ(c), batch, key) over the chosen batches; the mix is made
        once.
        """
        mixed = source.combine(*_ordered(c))
        chosen = range(len(batches)) if batch is None else [batch]

        def of(i):  # a clone: that the key is used again is meant
            return function(loss_fn, mixed, batches[i], jax.random.clone(keys[i]))

        total = of(chosen[0])
        for i in chosen[1:]:
            total = _add(total, of(i))
        return _divide(total, len(chosen)) if len(chosen) > 1 else total

    def value_and_grad(c, batch=None):
        groups, _ = _ordered(c)

        # Gradients of bfloat16 trees are not added in bfloat16: their projections are, or else they
        # are widened, where each projection would read all checkpoints.
        def of(*arguments):
            value, grads = _loss_and_grad(*arguments)
            return value, source.project(groups, grads) if source.held else _widened(grads)

        value, found = mean(of, c, batch)
        dots = found if source.held else source.project(groups, found)
        return value, dict(zip(groups, dots, strict=True)) if isinstance(c, Mapping) else dots[0]

    def gauss_newton(c, batch=None, on_simplex=False, proceed=None):
        if residual_fn is None:
            raise ValueError(
                "gauss_newton needs the residual whose mean square the loss is: pass residual_fn "
                "to the objective, or use a search that does without (bfgs)"
            )
        groups, ordered = _ordered(c)
        mixed, loss = source.combine(groups, ordered), None
        chosen = range(len(batches)) if batch is None else [batch]
        columns = [[] for _ in chosen]  # of each batch: r, then ∂r/∂θ times each direction
        for direction in _directions(source, len(groups), on_simplex):
            for found, i in zip(columns, chosen, strict=True):
                key = jax.random.clone(keys[i])
                r, column = _column((residual_fn, groups), mixed, direction, batches[i], key)
                found += [column] if found else [r, column]
            if loss is None:
                loss = float(np.mean([np.asarray(_gram(found[:1])) for found in columns]))
                if proceed is not None and not proceed(loss):
                    return loss, None, None
        gram = np.mean([np.asarray(_gram(found), np.float64) for found in columns], axis=0)
        back = _by_checkpoint(len(gram) - 1, source.n, len(groups))
        return loss, 2 * back.T @ gram[1:, 0], 2 * back.T @ gram[1:, 1:] @ back

    return Objective(
        lambda c, batch=None: mean(lambda *of: evaluate(*of)[0], c, batch),
        value_and_grad,
        gauss_newton,
        len(batches),
    )


# Compiled once per loss function, so that objectives on other batches of the same shapes share the
# work.
@functools.partial(jax.jit, static_argnums=0)
def evaluate(
    loss_fn: LossFn, params: Params, batch: PyTree, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """loss_fn(params, batch, key), as the objectives of this loss function compile it."""
    return loss_fn(params, batch, key)


# Whole trees at once: an addition for every shape of array would be a program for every shape.
@functools.partial(jax.jit, donate_argnums=0)
def _add(total: PyTree, part: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, total, part)


@functools.partial(jax.jit, donate_argnums=0)
def _widened(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


@functools.partial(jax.jit, donate_argnums=0)
def _divide(total: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda x: x / count, total)


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_grad(loss_fn: LossFn, mixed: Params, batch: PyTree, key: jax.Array):
    return jax.value_and_grad(lambda mixed: loss_fn(mixed, batch, key)[0])(mixed)


class _Direction(NamedTuple):
    """a - less b in the paths of one group, and no change elsewhere."""

    a: Params
    b: Params
    less: np.float32
    group: np.ndarray  # [G], one at the group


def _directions(source: Source, num_groups: int, on_simplex: bool) -> Iterator[_Direction]:
    """θ_0 itself, unless c stays on the simplex, then θ_k - θ_0 for every other k; each in every
    group before the next is fetched.

    Fine-tunes of one base are alike: the column of a difference is precise where the difference of
    two columns would be rounding.
    """
    for k in range(1 if on_simplex and source.n > 1 else 0, source.n):
        along = source.along(k)
        for group in np.eye(num_groups, dtype=np.float32):
            yield _Direction(*along, group)


def _by_checkpoint(num_directions: int, n: int, num_groups: int) -> np.ndarray:
    """T [directions, n G]: ∂r/∂c = columns @ T, since θ_k is θ_0 and θ_k - θ_0."""
    one = np.eye(n)
    one[0] = 1
    one = one[n - num_directions // num_groups :]
    both = np.einsum("dk,gh->dghk", one, np.eye(num_groups))
    return both.reshape(num_directions, num_groups * n)


@functools.partial(jax.jit, static_argnums=0)
def _column(static, mixed: Params, direction: _Direction, batch: PyTree, key: jax.Array):
    """(r, ∂r/∂θ times the direction); `static` is residual_fn and the regexes of the groups.

    `jax.jvp` and not `jax.linearize`: nothing of the forward pass is kept for other directions, and
    on CPU computing it again is faster than reading it back.
    """
    residual_fn, groups = static
    flat, tangent = tree_lib.flatten(mixed), {}
    rules = [(g, i) for i, g in enumerate(groups)]
    group_of = tree_lib.match(rules, list(flat), what="coefficients")
    others = tree_lib.flatten(direction.b)
    for path, leaf in tree_lib.flatten(direction.a).items():
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        step = jnp.asarray(leaf, wide) - direction.less * jnp.asarray(others[path], wide)
        tangent[path] = (direction.group[group_of[path]] * step).astype(flat[path].dtype)

    def residual(flat):
        return residual_fn(tree_lib.unflatten(flat), batch, key)

    return jax.jvp(residual, (flat,), (tangent,))


@jax.jit
def _gram(columns: Sequence[jax.Array]) -> jax.Array:
    """The products of all columns with each other, over the number of elements of one."""
    wide = jnp.stack([column.astype(jnp.float32).ravel() for column in columns])
    return jnp.matmul(wide, wide.T, precision=jax.lax.Precision.HIGHEST) / wide.shape[1]


def _ordered(coefficients: Coefficients) -> tuple[tuple[str, ...], list[jax.Array]]:
    """(regexes, coefficients) in the order given: `jax.jit` would sort the keys of a dict."""
    groups = coefficients if isinstance(coefficients, Mapping) else {".*": coefficients}
    ordered = [jnp.asarray(c, jnp.float32) for c in groups.values()]
    chex.assert_rank(ordered, 1)
    return tuple(groups), ordered


@functools.partial(jax.jit, static_argnums=0)
def _combine(
    groups: tuple[str, ...], coefficients: Sequence[jax.Array], params: Sequence[Params]
) -> Params:
    return tree_lib.combine(dict(zip(groups, coefficients, strict=True)), params)


@functools.partial(jax.jit, static_argnums=0)
def _project(groups: tuple[str, ...], grads: Params, params: Sequence[Params]) -> list[jax.Array]:
    """∂L/∂c_k = ⟨∂L/∂θ, θ_k⟩ for every k, apart for each group of paths."""
    flat_grads, flats = tree_lib.flatten(grads), [tree_lib.flatten(tree) for tree in params]
    group_of = tree_lib.match(
        [(g, i) for i, g in enumerate(groups)], list(flat_grads), what="coefficients"
    )
    totals = [jnp.zeros(len(flats), jnp.float32) for _ in groups]
    for path, grad in flat_grads.items():
        totals[group_of[path]] += jnp.stack([tree_lib.dot_leaf(grad, flat[path]) for flat in flats])
    return totals


def corner(n: int, chosen: Sequence[int]) -> np.ndarray:
    """Equal coefficients on the chosen checkpoints, zero on the others: [n]."""
    c = np.zeros(n)
    c[list(chosen)] = 1.0 / len(chosen)
    return c
