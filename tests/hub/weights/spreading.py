"""Ways to spread the leaves of a model over a mesh, for tests of reading into shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft.core import paths
from jaxpeft.core.paths import Path
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.quant.quantize import Quant

WAYS = ("whole", "rows", "columns", "both", "layers")
"""Of the tensors in the files, `[out, in]`; `layers` is the axis of stacked ones, and rows where
there is none.
"""


def requested(task: Any, quant: str | None = None, **options: Any) -> ModelRequest:
    """Return a request, with the number format of a quantized base by its name."""
    return ModelRequest(task, quant=None if quant is None else Quant(quant), **options)


def mesh_of(shape: tuple[int, int], devices: Any = None) -> Mesh:
    """Make a mesh of two axes, `a` and `b`."""
    there = np.asarray(jax.devices() if devices is None else devices)
    return Mesh(there[: shape[0] * shape[1]].reshape(shape), ("a", "b"))


def places(leaves: Any, mesh: Mesh, way: str) -> Callable[[Path], NamedSharding]:
    """Return the sharding of each leaf, cut along `a` (and `b` for `both`) where that divides it.

    Args:
        leaves: as they are stored, `Outline.leaves`.
        mesh: of `mesh_of`.
        way: one of `WAYS`.
    """
    found = {
        path: NamedSharding(mesh, _spec(path, leaf.shape, mesh, way))
        for path, leaf in paths.walk(leaves)
    }
    return found.__getitem__


def _spec(path: Path, shape: tuple[int, ...], mesh: Mesh, way: str) -> PartitionSpec:
    layers = len(paths.stacks(path))
    spec: list[Any] = [None] * len(shape)
    one = list(range(layers, len(shape)))  # the axes of one layer
    rows, columns = (one[-1:], one[:-1]) if path[-1] == "kernel" else (one[:1], one[1:])
    cuts = {
        "whole": [],
        "rows": [(rows, "a")],
        "columns": [(columns, "a")],
        "both": [(rows, "a"), (columns, "b")],
    }
    cuts["layers"] = [([0], ("a", "b"))] if layers else cuts["rows"]
    for axes, name in cuts[way]:
        parts = np.prod([mesh.shape[n] for n in (name if isinstance(name, tuple) else (name,))])
        for axis in axes[:1]:
            if shape[axis] % parts == 0:
                spec[axis] = name
    return PartitionSpec(*spec)
