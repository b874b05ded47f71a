"""Reading leaves into their shards: each process reads exactly the shards of its own devices, each
of them once.

A kernel is stored as its transpose, `[out, in]`: a shard along `out` is one byte range of the file,
a shard along `in` is a piece of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxpeft.core import paths
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.hub.weights.leaf_sources import Index, LeafSource, spans_of
from jaxpeft.hub.weights.leaf_tensors import WeightPlan
from jaxpeft.quant import sharded
from jaxpeft.quant.quantize import Quant

Places = Sharding | Callable[[Path], Sharding]
_Array = np.ndarray[Any, Any]


def read(
    abstract: Tree,
    weights: WeightPlan,
    new: Mapping[Path, _Array],
    sharding: Places | None = None,
    quant: Quant | None = None,
) -> Tree:
    """Read every leaf directly into device arrays, quantizing kernels layer by layer.

    Args:
        abstract: the model's tree, which determines the order of the leaves.
        weights: the plan from `leaf_tensors.plan`.
        new: newly initialized leaves by path, unsharded.
        sharding: one sharding for all leaves, or a function from the path of a stored leaf (for a
            quantized kernel, paths such as `(..., "kernel_nf4")`) to its sharding; None for this
            process's first device. A leaf of a quantized kernel or of a new head is replicated if
            the one sharding for all leaves does not fit it.
        quant: which kernels are quantized, and how; None for no quantization.

    Raises:
        ConfigError: A sharding does not fit its leaf.
        WeightsError: A file cannot be read.
    """
    place = SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
    chosen = {} if quant is None else quant.sites(abstract)
    items: list[tuple[Path, Any]] = []
    for path, _ in paths.walk(abstract):
        for item in _read_leaf(
            path, weights, new, place, quant if path in chosen else None, chosen.get(path)
        ):
            if items:  # at most one transfer to a device overlaps with reading
                jax.block_until_ready(items[-1][1])
            items.append(item)
    return paths.build(items)


def _read_leaf(
    path: Path,
    weights: WeightPlan,
    new: Mapping[Path, _Array],
    place: Places,
    quant: Quant | None,
    site: Site | None,
) -> Iterator[tuple[Path, jax.Array]]:
    """Read one leaf of the model; a quantized kernel yields several."""
    source, module = weights.sources.get(path), path[:-1]
    if path in weights.held:
        for key, leaf in weights.held[path].items():
            at = _place(place, (*module, key), leaf.shape, lenient=True)
            yield (*module, key), _put(leaf.shape, leaf.dtype, at, leaf.read)
    elif source is None:
        leaf = new[path]
        at = _place(place, path, leaf.shape, lenient=True)
        yield path, _put(leaf.shape, leaf.dtype, at, partial(_part, leaf))
    elif quant is None or site is None:
        yield path, _put(source.shape, source.dtype, _place(place, path, source.shape), source.read)
    else:
        leaves = _quantize(source, quant, site)
        at = {
            key: _place(place, (*module, key), leaf.shape, lenient=True)
            for key, leaf in leaves.items()
        }
        stored = sharded.store_sharded(quant, partial(_layer, source), source.layers, at)
        yield from (((*module, key), leaf) for key, leaf in stored.items())


def _quantize(source: LeafSource, quant: Quant, site: Site) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the abstract leaves of a kernel after quantization, by name."""
    leaves = quant.abstract(site.shape, source.dtype)
    return {
        key: jax.ShapeDtypeStruct((*source.layers, *leaf.shape), leaf.dtype)
        for key, leaf in leaves.items()
    }


def leaves(abstract: Tree, weights: WeightPlan, quant: Quant | None = None) -> Tree:
    """Return shape and dtype of every leaf that `read` returns.

    Args:
        abstract: the model's tree.
        weights: the plan from `leaf_tensors.plan`.
        quant: which kernels are quantized, and how; None for no quantization.
    """
    chosen = {} if quant is None else quant.sites(abstract)
    items: list[tuple[Path, Any]] = []
    for path, leaf in paths.walk(abstract):
        source, held = weights.sources.get(path), weights.held.get(path)
        if held is not None:
            found = {key: jax.ShapeDtypeStruct(one.shape, one.dtype) for key, one in held.items()}
        elif source is None:
            found = {path[-1]: jax.ShapeDtypeStruct(leaf.shape, np.float32)}
        elif quant is None or path not in chosen:
            found = {path[-1]: jax.ShapeDtypeStruct(source.shape, source.dtype)}
        else:
            found = _quantize(source, quant, chosen[path])
        items += [((*path[:-1], key), one) for key, one in found.items()]
    return paths.build(items)


def _place(place: Places, path: Path, shape: tuple[int, ...], *, lenient: bool = False) -> Sharding:
    """Return the sharding of one leaf.

    Raises:
        ConfigError: The sharding does not fit.
    """
    found = place if isinstance(place, Sharding) else place(path)
    try:
        found.shard_shape(shape)
    except (ValueError, IndexError) as error:  # IndexError if the leaf has fewer axes
        if not isinstance(found, NamedSharding):
            raise
        if lenient and isinstance(place, Sharding):
            return NamedSharding(found.mesh, PartitionSpec(), memory_kind=found.memory_kind)
        raise ConfigError(
            f"sharding: {paths.text(path)} with shape {list(shape)} is not evenly divisible by"
            f" {tuple(found.spec)} over {dict(found.mesh.shape)}; omit the axes that do not divide"
            " it"
        ) from error
    return found


def _put(
    shape: tuple[int, ...], dtype: Any, sharding: Sharding, read: Callable[[Index | None], _Array]
) -> jax.Array:
    """Read this process's shards of a leaf one after the other, and put them on their devices."""
    at = sharding.addressable_devices_indices_map(shape)
    holders: dict[Any, list[Any]] = {}
    for device, index in at.items():
        holders.setdefault(spans_of(index, shape), []).append(device)
    placed: dict[Any, jax.Array] = {}
    before: list[jax.Array] = []
    for devices in holders.values():
        part = read(at[devices[0]])
        jax.block_until_ready(before)
        before = [
            jax.device_put(part, SingleDeviceSharding(d, memory_kind=sharding.memory_kind))
            for d in devices
        ]
        placed |= zip(devices, before, strict=True)
    return jax.make_array_from_single_device_arrays(
        shape, sharding, [placed[device] for device in at], dtype=dtype
    )


def _part(leaf: _Array, index: Index | None) -> _Array:
    return leaf[(...) if index is None else index]


def _layer(source: LeafSource, layer: int, place: Sharding) -> jax.Array:
    """Read one layer of a kernel, `[in, out]`."""
    shape = source.shape[source.stacks :]
    return _put(shape, source.dtype, place, partial(source.read_layer, layer))
