"""The devices that a plan is for: read from `v5e:4x4`, and given by XLA as devices that programs
are compiled for.
"""

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
"""Devices of a plan: of TPUs, and of those that this machine has to simulate."""
EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:16x16, h100:8, h200:1 or cpu:8"


@dataclass(frozen=True)
class Topology:
    """Which devices.

    Attributes:
        chip: of which kind.
        shape: of the torus of one slice; one number of GPUs and CPUs.
        slices: how many of them.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_size(self) -> int:
        """Number of devices of one slice."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.slices * self.slice_size

    @property
    def name(self) -> str:
        """What it is called in `--topology`, with the slices in front."""
        one = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices} x {one}"

    @property
    def simulated(self) -> bool:
        """Whether programs are compiled for simulated CPU devices in place of these."""
        return self.chip.platform != "tpu"


def read(text: str, slices: int = 1) -> Topology:
    """Read a topology.

    Args:
        text: `CHIP:SHAPE`.
        slices: how many of them there are.

    Raises:
        ConfigError: there is no such chip, or it comes in no such shape.
    """
    name, _, shape = text.strip().lower().partition(":")
    if name not in CHIPS:
        raise ConfigError(
            f"--topology: {show(name)} is not a known chip{nearest(name, CHIPS)} (known:"
            f" {', '.join(CHIPS)}); write {EXAMPLES}"
        )
    axes = len(CHIPS[name].largest) or 1
    if (
        not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", shape)
        or shape.count("x") + 1 != axes
        or 0 in (sizes := _sizes(shape))
    ):
        example = "x".join(["4"] * axes)
        raise ConfigError(
            f"--topology: {show(text)} is not of a shape that {name} comes in; write"
            f" {name}:{example}"
        )
    most = CHIPS[name].largest
    if most and any(size > limit for size, limit in zip(sorted(sizes), most, strict=True)):
        raise ConfigError(
            f"--topology: {text!r} is larger than a pod of {name}, {'x'.join(map(str, most))}; more"
            " of them are joined by --slices"
        )
    if slices < 1:
        raise ConfigError(f"--slices: must be at least 1, is {slices}")
    found = Topology(CHIPS[name], sizes, slices)
    limit = MOST_SIMULATED if found.simulated else MOST
    if found.size > limit:
        raise ConfigError(
            f"--topology: {found.name} has {found.size} devices; a plan is for at most {limit}"
        )
    return found


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(n) for n in shape.split("x"))


def environment(topology: Topology) -> Mapping[str, str]:
    """Return what the environment must say before JAX is imported: no accelerator is looked for,
    nor metadata of one.
    """
    if topology.chip.platform != "tpu":
        return {"JAX_PLATFORMS": "cpu"}
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # a compilation takes no device: several may go on at once
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": f"{topology.chip.name}-{math.prod(topology.shape)}",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def prepare(topology: Topology, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the environment of this process, which has not imported JAX yet.

    Raises:
        ConfigError: the compiler of TPU programs is not installed.
    """
    if topology.chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology: {topology.name} needs the compiler of TPU programs, libtpu, which is not"
            " installed: pip install 'jaxpeft[plan]'"
        )
    environ.update(environment(topology))


def devices(topology: Topology) -> list[Any]:
    """Return the devices to compile for.

    Raises:
        ConfigError: there is no such topology.
    """
    import jax
    from jax.experimental import topologies

    if topology.simulated:
        with suppress(RuntimeError):  # a process that has its devices already
            jax.config.update("jax_num_cpu_devices", topology.size)
        there = jax.devices("cpu")
        if len(there) < topology.size:
            raise ConfigError(
                f"--topology: {topology.name} needs {topology.size} simulated devices, and this"
                f" process has {len(there)} already"
            )
        return there[: topology.size]
    more: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
        )
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology: {name}: libtpu knows no such slice ({' '.join(str(error).split())})"
        ) from error
