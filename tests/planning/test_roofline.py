"""The least time of a step, by hand."""

from dataclasses import dataclass

import numpy as np
import pytest
from jax.sharding import Mesh

from jaxpeft.planning.chips import CHIPS
from jaxpeft.planning.collectives import Collective
from jaxpeft.planning.roofline import rate, roofline
from jaxpeft.planning.work import Work

V5E = CHIPS["v5e"]


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
    flat = [Device((*index, 0), s) for s in range(slices) for index in np.ndindex(*shape)]
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
    assert roofline(CHIPS["cpu"], Work(1.0, 1, 0), True, {}, tokens=1, model_flops=1.0, devices=1) is None


def test_links_of_a_torus():
    line = torus(4, 4, axes=(4, 4))
    assert rate(V5E, line, "tensor") == 50e9  # a line of 4 is no ring: one link
    assert rate(V5E, line, "data+tensor") == 100e9
    ring = torus(16, 16, axes=(16, 16))
    assert rate(V5E, ring, "tensor") == 100e9
    both = torus(16, 16, axes=(1, 256))
    assert rate(V5E, both, "tensor") == 200e9
    assert rate(CHIPS["v5p"], torus(4, 4, 4, axes=(4, 16)), "tensor") == 400e9


def test_between_slices_the_network_bounds():
    two = torus(4, 4, axes=(2, 16), slices=2)
    assert rate(V5E, two, "data") == V5E.outside
    assert rate(V5E, two, "tensor") == 100e9


def test_within_a_host_the_switch_and_between_hosts_the_network():
    h100 = CHIPS["h100"]
    devices = np.array([object() for _ in range(16)]).reshape(2, 8)
    mesh = Devices(devices, ("data", "tensor"))
    assert rate(h100, mesh, "tensor") == 450e9
    assert rate(h100, mesh, "data") == 50e9


def test_a_real_mesh_is_taken():
    import jax

    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))
    assert rate(CHIPS["h100"], mesh, "tensor") == 450e9
    assert rate(CHIPS["cpu"], mesh, "tensor") == float("inf")
