"""Options of the mesh, and checks of batch sizes against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxpeft.choices import Strategy
from jaxpeft.core.expressions import find_expression_fault
from jaxpeft.core.options import option
from jaxpeft.errors import nearest
from jaxpeft.sharding.sizes import AXES, ROWS, STRATEGIES, known_sizes, row_shards

if TYPE_CHECKING:
    from jaxpeft.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How a run is sharded over devices: axes of the mesh, and rules (docs/sharding.md)."""

    strategy: Strategy | None = option(
        None,
        "sharding strategy, whose main axis uses all devices; None replicates the tree on `data`"
        " devices",
    )
    data: int | None = option(
        None,
        "devices that rows are sharded over; -1 for the rest; None for the strategy's default"
        " (without a strategy 1, or all in a multi-process run)",
        at_least=-1,
    )
    fsdp: int | None = option(
        None,
        "devices that rows and kernels are sharded over, with kernels gathered for use; -1 for the"
        " rest",
        at_least=-1,
    )
    tensor: int | None = option(
        None,
        "devices that attention heads and feed-forward width are sharded over; -1 for the rest",
        at_least=-1,
    )
    sequence: int | None = option(
        None, "devices that positions of a row are sharded over; -1 for the rest", at_least=-1
    )
    expert: int | None = option(
        None, "devices of an axis for user-defined rules; -1 for the rest", at_least=-1
    )
    slices: int = option(
        1,
        "groups of devices connected by a slower network (TPU slices, hosts); -1 to detect them",
        at_least=-1,
    )
    across: Literal["data", "fsdp"] = option("data", "axis that crosses slices")
    rules: tuple[tuple[str, ...], ...] = option(
        (),
        "user-defined rules, before the strategy's: a regular expression for a leaf's full path,"
        " then the axes of each of its last dimensions ('' for none, 'tensor+fsdp' for both)",
    )
    offload: bool = option(
        False, "store the frozen kernels of layers in host memory, and fetch them layer by layer"
    )

    def problems(self) -> list[str]:
        """List problems across options."""
        sizes = {axis: size for axis in AXES if (size := getattr(self, axis)) is not None}
        found = [
            f"{axis}: must be -1 or at least 1, is 0" for axis, size in sizes.items() if size == 0
        ]
        found += ["slices: must be -1 or at least 1, is 0"] if self.slices == 0 else []
        rest = [axis for axis, size in sizes.items() if size == -1]
        if len(rest) > 1:
            found.append(
                f"{rest[1]}: {' and '.join(rest)} are both -1, but only one axis can take the rest;"
                " give the other a size"
            )
        uses = STRATEGIES[self.strategy].axes if self.strategy else ("data",)
        for axis, size in sizes.items():
            if size not in (0, 1) and axis not in uses and axis not in self._named:
                using = [name for name, one in STRATEGIES.items() if axis in one.axes]
                fix = (
                    f"set mesh.strategy to {' or '.join(using)}"
                    if using
                    else "use it in mesh.rules, or remove it"
                )
                found.append(f"{axis}: is not used by strategy {self.strategy}; {fix}")
        size = getattr(self, self.across)
        if self.slices > 1 and size is not None and size > 0 and size % self.slices:
            near = " or ".join(
                str(n)
                for n in (
                    size // self.slices * self.slices,
                    (size // self.slices + 1) * self.slices,
                )
                if n
            )
            found.append(
                f"{self.across}: {size} is not divisible by {self.slices} slices; set it to {near}"
            )
        if self.strategy == "hybrid_fsdp" and self.across == "fsdp":
            found.append(
                "across: hybrid_fsdp crosses slices along data; to shard along fsdp across slices,"
                " set mesh.strategy to fsdp"
            )
        return found + self._rule_problems()

    @property
    def _named(self) -> set[str]:
        """The axes in the rules."""
        return {axis for rule in self.rules for axes in rule[1:] for axis in axes.split("+")}

    def _rule_problems(self) -> list[str]:
        found: list[str] = []
        for i, rule in enumerate(self.rules):
            why = (
                find_expression_fault(rule[0])
                if rule
                else "is empty; start it with a regular expression for a path"
            )
            found += [f"rules[{i}]: {why}"] if why else []
            named = [axis for axes in rule[1:] for axis in axes.split("+") if axes]
            for axis in named:
                if axis not in AXES:
                    found.append(
                        f"rules[{i}]: {axis!r} is not an axis{nearest(axis, AXES)} (known:"
                        f" {', '.join(AXES)})"
                    )
            if len(set(named)) < len(named):
                found.append(
                    f"rules[{i}]: uses an axis twice, in {', '.join(map(repr, rule[1:]))}; use each"
                    " axis once per leaf"
                )
        return found

    @property
    def long_rows(self) -> bool:
        """Whether positions are sharded, so that batches need lengths known to be divisible."""
        return self.strategy == "sequence" or self.sequence not in (None, 1)


def known_rows(mesh: MeshConfig) -> tuple[dict[str, int], str]:
    """Return the axis sizes known without the devices, with 1 for unknown ones, and a description
    of the row axes.
    """
    known = known_sizes(mesh) or {axis: max(1, getattr(mesh, axis) or 1) for axis in AXES}
    return known, " x ".join(
        f"mesh.{axis} {known[axis]}" for axis in ROWS if axis == ROWS[0] or known[axis] > 1
    )


def batch_problems(config: Config, sizes: Mapping[str, int], named: str) -> list[str]:
    """List batches that cannot be sharded evenly over a mesh, as `section.field: why`.

    Args:
        config: config of the run.
        sizes: size of each mesh axis.
        named: description of the devices that rows are sharded over.
    """
    found: list[str] = []
    over, parts = row_shards(sizes), config.train.accumulation
    size, by = config.train.batch_size, over * parts
    if size % by and size % parts == 0:
        near = " or ".join(str(n) for n in (size // by * by, (size // by + 1) * by) if n)
        product = (
            f"{named} x accumulation {parts}" if parts > 1 or named.startswith("mesh") else named
        )
        found.append(
            f"train.batch_size: {size} is not divisible by {product} = {by}; set it to {near}"
        )
    length, positions = config.data.max_length, sizes["sequence"]
    for field, n in (
        ("max_length", length),
        *(("lengths", n) for n in config.data.lengths if n != length),
    ):
        if n % positions:
            near = " or ".join(
                str(m) for m in (n // positions * positions, (n // positions + 1) * positions) if m
            )
            found.append(
                f"data.{field}: {n} is not divisible by mesh.sequence {positions}; set it to {near}"
            )
    return found
