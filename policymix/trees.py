"""What is true of any parameter tree: paths, regex selection, linear arithmetic, readable
differences.

A tree is a nested dict of arrays. A path is its keys joined by "/". Arithmetic accumulates in
float32 (in float64 for float64 inputs if jax_enable_x64 is on) and rounds once to the output dtype.
"""

import difflib
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from policymix.structs import PyTree

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def flatten(tree: PyTree) -> dict[str, Any]:
    """Nested dict → {"a/b/c": leaf}, in the order of the tree."""
    flat = {}

    def visit(node, prefix):
        if isinstance(node, Mapping):
            for key, child in node.items():
                visit(child, (*prefix, str(key)))
        else:
            flat["/".join(prefix)] = node

    visit(tree, ())
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} → nested dict. ValueError where one path is a leaf and a branch at once."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *branches, name = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"{path!r} goes through a leaf: one of its branches is itself an array"
                )
        if name in node:
            raise ValueError(f"{path!r} occurs twice, or is both a leaf and a branch")
        node[name] = leaf
    return tree


def map_with_path(function, tree: PyTree, *rest: PyTree) -> PyTree:
    """Like `jax.tree.map`, but calls `function(path, leaf, *other_leaves)`."""
    others = [flatten(other) for other in rest]
    flat = flatten(tree)
    return unflatten(
        {path: function(path, leaf, *(o[path] for o in others)) for path, leaf in flat.items()}
    )


def match(
    rules: Sequence[tuple[str, _T]], paths: Sequence[str], *, what: str, default: Any = ...
) -> dict[str, _T]:
    """Gives each path the value of the first rule whose regex matches it whole (`re.fullmatch`).

    Args:
      rules: (regex, value) pairs; the first match wins, and every match is logged.
      what: what the values are, for the log and for errors ("coefficients", "freeze").
      default: value for paths that no rule matches; without one such a path is an error.

    Raises:
      ValueError: a path without a rule, or a rule that no path uses (misspelt, or behind a wider
        one).
    """
    try:
        compiled = [(re.compile(pattern), value) for pattern, value in rules]
    except re.error as error:
        raise ValueError(
            f"{what}: {error.pattern!r} is not a regular expression: {error}"
        ) from error
    values, used = {}, set()
    for path in paths:
        for index, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(path):
                _log.info("%s: %s by %r", what, path, pattern.pattern)
                values[path] = value
                used.add(index)
                break
        else:
            if default is ...:
                raise ValueError(
                    f"{what}: no rule matches {path!r}; the rules are {[p for p, _ in rules]}. "
                    "Add one, or end with '.*' for all the rest"
                )
            values[path] = default
    for index, (pattern, _) in enumerate(compiled):
        if index in used:
            continue
        if any(pattern.fullmatch(path) for path in paths):
            raise ValueError(
                f"{what}: earlier rules take every parameter that {pattern.pattern!r} matches, so "
                "it is never used; put the narrower rule first (jax.jit sorts the keys of a dict)"
            )
        near = difflib.get_close_matches(pattern.pattern, paths, n=1, cutoff=0.0)
        hint = f"; the nearest path is {near[0]!r}" if near else ""
        raise ValueError(f"{what}: the rule {pattern.pattern!r} matches no parameter{hint}")
    return values


def combine(coefficients: Any, trees: Sequence[PyTree]) -> PyTree:
    """The linear combination Σ_k c_k θ_k, differentiable in c.

    Args:
      coefficients: [n] array, or {path regex: [n] array} with one entry per group of parameters.
      trees: n trees of equal structure and shapes.

    Returns:
      A tree in the widest dtype among the inputs, leaf by leaf; sums are taken in float32 or wider.

    Raises:
      ValueError: structures differ, or the number of coefficients is not n.
    """
    for index, tree in enumerate(trees[1:], 1):
        check_same(trees[0], tree, names=("trees[0]", f"trees[{index}]"))
    flats = [flatten(tree) for tree in trees]
    by_path = coefficients_by_path(coefficients, list(flats[0]), len(trees))
    return unflatten(
        {path: combine_leaf(c, [flat[path] for flat in flats]) for path, c in by_path.items()}
    )


def combine_leaf(coefficients: Any, leaves: Sequence[Any], dtype: Any = None) -> jax.Array:
    """Σ_k c_k leaf_k of arrays, summed in float32 or wider; `dtype` is the widest by default."""
    chex.assert_equal_shape(leaves)
    dtype = dtype or functools.reduce(jnp.promote_types, [leaf.dtype for leaf in leaves])
    wide = jnp.promote_types(dtype, jnp.float32)
    total = sum(
        jnp.asarray(c, wide) * jnp.asarray(leaf, wide)
        for c, leaf in zip(coefficients, leaves, strict=True)
    )
    return total.astype(dtype)


def coefficients_by_path(coefficients: Any, paths: Sequence[str], n: int) -> dict[str, Any]:
    """[n] array or {regex: [n] array} → {path: [n] array}. ValueError where a length is not n."""
    groups = coefficients if isinstance(coefficients, Mapping) else {".*": coefficients}
    for pattern, values in groups.items():
        if np.shape(values) != (n,):
            where = "" if pattern == ".*" else f" for {pattern!r}"
            raise ValueError(
                f"{n} checkpoints need {n} coefficients{where}, got shape {np.shape(values)}: "
                f"{values}"
            )
    return match(list(groups.items()), paths, what="coefficients")


def interpolate(
    base: PyTree, finetuned: PyTree, merge_ratio: float | Mapping[str, float]
) -> PyTree:
    """merge_ratio * base + (1 - merge_ratio) * finetuned, in the dtype of the base (RETAIN).

    `merge_ratio` is the weight of the *base*: 0 gives the fine-tuned tree, 1 the base. A dict {path
    regex: ratio} sets it per group of parameters.
    """
    check_same(base, finetuned, names=("base", "finetuned"))
    flats = flatten(base), flatten(finetuned)
    rules = list(merge_ratio.items()) if isinstance(merge_ratio, Mapping) else [(".*", merge_ratio)]
    ratios = match(rules, list(flats[0]), what="merge_ratio")
    return unflatten(
        {
            p: combine_leaf((r, 1.0 - r), (flats[0][p], flats[1][p]), flats[0][p].dtype)
            for p, r in ratios.items()
        }
    )


def task_vector(base: PyTree, finetuned: PyTree) -> PyTree:
    """finetuned - base, in float32 or wider (Ilharco et al. 2023, arXiv:2212.04089)."""
    check_same(base, finetuned, names=("base", "finetuned"))

    def subtract(tuned, start):
        wide = jnp.promote_types(jnp.promote_types(tuned.dtype, start.dtype), jnp.float32)
        return jnp.asarray(tuned, wide) - jnp.asarray(start, wide)

    return jax.tree.map(subtract, finetuned, base)


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """⟨a, b⟩ over all leaves, summed in float32 or wider whatever the trees are stored in."""
    return sum(jax.tree.leaves(jax.tree.map(dot_leaf, a, b)))


def dot_leaf(a: Any, b: Any) -> jax.Array:
    """⟨a, b⟩ of two arrays, in float32 or wider."""
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    return jnp.vdot(jnp.asarray(a, wide), jnp.asarray(b, wide))


def num_params(tree: PyTree) -> int:
    """Number of elements in all leaves; whatever has a shape is one, such as `nf4.Nf4`."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves, which may be shapes alone."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with floating-point leaves in `dtype`; others are left alone."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def difference(a: PyTree, b: PyTree, names: tuple[str, str] = ("a", "b")) -> str | None:
    """How structure and shapes of two trees differ, in words; None if they do not.

    Only `.shape` of the leaves is looked at: arrays and `jax.ShapeDtypeStruct` serve alike.
    """
    flats = flatten(a), flatten(b)
    clauses = []
    for mine, other, name in ((0, 1, names[0]), (1, 0, names[1])):
        only = sorted(flats[mine].keys() - flats[other].keys())
        if only:
            clauses.append(
                f"only in {name}: " + _few([f"{p} {_shape(flats[mine][p])}" for p in only])
            )
    unequal = [
        f"{path}: {_shape(flats[0][path])} in {names[0]}, {_shape(flats[1][path])} in {names[1]}"
        for path in sorted(flats[0].keys() & flats[1].keys())
        if _shape(flats[0][path]) != _shape(flats[1][path])
    ]
    if unequal:
        clauses.append(_few(unequal))
    return "; ".join(clauses) or None


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape)


def _few(words: Sequence[str], limit: int = 4) -> str:
    return ", ".join(words[:limit]) + (
        f" and {len(words) - limit} more" if len(words) > limit else ""
    )


def check_same(a: PyTree, b: PyTree, names: tuple[str, str] = ("a", "b")) -> None:
    """ValueError with the keys and both shapes if the trees differ in structure or shapes."""
    if differs := difference(a, b, names):
        raise ValueError(f"{names[0]} and {names[1]} are not the same architecture: {differs}")


class Filled(NamedTuple):
    """A filled tree, and the paths that were loaded, left as they were initialised, and ignored."""

    tree: PyTree
    loaded: list[str]
    fresh: list[str]
    ignored: list[str]


def fill(initial: PyTree, loaded: PyTree, *, may_miss: Sequence[str] = ()) -> Filled:
    """Replaces the leaves of `initial` by those of `loaded`, which keep their dtype.

    Args:
      may_miss: regexes of paths that may keep their initial value, such as ".*lora.*".

    Raises:
      ValueError: a path is missing that may not be, or a shape differs.
    """
    new, old = flatten(initial), flatten(loaded)
    fresh = [path for path in new if path not in old]
    refused = [p for p in fresh if not any(re.fullmatch(pattern, p) for pattern in may_miss)]
    if refused:
        raise ValueError(
            f"the checkpoint lacks {_few(refused)}, which the model needs: check config.model, or "
            "name in config.train.init_missing what may keep its fresh values"
        )
    common = {path: leaf for path, leaf in old.items() if path in new}
    check_same({path: new[path] for path in common}, common, names=("the model", "the checkpoint"))
    tree = {path: common.get(path, leaf) for path, leaf in new.items()}
    return Filled(unflatten(tree), list(common), fresh, sorted(old.keys() - new.keys()))
