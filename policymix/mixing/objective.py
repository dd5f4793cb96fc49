"""The loss of a mix as a function of its coefficients.

With θ(c) = Σ_k c_k θ_k, one backward pass gives every derivative: ∂L/∂c_k = ⟨∂L/∂θ, θ_k⟩.
`jax.grad` through `trees.combine` is the same number; the dot products are taken leaf by leaf in
float32, so they stay exact for bfloat16 trees, follow the sharding of the parameters, and may be
kept apart by groups of paths at no cost. n checkpoints.
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


class Objective(NamedTuple):
    """Pure functions of the coefficients.

    Attributes:
      value: (c, batch=None) → mean loss over all batches, or the loss of one batch by number.
      value_and_grad: (c, batch=None) → (loss, ∂loss/∂c with the structure of c).
      num_batches: how many batches there are; searches step through them.
    """

    value: Callable[..., jax.Array]
    value_and_grad: Callable[..., tuple[jax.Array, Coefficients]]
    num_batches: int


def in_memory(
    loss_fn: LossFn, trees: Sequence[Params], batches: Sequence[PyTree], key: jax.Array
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

    def mean(function, c, batch):
        """The mean of function(θ(c), batch, key) over the chosen batches; the mix is made once."""
        mixed = _combine(*_ordered(c), trees)
        chosen = range(len(batches)) if batch is None else [batch]

        def evaluate(i):  # a clone: that the key is used again is meant
            return function(loss_fn, mixed, batches[i], jax.random.clone(keys[i]))

        total = evaluate(chosen[0])
        for i in chosen[1:]:
            total = jax.tree.map(jnp.add, total, evaluate(i))
        return jax.tree.map(lambda x: x / len(chosen), total)

    def value_and_grad(c, batch=None):
        value, grads = mean(_loss_and_grad, c, batch)
        groups, _ = _ordered(c)
        dots = _project(groups, grads, trees)
        return value, dict(zip(groups, dots, strict=True)) if isinstance(c, Mapping) else dots[0]

    return Objective(lambda c, batch=None: mean(_loss, c, batch), value_and_grad, len(batches))


# Compiled once per loss function, so that objectives on other batches of the same shapes share the
# work.
@functools.partial(jax.jit, static_argnums=0)
def _loss(loss_fn: LossFn, mixed: Params, batch: PyTree, key: jax.Array) -> jax.Array:
    return loss_fn(mixed, batch, key)[0]


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_grad(loss_fn: LossFn, mixed: Params, batch: PyTree, key: jax.Array):
    return jax.value_and_grad(lambda mixed: loss_fn(mixed, batch, key)[0])(mixed)


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
