"""Finding and checking weights quantized to NF4 by `bitsandbytes` in Hugging Face checkpoints.

A matrix `X.weight [out, in]` is stored as its codes, two per byte, row by row, along with

    X.weight.absmax             per block of 64: uint8, or float32 without double quantization
    X.weight.quant_map          the 16 values of the codes
    X.weight.nested_absmax      with double quantization: per 256 blocks
    X.weight.nested_quant_map   with double quantization: the 256 values of the 8-bit type
    X.weight.quant_state.bitsandbytes__nf4
                                JSON: shape, dtype, sizes of the blocks, `nested_offset`

These are the leaves of `jaxpeft.kernels.nf4` in the same order, byte for byte.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from jaxpeft.errors import WeightsError
from jaxpeft.hub.weights.safetensors_files import DTYPES, Described, Span, Tensor
from jaxpeft.json_files import parse_json
from jaxpeft.kernels import nf4

_STATE = ".quant_state.bitsandbytes__"
_COMPANION = re.compile(
    r"^(.*\.weight)\."
    r"(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
)
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MOST_STATE = 1 << 16
_MOST_OFFSET, _MOST_SIDE = 1e38, 1 << 31
_INSTEAD = "load the unquantized model with quant='nf4'"


class RowReader(Described, Protocol):
    """A tensor that can be read by rows."""

    def read_rows(self, start: int, stop: int, columns: Span | None = None) -> np.ndarray[Any, Any]:
        """Read `tensor[start:stop]`, and of the second axis only `columns` if given."""
        ...


@dataclass(frozen=True)
class ConstantTensor:
    """A constant tensor that is not stored in a file.

    Attributes:
        shape: row-major shape.
        value: value of all elements.
    """

    shape: tuple[int, ...]
    value: float

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return 4 * math.prod(self.shape)

    def read_rows(self, start: int, stop: int, columns: Span | None = None) -> np.ndarray[Any, Any]:
        """Return `tensor[start:stop]`, and of the second axis only `columns` if given."""
        rest = self.shape[1:] if columns is None else (columns[1] - columns[0], *self.shape[2:])
        return np.full((stop - start, *rest) if self.shape else (), self.value, np.float32)


@dataclass(frozen=True)
class Packed:
    """A quantized matrix of a checkpoint.

    Attributes:
        file: file that contains its codes.
        shape: shape of the matrix, `[out, in]`.
        dtype: dtype that it was quantized from.
        leaves: its tensors by the names of the format's leaves.
        problems: errors in its tensors; if there are any, it has no leaves.
        form: its format, a key of `jaxpeft.kernels.QUANTIZED`.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    leaves: Mapping[str, RowReader]
    problems: tuple[str, ...] = ()
    form: str = "nf4"

    @property
    def nbytes(self) -> int:
        """Size in bytes of the unquantized matrix."""
        return math.prod(self.shape) * self.dtype.itemsize


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Packed]:
    """Group the tensors of each quantized matrix. Only the tables and the JSON text are read.

    Args:
        tensors: tensors of a checkpoint by name.

    Returns:
        The tensors without the companions, with a `Packed` for each quantized matrix.
    """
    companions: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _COMPANION.match(name):
            companions.setdefault(match[1], {})[match[2]] = tensor
    found: dict[str, Tensor | Packed] = {
        name: t for name, t in tensors.items() if not _COMPANION.match(name)
    }
    for name, beside in companions.items():
        codes = tensors.get(name)
        found[name] = (
            _faulty(beside, f"missing: {name}") if codes is None else _pack(name, codes, beside)
        )
    return found


def _faulty(beside: Mapping[str, Tensor], *problems: str) -> Packed:
    return Packed(next(iter(beside.values())).file, (), np.dtype(np.float32), {}, problems)


def _pack(name: str, codes: Tensor, beside: Mapping[str, Tensor]) -> Packed:
    stated = [key for key in beside if key.startswith(_STATE[1:])]
    if not stated:
        return _faulty(beside, f"missing: {name}{_STATE}nf4")
    state, *others = stated
    if others or state != f"{_STATE[1:]}nf4":
        return _faulty(
            beside,
            f"quantized: {name} is {state.partition('__')[2]}, but only nf4 is supported;"
            f" {_INSTEAD}",
        )
    parsed = _parse(beside[state])
    if parsed is None:
        return _faulty(
            beside,
            f"quantized: {name}.{state} is not a valid bitsandbytes state; fetch the file again",
        )
    nested = "nested_absmax" in beside or "nested_blocksize" in parsed
    needed = ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if nested else ()))
    problems = [f"missing: {name}.{key}" for key in needed if key not in beside]
    problems += [f"quantized: {name}: {problem}" for problem in _state_problems(parsed, nested)]
    if problems:
        return _faulty(beside, *problems)
    return _check_leaves(name, codes, beside, parsed, nested)


def _parse(state: Tensor) -> Mapping[str, Any] | None:
    if state.dtype != np.uint8 or state.nbytes > _MOST_STATE:
        return None
    try:
        return parse_json(state.read().tobytes(), "its state")
    except WeightsError:
        return None


def _state_problems(state: Mapping[str, Any], nested: bool) -> list[str]:
    """List where the JSON text differs from this format."""
    wanted: dict[str, Any] = {"quant_type": "nf4", "blocksize": nf4.BLOCK}
    wanted |= {"nested_blocksize": nf4.SECOND, "nested_dtype": "float32"} if nested else {}
    problems = [
        f"{key} is {state.get(key)!r}, must be {value!r}; {_INSTEAD}"
        for key, value in wanted.items()
        if state.get(key) != value
    ]
    shape: Any = state.get("shape")
    if not isinstance(shape, list) or [_is_count(n) for n in cast("list[Any]", shape)] != [
        True,
        True,
    ]:
        problems.append(f"shape is {shape!r}, must be [out, in]")
    elif shape[1] % 2:
        problems.append(f"shape is {shape!r}, but nf4 needs an even number of inputs; {_INSTEAD}")
    if not isinstance(state.get("dtype"), str) or state["dtype"] not in _DTYPES:
        problems.append(f"dtype is {state.get('dtype')!r}, must be one of {', '.join(_DTYPES)}")
    offset: Any = state.get("nested_offset")
    if nested and not _is_finite(offset):
        problems.append(f"nested_offset is {offset!r}, must be a number")
    return problems


def _is_finite(x: Any) -> bool:
    # compared without conversion, since an integer may exceed the range of floats
    return (
        isinstance(x, int | float) and not isinstance(x, bool) and -_MOST_OFFSET < x < _MOST_OFFSET
    )


def _is_count(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 < n < _MOST_SIDE


def _check_leaves(
    name: str, codes: Tensor, beside: Mapping[str, Tensor], state: Mapping[str, Any], nested: bool
) -> Packed:
    """Check the sizes and tables of the tensors, and return the leaves."""
    out, n_in = state["shape"]
    blocks = -(-out * n_in // nf4.BLOCK)
    seconds = -(-blocks // nf4.SECOND)
    problems: list[str] = []
    if codes.nbytes != out * n_in // 2:
        problems.append(
            f"misshaped: {name} has {codes.nbytes} bytes, must have {out * n_in // 2} for [{out},"
            f" {n_in}] in nf4"
        )
    kind, wide = np.dtype(np.uint8 if nested else np.float32), np.dtype(np.float32)
    wanted = {"absmax": (kind, blocks), "quant_map": (wide, 16)}
    wanted |= {"nested_absmax": (wide, seconds), "nested_quant_map": (wide, 256)} if nested else {}
    for key, (dtype, size) in wanted.items():
        tensor = beside[key]
        if tensor.dtype != dtype or tensor.shape != (size,):
            problems.append(
                f"misshaped: {name}.{key} is {tensor.dtype} {list(tensor.shape)}, must be {dtype}"
                f" [{size}]"
            )
    tables = {"quant_map": nf4.CODES, "nested_quant_map": nf4.dynamic()}
    problems += [
        f"quantized: {name}.{key} is not the table of nf4; {_INSTEAD}"
        for key, table in tables.items()
        if not problems
        and key in wanted
        and not np.allclose(beside[key].read(), table, rtol=1e-5, atol=0)
    ]
    if problems:
        return _faulty(beside, *problems)
    rows = (out, n_in // nf4.BLOCK) if n_in % nf4.BLOCK == 0 else (blocks,)
    leaves: tuple[RowReader, ...] = (
        # some checkpoints store the bytes of the codes in another dtype
        # (`bnb_4bit_quant_storage`)
        dataclasses.replace(codes, shape=(out, n_in // 2), dtype=np.dtype(np.uint8)),
        dataclasses.replace(beside["absmax"], shape=rows),
        beside["nested_absmax"] if nested else ConstantTensor((seconds,), 1.0),
        ConstantTensor((), float(state["nested_offset"]) if nested else 0.0),
    )
    dtype = np.dtype(DTYPES[_DTYPES[state["dtype"]]])
    return Packed(codes.file, (out, n_in), dtype, dict(zip(nf4.NF4.leaves, leaves, strict=True)))
