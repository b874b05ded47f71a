"""How many devices each axis of the mesh has: arithmetic alone, so that a config is checked before
JAX is imported.
"""

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
"""Every mesh has all of them, in this order: what talks most is last, between neighbors."""
ROWS = (DATA, FSDP)
"""The axes that the rows of a batch are spread over."""
MOST_TENSOR = 8
"""Beyond so many devices what tensor parallelism sends outweighs what it saves, unless it is asked
for.
"""


class Heads(NamedTuple):
    """The heads of a model's attention.

    Attributes:
        queries: how many of queries, which `tensor` must divide.
        keys: how many of keys and values; where `tensor` does not divide them, each device computes
            with all of them.
    """

    queries: int
    keys: int


@dataclass(frozen=True)
class Strategy:
    """A named way to spread a run.

    Attributes:
        own: the axis that takes all devices where no size is given; empty for one device.
        axes: those that it uses.
        about: what lies where, in one line.
    """

    own: str
    axes: tuple[str, ...]
    about: str


STRATEGIES: Mapping[str, Strategy] = {
    "replicated": Strategy(DATA, (DATA,), "the whole tree on each device, rows spread"),
    "fsdp": Strategy(
        FSDP, (DATA, FSDP), "each kernel spread, and gathered when it is used; rows spread"
    ),
    "tensor": Strategy(TENSOR, (DATA, TENSOR), "heads and the feed-forward's width spread"),
    "fsdp_tensor": Strategy(
        FSDP, (DATA, FSDP, TENSOR), "both: tensor between neighbors, fsdp over the rest"
    ),
    "sequence": Strategy(
        SEQUENCE, (DATA, FSDP, SEQUENCE, TENSOR), "positions of a row spread, for long rows"
    ),
    "hybrid_fsdp": Strategy(
        FSDP, (DATA, FSDP, TENSOR), "fsdp within a host or slice, whole copies across them"
    ),
}


def row_shards(sizes: Mapping[str, int]) -> int:
    """Return over how many devices the rows of a batch are spread, from the size of each axis."""
    return math.prod(sizes[axis] for axis in ROWS)


def sizes(
    mesh: MeshConfig, devices: int, groups: int = 1, heads: Heads | None = None
) -> dict[str, int]:
    """Return the size of each axis.

    Args:
        mesh: the options.
        devices: how many there are.
        groups: how many groups a slower network joins, as the devices say.
        heads: of the model, which `tensor` divides; None where not known.

    Returns:
        The sizes by axis, in the order of the mesh; their product is at most `devices`.

    Raises:
        ConfigError: they do not go with so many devices.
    """
    if mesh.slices > 1 and devices % mesh.slices:
        near = [n for n in divisors(devices) if abs(n - mesh.slices) <= mesh.slices]
        raise ConfigError(
            f"mesh.slices: {mesh.slices} groups, and {devices} devices are no multiple of that; it"
            f" could be {_or(nearest(near, mesh.slices))}"
        )
    wanted = _requested(mesh, devices, groups, heads)
    given = {axis: size for axis, size in wanted.items() if size != -1}
    used = math.prod(given.values())
    rest = next((axis for axis, size in wanted.items() if size == -1), None)
    if used > devices:
        raise ConfigError(_too_many(given, devices))
    if rest is not None:
        if devices % used:
            raise ConfigError(_no_rest(rest, given, devices))
        wanted[rest] = devices // used
    if heads is not None and heads.queries % wanted[TENSOR]:
        fits = [n for n in divisors(devices) if heads.queries % n == 0]
        raise ConfigError(
            f"mesh.tensor: {wanted[TENSOR]} does not divide the {heads.queries} heads of the model;"
            f" it could be {_or(nearest(fits, wanted[TENSOR]))}"
        )
    return {axis: wanted[axis] for axis in AXES}


def divisors(n: int) -> list[int]:
    """Return the whole numbers that divide one of at least 1, ascending; it takes as many steps as
    its root is large.
    """
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def nearest(fits: Sequence[int], wanted: int, most: int = 2) -> list[int]:
    """Return those numbers that are nearest to the wanted one, ascending."""
    return sorted(sorted(fits, key=lambda n: (abs(n - wanted), n))[:most])


def _or(values: list[int]) -> str:
    return " or ".join(map(str, values))


def known_sizes(mesh: MeshConfig) -> dict[str, int] | None:
    """Return the sizes where they do not depend on the devices, None where they do."""
    wanted = _requested(mesh, 0, 1, None)
    return None if -1 in wanted.values() or 0 in wanted.values() else wanted


def _requested(mesh: MeshConfig, devices: int, groups: int, heads: Heads | None) -> dict[str, int]:
    """Return the size of each axis, -1 of at most one that takes the rest; with 0 devices 0 for
    what depends on them.
    """
    given = {axis: size for axis in AXES if (size := getattr(mesh, axis)) is not None}
    found = {axis: given.get(axis, 1) for axis in AXES}
    if mesh.strategy is None:
        if groups > 1 and DATA not in given and -1 not in given.values():
            found[DATA] = -1  # each process has devices, and all of them must be in the mesh
        return found
    left = devices // math.prod(size for size in given.values() if size > 0)
    if mesh.strategy == "fsdp_tensor" and TENSOR not in given:
        found[TENSOR] = (
            _tensor(left, MOST_TENSOR, None if heads is None else heads.keys) if left else 0
        )
    if (
        mesh.strategy == "tensor"
        and heads is not None
        and TENSOR not in given
        and DATA not in given
    ):
        found[TENSOR] = given[TENSOR] = _tensor(left, left, heads.queries) if left else 0
    across = groups if mesh.slices == 1 else mesh.slices
    if mesh.strategy == "hybrid_fsdp" and DATA not in given and given.get(FSDP, -1) == -1:
        found[DATA] = (groups if across == -1 else across) if devices else 0
        given[DATA] = found[DATA]
    if -1 not in found.values():
        own = STRATEGIES[mesh.strategy].own
        axis = own if own not in given else DATA if DATA not in given else None
        if axis is not None:
            found[axis] = -1
    return found


def _tensor(devices: int, most: int, heads: int | None) -> int:
    """Return the largest size of `tensor` that divides the devices and the heads, and is no more
    than `most`.
    """
    return max(n for n in divisors(devices) if n <= most and (heads is None or heads % n == 0))


def _too_many(given: Mapping[str, int], devices: int) -> str:
    """Say that the sizes need more devices than there are, and what the largest of them could
    be.
    """
    large = {axis: size for axis, size in given.items() if size > 1}
    axis = max(large, key=large.__getitem__)
    if len(large) == 1:
        return (
            f"mesh.{axis}: {large[axis]} devices, there are {devices}; set it to {devices} or less,"
            " or to -1"
        )
    product = " x ".join(f"{name} {size}" for name, size in large.items())
    others = math.prod(large.values()) // large[axis]
    fix = (
        f"mesh.{axis} could be {devices // others} or less"
        if others <= devices
        else "make them smaller"
    )
    return f"mesh: {product} = {math.prod(large.values())} devices, there are {devices}; {fix}"


def _no_rest(rest: str, given: Mapping[str, int], devices: int) -> str:
    """Say that nothing whole is left for the axis that takes the rest, and the nearest sizes of
    another that leave it.
    """
    large = {axis: size for axis, size in given.items() if size > 1}
    product = " x ".join(f"{axis} {size}" for axis, size in large.items())
    used = math.prod(large.values())
    axis = max(large, key=large.__getitem__)
    others = used // large[axis]
    fits = divisors(devices // others) if devices % others == 0 else []
    near = nearest(fits, large[axis])
    fix = f"mesh.{axis} could be {_or(near)}" if near else "choose divisors of the devices"
    return (
        f"mesh.{rest}: takes the rest, and {devices} devices / ({product} = {used}) is no whole"
        f" number; {fix}"
    )
