"""Collectives of a compiled program: kinds, counts, bytes and mesh axes."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxpeft.plan.hlo import Instruction, Program

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_EXPLICIT = re.compile(r"replica_groups=\{(\{[\d,\{\} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\],?\s*(?:device_ids=\((.*?)\)\s*)?\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_IDS = re.compile(r"\{([\d, ]+)\}")
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same axes.

    Attributes:
        kind: kind of collective, such as `all-gather`.
        axes: mesh axes, joined by `+`; `none` for groups of one device.
        count: number of runs per step, counting every loop iteration.
        nbytes: total bytes of the complete arrays gathered, reduced or sent, per device.
        wire: bytes that one device sends in a ring: `(n - 1) / n` of `nbytes`, twice that for an
            all-reduce.
        group: number of devices per group.
    """

    kind: str
    axes: str
    count: int
    nbytes: int
    wire: int
    group: int


def collectives(
    program: Program, mesh: Mapping[str, int], across: str = "none", slices: int = 1
) -> tuple[Collective, ...]:
    """Find the collectives of a program.

    Args:
        program: program compiled for the devices of a mesh, in mesh order.
        mesh: size of each axis, in order.
        across: axes across slices; communication between TPU slices is sent through the hosts.
        slices: number of slices.

    Returns:
        The collectives, most bytes first. One that the compiler splits over several fusions counts
        once.
    """
    seen: set[tuple[str, str]] = set()
    sums: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, times in program.runs.items():
        for one in program.computations[name].values():
            between = _BETWEEN.search(one.text) if one.opcode == "send" else None
            kind = (
                between.group(1).lower().replace("_", "-")
                if between
                else one.opcode.removesuffix("-start")
            )
            channel = _CHANNEL.search(one.text)
            mark = (kind, channel.group(1)) if channel else (name, one.name)
            if kind not in KINDS or not times or mark in seen:
                continue
            seen.add(mark)
            # a TPU program expresses a reduce-scatter as an all-reduce followed by a slice
            kind = (
                "reduce-scatter"
                if kind == "all-reduce" and name.startswith("all-reduce-scatter")
                else kind
            )
            size = _payload(program, name, one, kind)
            if between:
                axes, n = across, slices
            else:
                groups = groups_of(one.text, int(np.prod(list(mesh.values()))))
                axes, n = axes_of(groups, mesh), len(groups[0]) if groups else 1
                if kind == "collective-permute":  # its groups are pairs of neighbors
                    n = math.prod(mesh.get(axis, 1) for axis in axes.split("+"))
            entry = sums[kind, axes, n]
            entry[0] += times
            entry[1] += times * size
            entry[2] += times * _wire(kind, size, n)
    found = [Collective(kind, axes, *entry, group=n) for (kind, axes, n), entry in sums.items()]
    return tuple(sorted(found, key=lambda one: -one.wire))


def _payload(program: Program, computation: str, one: Instruction, kind: str) -> int:
    """Return the bytes of the complete array: the output of an all-gather, the input of others."""
    inputs = sum(operand.nbytes for operand in program.operands(computation, one))
    if kind != "all-gather" or one.opcode == "send":
        return inputs or one.nbytes
    # the result of a `-start` includes its operand
    return one.nbytes - inputs if one.opcode.endswith("-start") else one.nbytes


def _wire(kind: str, size: int, n: int) -> int:
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    return int(size * (n - 1) / n * (2 if kind == "all-reduce" else 1))


def groups_of(text: str, devices: int) -> Groups:
    """Parse the device groups of a collective.

    Args:
        text: attributes of the instruction. Groups are listed, or an iota that is reshaped and
            transposed, or axes of a mesh; those of a permute are pairs.
        devices: number of devices in the single group, if no groups are given.
    """
    pairs = _PAIRS.search(text)
    if pairs:
        return _numbers(pairs.group(1))
    iota = _IOTA.search(text)
    if iota:
        return _iota(*iota.groups())
    named = _MESH.search(text)
    if named:
        return _of_mesh(*named.groups())
    explicit = _EXPLICIT.search(text)
    return _numbers(explicit.group(1)) if explicit else (tuple(range(devices)),)


def _numbers(text: str) -> Groups:
    return tuple(tuple(int(n) for n in ids.split(",")) for ids in _IDS.findall(text))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(shape: str, dims: str, order: str | None) -> Groups:
    sizes = _ints(dims)
    ids = np.arange(int(np.prod(sizes))).reshape(sizes)
    ids = ids if order is None else ids.transpose(_ints(order))
    return _rows(ids.reshape(_ints(shape)))


def _of_mesh(mesh: str, order: str | None, axes: str) -> Groups:
    """Parse groups such as `mesh['a'=4,'b'=2] {'a'}`: devices of a group differ only along `a`."""
    names = re.findall(r"'([^']*)'=(\d+)", mesh)
    sizes = [int(n) for _, n in names]
    ids = np.arange(int(np.prod(sizes))) if order is None else _read_order(order)
    together = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)
    sizes, split = _split(names, together)
    ids = ids.reshape(sizes)
    moved = [i for i, on in enumerate(split) if not on] + [i for i, on in enumerate(split) if on]
    n = int(np.prod([size for size, on in zip(sizes, split, strict=True) if on]))
    return _rows(ids.transpose(moved).reshape(-1, n))


def _read_order(text: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Parse the devices of a mesh: listed, or an iota that is reshaped and transposed."""
    shuffled = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if shuffled is None:
        return np.array(_ints(text))
    base = np.arange(int(np.prod(_ints(shuffled.group(1))))).reshape(_ints(shuffled.group(1)))
    return (
        base if shuffled.group(2) is None else base.transpose(_ints(shuffled.group(2)))
    ).reshape(-1)


def _split(
    names: Sequence[tuple[str, str]], together: Sequence[tuple[str, str, str]]
) -> tuple[list[int], list[bool]]:
    """Split axes of which only a part is used: `'a':(2)4` is a sub-axis of size 4 whose major
    (outer) part has size 2.
    """
    sizes: list[int] = []
    on: list[bool] = []
    for name, size in names:
        parts = sorted((int(before), int(n)) for axis, before, n in together if axis == name and n)
        done = 1
        for before, n in parts:
            sizes += [before // done, n]
            on += [False, True]
            done = before * n
        sizes.append(int(size) // done)
        on.append(not parts and any(axis == name for axis, _, _ in together))
    return sizes, on


def _rows(ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Groups:
    return tuple(tuple(int(n) for n in row) for row in ids)


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> str:
    """Return the axes along which members of groups differ, or `none`."""
    places = np.array(
        np.unravel_index(np.arange(int(np.prod(list(mesh.values())))), tuple(mesh.values()))
    )
    differ = np.zeros(len(mesh), bool)
    for group in groups:
        own = places[:, list(group)]
        differ |= (own != own[:, :1]).any(axis=1)
    return "+".join(name for name, on in zip(mesh, differ, strict=True) if on) or "none"
