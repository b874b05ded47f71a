"""The rows of a batch among several processes: each makes those of its own devices, and all
together are one array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft.core import paths
from jaxpeft.core.paths import Tree
from jaxpeft.errors import ConfigError
from jaxpeft.sharding.mesh import batch_shardings
from jaxpeft.sharding.sizes import ROWS

RowNumbers = tuple[int, ...]


def check_processes(mesh: Mesh) -> None:
    """Refuse a mesh that leaves out the devices of a process, which would then wait for nothing.

    Raises:
        ConfigError: naming the processes.
    """
    used = {device.process_index for device in mesh.devices.flat}
    idle = sorted(set(range(jax.process_count())) - used)
    if idle:
        raise ConfigError(
            f"mesh: its {mesh.devices.size} devices are those of process"
            f" {', '.join(map(str, sorted(used)))}, and process {', '.join(map(str, idle))} has"
            f" none; set mesh.data to -1 for all {jax.device_count()} devices, or start fewer"
            " processes"
        )


def own_rows(mesh: Mesh, rows: int) -> RowNumbers | None:
    """Return the rows that this process makes, of a batch or of each micro-batch.

    Args:
        mesh: the devices.
        rows: how many there are in all.

    Returns:
        Their numbers, ascending; None for all, which one process makes.
    """
    return None if jax.process_count() == 1 else _rows_here(mesh, rows)


def put_batch(
    mesh: Mesh, batch: Mapping[str, np.ndarray[Any, Any]], axis: int = 0
) -> dict[str, jax.Array]:
    """Put a batch onto the devices.

    Args:
        mesh: the devices.
        batch: arrays with an axis of rows; of several processes each has the rows of its own
            devices.
        axis: which axis that is: 1 behind an axis of micro-batches.
    """
    where = batch_shardings(mesh, batch, axis)
    if jax.process_count() > 1:
        return _join(batch, where, axis)
    return jax.device_put(dict(batch), where)


def _join(
    batch: Mapping[str, np.ndarray[Any, Any]], shardings: Mapping[str, NamedSharding], axis: int
) -> dict[str, jax.Array]:
    """Make the arrays of a batch of which each process has its own rows.

    Args:
        batch: arrays with the rows of `own_rows` along an axis, all of the others'.
        shardings: of each array.
        axis: of the rows.
    """
    made: dict[str, jax.Array] = {}
    for name, array in batch.items():
        mesh = shardings[name].mesh
        parts = math.prod(mesh.shape[of] for of in _row_axes(mesh))
        rows = array.shape[axis] * parts // len(_rows_here(mesh, parts))
        shape = (*array.shape[:axis], rows, *array.shape[axis + 1 :])
        made[name] = jax.make_array_from_process_local_data(shardings[name], array, shape)
    return made


def put(tree: Any, where: Any) -> Any:
    """Put a tree where it lies on a mesh, whose devices may be those of several processes.

    Args:
        tree: of arrays; those of one process alone are the same in each.
        where: the sharding of each leaf.
    """
    return (
        jax.device_put(tree, where) if jax.process_count() == 1 else jax.tree.map(_put, tree, where)
    )


def _put(leaf: Any, where: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        same = (
            leaf.sharding.is_equivalent_to(where, leaf.ndim)
            and leaf.sharding.memory_kind == where.memory_kind
        )
        return leaf if same else jax.jit(lambda x: x, out_shardings=where)(leaf)
    # by way of the host: jax 0.10's device_put makes arrays of a process with one device that
    # cannot be read (shards counted twice)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def fetch_to_host(params: Tree, *, keep: bool) -> Tree:
    """Return a tree whose leaves are whole in this process's memory; of one process they are
    anyway, and stay where they are.

    One leaf after the other is gathered, so that no device holds the whole tree.

    Args:
        params: the tree, the same in every process.
        keep: whether this process wants it; all must ask.
    """
    if jax.process_count() == 1:
        return params
    return paths.map_with_path(lambda _, leaf: _fetch(leaf, keep=keep), params)


def _fetch(leaf: Any, *, keep: bool) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if not leaf.is_fully_replicated:
        mesh: Any = leaf.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
        whole = NamedSharding(mesh, PartitionSpec())
        leaf = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=whole)(leaf))
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
