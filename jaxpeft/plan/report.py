"""A plan as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpeft.chips import GIB
from jaxpeft.plan.collectives import Collective
from jaxpeft.plan.roofline import Roofline

VERSION = 1
"""Of the JSON; a field that is renamed or means something else makes it the next."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        base: the leaves of the base, as they lie on it.
        adapters: the leaves that the method adds.
        optimizer: its state.
        activations: what the forward pass keeps for the backward pass, estimated from one layer's
            program.
        temporaries: all else: the layer at work, gathered kernels, gradients, the batch, padding,
            the program.
        total: of all.
        limit: that a step may take; None where nothing tells.
    """

    base: int
    adapters: int
    optimizer: int
    activations: int
    temporaries: int
    total: int
    limit: int | None


@dataclass(frozen=True)
class Row:
    """What is known of a run under one strategy.

    Attributes:
        strategy: its name.
        change: what differs from the config, such as `train.accumulation 2`; empty for nothing.
        mesh: sizes of the axes.
        batch_size: rows of an optimizer step.
        accumulation: parts that they are computed in.
        remat: what the backward pass computes again.
        quant: number format of the base.
        attention: the kernel that computes attention.
        fits: whether it runs; None where no limit is known.
        verdict: that in words.
        memory: None where the strategy is refused.
        collectives: None where no program could be read.
        flops: of one device and step, with what is computed again; None where no program could be
            read.
        model_flops: of all devices together, without that.
        traffic: bytes between one device and its memory.
        roofline: None where chip or program are not known.
        seconds: that compiling took.
        notes: what else is to be said.
        nearest: the nearest change that fits, compiled; None where nothing is to be changed, or
            nothing tried fits.
        tried: changes that were compiled, or ruled out by the bytes of their arguments, and do not
            fit.
    """

    strategy: str
    change: str
    mesh: Mapping[str, int]
    batch_size: int
    accumulation: int
    remat: str
    quant: str
    attention: str
    fits: bool | None
    verdict: str
    memory: Memory | None = None
    collectives: tuple[Collective, ...] | None = None
    flops: float | None = None
    model_flops: float | None = None
    traffic: int | None = None
    roofline: Roofline | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    nearest: Row | None = None
    tried: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A run on a topology, under several strategies.

    Attributes:
        config: path of the config file.
        model: sizes of the model.
        method: the fine-tuning method.
        parameters: of the base.
        trained: parameters that are trained.
        topology: name of the devices.
        devices: how many.
        chip: their figures.
        length: tokens a row.
        layers: `scanned` or `unrolled`: how the layers were compiled.
        programs: what the programs were compiled for, in words.
        seconds: that the whole plan took.
        cpu_seconds: of all cores together.
        versions: of jax and, for TPUs, libtpu.
        rows: one a strategy.
    """

    config: str
    model: Mapping[str, Any]
    method: str
    parameters: int
    trained: int
    topology: str
    devices: int
    chip: Mapping[str, Any]
    length: int
    layers: str
    programs: str
    seconds: float
    cpu_seconds: float
    versions: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        """The row that fits and takes the least time; of rows without a time the one that takes
        least memory.
        """
        fitting = [row for row in self.rows if row.fits is not False and row.memory is not None]
        timed = [row for row in fitting if row.roofline is not None]
        if timed:
            return min(timed, key=lambda row: row.roofline.seconds if row.roofline else 0.0)
        return min(fitting, key=lambda row: row.memory.total if row.memory else 0, default=None)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain JSON values."""
    best = plan.best
    return {"version": VERSION, **dataclasses.asdict(plan), "best": best.strategy if best else None}


def as_table(plan: Plan) -> str:
    """Write a plan for a terminal."""
    head = (
        f"{plan.method} on {plan.parameters / 1e9:.2f} B parameters ({plan.trained / 1e6:.1f} M"
        f" trained), rows of {plan.length} tokens, on {plan.topology} ({plan.devices}"
        f" devices)\nlayers {plan.layers}; {plan.programs}"
    )
    columns = (
        "strategy",
        "mesh",
        "rows",
        "remat",
        "base",
        "adapters",
        "optimizer",
        "activations",
        "temporaries",
        "total",
        "of",
        "TFLOP",
        "step",
        "bound by",
        "tokens/s",
        "MFU",
        "",
    )
    parts = [
        head,
        _align([columns, *(_cells(row) for row in _with_nearest(plan.rows))]),
        _talk(plan.rows),
    ]
    best = plan.best
    parts.append(f"best: {best.strategy}" if best else "best: none of these fits")
    parts.append(
        f"memory in GiB of one device; {plan.seconds:.0f} s in all, {plan.cpu_seconds:.0f} s of a"
        " core"
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _with_nearest(rows: Sequence[Row]) -> list[Row]:
    return [one for row in rows for one in (row, row.nearest) if one is not None]


def _cells(row: Row) -> tuple[str, ...]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in row.mesh.items() if size > 1) or (
        "one device" if row.mesh else ""
    )
    parts = (
        f"{row.batch_size}" if row.accumulation == 1 else f"{row.batch_size} in {row.accumulation}"
    )
    memory = row.memory
    name = row.strategy if not row.change else f"  {row.change}"
    if memory is None:
        return (name, mesh, parts, row.remat, *[""] * 12, "refused")
    sizes = (
        memory.base,
        memory.adapters,
        memory.optimizer,
        memory.activations,
        memory.temporaries,
        memory.total,
    )
    roof = row.roofline
    return (
        name,
        mesh,
        parts,
        row.remat,
        *(f"{n / GIB:.2f}" for n in sizes),
        f"{memory.limit / GIB:.2f}" if memory.limit else "?",
        f"{row.flops / 1e12:.1f}" if row.flops is not None else "?",
        *(
            (
                f"{1e3 * roof.seconds:.1f} ms",
                roof.bound,
                f"{roof.tokens_per_second:,.0f}",
                f"{roof.mfu:.0%}",
            )
            if roof
            else ("?",) * 4
        ),
        _short(row),
    )


def _short(row: Row) -> str:
    """Return in a few words whether a row fits."""
    memory = row.memory
    if row.fits is None or memory is None or memory.limit is None:
        return "no limit"
    over = (memory.total - memory.limit) / GIB
    return "fits" if row.fits else f"{over:.2f} over" if over > 0 else "too full"


def _talk(rows: Sequence[Row]) -> str:
    """Write the collectives of each row, and its notes."""
    lines: list[str] = []
    for row in _with_nearest(rows):
        name = f"{row.strategy}, {row.change}" if row.change else row.strategy
        lines += [f"{name}: {row.verdict}"] if row.fits is not True else []
        for one in (row.collectives or ())[:8]:
            lines.append(
                f"{name}: {one.count} {one.kind} over {one.axes} ({one.group} devices),"
                f" {one.nbytes / GIB:.3f} GiB, {one.wire / GIB:.3f} GiB sent"
            )
        if row.collectives is not None and len(row.collectives) > 8:
            lines.append(f"{name}: {len(row.collectives) - 8} more kinds, smaller; --json has them")
        lines += [f"{name}: {note}" for note in row.notes]
        lines += [f"{name}: tried, and does not fit: {what}" for what in row.tried]
    return "\n".join(lines)


def _align(lines: Sequence[Sequence[str]]) -> str:
    """Pad columns to their widest cell: words on the left, numbers on the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = (0, 1, 2, 3, 13, len(widths) - 1)
    return "\n".join(
        "  ".join(
            cell.ljust(n) if i in left else cell.rjust(n)
            for i, (cell, n) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
