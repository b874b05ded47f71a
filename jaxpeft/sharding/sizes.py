"""Sizes of the mesh axes, computed without JAX, so that a config is checked before importing it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from jaxpeft.errors import ConfigError

if TYPE_CHECKING:
    from jaxpeft.config.schema import MeshConfig

DATA, FSDP, EXPERT, SEQUENCE, TENSOR = "data", "fsdp", "expert", "sequence", "tensor"
AXES = (DATA, FSDP, EXPERT, SEQUENCE, TENSOR)
"""Axes of every mesh; those with most communication are last, so that they connect neighbors."""
ROWS = (DATA, FSDP)
"""Axes that the rows of a batch are sharded over."""
MOST_TENSOR = 8
"""Maximum automatic `tensor` size; beyond it, communication outweighs the savings."""


class Heads(NamedTuple):
    """The heads of a model's attention.

    Attributes:
        queries: number of query heads, which `tensor` must divide.
        keys: number of key/value heads; if `tensor` does not divide it, each device computes all.
    """

    queries: int
    keys: int


@dataclass(frozen=True)
class Strategy:
    """A sharding strategy.

    Attributes:
        own: main axis, which uses all devices if no size is given.
        axes: axes that it uses.
        about: one-line description.
    """

    own: str
    axes: tuple[str, ...]
    about: str


STRATEGIES: Mapping[str, Strategy] = {
    "replicated": Strategy(DATA, (DATA,), "tree replicated, rows sharded"),
    "fsdp": Strategy(FSDP, (DATA, FSDP), "kernels sharded and gathered for use, rows sharded"),
    "tensor": Strategy(TENSOR, (DATA, TENSOR), "attention heads and feed-forward width sharded"),
    "fsdp_tensor": Strategy(
        FSDP, (DATA, FSDP, TENSOR), "tensor between neighbors, fsdp over the rest"
    ),
    "sequence": Strategy(
        SEQUENCE, (DATA, FSDP, SEQUENCE, TENSOR), "positions of a row sharded, for long rows"
    ),
    "hybrid_fsdp": Strategy(
        FSDP, (DATA, FSDP, TENSOR), "fsdp within a host or slice, replicated across them"
    ),
}


def row_shards(sizes: Mapping[str, int]) -> int:
    """Return the number of devices that rows are sharded over, from the axis sizes."""
    return math.prod(sizes[axis] for axis in ROWS)


def sizes(
    mesh: MeshConfig, devices: int, groups: int = 1, heads: Heads | None = None
) -> dict[str, int]:
    """Return the size of each axis.

    Args:
        mesh: mesh options.
        devices: number of devices.
        groups: number of device groups connected by a slower network.
        heads: heads of the model, which `tensor` divides; None if unknown.

    Returns:
        Sizes by axis, in mesh order; their product is at most `devices`.

    Raises:
        ConfigError: the sizes do not fit the number of devices.
    """
    if mesh.slices > 1 and devices % mesh.slices:
        near = [n for n in divisors(devices) if abs(n - mesh.slices) <= mesh.slices]
        raise ConfigError(
            f"mesh.slices: {mesh.slices} does not divide {devices} devices; set it to"
            f" {_or(nearest(near, mesh.slices))}"
        )
    requested = _requested_sizes(mesh, devices, groups, heads)
    explicit = {axis: size for axis, size in requested.items() if size != -1}
    used = math.prod(explicit.values())
    rest = next((axis for axis, size in requested.items() if size == -1), None)
    if used > devices:
        raise ConfigError(_too_many(explicit, devices))
    if rest is not None:
        if devices % used:
            raise ConfigError(_no_rest(rest, explicit, devices))
        requested[rest] = devices // used
    if heads is not None and heads.queries % requested[TENSOR]:
        fits = [n for n in divisors(devices) if heads.queries % n == 0]
        raise ConfigError(
            f"mesh.tensor: {requested[TENSOR]} does not divide the model's {heads.queries} heads;"
            f" set it to {_or(nearest(fits, requested[TENSOR]))}"
        )
    return {axis: requested[axis] for axis in AXES}


def divisors(n: int) -> list[int]:
    """Return the divisors of `n` (at least 1) in ascending order, in O(sqrt(n))."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def nearest(fits: Sequence[int], wanted: int, most: int = 2) -> list[int]:
    """Return the numbers nearest to `wanted`, ascending."""
    return sorted(sorted(fits, key=lambda n: (abs(n - wanted), n))[:most])


def _or(values: list[int]) -> str:
    return " or ".join(map(str, values))


def known_sizes(mesh: MeshConfig) -> dict[str, int] | None:
    """Return the sizes if they do not depend on the devices, else None."""
    requested = _requested_sizes(mesh, 0, 1, None)
    return None if -1 in requested.values() or 0 in requested.values() else requested


def _requested_sizes(
    mesh: MeshConfig, devices: int, groups: int, heads: Heads | None
) -> dict[str, int]:
    """Return the size of each axis, with -1 for at most one axis that takes the rest; if `devices`
    is 0, sizes that depend on it are 0.
    """
    explicit = {axis: size for axis in AXES if (size := getattr(mesh, axis)) is not None}
    found = {axis: explicit.get(axis, 1) for axis in AXES}
    if mesh.strategy is None:
        if groups > 1 and DATA not in explicit and -1 not in explicit.values():
            found[DATA] = -1  # the mesh must contain the devices of every process
        return found
    remaining = devices // math.prod(size for size in explicit.values() if size > 0)
    if mesh.strategy == "fsdp_tensor" and TENSOR not in explicit:
        found[TENSOR] = (
            _tensor(remaining, MOST_TENSOR, None if heads is None else heads.keys)
            if remaining
            else 0
        )
    if (
        mesh.strategy == "tensor"
        and heads is not None
        and TENSOR not in explicit
        and DATA not in explicit
    ):
        found[TENSOR] = explicit[TENSOR] = (
            _tensor(remaining, remaining, heads.queries) if remaining else 0
        )
    across = groups if mesh.slices == 1 else mesh.slices
    if mesh.strategy == "hybrid_fsdp" and DATA not in explicit and explicit.get(FSDP, -1) == -1:
        found[DATA] = (groups if across == -1 else across) if devices else 0
        explicit[DATA] = found[DATA]
    if -1 not in found.values():
        own = STRATEGIES[mesh.strategy].own
        axis = own if own not in explicit else DATA if DATA not in explicit else None
        if axis is not None:
            found[axis] = -1
    return found


def _tensor(devices: int, most: int, heads: int | None) -> int:
    """Return the largest `tensor` size up to `most` that divides the devices and the heads."""
    return max(n for n in divisors(devices) if n <= most and (heads is None or heads % n == 0))


def _too_many(explicit: Mapping[str, int], devices: int) -> str:
    """Return a message that the sizes need more devices than exist, with a fix."""
    large = {axis: size for axis, size in explicit.items() if size > 1}
    axis = max(large, key=large.__getitem__)
    if len(large) == 1:
        return (
            f"mesh.{axis}: needs {large[axis]} devices, there are {devices}; set it to {devices} or"
            " less, or to -1"
        )
    product = " x ".join(f"{name} {size}" for name, size in large.items())
    others = math.prod(large.values()) // large[axis]
    fix = (
        f"set mesh.{axis} to {devices // others} or less"
        if others <= devices
        else "make them smaller"
    )
    total = math.prod(large.values())
    return f"mesh: {product} needs {total} devices, there are {devices}; {fix}"


def _no_rest(rest: str, explicit: Mapping[str, int], devices: int) -> str:
    """Return a message that the rest of the devices is no integer, with the nearest valid sizes."""
    large = {axis: size for axis, size in explicit.items() if size > 1}
    product = " x ".join(f"{axis} {size}" for axis, size in large.items())
    used = math.prod(large.values())
    axis = max(large, key=large.__getitem__)
    others = used // large[axis]
    fits = divisors(devices // others) if devices % others == 0 else []
    near = nearest(fits, large[axis])
    fix = f"set mesh.{axis} to {_or(near)}" if near else "choose divisors of the devices"
    return (
        f"mesh.{rest}: takes the rest, but {devices} devices are not divisible by {product} ="
        f" {used}; {fix}"
    )
