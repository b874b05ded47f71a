"""Topologies of a plan: parse text such as `v5e:4x4`, and make the devices to compile for."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jaxpeft.chips import CHIPS, Chip
from jaxpeft.errors import ConfigError, nearest, show

MOST, MOST_SIMULATED = 2**17, 2**12
"""Maximum number of devices of a plan: TPUs, and simulated devices."""
EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:16x16, h100:8, h200:1 or cpu:8"


@dataclass(frozen=True)
class Topology:
    """A set of devices.

    Attributes:
        chip: kind of chip.
        shape: torus shape of one slice; a single number for GPUs and CPUs.
        slices: number of slices.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_size(self) -> int:
        """Number of devices per slice."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.slices * self.slice_size

    @property
    def name(self) -> str:
        """Name as in `--topology`, prefixed with the number of slices."""
        one = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices} x {one}"

    @property
    def simulated(self) -> bool:
        """Whether programs are compiled for simulated CPU devices instead of these."""
        return self.chip.platform != "tpu"


def read(text: str, slices: int = 1) -> Topology:
    """Parse a topology.

    Args:
        text: `CHIP:SHAPE`.
        slices: number of slices.

    Raises:
        ConfigError: the chip is unknown, or does not exist in this shape.
    """
    name, _, shape = text.strip().lower().partition(":")
    if name not in CHIPS:
        raise ConfigError(
            f"--topology: {show(name)} is not a known chip{nearest(name, CHIPS)} (known:"
            f" {', '.join(CHIPS)}); give {EXAMPLES}"
        )
    axes = len(CHIPS[name].largest) or 1
    if (
        not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", shape)
        or shape.count("x") + 1 != axes
        or 0 in (sizes := _sizes(shape))
    ):
        example = "x".join(["4"] * axes)
        raise ConfigError(
            f"--topology: {show(text)} is not a valid shape of {name}; give a shape such as"
            f" {name}:{example}"
        )
    most = CHIPS[name].largest
    if most and any(size > limit for size, limit in zip(sorted(sizes), most, strict=True)):
        raise ConfigError(
            f"--topology: {text!r} is larger than a {name} pod, {'x'.join(map(str, most))}; use"
            " --slices for several"
        )
    if slices < 1:
        raise ConfigError(f"--slices: must be at least 1, is {slices}")
    found = Topology(CHIPS[name], sizes, slices)
    limit = MOST_SIMULATED if found.simulated else MOST
    if found.size > limit:
        raise ConfigError(
            f"--topology: {found.name} has {found.size} devices; the maximum is {limit}"
        )
    return found


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(n) for n in shape.split("x"))


def environment(topology: Topology) -> Mapping[str, str]:
    """Return environment variables to set before JAX is imported, so that it does not look for
    accelerators or their metadata.
    """
    if topology.chip.platform != "tpu":
        return {"JAX_PLATFORMS": "cpu"}
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # compiling uses no device, so several processes may do it at once
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": f"{topology.chip.name}-{math.prod(topology.shape)}",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def prepare(topology: Topology, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the environment of this process before it imports JAX.

    Raises:
        ConfigError: the TPU compiler is not installed.
    """
    if topology.chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology: {topology.name} requires the TPU compiler libtpu, which is not installed;"
            " run `pip install 'jaxpeft[plan]'`"
        )
    environ.update(environment(topology))


def devices(topology: Topology) -> list[Any]:
    """Return the devices to compile for.

    Raises:
        ConfigError: the topology does not exist.
    """
    import jax
    from jax.experimental import topologies

    if topology.simulated:
        with suppress(RuntimeError):  # JAX is already initialized
            jax.config.update("jax_num_cpu_devices", topology.size)
        simulated = jax.devices("cpu")
        if len(simulated) < topology.size:
            raise ConfigError(
                f"--topology: {topology.name} needs {topology.size} simulated devices, but JAX is"
                f" already initialized with {len(simulated)}"
            )
        return simulated[: topology.size]
    more: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
        )
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology: {name}: libtpu does not support this slice"
            f" ({' '.join(str(error).split())})"
        ) from error
