"""How long a step takes at least, and what bounds it: operations, memory, or what the chips tell
each other.

Williams et al. 2009, "Roofline: An Insightful Visual Performance Model for Multicore Architectures"
(doi:10.1145/1498765.1498785), with the interconnect as a third roof. Each roof is taken by itself,
as if all overlapped perfectly: no step is faster, most are slower.
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
        compute: seconds of its products at the chip's peak.
        memory: seconds of its traffic at the memory's bandwidth; None where the program is not the
            chip's own.
        interconnect: seconds of its collectives, one after the other.
        seconds: the largest of them.
        bound: which that is.
        tokens_per_second: of all devices together.
        mfu: model FLOPs, without what is computed again, by what all chips could do in that time.
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
    talk: Mapping[Collective, float],
    *,
    tokens: int,
    model_flops: float,
    devices: int,
) -> Roofline | None:
    """Return the least time of a step, None of a chip whose figures are not known.

    Args:
        chip: its figures.
        done: what one device does.
        traffic: whether its memory traffic is that of the chip's own program.
        talk: bytes/s of each collective.
        tokens: of a step, all devices together.
        model_flops: of a step, all devices together.
        devices: how many.
    """
    if chip.flops is None or chip.bandwidth is None:
        return None
    compute = done.flops / chip.flops
    memory = done.traffic / chip.bandwidth if traffic else None
    interconnect = sum(one.wire / rate for one, rate in talk.items() if one.group > 1)
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
    """Return the bytes/s at which each collective can run.

    Args:
        topology: of the devices.
        mesh: the `jax.sharding.Mesh` of the program.
        found: its collectives.
    """
    return {one: rate(topology, mesh, one.axes) for one in found}


def rate(topology: Topology, mesh: Any, axes: str) -> float:
    """Return the bytes/s that a chip sends along axes of the mesh.

    Of a torus that is two links for each of its axes that the group of chips extends along, one
    where the group is no ring: where it is not the whole axis, or the slice too small; where the
    group goes over several slices, or hosts of GPUs, their network.
    """
    chip = topology.chip
    if chip.link is None or chip.outside is None:
        return float("inf")
    group = _group(mesh, axes)
    if len({getattr(device, "slice_index", 0) for device in group}) > 1:
        return chip.outside
    if chip.host:
        # simulated devices are numbered through, slice after slice
        places = {
            (device.id // topology.slice_size, device.id % topology.slice_size // chip.host)
            for device in group
        }
        return chip.outside if len(places) > 1 else chip.link * chip.links
    own = getattr(group[0], "slice_index", 0)
    whole = _extents([one for one in mesh.devices.ravel() if getattr(one, "slice_index", 0) == own])
    rings = [size > 1 and size % chip.wraps == 0 for size in whole]
    if len(chip.largest) > 2:  # slices of three axes are made of whole cubes, or are no torus
        rings = [all(rings)] * len(rings)
    along = zip(_extents(group), whole, rings, strict=True)
    return chip.link * max(
        1, sum(2 if ring and size == axis else 1 for size, axis, ring in along if size > 1)
    )


def _extents(devices: Sequence[Any]) -> list[int]:
    """Return over how many places of each axis of the torus devices are spread."""
    return [len(set(axis.tolist())) for axis in np.array([device.coords for device in devices]).T]


def _group(mesh: Any, axes: str) -> list[Any]:
    """Return the devices that differ from the first along some axes alone."""
    wanted = axes.split("+")
    index = tuple(slice(None) if name in wanted else 0 for name in mesh.axis_names)
    return list(np.atleast_1d(np.asarray(mesh.devices[index])).ravel())
