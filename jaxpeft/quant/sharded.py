"""Quantizing kernels on a mesh, layer by layer, with the same bits as on one device.

A kernel is sharded like its codes and quantized by one program over the mesh. Sums over a full
kernel are computed on every device after a gather (`Quantized.pooled`), so that the order of
summation does not depend on the mesh. If the layer axis is sharded, each layer is quantized by its
own devices only.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxpeft.core.tree import stack_leaves
from jaxpeft.kernels import QUANTIZED
from jaxpeft.quant.quantize import Quant

Shardings = Mapping[str, Sharding]


@dataclass(frozen=True)
class _Group:
    """Layers on the same devices.

    Attributes:
        layers: their numbers among all layers and experts.
        sizes: the sizes of the stacked axes that they fill.
        kernel: sharding of the kernel of one layer, `[in, out]`.
        leaves: shardings of its leaves.
        stack: shardings of the stacked leaves.
    """

    layers: Sequence[int]
    sizes: tuple[int, ...]
    kernel: Sharding
    leaves: Shardings
    stack: Shardings


def store_sharded(
    quant: Quant,
    read: Callable[[int, Sharding], jax.Array],
    layers: tuple[int, ...],
    places: Shardings,
) -> dict[str, jax.Array]:
    """Return the leaves of a quantized kernel; layers are read, quantized and freed one by one.

    Args:
        quant: the quantization.
        read: `(layer, sharding) -> kernel`: returns the kernel of a layer, `[in, out]`.
        layers: the sizes of the stacked axes; empty for a single kernel.
        places: shardings of the leaves by name.
    """
    parts: dict[str, list[jax.Array]] = {key: [] for key in places}
    shapes: dict[str, tuple[int, ...]] = {}
    for group in _groups(places, layers, QUANTIZED[quant.form].leaves[0]):
        if not group.kernel.addressable_devices:
            continue
        store = _compile(quant, tuple(group.leaves.items()))
        kept: list[dict[str, Any]] = []
        for layer in group.layers:
            stored = jax.block_until_ready(store(read(layer, group.kernel)))
            shapes = {key: (*layers, *leaf.shape) for key, leaf in stored.items()}
            kept.append(
                {key: _fetch(leaf) if _host(places[key]) else leaf for key, leaf in stored.items()}
            )
        for key, place in places.items():
            own = [leaves.pop(key) for leaves in kept]
            if _host(place):
                numbers = {number: i for i, number in enumerate(group.layers)}
                parts[key] += _put_back(own, place, shapes[key], len(layers), numbers)
            else:
                leaf = _stack(group.stack[key], group.sizes)(own) if layers else own[0]
                parts[key] += [shard.data for shard in leaf.addressable_shards]
    return {
        key: jax.make_array_from_single_device_arrays(shapes[key], places[key], parts[key])
        for key in places
    }


@functools.lru_cache(maxsize=64)
def _compile(
    quant: Quant, places: tuple[tuple[str, Sharding], ...]
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Return the program that quantizes one kernel; cached, so it is traced once per shape."""
    (_, first), *_ = places
    whole = None
    if isinstance(first, NamedSharding):
        whole = partial(
            jax.shard_map, mesh=first.mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()
        )
    return jax.jit(quant.store(whole), out_shardings=dict(places))


def _groups(places: Shardings, layers: tuple[int, ...], codes: str) -> Iterator[_Group]:
    """Yield the groups of layers in order; `codes` is the name of the leaf with the codes."""
    first, depth, every = places[codes], len(layers), range(math.prod(layers))
    if not isinstance(first, NamedSharding):
        here = {key: _in_device_memory(place) for key, place in places.items()}
        yield _Group(every, layers, here[codes], here, here)
        return
    specs = {
        key: tuple(place.spec) for key, place in places.items() if isinstance(place, NamedSharding)
    }
    # a mesh with automatic axes, so that the partitioner shards the program
    mesh = Mesh(np.asarray(first.mesh.devices), first.mesh.axis_names)
    cuts = {(*spec, *(None,) * depth)[:depth] for spec in specs.values()}
    one = {key: spec[depth:] for key, spec in specs.items()}
    if len(cuts) > 1 or cuts == {(None,) * depth}:
        yield _Group(
            every, layers, _kernel(mesh, one[codes]), _shardings(mesh, one), _shardings(mesh, specs)
        )
        return
    (cut,) = cuts
    axes = [() if c is None else c if isinstance(c, tuple) else (str(c),) for c in cut]
    counts = [math.prod(mesh.shape[axis] for axis in each) for each in axes]
    sizes = tuple(n // count for n, count in zip(layers, counts, strict=True))
    numbers = np.arange(math.prod(layers)).reshape(layers)
    for at, part in _submeshes(mesh, axes):
        held = numbers[tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, sizes, strict=True))]
        stack = _shardings(part, {key: (*(None,) * depth, *spec) for key, spec in one.items()})
        own = _shardings(part, one)
        yield _Group(held.reshape(-1).tolist(), sizes, _kernel(part, one[codes]), own, stack)


def _submeshes(
    mesh: Mesh, axes: Sequence[tuple[str, ...]]
) -> Iterator[tuple[tuple[int, ...], Mesh]]:
    """Yield the submesh of each shard along some dimensions, with the shard's index.

    Args:
        mesh: the device mesh.
        axes: the mesh axes of each of these dimensions.
    """
    flat = tuple(itertools.chain(*axes))
    for at in itertools.product(*(range(mesh.shape[axis]) for axis in flat)):
        place = dict(zip(flat, at, strict=True))
        index = tuple(
            slice(place[a], place[a] + 1) if a in place else slice(None) for a in mesh.axis_names
        )
        shard = tuple(
            functools.reduce(lambda i, axis: i * mesh.shape[axis] + place[axis], each, 0)
            for each in axes
        )
        yield shard, Mesh(np.asarray(mesh.devices)[index], mesh.axis_names)


def _shardings(mesh: Mesh, specs: Mapping[str, tuple[Any, ...]]) -> dict[str, Sharding]:
    return {key: NamedSharding(mesh, PartitionSpec(*spec)) for key, spec in specs.items()}


def _kernel(mesh: Mesh, codes: tuple[Any, ...]) -> Sharding:
    """Return the sharding of a kernel `[in, out]` from that of its codes `[out, in ...]`."""
    rows, columns = (*codes, None, None)[:2]
    return NamedSharding(mesh, PartitionSpec(columns, rows))


def _host(place: Sharding) -> bool:
    """Return whether a leaf is stored in host memory."""
    return place.memory_kind not in (None, jax.local_devices()[0].default_memory().kind)


def _in_device_memory(place: Sharding) -> Sharding:
    return (
        place.with_memory_kind(jax.local_devices()[0].default_memory().kind)
        if _host(place)
        else place
    )


def _fetch(leaf: jax.Array) -> dict[Any, np.ndarray[Any, Any]]:
    """Copy this process's shards of a leaf to NumPy, to free the devices' memory."""
    return {shard.device: np.asarray(shard.data) for shard in leaf.addressable_shards}


def _put_back(
    fetched: list[dict[Any, np.ndarray[Any, Any]]],
    place: Sharding,
    shape: tuple[int, ...],
    depth: int,
    places: Mapping[int, int],
) -> list[jax.Array]:
    """Put fetched shards into the host memory of their devices, one array per device.

    Args:
        fetched: shards of the leaf of each layer, by device.
        place: sharding of the stacked leaf.
        shape: its shape.
        depth: number of its stacked axes.
        places: the index in `fetched` of each layer, by its number among all layers and experts.
    """
    numbers = np.arange(math.prod(shape[:depth])).reshape(shape[:depth])
    parts: list[jax.Array] = []
    for device, index in place.addressable_devices_indices_map(shape).items():
        if device not in fetched[0] or index is None:
            continue
        own = numbers[index[:depth]]
        mine = [fetched[places[int(number)]][device] for number in own.reshape(-1)]
        memory = SingleDeviceSharding(device, memory_kind=place.memory_kind)
        parts.append(jax.device_put(np.stack(mine).reshape((*own.shape, *mine[0].shape)), memory))
    return parts


@functools.lru_cache(maxsize=256)
def _stack(place: Sharding, sizes: tuple[int, ...]) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(partial(stack_leaves, layers=sizes), out_shardings=place)
