"""The device mesh of a run, with five named axes, and shardings of batches."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft.errors import ConfigError
from jaxpeft.sharding.mesh_config import MeshConfig, batch_problems
from jaxpeft.sharding.sizes import (
    AXES,
    DATA,
    FSDP,
    ROWS,
    SEQUENCE,
    STRATEGIES,
    TENSOR,
    Heads,
    row_shards,
    sizes,
)

if TYPE_CHECKING:
    from jaxpeft.config.schema import Config

_log = logging.getLogger(__name__)


def make_mesh(
    config: Config, devices: Sequence[Any] | None = None, heads: Heads | None = None
) -> Mesh:
    """Make the mesh of a run, and check that its batches can be sharded on it.

    Args:
        config: a checked config.
        devices: devices of the mesh, possibly of an abstract topology; None for all JAX devices.
        heads: heads of the model (`heads_of`), which `tensor` divides; None if unknown.

    Raises:
        ConfigError: there are too few devices, or a batch cannot be sharded evenly.
    """
    mesh = create_device_mesh(config.mesh, devices, heads)
    problems = batch_problems(config, mesh.shape, f"{row_shards(mesh.shape)} devices")
    if problems:
        raise ConfigError(problems)
    return mesh


def create_device_mesh(
    options: MeshConfig, devices: Sequence[Any] | None = None, heads: Heads | None = None
) -> Mesh:
    """Make the mesh of a strategy, with five named axes; unused axes have size 1.

    Args:
        options: strategy and axis sizes.
        devices: devices of the mesh, possibly of an abstract topology; None for all JAX devices.
        heads: heads of the model (`heads_of`), which `tensor` divides; None if unknown.

    Raises:
        ConfigError: there are too few devices.
    """
    available = list(jax.devices() if devices is None else devices)
    groups = _groups(available)
    along = _sizes(options, available, len(groups), heads)
    count, chosen = math.prod(along.values()), options.strategy
    slices = _slices(options, len(groups), along[DATA])
    _check_slices(options, along, len(available), slices)
    mesh = Mesh(_arrange(options, along, available[:count], slices), AXES)
    if heads is not None and heads.keys % along[TENSOR]:
        _log.warning(
            "mesh.tensor: %d does not divide the %d key/value heads, so each device computes all of"
            " them",
            along[TENSOR],
            heads.keys,
        )
    if chosen is not None:
        shape = (
            " x ".join(f"{axis} {size}" for axis, size in along.items() if size > 1) or "one device"
        )
        _log.info("mesh for strategy %s: %s (%s)", chosen, shape, STRATEGIES[chosen].about)
    return mesh


def evaluation_rows(config: Config, mesh: Mesh) -> int:
    """Return `evaluation.batch_size`, rounded up to a multiple of the devices."""
    over = row_shards(mesh.shape)
    return -(-config.evaluation.batch_size // over) * over


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """Return the number of heads in a model's `config.json`, or None."""
    queries = next(
        (
            config[name]
            for name in ("num_attention_heads", "n_heads")
            if isinstance(config.get(name), int)
        ),
        None,
    )
    keys = config.get("num_key_value_heads")
    return None if queries is None else Heads(queries, keys if isinstance(keys, int) else queries)


def _sizes(
    options: MeshConfig, devices: Sequence[Any], groups: int, heads: Heads | None
) -> dict[str, int]:
    try:
        return sizes(options, len(devices), groups, heads)
    except ConfigError as error:
        kind = f"there are {len(devices)} ({devices[0].device_kind})"
        raise ConfigError(
            [why.replace(f"there are {len(devices)}", kind) for why in error.problems]
        ) from None


def _groups(devices: Sequence[Any]) -> list[int]:
    """List the groups of devices connected by a slower network: TPU slices, else processes."""
    by_slice = sorted({getattr(device, "slice_index", 0) or 0 for device in devices})
    return by_slice if len(by_slice) > 1 else sorted({device.process_index for device in devices})


def _slices(options: MeshConfig, groups: int, data: int) -> int:
    """Return the number of slices of a mesh.

    Raises:
        ConfigError: the devices have another number of groups.
    """
    count = groups if options.slices == -1 else options.slices
    if (
        options.strategy == "hybrid_fsdp"
        and options.slices == 1
        and options.across == DATA
        and groups > 1
    ):
        count = groups if data % groups == 0 else 1
    if count > 1 and groups not in (1, count):
        raise ConfigError(
            f"mesh.slices: is {count}, but the devices are in {groups} groups; set it to {groups},"
            " or to -1"
        )
    return count


def _check_slices(options: MeshConfig, along: Mapping[str, int], devices: int, slices: int) -> None:
    """Reject an axis size that is not divisible by the number of slices.

    Raises:
        ConfigError: suggests valid sizes.
    """
    axis, other = options.across, FSDP if options.across == DATA else DATA
    if along[axis] % slices == 0:
        return

    def divides(across: str, **changed: Any) -> bool:
        try:
            return sizes(dataclasses.replace(options, **changed), devices)[across] % slices == 0
        except ConfigError:
            return False

    fits = [n for n in range(slices, devices + 1, slices) if divides(axis, **{axis: n})]
    near = sorted(fits, key=lambda n: (abs(n - along[axis]), n))[:2]
    fixes = [f"set it to {' or '.join(map(str, sorted(near)))}"] if near else []
    if options.strategy != "hybrid_fsdp" and along[other] % slices == 0:
        fixes.append(f"set mesh.across to {other}")
    fix = ", or ".join(fixes) or f"set mesh.slices to a divisor of {along[axis]}"
    raise ConfigError(f"mesh.{axis}: {along[axis]} is not divisible by {slices} slices; {fix}")


def _arrange(
    options: MeshConfig, along: Mapping[str, int], devices: Sequence[Any], slices: int
) -> np.ndarray[Any, Any]:
    """Return the devices as an array of the mesh's shape, with neighbors along the last axes."""
    shape = tuple(along.values())
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    axis = options.across
    outer = tuple(slices if name == axis else 1 for name in along)
    inner = tuple(size // slices if name == axis else size for name, size in along.items())
    # simulated devices have no groups: treat consecutive devices as a slice
    if len(_groups(devices)) == 1:
        return _by_order(devices, inner, AXES.index(axis), slices)
    by_process = len({getattr(device, "slice_index", 0) or 0 for device in devices}) == 1
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


def _by_order(
    devices: Sequence[Any], inner: tuple[int, ...], axis: int, slices: int
) -> np.ndarray[Any, Any]:
    each = len(devices) // slices
    parts = [
        mesh_utils.create_device_mesh(
            inner, devices[i * each : (i + 1) * each], allow_split_physical_axes=True
        )
        for i in range(slices)
    ]
    return np.concatenate(parts, axis=axis)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is replicated on all devices."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, axis: int) -> NamedSharding:
    """Return the sharding of an array whose rows are sharded over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))


def batch_shardings(
    mesh: Mesh, batch: Mapping[str, Any], axis: int = 0
) -> dict[str, NamedSharding]:
    """Return the sharding of each array of a batch: rows over `data` and `fsdp`, positions over
    `sequence`.

    Args:
        mesh: device mesh.
        batch: arrays, possibly abstract.
        axis: axis of the rows; 1 if there is a leading micro-batch axis.
    """
    shape = batch["input_ids"].shape
    positions = NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS, SEQUENCE))
    shards_positions = shape[-1] % mesh.shape[SEQUENCE] == 0
    return {
        name: positions if shards_positions and has_positions(array, shape) else by_rows(mesh, axis)
        for name, array in batch.items()
    }


def has_positions(array: Any, ids: tuple[int, ...]) -> bool:
    """Return whether an array of a batch has a position axis: an integer array shaped like
    `input_ids`.

    Multi-label targets may have the same shape, but are floating.
    """
    return array.shape == ids and np.issubdtype(array.dtype, np.integer)
