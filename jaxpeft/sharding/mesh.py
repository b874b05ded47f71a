"""The mesh of a run: the rows of a batch spread over its devices, parameters on each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft.config.schema import Config
from jaxpeft.errors import ConfigError
from jaxpeft.sharding.processes import joined

DATA = "data"


def make_mesh(config: Config) -> Mesh:
    """Makes the mesh of a run.

    Args:
        config: a checked config.

    Raises:
        ConfigError: there are not as many devices, or a batch cannot be spread over them evenly.
    """
    there, wanted = jax.devices(), config.mesh.data
    data = len(there) if wanted == -1 else wanted
    if data > len(there):
        raise ConfigError(
            f"mesh.data: {data} devices, there are {len(there)} ({there[0].device_kind}); set it to {len(there)} or less, or to -1"
        )
    problems: list[str] = []
    parts = data * config.train.accumulation
    sizes = (("train", config.train.batch_size, parts), ("evaluation", config.evaluation.batch_size, data))
    for section, size, over in sizes:
        if size % over:
            near = " or ".join(str(n) for n in (size // over * over, (size // over + 1) * over) if n)
            by = f"{data} devices" + (f" x accumulation {config.train.accumulation}" if over != data else "")
            problems.append(f"{section}.batch_size: {size} is not divisible by {by} = {over}; it could be {near}")
    if problems:
        raise ConfigError(problems)
    return Mesh(np.array(there[:data]), (DATA,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Gives the sharding of an array that each device holds."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, axis: int) -> NamedSharding:
    """Gives the sharding of an array whose axis of rows is spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))


def place(mesh: Mesh, batch: Mapping[str, np.ndarray[Any, Any]], axis: int = 0) -> dict[str, jax.Array]:
    """Puts a batch onto the devices.

    Args:
        mesh: the devices.
        batch: arrays with an axis of rows; of several processes each has the rows of its own devices.
        axis: which axis that is: 1 behind an axis of micro-batches.
    """
    where = by_rows(mesh, axis)
    if jax.process_count() > 1:
        return joined(batch, dict.fromkeys(batch, where), axis)
    return jax.device_put(dict(batch), where)
