"""Devices, and which of them holds what.

The mesh has the axes (data, fsdp). Batches are split over both, parameters over fsdp only. On one
device all of this is the identity. What is not needed all the time may lie in the memory of the
host that a device belongs to, from where a compiled step fetches it.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from policymix import trees
from policymix.structs import PyTree

AXES = ("data", "fsdp")
HOST = "pinned_host"  # the kind of memory, as jax calls it
Rules = Sequence[tuple[str, int | None]]  # (regex of paths, the axis to split; None: not at all)
_FIELD = "config.train.shard"
_BY_SIZE = "by size"  # the value of parameters that no rule matches
_MIN_BYTES = 4 * 2**20  # smaller arrays are cheaper to keep whole on every device


def mesh(fsdp_devices: int = 1, devices: Any = None) -> Mesh:
    """All devices as (n / fsdp_devices, fsdp_devices). ValueError if that does not divide."""
    devices = jax.devices() if devices is None else devices
    if fsdp_devices < 1 or len(devices) % fsdp_devices:
        raise ValueError(
            f"fsdp_devices is {fsdp_devices}, which does not divide the {len(devices)} devices"
        )
    return Mesh(np.asarray(devices).reshape(-1, fsdp_devices), AXES)


def parse_rules(texts: Sequence[str] | str, field: str = _FIELD) -> Rules:
    """("PATH REGEX=AXIS", "PATH REGEX=none") → rules of `parameters`; else ValueError."""
    rules = []
    for text in (texts,) if isinstance(texts, str) else texts:
        pattern, _, axis = str(text).rpartition("=")
        if not pattern or not re.fullmatch(r"-?\d+|none", axis.strip().lower()):
            raise ValueError(
                f"{field}: {text!r} is no rule; expected 'PATH REGEX=AXIS' with the number of the "
                "axis to split, such as '.*/mlp/linear=1', or 'PATH REGEX=none'"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{field}: {pattern!r} is not a regular expression: {error}"
            ) from error
        rules.append((pattern, None if axis.strip().lower() == "none" else int(axis)))
    return tuple(rules)


def parameters(mesh: Mesh, shapes: PyTree, rules: Rules = ()) -> PyTree:
    """OpenPI's rule: an array of ≥ 4 MiB and rank ≥ 2 is split along its largest axis that divides.

    Args:
      shapes: a tree of anything with shape and dtype: parameters, optimizer states, whole train
        states.
      rules: (regex, axis) of the parameters that are split otherwise; the first match wins. What
        belongs to such a parameter, at a path that ends in its own, is split alike: its average and
        its moments. An array of another shape, as 8 bits and 4 bits have, only where that axis of
        it divides too.

    Returns:
      The same tree of `NamedSharding`.

    Raises:
      ValueError: a rule that no parameter uses, or an axis that is not there or does not divide.
    """
    axes = _axes(mesh, getattr(shapes, "params", shapes), rules) if rules else {}

    def place(path, leaf):
        shape, axis = tuple(leaf.shape), _BY_SIZE
        if owner := _owner(path, axes):
            of, axis = axes[owner]
            if axis not in (None, _BY_SIZE) and shape != of:
                axis = axis if _divides(mesh, shape, axis) else _BY_SIZE
        if axis == _BY_SIZE:
            axis = _largest(mesh, leaf)
        spec: list[str | None] = [None] * len(shape)
        if axis is not None and mesh.shape["fsdp"] > 1:
            spec[axis] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, shapes)


def _largest(mesh: Mesh, leaf: Any) -> int | None:
    """The axis that a large array is split along, if any divides."""
    shape, size = leaf.shape, mesh.shape["fsdp"]
    big = math.prod(shape) * leaf.dtype.itemsize >= _MIN_BYTES
    if size == 1 or len(shape) < 2 or not big:
        return None
    largest_first = sorted(range(len(shape)), key=lambda i: -shape[i])
    return next((i for i in largest_first if shape[i] % size == 0), None)


def _axes(
    mesh: Mesh, params: PyTree, rules: Rules
) -> dict[str, tuple[tuple[int, ...], int | str | None]]:
    """{path: (shape, the axis that a rule gives, None, or _BY_SIZE)} of all parameters."""
    flat = trees.flatten(params)
    found = trees.match(rules, list(flat), what=_FIELD, default=_BY_SIZE)
    axes: dict[str, tuple[tuple[int, ...], int | str | None]] = {}
    for path, axis in found.items():
        shape = tuple(flat[path].shape)
        if isinstance(axis, int) and not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"{_FIELD}: {path} is {shape} and has no axis {axis}; give one of 0 to "
                f"{len(shape) - 1}, or 'none'"
            )
        if isinstance(axis, int) and not _divides(mesh, shape, axis):
            raise ValueError(
                f"{_FIELD}: axis {axis} of {path} {shape} is {shape[axis]} long, which "
                f"config.train.fsdp_devices {mesh.shape['fsdp']} does not divide; give another "
                "axis, or 'none'"
            )
        axes[path] = shape, axis
    return axes


def _divides(mesh: Mesh, shape: tuple[int, ...], axis: int) -> bool:
    return -len(shape) <= axis < len(shape) and shape[axis] % mesh.shape["fsdp"] == 0


def _owner(path: tuple[Any, ...], params: Any) -> str | None:
    """The parameter that a leaf belongs to: the longest path that the keys of its own end in."""
    keys = [str(key.key) for key in path if isinstance(key, DictKey)]
    ends = ("/".join(keys[start:]) for start in range(len(keys)))
    return next((end for end in ends if end in params), None)


def batch(mesh: Mesh) -> NamedSharding:
    """Examples split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def on_host(places: PyTree) -> PyTree:
    """The same places in the memory of the devices' hosts.

    A compiled step that is given arrays from there fetches them by `fetched`, and puts them back if
    its out_shardings say so; arithmetic on what lies in both memories is an error of jax.
    """
    return jax.tree.map(lambda place: place.with_memory_kind(HOST), places)


def fetched(tree: PyTree, places: PyTree) -> PyTree:
    """Within a compiled function: arrays at `places`, of whatever memory, in the devices' own."""
    return jax.tree.map(lambda x, place: jax.device_put(x, _on_device(place)), tree, places)


def offloaded(
    optimizer: optax.GradientTransformation, places: PyTree
) -> optax.GradientTransformation:
    """The optimizer, within a compiled step, on a state that lies `on_host(places)` between steps.

    It is fetched when the gradients are there, so when the activations are gone. The step's
    out_shardings put it back.
    """

    def update(grads, state, params=None):
        grads, state = jax.lax.optimization_barrier((grads, state))
        return optimizer.update(grads, fetched(state, places), params)

    return optax.GradientTransformation(optimizer.init, update)


def _on_device(place: NamedSharding) -> NamedSharding:
    device = place.mesh.devices.flat[0]
    return place.with_memory_kind(device.default_memory().kind)


def has_host_memory(mesh: Mesh) -> bool:
    """Whether a compiled step on these devices can take arrays from the host's memory and put them
    back; it is tried on one of them.
    """
    return _has_host_memory(mesh.local_devices[0])


@functools.cache
def _has_host_memory(device: jax.Device) -> bool:
    if all(memory.kind != HOST for memory in device.addressable_memories()):
        return False
    place = NamedSharding(mesh(1, [device]), PartitionSpec())
    try:
        numbers = jax.device_put(jnp.zeros((8,)), on_host(place))
        step = jax.jit(lambda x: fetched(x, place) + 1, out_shardings=on_host(place))
        return bool(jax.device_get(step(numbers)).all())
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError):  # what backends raise
        return False


def put(tree: PyTree, place: NamedSharding) -> PyTree:
    """Host arrays on their devices. Where there are several processes, each brings its own rows."""
    if jax.process_count() == 1:
        return jax.device_put(tree, place)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), tree)


def put_whole(tree: PyTree, places: PyTree) -> PyTree:
    """Host arrays that every process has whole, on their devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def put(array, place):
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    return jax.tree.map(put, tree, places)
