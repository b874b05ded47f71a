"""The mesh of a run: five named axes over its devices, and where batches and trees that every
device holds lie.
"""

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
    """Make the mesh of a run, with which its batches must go: the arguments are those of
    `create_device_mesh`, but the config.

    Args:
        config: a checked config.
        devices: to make it of, those of a topology that is only described too; None for those that
            there are.
        heads: of the model (`heads_of`), which `tensor` divides; None where they are not known.

    Raises:
        ConfigError: there are not as many devices, or a batch cannot be spread over them evenly.
    """
    mesh = create_device_mesh(config.mesh, devices, heads)
    problems = batch_problems(config, mesh.shape, f"{row_shards(mesh.shape)} devices")
    if problems:
        raise ConfigError(problems)
    return mesh


def create_device_mesh(
    options: MeshConfig, devices: Sequence[Any] | None = None, heads: Heads | None = None
) -> Mesh:
    """Make the mesh of a strategy: five named axes, those that are not used of size 1.

    Args:
        options: the strategy, and sizes of axes.
        devices: to make it of, those of a topology that is only described too; None for those that
            there are.
        heads: of the model (`heads_of`), which `tensor` divides; None where they are not known.

    Raises:
        ConfigError: there are not as many devices.
    """
    there = list(jax.devices() if devices is None else devices)
    groups = _groups(there)
    along = _sizes(options, there, len(groups), heads)
    many, chosen = math.prod(along.values()), options.strategy
    slices = _slices(options, len(groups), along[DATA])
    _check_slices(options, along, len(there), slices)
    mesh = Mesh(_arrange(options, along, there[:many], slices), AXES)
    if heads is not None and heads.keys % along[TENSOR]:
        _log.warning(
            "mesh.tensor: %d does not divide the %d heads of keys and values, of which each device"
            " computes all",
            along[TENSOR],
            heads.keys,
        )
    if chosen is not None:
        shape = (
            " x ".join(f"{axis} {size}" for axis, size in along.items() if size > 1) or "one device"
        )
        _log.info("mesh of %s: %s (%s)", chosen, shape, STRATEGIES[chosen].about)
    return mesh


def evaluation_rows(config: Config, mesh: Mesh) -> int:
    """Return the rows of a batch of an evaluation: `evaluation.batch_size`, or the next number that
    the devices share evenly.
    """
    over = row_shards(mesh.shape)
    return -(-config.evaluation.batch_size // over) * over


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """Return the heads that the `config.json` of a model names, None where it names none."""
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
    options: MeshConfig, there: Sequence[Any], groups: int, heads: Heads | None
) -> dict[str, int]:
    try:
        return sizes(options, len(there), groups, heads)
    except ConfigError as error:
        kind = f"there are {len(there)} ({there[0].device_kind})"
        raise ConfigError(
            [why.replace(f"there are {len(there)}", kind) for why in error.problems]
        ) from None


def _groups(devices: Sequence[Any]) -> list[int]:
    """List the groups of devices that a slower network joins: slices of a TPU, else processes,
    which is hosts.
    """
    by_slice = sorted({getattr(device, "slice_index", 0) or 0 for device in devices})
    return by_slice if len(by_slice) > 1 else sorted({device.process_index for device in devices})


def _slices(options: MeshConfig, groups: int, data: int) -> int:
    """Return how many slices a mesh goes over.

    Raises:
        ConfigError: the devices are in another number of groups.
    """
    wanted = groups if options.slices == -1 else options.slices
    if (
        options.strategy == "hybrid_fsdp"
        and options.slices == 1
        and options.across == DATA
        and groups > 1
    ):
        wanted = groups if data % groups == 0 else 1
    if wanted > 1 and groups not in (1, wanted):
        raise ConfigError(
            f"mesh.slices: {wanted}, and the devices are in {groups} groups; set it to {groups}, or"
            " to -1"
        )
    return wanted


def _check_slices(options: MeshConfig, along: Mapping[str, int], devices: int, slices: int) -> None:
    """Refuse an axis that does not go over the slices evenly.

    Raises:
        ConfigError: with what would.
    """
    axis, other = options.across, FSDP if options.across == DATA else DATA
    if along[axis] % slices == 0:
        return

    def goes(across: str, **changed: Any) -> bool:
        try:
            return sizes(dataclasses.replace(options, **changed), devices)[across] % slices == 0
        except ConfigError:
            return False

    fits = [n for n in range(slices, devices + 1, slices) if goes(axis, **{axis: n})]
    near = sorted(fits, key=lambda n: (abs(n - along[axis]), n))[:2]
    fixes = [f"it could be {' or '.join(map(str, sorted(near)))}"] if near else []
    if options.strategy != "hybrid_fsdp" and along[other] % slices == 0:
        fixes.append(f"set mesh.across to {other}")
    fix = ", or ".join(fixes) or f"set mesh.slices to a divisor of {along[axis]}"
    raise ConfigError(f"mesh.{axis}: {along[axis]} does not go over {slices} slices evenly; {fix}")


def _arrange(
    options: MeshConfig, along: Mapping[str, int], devices: Sequence[Any], slices: int
) -> np.ndarray[Any, Any]:
    """Return the devices as an array of the mesh's shape, neighbors along the last axes."""
    shape = tuple(along.values())
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    axis = options.across
    outer = tuple(slices if name == axis else 1 for name in along)
    inner = tuple(size // slices if name == axis else size for name, size in along.items())
    if (
        len(_groups(devices)) == 1
    ):  # nothing tells them apart, as on simulated devices: neighbors are a group
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
    """Return the sharding of an array that each device holds."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, axis: int) -> NamedSharding:
    """Return the sharding of an array whose axis of rows is spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))


def batch_shardings(
    mesh: Mesh, batch: Mapping[str, Any], axis: int = 0
) -> dict[str, NamedSharding]:
    """Return the sharding of each array of a batch: rows over `data` and `fsdp`, positions over
    `sequence`.

    Args:
        mesh: the devices.
        batch: arrays, abstract ones too.
        axis: which axis is that of rows: 1 behind an axis of micro-batches.
    """
    shape = batch["input_ids"].shape
    positions = NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS, SEQUENCE))
    spread = shape[-1] % mesh.shape[SEQUENCE] == 0
    return {
        name: positions if spread and has_positions(array, shape) else by_rows(mesh, axis)
        for name, array in batch.items()
    }


def has_positions(array: Any, ids: tuple[int, ...]) -> bool:
    """Return whether an array of a batch has an axis of positions: whole numbers of the shape of
    its `input_ids`.

    The labels of a row with several may be as many as its positions; they are floating.
    """
    return array.shape == ids and np.issubdtype(array.dtype, np.integer)
