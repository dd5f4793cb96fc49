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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from policymix import trees as tree_lib
from policymix.structs import LossFn, Params, PyTree

Coefficients = Any  # [n] array, or {path regex: [n] array}
ResidualFn = Callable[[Params, Any, jax.Array], jax.Array]  # residual_fn(params, batch, key)


class Objective(NamedTuple):
    """Pure functions of the coefficients.

    Attributes:
      value: (c, batch=None) → mean loss over all batches, or the loss of one batch by number.
      value_and_grad: (c, batch=None) → (loss, ∂loss/∂c with the structure of c).
      gauss_newton: (c, batch=None, on_simplex=False) → (loss, gradient 2 Jᵀr / N [n G], curvature
        2 JᵀJ / N [n G, n G]) of a loss rᵀr / N, N the number of elements of r, with the groups of c
        one after another; numpy, float64. `on_simplex` leaves out, for each group, the direction in
        which all its coefficients grow together: one column less to compute, and the numbers then
        hold only for changes that leave the sum of every group as it is.
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
    if not batches:
        raise ValueError("an objective needs at least one validation batch")
    for index, tree in enumerate(trees[1:], 1):
        tree_lib.check_same(trees[0], tree, names=("checkpoint 0", f"checkpoint {index}"))
    keys = list(
        key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(batches)))
    )
    if len(keys) != len(batches):
        raise ValueError(f"{len(batches)} batches need {len(batches)} keys, got {len(keys)}")

    def mean(function, c, batch, model=loss_fn):
        """The mean of function(model, θ(c), batch, key) over the chosen batches; the mix is made
        once.
        """
        mixed = _combine(*_ordered(c), trees)
        chosen = range(len(batches)) if batch is None else [batch]

        def evaluate(i):  # a clone: that the key is used again is meant
            return function(model, mixed, batches[i], jax.random.clone(keys[i]))

        total = evaluate(chosen[0])
        for i in chosen[1:]:
            total = jax.tree.map(jnp.add, total, evaluate(i))
        return jax.tree.map(lambda x: x / len(chosen), total)

    def value_and_grad(c, batch=None):
        value, grads = mean(_loss_and_grad, c, batch)
        groups, _ = _ordered(c)
        dots = _project(groups, grads, trees)
        return value, dict(zip(groups, dots, strict=True)) if isinstance(c, Mapping) else dots[0]

    def gauss_newton(c, batch=None, on_simplex=False):
        if residual_fn is None:
            raise ValueError(
                "gauss_newton needs the residual whose mean square the loss is: pass residual_fn "
                "to the objective, or use a search that does without (bfgs)"
            )
        groups, ordered = _ordered(c)
        n = len(trees)
        # Column 0 of a group is along θ_0 itself, column k along θ_k - θ_0: fine-tunes of one base
        # are alike, and their differences would drown in the rounding of the whole.
        chosen = range(1 if on_simplex and n > 1 else 0, n)
        columns = [(group, k) for group in range(len(groups)) for k in chosen]

        def products(residual_fn, mixed, batch, key):
            found = [
                _column(
                    (residual_fn, groups),
                    mixed,
                    (trees[k], trees[0], np.float32(k > 0)),
                    np.eye(len(groups), dtype=np.float32)[group],
                    batch,
                    jax.random.clone(key),
                )
                for group, k in columns
            ]
            return _gram([found[0][0], *(column for _, column in found)])

        gram = np.asarray(mean(products, c, batch, residual_fn), np.float64)
        # J = columns @ back: all n columns of a group share the one along θ_0.
        back = np.zeros((len(columns), len(groups) * n))
        for row, (group, k) in enumerate(columns):
            back[row, group * n + (np.arange(n) if k == 0 else k)] = 1
        return gram[0, 0], 2 * back.T @ gram[1:, 0], 2 * back.T @ gram[1:, 1:] @ back

    return Objective(
        lambda c, batch=None: mean(_loss, c, batch), value_and_grad, gauss_newton, len(batches)
    )


# Compiled once per loss function, so that objectives on other batches of the same shapes share the
# work.
@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn: LossFn, mixed: Params, batch: PyTree, key: jax.Array) -> jax.Array:
    return loss_fn(mixed, batch, key)[0]


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_grad(loss_fn: LossFn, mixed: Params, batch: PyTree, key: jax.Array):
    return jax.value_and_grad(lambda mixed: loss_fn(mixed, batch, key)[0])(mixed)


@functools.partial(jax.jit, static_argnums=0)
def _column(static, mixed: Params, along: tuple, group: jax.Array, batch: PyTree, key: jax.Array):
    """(r, (∂r/∂θ) (θ_k - less θ_0)), of the direction only what belongs to the group.

    `jax.jvp` and not `jax.linearize`: nothing of the forward pass is kept for other directions, and
    on CPU doing it again is faster than reading it back.

    Args:
      static: residual_fn and the regexes of the groups.
      along: θ_k, θ_0, and `less`, a number. group: [G], one at the group, zero elsewhere.
    """
    residual_fn, groups = static
    tree, origin, less = along
    flat, tangent = tree_lib.flatten(mixed), {}
    rules = [(g, i) for i, g in enumerate(groups)]
    group_of = tree_lib.match(rules, list(flat), what="coefficients")
    origin = tree_lib.flatten(origin)
    for path, leaf in tree_lib.flatten(tree).items():
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        step = jnp.asarray(leaf, wide) - less * jnp.asarray(origin[path], wide)
        tangent[path] = (group[group_of[path]] * step).astype(flat[path].dtype)

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
