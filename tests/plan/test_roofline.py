"""The least time of a step, by hand."""

from dataclasses import dataclass

import numpy as np
import pytest
from jax.sharding import Mesh

from jaxpeft.chips import CHIPS
from jaxpeft.plan.collectives import Collective
from jaxpeft.plan.roofline import rate, roofline
from jaxpeft.plan.topology import read
from jaxpeft.plan.work import Work

V5E = CHIPS["v5e"]
SLICE, CUBE = read("v5e:4x4"), read("v5p:4x4x4")


@dataclass(frozen=True)
class Device:
    """A chip in a torus."""

    coords: tuple[int, ...]
    slice_index: int = 0


@dataclass(frozen=True)
class Devices:
    """As much of a mesh as is asked for."""

    devices: np.ndarray
    axis_names: tuple[str, ...]


def torus(*shape: int, axes: tuple[int, ...], slices: int = 1) -> Devices:
    flat = [Device((*index, 0)[:3], s) for s in range(slices) for index in np.ndindex(*shape)]
    array = np.empty(len(flat), object)
    array[:] = flat
    return Devices(array.reshape(axes), ("data", "tensor"))


def gather(wire: int, axes: str = "tensor") -> Collective:
    return Collective("all-gather", axes, 1, wire, wire, 4)


@pytest.mark.parametrize(
    ("done", "wire", "seconds", "bound"),
    [
        (Work(197e12, 0, 0), 0, 1.0, "compute"),
        (Work(197e10, 819_000_000_000, 0), 0, 1.0, "memory"),
        (Work(197e10, 819_000_000, 0), 100_000_000_000, 1.0, "interconnect"),
    ],
)
def test_the_highest_roof_bounds(done, wire, seconds, bound):
    one = gather(wire)
    found = roofline(V5E, done, True, {one: 100e9}, tokens=1000, model_flops=98.5e12 * 4, devices=4)
    assert found is not None
    assert (found.bound, found.seconds) == (bound, pytest.approx(seconds))
    assert found.tokens_per_second == pytest.approx(1000)
    assert found.mfu == pytest.approx(0.5)


def test_traffic_of_another_program_is_no_roof():
    found = roofline(V5E, Work(197e12, 10**15, 0), False, {}, tokens=1, model_flops=1.0, devices=1)
    assert found is not None
    assert (found.memory, found.bound) == (None, "compute")


def test_a_chip_without_figures_has_none():
    assert (
        roofline(CHIPS["cpu"], Work(1.0, 1, 0), True, {}, tokens=1, model_flops=1.0, devices=1)
        is None
    )


def test_links_of_a_torus():
    line = torus(4, 4, axes=(4, 4))
    assert rate(SLICE, line, "tensor") == 50e9  # a line of 4 is no ring: one link
    assert rate(SLICE, line, "data+tensor") == 100e9
    ring = torus(16, 16, axes=(16, 16))
    assert rate(SLICE, ring, "tensor") == 100e9
    both = torus(16, 16, axes=(1, 256))
    assert rate(SLICE, both, "tensor") == 200e9
    assert rate(CUBE, torus(4, 4, 4, axes=(4, 16)), "tensor") == 400e9


def test_a_part_of_a_ring_and_a_slice_that_is_no_torus_are_lines():
    # 4 of the 8 chips along an axis have one link on
    assert rate(CUBE, torus(4, 4, 8, axes=(32, 4)), "tensor") == 100e9
    assert rate(CUBE, torus(4, 4, 8, axes=(16, 8)), "tensor") == 200e9
    # no whole cube: nothing is joined to a ring
    assert rate(CUBE, torus(2, 4, 4, axes=(8, 4)), "tensor") == 100e9
    assert rate(SLICE, torus(16, 16, axes=(32, 8)), "tensor") == 50e9


def test_between_slices_the_network_bounds():
    two = torus(4, 4, axes=(2, 16), slices=2)
    assert rate(SLICE, two, "data") == V5E.outside
    assert rate(SLICE, two, "tensor") == 100e9


@dataclass(frozen=True)
class Gpu:
    """A simulated one."""

    id: int


def test_within_a_host_the_switch_and_between_hosts_the_network():
    mesh = Devices(np.array([Gpu(i) for i in range(16)]).reshape(2, 8), ("data", "tensor"))
    assert rate(read("h100:16"), mesh, "tensor") == 450e9
    assert rate(read("h100:16"), mesh, "data") == 50e9


def test_slices_of_less_than_a_host_are_joined_by_the_network():
    mesh = Devices(np.array([Gpu(i) for i in range(8)]).reshape(2, 4), ("data", "tensor"))
    assert rate(read("h100:8"), mesh, "data") == 450e9
    assert rate(read("h100:4", slices=2), mesh, "data") == 50e9
    assert rate(read("h100:4", slices=2), mesh, "tensor") == 450e9


def test_a_real_mesh_is_taken():
    import jax

    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))
    assert rate(read("h100:8"), mesh, "tensor") == 450e9
    assert rate(read("cpu:8"), mesh, "tensor") == float("inf")
