"""Parse the HLO text of a compiled program: computations, instructions, and how often each runs.

An instruction is `%name = shape opcode(%operand, ...), attribute=value, ...`; a computation is a
name and instructions in braces. The loop of a scan counts up to a constant, which its condition
compares with or an attribute names.

This parser exists because XLA's is not part of JAX's public API, and `Compiled.cost_analysis`
counts a loop's body once and does not list collectives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_BITS: Mapping[str, int] = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8, "s16": 16,
    "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64,
    "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(
    r"\b(pred|token|opaque|bf16|[sufc]\d+(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](?:\{([^{}]*)\})?"
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%([\w.\-]+)")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)
_INDEX = re.compile(r"\bindex=(\d+)")
_TRIPS = re.compile(r"known_trip_count[\"']?:?=?\s*\{[\"']?n[\"']?\s*:\s*[\"']?(\d+)")


@dataclass(frozen=True)
class Array:
    """An array, or an element of a tuple.

    Attributes:
        dtype: HLO dtype, such as `bf16`.
        dims: shape per device.
        space: memory space: 0 is device memory, others are on-chip or host memory.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for n in self.dims:
            size *= n
        return size

    @property
    def nbytes(self) -> int:
        """Bytes without padding; elements of unknown dtypes count as 8 bits."""
        return -(-self.size * _BITS.get(self.dtype, 8) // 8)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: name, unique in its computation.
        opcode: opcode, such as `dot`.
        arrays: arrays of the result.
        operands: names of instructions of the same computation.
        text: text after the operands: attributes and metadata.
        inside: text between the parentheses.
        root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    inside: str
    root: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return sum(array.nbytes for array in self.arrays)

    @cached_property
    def called(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the called computations, by attribute."""
        return {key: tuple(_NAME.findall(value)) for key, value in _CALLED.findall(self.text)}


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: instructions by name, in order, by name of computation.
        entry: name of the entry computation.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    @cached_property
    def runs(self) -> Mapping[str, int]:
        """Number of runs of each computation reachable from the entry, including in fusions."""
        order: list[str] = []
        self._visit(self.entry, order, set())
        counts = dict.fromkeys(order, 0)
        counts[self.entry] = 1
        for name in reversed(order):
            for one in self.computations[name].values():
                times = counts[name] * (self.trips(one) if one.opcode == "while" else 1)
                for callee in self._callees(one):
                    counts[callee] += times
        return counts

    def _callees(self, one: Instruction) -> list[str]:
        # skip the scalar computation of a reduction
        kinds = ("calls", "body", "branch_computations", "called_computations", "to_apply")
        names = [
            n
            for kind in kinds
            if kind != "to_apply" or one.opcode == "call"
            for n in one.called.get(kind, ())
        ]
        return [name for name in names if name in self.computations]

    def _visit(self, name: str, order: list[str], seen: set[str]) -> None:
        """Append a computation after all those it calls."""
        seen.add(name)
        for one in self.computations[name].values():
            for callee in self._callees(one):
                if callee not in seen:
                    self._visit(callee, order, seen)
        order.append(name)

    def trips(self, loop: Instruction) -> int:
        """Return the trip count of a `while`, or 1 if unknown."""
        known = _TRIPS.search(loop.text)
        if known:
            return int(known.group(1))
        names = loop.called.get("condition", ())
        limit = max((int(n) for name in names for n in self._constants(name, 0)), default=1)
        return -(-limit // self._step(loop))

    def _step(self, loop: Instruction) -> int:
        """Return a loop's counter increment, or 1 if unknown; the compiler may unroll by two."""
        condition = self.computations.get(next(iter(loop.called.get("condition", ())), ""), {})
        body = self.computations.get(next(iter(loop.called.get("body", ())), ""), {})
        places = [
            int(found.group(1)) for one in condition.values() if (found := _INDEX.search(one.text))
        ]
        root = next((one for one in body.values() if one.root and one.opcode == "tuple"), None)
        if root is None or len(places) != 1 or places[0] >= len(root.operands):
            return 1
        added = body.get(root.operands[places[0]])
        if added is None or added.opcode != "add":
            return 1
        numbers = [
            body[name].inside
            for name in added.operands
            if name in body and body[name].opcode == "constant"
        ]
        return max((int(n) for n in numbers if n.strip().isdigit()), default=1) or 1

    def _constants(self, name: str, depth: int) -> list[str]:
        """Return the integer constants of a condition, including those in fusions."""
        found: list[str] = []
        for one in self.computations.get(name, {}).values():
            if one.opcode == "constant" and re.fullmatch(r"\d+", one.inside.strip()):
                found.append(one.inside)
            for callee in self._callees(one) if depth < 2 else ():
                found += self._constants(callee, depth + 1)
        return found

    def operands(self, computation: str, one: Instruction) -> list[Instruction]:
        """Return the instructions that produce an instruction's operands."""
        instructions = self.computations[computation]
        return [instructions[name] for name in one.operands if name in instructions]


def parse(text: str) -> Program:
    """Parse the text of a compiled module.

    Args:
        text: result of `compiled.as_text()`.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] | None = None
    entry = ""
    for raw in text.splitlines():
        if current is None:
            header = _HEADER.match(raw)
            if header and "=" not in raw.split("(")[0]:
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        elif raw.rstrip() == "}":  # a kernel's metadata may span lines, and contain further braces
            current = None
        else:
            one = _instruction(raw)
            if one is not None:
                current[one.name] = one
    return Program(computations, entry or next(reversed(computations), ""))


def _instruction(raw: str) -> Instruction | None:
    found = _LINE.match(raw)
    if found is None:
        return None
    rest = _COMMENT.sub("", found.group(3))
    shape, rest = _shape(rest)
    opcode, paren, rest = rest.partition("(")
    if not paren:
        return None
    end = _closing_index(rest)
    inside, text = rest[:end], rest[end + 1 :]
    return Instruction(
        found.group(2),
        opcode.strip(),
        arrays(shape),
        tuple(_NAME.findall(inside)),
        text,
        inside,
        bool(found.group(1)),
    )


def _shape(text: str) -> tuple[str, str]:
    """Split an instruction after its shape, which may be a tuple."""
    if text.startswith("("):
        end = _closing_index(text[1:]) + 2
        return text[:end], text[end:].lstrip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _closing_index(text: str) -> int:
    """Return the index of the parenthesis that closes one opened before `text`."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def arrays(shape: str) -> tuple[Array, ...]:
    """Parse the arrays of a shape, such as `(bf16[8,4]{1,0:S(1)}, s32[])`."""
    found: list[Array] = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = _SPACE.search(layout)
        sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
        found.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(found)
