"""The source tensors of a leaf, and reading any slice of it without reading more of the files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.hub.weights.bitsandbytes import RowReader
from jaxpeft.hub.weights.safetensors_files import Span, Tensor, aligned_empty

_BLOCK_BYTES = 1 << 20
_MAPPED_BYTES = 4 << 20
"""Maximum bytes of a file that are mapped at once to read parts of its rows."""
_MEAN_ROWS = 1024
_STRIP = 32
_THREADS = 8
Index = tuple[slice, ...]


@dataclass(frozen=True)
class LeafSource:
    """The source tensors of one leaf.

    Attributes:
        tensors: one tensor, or one per layer and expert.
        shape: shape of the leaf.
        dtype: dtype of the leaf.
        stacks: number of stacked axes, which come first: of layers, and of experts.
        transposed: whether the leaf is the transpose of the tensors (a kernel).
    """

    tensors: tuple[RowReader, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stacks: int
    transposed: bool

    @property
    def layers(self) -> tuple[int, ...]:
        """The sizes of the stacked axes."""
        return self.shape[: self.stacks]

    def read(self, index: Index | None) -> np.ndarray[Any, Any]:
        """Read a slice of the leaf.

        Args:
            index: a slice for each axis of the leaf; None for the entire leaf.

        Returns:
            Array of the slice's shape in the leaf's dtype.
        """
        spans = spans_of(index, self.shape)
        out = aligned_empty(tuple(stop - start for start, stop in spans), self.dtype)
        blocks: list[Callable[[], None]] = []
        stack, within = spans[: self.stacks], spans[self.stacks :]
        for place in np.ndindex(out.shape[: self.stacks]):
            at = [start + i for (start, _), i in zip(stack, place, strict=True)]
            tensor = self.tensors[np.ravel_multi_index(at, self.layers) if at else 0]
            blocks += self._blocks(out[(*place, ...)], tensor, within)
        if len(blocks) == 1:
            blocks[0]()
        else:
            with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
                for _ in pool.map(lambda block: block(), blocks):
                    pass
        return out

    def read_layer(self, layer: int, index: Index | None) -> np.ndarray[Any, Any]:
        """Read a slice of one layer of the leaf.

        Args:
            layer: number of the layer, or of the expert of all layers; 0 if the leaf is not
                stacked.
            index: a slice for each axis of the layer; None for the entire layer.
        """
        at = [int(i) for i in np.unravel_index(layer, self.layers)] if self.stacks else []
        rest = index or (slice(None),) * (len(self.shape) - self.stacks)
        return self.read((*(slice(i, i + 1) for i in at), *rest))[(0,) * self.stacks]

    def _blocks(
        self, out: np.ndarray[Any, Any], tensor: RowReader, spans: Sequence[Span]
    ) -> Iterator[Callable[[], None]]:
        """Yield functions that each read a block of the tensor's rows into `out`."""
        if not spans:
            yield lambda: out.__setitem__(..., tensor.read_rows(0, 1))
            return
        upright = isinstance(tensor, UprightTensor)
        transposed, tensor = self.transposed and not upright, tensor.stored if upright else tensor
        rows, others = (spans[-1], spans[-2::-1]) if transposed else (spans[0], spans[1:])
        step = _rows_at_once(tensor, others)
        for start in range(rows[0], rows[1], step):
            stop = min(start + step, rows[1])
            at = slice(start - rows[0], stop - rows[0])
            place = out[..., at].T if transposed else out[at]
            yield functools.partial(_copy, place, tensor, (start, stop), others)


def spans_of(index: Index | None, shape: tuple[int, ...]) -> tuple[Span, ...]:
    """Return the start and stop of a slice along each axis; an index of None is the full shape."""
    slices = (slice(None),) * len(shape) if index is None else index
    return tuple(s.indices(n)[:2] for s, n in zip(slices, shape, strict=True))


def _rows_at_once(tensor: RowReader, others: Sequence[Span]) -> int:
    """Return the number of rows per block if only the given spans of the other axes are read."""
    row = max(1, tensor.nbytes // max(1, tensor.shape[0]))
    if not others or others[0] == (0, tensor.shape[1]):
        return max(1, _BLOCK_BYTES // row)
    part = max(1, row * (others[0][1] - others[0][0]) // max(1, tensor.shape[1]))
    return max(1, min(_BLOCK_BYTES // part, _MAPPED_BYTES // row))


def _copy(
    place: np.ndarray[Any, Any], tensor: RowReader, rows: Span, others: Sequence[Span]
) -> None:
    """Read rows of a tensor into an array, a few at a time: six times as fast to transpose."""
    behind = (slice(None), slice(None), *(slice(*span) for span in others[1:]))[: 1 + len(others)]
    block = tensor.read_rows(*rows, *others[:1])[behind]
    if block.dtype == place.dtype:
        # NumPy copies its own dtypes faster than those of ml_dtypes
        raw = f"u{block.dtype.itemsize}"
        block, place = block.view(raw), place.view(raw)
    for row in range(0, len(block), _STRIP):
        place[row : row + _STRIP] = block[row : row + _STRIP]


def join(tensors: Sequence[RowReader], layers: tuple[int, ...]) -> LeafSource:
    """Return the leaf of tensors with the same shape and dtype, not transposed.

    Args:
        tensors: one tensor, or one per layer and expert.
        layers: the sizes of the stacked axes.
    """
    first = tensors[0]
    shape = (*layers, *first.shape)
    return LeafSource(tuple(tensors), shape, first.dtype, len(layers), transposed=False)


@dataclass(frozen=True)
class UprightTensor:
    """A matrix of torch's shape `[out, in]` that the file stores as its kernel `[in, out]`.

    Attributes:
        stored: the tensor in the file.
    """

    stored: Tensor

    @property
    def file(self) -> Path:
        """The file."""
        return self.stored.file

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `[out, in]`."""
        return self.stored.shape[::-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype."""
        return self.stored.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stored.nbytes

    def read_rows(self, start: int, stop: int, columns: Span | None = None) -> np.ndarray[Any, Any]:
        """Read `matrix[start:stop]`, and of the second axis only `columns` if given."""
        first, last = columns or (0, self.shape[1])
        return self.stored.read_rows(first, last, (start, stop)).T


@dataclass(frozen=True)
class ExtendedTensor:
    """A tensor with more rows than in the file; the new rows are the mean of the existing ones.

    Attributes:
        stored: the tensor in the file.
        rows: number of rows, including new ones.
        dtype: dtype of the values read.
    """

    stored: RowReader
    rows: int
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""
        return (self.rows, *self.stored.shape[1:])

    @property
    def nbytes(self) -> int:
        """Size in bytes of the tensor in the file."""
        return self.stored.nbytes

    def read_rows(self, start: int, stop: int, columns: Span | None = None) -> np.ndarray[Any, Any]:
        """Read `tensor[start:stop]`, and of the second axis only `columns` if given."""
        own = self.stored.shape[0]
        found = (
            [self.stored.read_rows(start, min(stop, own), columns).astype(self.dtype)]
            if start < own
            else []
        )
        if stop > own:
            mean = self._mean(columns)
            found.append(np.broadcast_to(mean, (stop - max(start, own), *mean.shape)))
        return np.concatenate(found)

    def _mean(self, columns: Span | None) -> np.ndarray[Any, Any]:
        """Return the mean, summed in the same order for any columns, so that all shards agree."""
        own, total = self.stored.shape[0], np.zeros((), np.float64)
        for start in range(0, own, _MEAN_ROWS):
            rows = self.stored.read_rows(start, min(start + _MEAN_ROWS, own), columns)
            total = total + rows.astype(np.float64).sum(axis=0)
        return np.asarray(total / own).astype(self.dtype)
