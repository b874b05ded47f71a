"""Tensors of a checkpoint that hold all experts of a layer, as the tensors of each expert.

Some families store the linear modules of a layer's experts together, beside each other:

    X.experts.down_proj        [experts, in, out]: the kernels, not transposed
    X.experts.down_proj_bias   [experts, out]
    X.experts.down_proj_blocks [experts, out, in / 32, 16] uint8: in MXFP4, in place of the kernels
    X.experts.down_proj_scales [experts, out, in / 32] uint8

One expert is a slice of the first axis, and so a tensor of its own at another place of the same
file: `X.experts.7.down_proj.weight`. Nothing is read here. Blocks and scales are the leaves of
`jaxpeft.kernels.mxfp4`, byte for byte.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from jaxpeft.hub.weights.bitsandbytes import Packed
from jaxpeft.hub.weights.leaf_sources import UprightTensor
from jaxpeft.hub.weights.leaf_tensors import AnyTensor, Tensors
from jaxpeft.hub.weights.safetensors_files import Tensor
from jaxpeft.kernels import mxfp4

_NAME = re.compile(r"(?P<experts>.*\.experts)\.(?P<module>\w+?)(?P<part>_bias|_blocks|_scales)?")
_AXES = {None: 3, "_bias": 2, "_blocks": 4, "_scales": 3}
"""The number of axes of each part."""
_BYTES = mxfp4.BLOCK // 2
_INSTEAD = "fetch the file again"


@dataclass(frozen=True)
class StackedTensor:
    """Tensors of all experts of a layer as one tensor, for a file.

    Attributes:
        parts: the tensor of each expert.
        transposed: whether the parts are in torch's `[out, in]`, but the tensor is `[in, out]`.
    """

    parts: tuple[Any, ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""
        own = self.parts[0].shape
        return len(self.parts), *(own[::-1] if self.transposed else own)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(part.nbytes for part in self.parts)

    def read(self) -> np.ndarray[Any, Any]:
        """Return the values."""
        return np.stack([p.read().T if self.transposed else p.read() for p in self.parts])


def split(tensors: Tensors, config: Any) -> dict[str, AnyTensor]:
    """Return the tensors with those of each expert in place of those of all experts.

    Args:
        tensors: tensors of a checkpoint by name.
        config: the model's config; unless its family stores experts together, nothing is split.
    """
    mixture = getattr(config, "mixture", None)
    if mixture is None or not mixture.stacked:
        return dict(tensors)
    modules: dict[str, dict[str | None, Tensor]] = {}
    out: dict[str, AnyTensor] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or found["module"] not in mixture.names or not _fits(tensor, found):
            out[name] = tensor
        else:
            module = f"{found['experts']}.*.{found['module']}"
            modules.setdefault(module, {})[found["part"]] = tensor
    return out | {
        name.replace("*", str(i)): tensor
        for module, parts in modules.items()
        for name, each in _split_module(module, parts, mixture.experts + 1)  # one too many is named
        for i, tensor in enumerate(each)
    }


def _fits(tensor: AnyTensor, found: re.Match[str]) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and len(tensor.shape) == _AXES[found["part"]]


def _split_module(
    module: str, parts: Mapping[str | None, Tensor], most: int
) -> Iterator[tuple[str, Iterable[AnyTensor]]]:
    """Yield the names of the tensors of an expert, with those of the first `most` experts."""
    if None in parts:
        yield f"{module}.weight", (UprightTensor(each) for each in _slices(parts[None], most))
    if "_bias" in parts:
        yield f"{module}.bias", _slices(parts["_bias"], most)
    if parts.keys() & {"_blocks", "_scales"}:
        yield f"{module}.weight", _packed(module.replace(".*", ""), parts, most)


def _slices(tensor: Tensor, most: int) -> Iterator[Tensor]:
    """Yield the first items of the first axis, each a tensor in the file."""
    size = tensor.nbytes // max(1, tensor.shape[0])
    for i in range(min(most, tensor.shape[0])):
        yield dataclasses.replace(tensor, offset=tensor.offset + i * size, shape=tensor.shape[1:])


def _packed(name: str, parts: Mapping[str | None, Tensor], most: int) -> Iterator[Packed]:
    """Yield the quantized matrix of each expert."""
    blocks, scales = parts.get("_blocks"), parts.get("_scales")
    first: Any = scales if blocks is None else blocks
    problems = _problems(name, blocks, scales)
    if blocks is None or scales is None or problems:
        for _ in _slices(first, most):
            yield Packed(first.file, (), np.dtype(np.float32), {}, tuple(problems), "mxfp4")
        return
    for codes, own in zip(_slices(blocks, most), _slices(scales, most), strict=True):
        out, n_in = own.shape[0], own.shape[1] * mxfp4.BLOCK
        leaves = (dataclasses.replace(codes, shape=(out, n_in // 2)), own)
        named = dict(zip(mxfp4.MXFP4.leaves, leaves, strict=True))
        yield Packed(codes.file, (out, n_in), np.dtype(ml_dtypes.bfloat16), named, form="mxfp4")


def _problems(name: str, blocks: Tensor | None, scales: Tensor | None) -> list[str]:
    if blocks is None or scales is None:
        return [f"missing: {name}_{'blocks' if blocks is None else 'scales'}"]
    found = [
        f"quantized: {name}_{part} is {tensor.dtype}, must be uint8; {_INSTEAD}"
        for part, tensor in (("blocks", blocks), ("scales", scales))
        if tensor.dtype != np.uint8
    ]
    wanted = (*scales.shape, _BYTES)
    if blocks.shape != wanted:
        found.append(
            f"misshaped: {name}_blocks is {list(blocks.shape)}, must be {list(wanted)} for"
            f" {name}_scales {list(scales.shape)}"
        )
    return found


def join(tensors: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Return the tensors of a model with those of all experts in place of those of each expert.

    It is the inverse of `split` for unquantized tensors.

    Args:
        tensors: tensors by name.
        config: the model's config; unless its family stores experts together, nothing is joined.
    """
    mixture = getattr(config, "mixture", None)
    if mixture is None or not mixture.stacked:
        return dict(tensors)
    out: dict[str, Any] = {}
    parts: dict[str, list[Any]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.(weight|bias)", name)
        if found is None:
            out[name] = tensor
            continue
        end = "_bias" if found[3] == "bias" else ""
        joined = f"{found[1]}.{found[2]}{end}"
        parts.setdefault(joined, []).append(tensor)
        # at the place of the first expert
        out[joined] = StackedTensor(tuple(parts[joined]), transposed=not end)
    return out
