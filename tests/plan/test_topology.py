"""Topologies: what can be written, what is refused, and what the environment must say."""

import importlib.util

import jax
import pytest

from jaxpeft.errors import ConfigError
from jaxpeft.plan import topology


@pytest.mark.parametrize(
    ("text", "chip", "shape", "size"),
    [
        ("v5e:4x4", "v5e", (4, 4), 16),
        ("v5p:4x4x8", "v5p", (4, 4, 8), 128),
        ("V6E:16x16", "v6e", (16, 16), 256),
        ("h100:8", "h100", (8,), 8),
        ("cpu:8", "cpu", (8,), 8),
    ],
)
def test_topologies_are_read(text, chip, shape, size):
    found = topology.read(text)
    assert (found.chip.name, found.shape, found.size) == (chip, shape, size)


def test_slices_multiply():
    found = topology.read("v5e:4x4", slices=2)
    assert (found.size, found.name) == (32, "2 x v5e:4x4")


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        (
            "v5f:4x4",
            1,
            (
                r"--topology: 'v5f' is not a known chip; did you mean 'v5p' or 'v5e'\? .*known:"
                r" v5e, v5p, v6e, h100"
            ),
        ),
        ("v5e:4x4x4", 1, "'v5e:4x4x4' is not a valid shape of v5e; give a shape such as v5e:4x4$"),
        ("v5p:4x4", 1, "is not a valid shape of v5p; give a shape such as v5p:4x4x4"),
        ("h100", 1, "'h100' is not a valid shape of h100; give a shape such as h100:4"),
        ("h100:0", 1, "'h100:0' is not a valid shape"),
        (
            "v5e:100x100",
            1,
            "'v5e:100x100' is larger than a v5e pod, 16x16; use --slices for several",
        ),
        ("v5p:4x4x32", 1, "is larger than a v5p pod, 16x20x28"),
        ("v5e:4x4", 0, "--slices: must be at least 1, is 0"),
        ("cpu:100000", 1, "--topology: cpu:100000 has 100000 devices; the maximum is 4096"),
        ("v5e:4x4", 10**9, "has 16000000000 devices; the maximum is 131072"),
        (
            "h100:" + "9" * 5000,
            1,
            r"9\.\.\. \(5,007 characters\) is not a valid shape of h100",
        ),
        ("h100:٣", 1, "is not a valid shape of h100"),
    ],
)
def test_what_is_no_topology_is_refused(text, slices, message):
    with pytest.raises(ConfigError, match=message):
        topology.read(text, slices)


def test_the_environment_asks_for_no_accelerator():
    environ: dict[str, str] = {}
    topology.prepare(topology.read("h100:8"), environ)
    assert environ == {"JAX_PLATFORMS": "cpu"}


def test_without_libtpu_a_tpu_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"requires the TPU compiler libtpu, .* `pip install 'jaxpeft\[plan\]'",
    ):
        topology.prepare(topology.read("v5e:4x4"), {})


def test_too_many_simulated_devices_for_this_process():
    assert len(jax.devices()) == 8
    with pytest.raises(
        ConfigError,
        match="cpu:64 needs 64 simulated devices, but JAX is already initialized with 8",
    ):
        topology.devices(topology.read("cpu:64"))
