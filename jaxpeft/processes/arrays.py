"""Global arrays of several processes: each process provides the rows of its own devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft.core import paths
from jaxpeft.core.paths import Tree
from jaxpeft.errors import ConfigError
from jaxpeft.sharding.mesh import batch_shardings
from jaxpeft.sharding.sizes import ROWS

RowNumbers = tuple[int, ...]


def check_processes(mesh: Mesh) -> None:
    """Reject a mesh without the devices of some process, which would be idle.

    Raises:
        ConfigError: names the processes.
    """
    used = {device.process_index for device in mesh.devices.flat}
    idle = sorted(set(range(jax.process_count())) - used)
    if idle:
        raise ConfigError(
            f"mesh: uses {mesh.devices.size} devices of process"
            f" {', '.join(map(str, sorted(used)))}, but none of process"
            f" {', '.join(map(str, idle))}; set mesh.data to -1 for all {jax.device_count()}"
            " devices, or start fewer processes"
        )


def own_rows(mesh: Mesh, rows: int) -> RowNumbers | None:
    """Return the rows of a batch, or of each micro-batch, that this process provides.

    Args:
        mesh: device mesh.
        rows: total number of rows.

    Returns:
        Ascending row indices; None for all rows, in a single-process run.
    """
    return None if jax.process_count() == 1 else _rows_here(mesh, rows)


def put_batch(
    mesh: Mesh, batch: Mapping[str, np.ndarray[Any, Any]], axis: int = 0
) -> dict[str, jax.Array]:
    """Put a batch on the devices.

    Args:
        mesh: device mesh.
        batch: arrays with an axis of rows, only those of this process's devices.
        axis: axis of the rows; 1 if there is a leading micro-batch axis.
    """
    where = batch_shardings(mesh, batch, axis)
    if jax.process_count() > 1:
        return _join(batch, where, axis)
    return jax.device_put(dict(batch), where)


def _join(
    batch: Mapping[str, np.ndarray[Any, Any]], shardings: Mapping[str, NamedSharding], axis: int
) -> dict[str, jax.Array]:
    """Make the global arrays of a batch from this process's rows.

    Args:
        batch: arrays with the rows of `own_rows`; complete along the other axes.
        shardings: sharding of each array.
        axis: axis of the rows.
    """
    arrays: dict[str, jax.Array] = {}
    for name, array in batch.items():
        mesh = shardings[name].mesh
        parts = math.prod(mesh.shape[of] for of in _row_axes(mesh))
        rows = array.shape[axis] * parts // len(_rows_here(mesh, parts))
        shape = (*array.shape[:axis], rows, *array.shape[axis + 1 :])
        arrays[name] = jax.make_array_from_process_local_data(shardings[name], array, shape)
    return arrays


def put(tree: Any, where: Any) -> Any:
    """Put a tree on the devices of a mesh, possibly of several processes.

    Args:
        tree: tree of arrays; process-local arrays are equal in all processes.
        where: sharding of each leaf.
    """
    return (
        jax.device_put(tree, where) if jax.process_count() == 1 else jax.tree.map(_put, tree, where)
    )


def replicate(mesh: Mesh | None, array: Any) -> jax.Array:
    """Put an array on every device of a mesh, or on the default device.

    Args:
        mesh: device mesh, or None.
        array: a NumPy array, or one of this process's devices, equal in all processes.
    """
    if mesh is None:
        return jnp.asarray(array)
    return put(array, NamedSharding(mesh, PartitionSpec()))


def _put(leaf: Any, where: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        same = (
            leaf.sharding.is_equivalent_to(where, leaf.ndim)
            and leaf.sharding.memory_kind == where.memory_kind
        )
        return leaf if same else jax.jit(lambda x: x, out_shardings=where)(leaf)
    # via the host: with one device per process, jax 0.10's device_put makes unreadable arrays
    # (it counts shards twice)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def fetch_to_host(params: Tree, *, keep: bool) -> Tree:
    """Gather a tree's leaves to this process's host memory; a no-op in a single-process run.

    Leaves are gathered one by one, so that no device holds the complete tree. All processes must
    call it.

    Args:
        params: the tree, equal in every process.
        keep: whether this process keeps the result.
    """
    if jax.process_count() == 1:
        return params
    return paths.map_with_path(lambda _, leaf: _fetch(leaf, keep=keep), params)


def _fetch(leaf: Any, *, keep: bool) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if not leaf.is_fully_replicated:
        mesh: Any = leaf.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
        replicated = NamedSharding(mesh, PartitionSpec())
        leaf = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=replicated)(leaf))
    return np.asarray(leaf.addressable_data(0)) if keep else None


def _rows_here(mesh: Any, rows: int) -> RowNumbers:
    sharding = NamedSharding(mesh, PartitionSpec(_row_axes(mesh)))
    spans = {
        span[0].indices(rows)[:2]
        for span in sharding.addressable_devices_indices_map((rows,)).values()
        if span
    }
    return tuple(row for start, stop in sorted(spans) for row in range(start, stop))


def _row_axes(mesh: Any) -> tuple[str, ...]:
    return tuple(axis for axis in ROWS if axis in mesh.shape)
