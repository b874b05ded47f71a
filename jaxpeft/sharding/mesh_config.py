"""The options of the mesh, and which batches go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxpeft.core.expressions import find_expression_fault
from jaxpeft.core.options import option
from jaxpeft.errors import nearest
from jaxpeft.sharding.sizes import AXES, ROWS, STRATEGIES, known_sizes, row_shards

if TYPE_CHECKING:
    from jaxpeft.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How a run is spread over devices: the axes of the mesh, and what lies along them
    (docs/sharding.md).
    """

    strategy: (
        Literal["replicated", "fsdp", "tensor", "fsdp_tensor", "sequence", "hybrid_fsdp"] | None
    ) = option(
        None,
        "what is spread, and how; its own axis takes all devices; None for the whole tree on each"
        " of `data` devices",
    )
    data: int | None = option(
        None,
        "devices that the rows of a batch are spread over; -1 for the rest; None for what the"
        " strategy says; without one 1, of several processes all",
        at_least=-1,
    )
    fsdp: int | None = option(
        None,
        "devices that rows and kernels are spread over, kernels gathered in use; -1 for the rest",
        at_least=-1,
    )
    tensor: int | None = option(
        None,
        "devices that heads and the feed-forward's width are spread over; -1 for the rest",
        at_least=-1,
    )
    sequence: int | None = option(
        None, "devices that the positions of a row are spread over; -1 for the rest", at_least=-1
    )
    expert: int | None = option(
        None, "devices along an axis for rules of your own; -1 for the rest", at_least=-1
    )
    slices: int = option(
        1,
        "groups of devices that a slower network joins (TPU slices, hosts); -1 for as many as the"
        " devices say",
        at_least=-1,
    )
    across: Literal["data", "fsdp"] = option("data", "the axis that goes over slices")
    rules: tuple[tuple[str, ...], ...] = option(
        (),
        "your own rules, before the strategy's: an expression of a leaf's whole path, then the axes"
        " of each of its last dimensions: '' for none, 'tensor+fsdp' for both",
    )
    offload: bool = option(
        False, "the frozen kernels of the layers in host memory, fetched a layer at a time"
    )

    def problems(self) -> list[str]:
        """List what is wrong across options."""
        given = {axis: size for axis in AXES if (size := getattr(self, axis)) is not None}
        found = [
            f"{axis}: must be -1 or at least 1, is 0" for axis, size in given.items() if size == 0
        ]
        found += ["slices: must be -1 or at least 1, is 0"] if self.slices == 0 else []
        rest = [axis for axis, size in given.items() if size == -1]
        if len(rest) > 1:
            found.append(
                f"{rest[1]}: {' and '.join(rest)} are both -1, and one axis can take the rest; give"
                " the other a size"
            )
        uses = STRATEGIES[self.strategy].axes if self.strategy else ("data",)
        for axis, size in given.items():
            if size not in (0, 1) and axis not in uses and axis not in self._named:
                those = [name for name, one in STRATEGIES.items() if axis in one.axes]
                fix = (
                    f"set mesh.strategy to {' or '.join(those)}"
                    if those
                    else "give mesh.rules that do, or leave it out"
                )
                found.append(f"{axis}: nothing of strategy {self.strategy} lies along it; {fix}")
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
                f"{self.across}: {size} does not go over {self.slices} slices evenly; it could be"
                f" {near}"
            )
        if self.strategy == "hybrid_fsdp" and self.across == "fsdp":
            found.append(
                "across: hybrid_fsdp goes over slices by data; for fsdp over slices set"
                " mesh.strategy to fsdp"
            )
        return found + self._rule_problems()

    @property
    def _named(self) -> set[str]:
        """The axes that the rules name."""
        return {axis for rule in self.rules for axes in rule[1:] for axis in axes.split("+")}

    def _rule_problems(self) -> list[str]:
        found: list[str] = []
        for i, rule in enumerate(self.rules):
            why = (
                find_expression_fault(rule[0])
                if rule
                else "is empty; begin it with an expression of a path"
            )
            found += [f"rules[{i}]: {why}"] if why else []
            named = [axis for axes in rule[1:] for axis in axes.split("+") if axes]
            for axis in named:
                if axis not in AXES:
                    found.append(
                        f"rules[{i}]: {axis!r} is no axis{nearest(axis, AXES)} (known:"
                        f" {', '.join(AXES)})"
                    )
            if len(set(named)) < len(named):
                found.append(
                    f"rules[{i}]: an axis stands there twice, in {', '.join(map(repr, rule[1:]))};"
                    " a leaf has it once"
                )
        return found

    @property
    def long_rows(self) -> bool:
        """Whether the positions of a row are spread: batches are then of lengths that are known to
        divide.
        """
        return self.strategy == "sequence" or self.sequence not in (None, 1)


def known_rows(mesh: MeshConfig) -> tuple[dict[str, int], str]:
    """Return the sizes of the axes as far as they are known without the devices, 1 elsewhere, and
    what to call those of the rows.
    """
    known = known_sizes(mesh) or {axis: max(1, getattr(mesh, axis) or 1) for axis in AXES}
    return known, " x ".join(
        f"mesh.{axis} {known[axis]}" for axis in ROWS if axis == ROWS[0] or known[axis] > 1
    )


def batch_problems(config: Config, sizes: Mapping[str, int], named: str) -> list[str]:
    """List batches that cannot be spread over a mesh evenly, as `section.field: why`.

    Args:
        config: the options.
        sizes: of the mesh's axes.
        named: what to call the devices that rows are spread over.
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
            f"train.batch_size: {size} is not divisible by {product} = {by}; it could be {near}"
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
                f"data.{field}: {n} is not divisible by mesh.sequence {positions}; it could be"
                f" {near}"
            )
    return found
