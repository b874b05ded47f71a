"""Roofline of a step: its least time, and whether compute, memory or interconnect bounds it.

Williams et al. 2009, "Roofline: An Insightful Visual Performance Model for Multicore Architectures"
(doi:10.1145/1498765.1498785), with the interconnect as a third roof. All three are assumed to
overlap perfectly, so most steps are slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpeft.chips import Chip
from jaxpeft.plan.collectives import Collective
from jaxpeft.plan.topology import Topology
from jaxpeft.plan.work import Work

COMPUTE, MEMORY, INTERCONNECT = "compute", "memory", "interconnect"


@dataclass(frozen=True)
class Roofline:
    """The least time of a step.

    Attributes:
        compute: seconds of its matrix products at peak FLOP/s.
        memory: seconds of its memory traffic at full bandwidth; None if the program was not
            compiled for the chip.
        interconnect: seconds of its collectives, run one by one.
        seconds: maximum of the three.
        bound: which of the three is the maximum.
        tokens_per_second: tokens per second of all devices.
        mfu: model FLOPs utilization, without recomputation.
    """

    compute: float
    memory: float | None
    interconnect: float
    seconds: float
    bound: str
    tokens_per_second: float
    mfu: float


def roofline(
    chip: Chip,
    done: Work,
    traffic: bool,
    bandwidths: Mapping[Collective, float],
    *,
    tokens: int,
    model_flops: float,
    devices: int,
) -> Roofline | None:
    """Return the roofline of a step, or None if the chip's properties are unknown.

    Args:
        chip: chip of the devices.
        done: work of one device.
        traffic: whether the memory traffic is that of a program compiled for the chip.
        bandwidths: bytes/s of each collective.
        tokens: tokens per step on all devices.
        model_flops: model FLOPs per step on all devices.
        devices: number of devices.
    """
    if chip.flops is None or chip.bandwidth is None:
        return None
    compute = done.flops / chip.flops
    memory = done.traffic / chip.bandwidth if traffic else None
    interconnect = sum(one.wire / rate for one, rate in bandwidths.items() if one.group > 1)
    roofs = {COMPUTE: compute, MEMORY: memory or 0.0, INTERCONNECT: interconnect}
    bound = max(roofs, key=roofs.__getitem__)
    seconds = max(roofs[bound], 1e-12)
    return Roofline(
        compute,
        memory,
        interconnect,
        seconds,
        bound,
        tokens / seconds,
        model_flops / (seconds * chip.flops * devices),
    )


def rates(topology: Topology, mesh: Any, found: Sequence[Collective]) -> dict[Collective, float]:
    """Return the bandwidth of each collective in bytes/s.

    Args:
        topology: topology of the devices.
        mesh: the `jax.sharding.Mesh` of the program.
        found: collectives of the program.
    """
    return {one: rate(topology, mesh, one.axes) for one in found}


def rate(topology: Topology, mesh: Any, axes: str) -> float:
    """Return the bytes/s that a chip sends along mesh axes.

    On a torus, a group uses two links per torus axis that it extends along, or one if it is no ring
    there (it covers only part of the axis, or the slice is too small to wrap around). A group that
    crosses slices, or hosts of GPUs, uses their network.
    """
    chip = topology.chip
    if chip.link is None or chip.outside is None:
        return float("inf")
    group = _group(mesh, axes)
    if len({getattr(device, "slice_index", 0) for device in group}) > 1:
        return chip.outside
    if chip.host:
        # simulated devices are numbered consecutively, slice by slice
        places = {
            (device.id // topology.slice_size, device.id % topology.slice_size // chip.host)
            for device in group
        }
        return chip.outside if len(places) > 1 else chip.link * chip.links
    own = getattr(group[0], "slice_index", 0)
    torus = _extents([one for one in mesh.devices.ravel() if getattr(one, "slice_index", 0) == own])
    rings = [size > 1 and size % chip.wraps == 0 for size in torus]
    if len(chip.largest) > 2:  # a 3D slice is a torus only if it consists of complete cubes
        rings = [all(rings)] * len(rings)
    along = zip(_extents(group), torus, rings, strict=True)
    return chip.link * max(
        1, sum(2 if ring and size == axis else 1 for size, axis, ring in along if size > 1)
    )


def _extents(devices: Sequence[Any]) -> list[int]:
    """Return the number of distinct coordinates of devices along each torus axis."""
    return [len(set(axis.tolist())) for axis in np.array([device.coords for device in devices]).T]


def _group(mesh: Any, axes: str) -> list[Any]:
    """Return the devices that differ from the first only along the given axes."""
    names = axes.split("+")
    index = tuple(slice(None) if name in names else 0 for name in mesh.axis_names)
    return list(np.atleast_1d(np.asarray(mesh.devices[index])).ravel())
