"""What a training step takes of each device's memory, told before anything is compiled.

What lasts from step to step is counted exactly. What the step itself needs is read off its jaxpr:
every intermediate lives from where it is made to where it is last used, elementwise arithmetic is
fused into what it feeds, or done in place where it can be. Of small π0s on a CPU, XLA's own plan
for gradients and activations was as large as that, to a third larger.
"""

import collections
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
from jax.extend import core

from policymix import sharding, trees
from policymix.structs import LossFn, PyTree

_BATCHES = 3  # the present one, and those that `loader.placed` has ready
_NAMES = (
    "abs add add_any and broadcast_in_dim ceil clamp concatenate convert_element_type copy cos "
    "div dynamic_slice dynamic_update_slice eq erf exp expand_dims floor gather ge gt iota "
    "integer_pow is_finite le log logistic lt max min mul ne neg not or pad pow reduce_precision "
    "reshape rev rsqrt scatter-add select_n shift_left shift_right_logical sign sin slice split "
    "sqrt square squeeze stop_gradient sub tanh transpose xor"
)
_FUSED = frozenset(_NAMES.split())  # made where they are used, if that is one place
_FUSING = _FUSED | {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax"}
_LOOPS = ("scan", "while")
_LEFT_OUT = (
    "activations are an estimate; the scratch space of XLA's matrix products, copies that it "
    "makes, and the program itself come on top"
)


def parts(
    state: Any,
    loss_fn: LossFn,
    batch: PyTree,
    key: Any,
    *,
    frozen: Collection[str],
    mesh: jax.sharding.Mesh,
    places: Any,
    accumulate: int = 1,
) -> dict[str, int]:
    """Bytes on each device, of every part of a training step.

    Args:
      state: a TrainState of shapes; `places` are its shardings. What lies with the host is called
        "optimizer, on the host".
      batch: shapes of a whole batch, over all devices and all `accumulate` parts.
      frozen: paths of the parameters that no gradient is computed of.
    """
    flat, where = trees.flatten(state.params), trees.flatten(places.params)
    trained = {path: leaf for path, leaf in flat.items() if path not in frozen}
    fixed = {path: leaf for path, leaf in flat.items() if path in frozen}
    own = _bytes(trained, {path: where[path] for path in trained})
    bytes_of = {
        "parameters, trained": own,
        "parameters, frozen": _bytes(fixed, {path: where[path] for path in fixed}),
        "average": _bytes(state.ema_params, places.ema_params),
        "optimizer": _bytes(state.opt_state, places.opt_state),
        "optimizer, on the host": _bytes(state.opt_state, places.opt_state, host=True),
        "batches": _BATCHES * trees.nbytes(_rows(batch, mesh.size)),
        # The sum of earlier parts of a batch, besides those of the present one.
        "gradients": own * (2 if accumulate > 1 else 1),
    }
    at_work = activations(loss_fn, trained, fixed, _rows(batch, mesh.size * accumulate), key)
    # The optimizer's states are fetched when the activations are gone.
    bytes_of["activations"] = max(at_work, bytes_of["optimizer, on the host"])
    return bytes_of


def activations(
    loss_fn: LossFn, trained: Mapping[str, Any], fixed: Mapping[str, Any], batch: PyTree, key: Any
) -> int:
    """Bytes of what a loss and its gradients need at once besides their arguments and results.

    Args:
      trained, fixed: {path: shape} of all parameters. batch: shapes of what one device sees.
    """

    def step(trained, fixed, batch, key):
        def value(trained):
            return loss_fn(trees.unflatten({**fixed, **trained}), batch, key)

        return jax.value_and_grad(value, has_aux=True)(trained)

    return _peak(jax.make_jaxpr(step)(dict(trained), dict(fixed), batch, key).jaxpr)


def table(parts: Mapping[str, int]) -> str:
    """The parts that there are and their sum, one a line, for reading."""
    lines = [(name, size) for name, size in parts.items() if size]
    on_device = sum(size for name, size in lines if not name.endswith("on the host"))
    lines.append(("in all, on each device", on_device))
    width = max(len(name) for name, _ in lines)
    unit, name = (1e9, "GB") if on_device >= 1e10 else (1e6, "MB")
    rows = [f"  {label:<{width}}  {size / unit:>10,.1f} {name}" for label, size in lines]
    return "\n".join(["memory, as predicted:", *rows, f"  ({_LEFT_OUT})"])


def _rows(batch: PyTree, count: int) -> PyTree:
    """The shapes of a batch of which only one in `count` rows is there."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((math.ceil(x.shape[0] / count), *x.shape[1:]), x.dtype),
        batch,
    )


def _bytes(tree: PyTree, places: PyTree, *, host: bool = False) -> int:
    """Of the pieces that one device holds, or that its host holds for it."""

    def size(leaf, place):
        if (place.memory_kind == sharding.HOST) != host:
            return 0
        return math.prod(place.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, places)))


def _peak(jaxpr: core.Jaxpr) -> int:
    """The most bytes that are alive at once, of what is neither argument nor result."""
    uses, last = collections.defaultdict(list), {}
    for number, equation in enumerate(jaxpr.eqns):
        for var in _vars(equation.invars):
            uses[var].append(equation.primitive.name)
            last[var] = number
    results = _in_place(jaxpr, last)
    alive: dict[core.Var, int] = {}
    total = most = 0
    for number, equation in enumerate(jaxpr.eqns):
        inner = max((_peak(body) for body in _bodies(equation)), default=0)
        for var in _taken_over(equation, number, last, alive):
            total -= alive.pop(var)
        for var in equation.outvars:
            alive[var] = 0 if var in results or _fused(equation, uses[var]) else _size(var)
            total += alive[var]
        most = max(most, total + inner)
        for var in {*_vars(equation.invars), *equation.outvars}:
            if var in alive and last.get(var, -1) <= number:
                total -= alive.pop(var)
    return most


def _fused(equation: core.JaxprEqn, users: list[str]) -> bool:
    """Whether what an equation makes is never stored, for it is made where it is used."""
    name = equation.primitive.name
    return not users or (name in _FUSED and len(users) == 1 and users[0] in _FUSING)


def _in_place(jaxpr: core.Jaxpr, last: Mapping[core.Var, int]) -> set[core.Var]:
    """The results of a jaxpr, and what becomes them in their place: sums that are added to."""
    found = set(_vars(jaxpr.outvars))
    for number, equation in reversed(list(enumerate(jaxpr.eqns))):
        if equation.primitive.name not in _FUSED and equation.primitive.name not in _LOOPS:
            continue
        kinds = {_kind(var) for var in equation.outvars if var in found}
        found |= {v for v in _vars(equation.invars) if _kind(v) in kinds and last[v] == number}
    return found


def _taken_over(
    equation: core.JaxprEqn, number: int, last: Mapping[core.Var, int], alive: Collection[core.Var]
) -> list[core.Var]:
    """What an equation reads for the last time and may write its results over."""
    if equation.primitive.name not in _FUSED and equation.primitive.name not in _LOOPS:
        return []
    room = collections.Counter(_kind(var) for var in equation.outvars)
    found = []
    for var in dict.fromkeys(_vars(equation.invars)):
        if var in alive and last[var] == number and room[_kind(var)]:
            room[_kind(var)] -= 1
            found.append(var)
    return found


def _vars(atoms: Any) -> list[core.Var]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _kind(var: core.Var) -> tuple[Any, Any]:
    return var.aval.shape, var.aval.dtype


def _size(var: core.Var) -> int:
    return math.prod(var.aval.shape) * var.aval.dtype.itemsize


def _bodies(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Of loops, checkpoints and calls."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part
