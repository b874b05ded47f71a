"""Work of a compiled program: FLOPs, and bytes that its instructions read and write.

Unlike XLA's cost analysis, which counts a loop's body once, this counts every iteration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxpeft.plan.hlo import Array, Instruction, Program

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Number of matrix products in each splash attention kernel, by name."""
_ESTIMATE = re.compile(r'"cost_estimate":\s*\{[^}]*?"flops":\s*"?(\d+)')
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "opt-barrier",
        "partition-id",
        "replica-id",
        "iota",
        "domain",
        "async-done",
        "async-update",
        "copy-done",
        "all-gather-done",
        "all-reduce-done",
        "collective-permute-done",
    }
)
"""Opcodes without memory traffic."""


@dataclass(frozen=True)
class Work:
    """Work of one device in one run of a program.

    Attributes:
        flops: multiplications and additions of products.
        traffic: bytes read from and written to device memory, summed over instructions.
        kernels: number of calls of kernels that do not report FLOPs.
    """

    flops: float
    traffic: int
    kernels: int


def work(program: Program, *, causal: bool = True) -> Work:
    """Return the total work of a program.

    Args:
        program: compiled program.
        causal: whether attention kernels compute only half of the position pairs.
    """
    flops, kernels, traffic = 0.0, 0, 0
    outer = _outer(program)
    for name, times in program.runs.items():
        for one in program.computations[name].values():
            if one.opcode == "custom-call" and "tpu_custom_call" in one.text:
                own = _kernel(program, name, one, causal)
                flops, kernels = flops + times * (own or 0.0), kernels + times * (own is None)
            elif one.opcode in ("dot", "convolution"):
                flops += times * _product(program, name, one)
            if name in outer:
                traffic += times * _moved_bytes(program, name, one)
    return Work(flops, traffic, kernels)


def _kernel(program: Program, computation: str, one: Instruction, causal: bool) -> float | None:
    """Return the FLOPs of a kernel call, reported or computed for splash attention, or None."""
    reported = _ESTIMATE.search(one.text)
    if reported is not None:
        return float(reported.group(1))
    products = next((n for name, n in _PRODUCTS.items() if one.name.startswith(name)), None)
    inputs = (array for operand in program.operands(computation, one) for array in operand.arrays)
    queries = next(
        (a for a in inputs if len(a.dims) > 2 and a.dtype in ("bf16", "f16", "f32")), None
    )
    if products is None or queries is None:
        return None
    length = queries.dims[-2]
    return products * 2.0 * queries.size * length / (2 if causal else 1)


def _outer(program: Program) -> set[str]:
    """Return the computations outside fusions, whose instructions run one by one."""
    found, waiting = {program.entry}, [program.entry]
    while waiting:
        for one in program.computations[waiting.pop()].values():
            if one.opcode not in ("while", "conditional", "call", "async-start"):
                continue
            names = [
                n
                for key, called in one.called.items()
                for n in called
                if key != "to_apply" or one.opcode == "call"
            ]
            new = [name for name in names if name in program.computations and name not in found]
            found.update(new)
            waiting += new
    return found


def _product(program: Program, computation: str, one: Instruction) -> float:
    operands = program.operands(computation, one)
    if len(operands) < 2:
        return 0.0
    left, right = operands[0].arrays[0], operands[1].arrays[0]
    if one.opcode == "dot":
        dims = _CONTRACTED.search(one.text)
        axes = [int(n) for n in dims.group(1).split(",") if n] if dims else []
        return 2.0 * one.arrays[0].size * float(np.prod([left.dims[axis] for axis in axes]))
    return _convolution(one, left, right)


def _convolution(one: Instruction, left: Array, right: Array) -> float:
    """Count the FLOPs of a convolution, excluding padding; TPU programs write matrix products as
    convolutions.
    """
    labels = _LABELS.search(one.text)
    if labels is None:
        return 0.0
    lhs, rhs, out = labels.groups()
    result = one.arrays[0]
    pairs = 1.0
    window = _window(one.text)
    for i in range(sum(label.isdigit() for label in out)):
        sizes = (
            left.dims[lhs.index(str(i))],
            right.dims[rhs.index(str(i))],
            result.dims[out.index(str(i))],
        )
        pairs *= _valid(*sizes, *(values[i] for values in window))
    features = (
        result.dims[out.index("b")] * result.dims[out.index("f")] * right.dims[rhs.index("i")]
    )
    return 2.0 * features * pairs


def _window(text: str) -> tuple[Sequence[int], ...]:
    """Return stride, low padding and both dilations, each per spatial dimension."""
    found = _WINDOW.search(text)
    fields = dict(part.split("=", 1) for part in found.group(1).split()) if found else {}
    many = len(fields.get("size", "").split("x"))

    def numbers(key: str, default: str) -> list[int]:
        return [
            int(part.split("_")[0])
            for part in fields.get(key, "x".join([default] * many)).split("x")
        ]

    return (
        numbers("stride", "1"),
        numbers("pad", "0_0"),
        numbers("lhs_dilate", "1"),
        numbers("rhs_dilate", "1"),
    )


def _valid(
    size: int, kernel: int, result: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Count the pairs of result and kernel positions that read an element of the input."""
    place = np.arange(result)[:, None] * stride - pad + np.arange(kernel)[None, :] * rhs_dilate
    inside = (place >= 0) & (place < (size - 1) * lhs_dilate + 1)
    return int((inside & (place % lhs_dilate == 0)).sum())


def _moved_bytes(program: Program, computation: str, one: Instruction) -> int:
    """Return the bytes of device memory that an instruction reads and writes."""
    if one.opcode in _FREE:
        return 0
    operands = program.operands(computation, one)
    if one.opcode == "fusion":
        inner = next(
            (name for name in one.called.get("calls", ()) if name in program.computations), ""
        )
        read = sum(_read(program, inner, i, operand) for i, operand in enumerate(operands))
        return read + _written_bytes(program, inner, one)
    if one.opcode == "dynamic-slice":
        return 2 * _device_bytes(one.arrays)
    if one.opcode == "dynamic-update-slice":
        return 2 * _device_bytes(operands[1].arrays) if len(operands) > 1 else 0
    # the result of a `-start` includes its operand
    results = one.arrays[:1] if one.opcode.endswith("-start") else one.arrays
    return _device_bytes(results) + sum(_device_bytes(operand.arrays) for operand in operands)


def _device_bytes(arrays: Sequence[Array]) -> int:
    """Return the bytes of the arrays that are in device memory."""
    return sum(array.nbytes for array in arrays if array.space == 0)


def _read(program: Program, fusion: str, i: int, operand: Instruction) -> int:
    """Return the bytes that a fusion reads of an operand, which may be only a slice."""
    total = _device_bytes(operand.arrays)
    if not total or not fusion:
        return total
    instructions = program.computations[fusion]
    names = [
        one.name
        for one in instructions.values()
        if one.opcode == "parameter" and one.inside.strip() == str(i)
    ]
    return min(total, _used_bytes(program, fusion, names[0], total)) if names else total


def _used_bytes(program: Program, fusion: str, name: str, total: int) -> int:
    used = 0
    for one in program.computations[fusion].values():
        if name not in one.operands:
            continue
        if one.opcode == "dynamic-slice" and one.operands[0] == name:
            used += one.nbytes
        elif one.opcode == "dynamic-update-slice" and one.operands[0] == name:
            continue  # written in place
        elif one.opcode == "bitcast":
            used += _used_bytes(program, fusion, one.name, total)
        elif one.opcode == "fusion":
            inner = one.called["calls"][0]
            index = str(one.operands.index(name))
            own = next(
                (
                    inst.name
                    for inst in program.computations[inner].values()
                    if inst.opcode == "parameter" and inst.inside.strip() == index
                ),
                "",
            )
            used += _used_bytes(program, inner, own, total)
        else:
            return total
    return used


def _written_bytes(program: Program, fusion: str, one: Instruction) -> int:
    """Return the bytes that a fusion writes; it may update slices in place."""
    instructions = program.computations.get(fusion, {})
    root = next((inner for inner in instructions.values() if inner.root), None)
    if root is None:
        return _device_bytes(one.arrays)
    results = (
        [instructions[name] for name in root.operands if name in instructions]
        if root.opcode == "tuple"
        else [root]
    )
    if len(results) != len(one.arrays):
        return _device_bytes(one.arrays)
    written = 0
    for array, result in zip(one.arrays, results, strict=True):
        while result.opcode == "bitcast" and result.operands[0] in instructions:
            result = instructions[result.operands[0]]  # noqa: PLW2901 - look through the bitcast
        if array.space == 0:
            sliced = result.opcode == "dynamic-update-slice" and result.operands[1] in instructions
            written += instructions[result.operands[1]].nbytes if sliced else array.nbytes
    return written
