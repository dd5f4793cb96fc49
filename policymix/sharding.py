"""Devices, and which of them holds what.

The mesh has the axes (data, fsdp). Batches are split over both, parameters over fsdp only. On one
device all of this is the identity.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from policymix.structs import PyTree

AXES = ("data", "fsdp")
_MIN_BYTES = 4 * 2**20  # smaller arrays are cheaper to keep whole on every device


def mesh(fsdp_devices: int = 1, devices: Any = None) -> Mesh:
    """All devices as (n / fsdp_devices, fsdp_devices). ValueError if that does not divide."""
    devices = jax.devices() if devices is None else devices
    if fsdp_devices < 1 or len(devices) % fsdp_devices:
        raise ValueError(
            f"fsdp_devices is {fsdp_devices}, which does not divide the {len(devices)} devices"
        )
    return Mesh(np.asarray(devices).reshape(-1, fsdp_devices), AXES)


def parameters(mesh: Mesh, shapes: PyTree) -> PyTree:
    """OpenPI's rule: an array of ≥ 4 MiB and rank ≥ 2 is split along its largest axis that divides.

    Args:
      shapes: a tree of anything with shape and dtype: parameters, optimizer states, whole train
        states.

    Returns:
      The same tree of `NamedSharding`.
    """
    size = mesh.shape["fsdp"]

    def rule(leaf):
        spec = [None] * len(leaf.shape)
        big = math.prod(leaf.shape) * leaf.dtype.itemsize >= _MIN_BYTES
        if size > 1 and len(leaf.shape) >= 2 and big:
            for axis in sorted(range(len(leaf.shape)), key=lambda i: -leaf.shape[i]):
                if leaf.shape[axis] % size == 0:
                    spec[axis] = "fsdp"
                    break
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(rule, shapes)


def batch(mesh: Mesh) -> NamedSharding:
    """Examples split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: PyTree, place: NamedSharding) -> PyTree:
    """Host arrays on their devices. Where there are several processes, each brings its own rows."""
    if jax.process_count() == 1:
        return jax.device_put(tree, place)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), tree)
