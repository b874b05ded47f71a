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
"""Version of the JSON; increased when a field is renamed or changes its meaning."""


@dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
        base: leaves of the base, as stored.
        adapters: adapter leaves.
        optimizer: optimizer state.
        activations: activations saved for the backward pass, estimated from one layer's program.
        temporaries: everything else: current layer, gathered kernels, gradients, batch, padding,
            program.
        total: total bytes.
        limit: bytes a step may use; None if unknown.
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
    """Plan of a run under one strategy.

    Attributes:
        strategy: name of the strategy.
        change: change from the config, such as `train.accumulation 2`; empty if unchanged.
        mesh: size of each mesh axis.
        batch_size: rows per optimizer step.
        accumulation: number of micro-batches.
        remat: remat policy.
        quant: quantization format of the base.
        attention: attention kernel.
        fits: whether it fits; None if the limit is unknown.
        verdict: `fits` in words.
        memory: memory per device; None if the strategy is rejected.
        collectives: collectives; None if the program could not be read.
        flops: FLOPs per device and step, including recomputation; None if the program could not be
            read.
        model_flops: model FLOPs of all devices, without recomputation.
        traffic: bytes read from and written to one device's memory.
        roofline: roofline; None if chip or program are unknown.
        seconds: compile time.
        notes: further notes.
        nearest: nearest change that fits; None if no change is needed or none fits.
        tried: changes that do not fit, compiled or estimated.
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
        method: fine-tuning method.
        parameters: number of base parameters.
        trained: number of trainable parameters.
        topology: name of the topology.
        devices: number of devices.
        chip: properties of the chip.
        length: tokens per row.
        layers: `scanned` or `unrolled`, as compiled.
        programs: description of the compilation target.
        seconds: wall-clock time of the plan.
        cpu_seconds: CPU time of the plan.
        versions: versions of jax and, for TPUs, libtpu.
        rows: one row per strategy.
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
        """The fitting row with the least time or, if no times are known, the least memory."""
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
    """Format a plan for a terminal."""
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
        _details(plan.rows),
    ]
    best = plan.best
    parts.append(f"best: {best.strategy}" if best else "best: none (no strategy fits)")
    parts.append(
        f"memory in GiB per device; planned in {plan.seconds:.0f} s ({plan.cpu_seconds:.0f} s of"
        " CPU time)"
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
    """Return a short verdict of a row."""
    memory = row.memory
    if row.fits is None or memory is None or memory.limit is None:
        return "no limit"
    over = (memory.total - memory.limit) / GIB
    return "fits" if row.fits else f"{over:.2f} over" if over > 0 else "too full"


def _details(rows: Sequence[Row]) -> str:
    """Format the collectives and notes of each row."""
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
            lines.append(f"{name}: {len(row.collectives) - 8} smaller kinds omitted; see --json")
        lines += [f"{name}: {note}" for note in row.notes]
        lines += [f"{name}: tried, does not fit: {what}" for what in row.tried]
    return "\n".join(lines)


def _align(lines: Sequence[Sequence[str]]) -> str:
    """Align columns: words to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = (0, 1, 2, 3, 13, len(widths) - 1)
    return "\n".join(
        "  ".join(
            cell.ljust(n) if i in left else cell.rjust(n)
            for i, (cell, n) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
