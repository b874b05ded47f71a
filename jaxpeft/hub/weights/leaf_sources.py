"""Where the numbers of a leaf come from, and reading any slice of it: no more is asked of the files
than the slice has.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpeft.hub.weights.bitsandbytes import RowReader
from jaxpeft.hub.weights.safetensors_files import Span, aligned_empty

_BLOCK_BYTES = 1 << 20
_MAPPED_BYTES = 4 << 20
"""How much of a file is mapped at once, where parts of its rows are read."""
_MEAN_ROWS = 1024
_STRIP = 32
_THREADS = 8
Index = tuple[slice, ...]


@dataclass(frozen=True)
class LeafSource:
    """Where the numbers of one leaf come from.

    Attributes:
        tensors: one, or one a layer.
        shape: of the leaf.
        dtype: of the leaf.
        stacked: whether the leading axis counts `tensors`.
        transposed: whether the leaf is the transpose of the tensors (a kernel).
    """

    tensors: tuple[RowReader, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stacked: bool
    transposed: bool

    def read(self, index: Index | None) -> np.ndarray[Any, Any]:
        """Read a slice of the leaf.

        Args:
            index: a slice for each axis of the leaf; None for all of it.

        Returns:
            Array of the slice's shape, in the leaf's dtype.
        """
        spans = spans_of(index, self.shape)
        out = aligned_empty(tuple(stop - start for start, stop in spans), self.dtype)
        blocks: list[Callable[[], None]] = []
        if not self.stacked:
            blocks += self._blocks(out, self.tensors[0], spans)
        else:
            for row, tensor in enumerate(self.tensors[slice(*spans[0])]):
                blocks += self._blocks(out[row : row + 1].reshape(out.shape[1:]), tensor, spans[1:])
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
            layer: its number; 0 where the leaf is not stacked.
            index: a slice for each axis of the layer; None for all of it.
        """
        if not self.stacked:
            return self.read(index)
        return self.read(
            (slice(layer, layer + 1), *(index or (slice(None),) * (len(self.shape) - 1)))
        )[0]

    def _blocks(
        self, out: np.ndarray[Any, Any], tensor: RowReader, spans: Sequence[Span]
    ) -> Iterator[Callable[[], None]]:
        """Yield functions that each read a block of the tensor's rows into its place in `out`."""
        if not spans:
            yield lambda: out.__setitem__(..., tensor.read_rows(0, 1))
            return
        rows, others = (spans[-1], spans[:-1]) if self.transposed else (spans[0], spans[1:])
        step = _rows_at_once(tensor, others)
        for start in range(rows[0], rows[1], step):
            stop = min(start + step, rows[1])
            at = slice(start - rows[0], stop - rows[0])
            place = out[:, at].T if self.transposed else out[at]
            yield functools.partial(_copy, place, tensor, (start, stop), others)


def spans_of(index: Index | None, shape: tuple[int, ...]) -> tuple[Span, ...]:
    """Return from where to where a slice reaches along each axis; None is all of it."""
    whole = (slice(None),) * len(shape) if index is None else index
    return tuple(s.indices(n)[:2] for s, n in zip(whole, shape, strict=True))


def _rows_at_once(tensor: RowReader, others: Sequence[Span]) -> int:
    """Return how many rows make a block, where of each the spans along the other axes are read."""
    row = max(1, tensor.nbytes // max(1, tensor.shape[0]))
    if not others or others[0] == (0, tensor.shape[1]):
        return max(1, _BLOCK_BYTES // row)
    part = max(1, row * (others[0][1] - others[0][0]) // max(1, tensor.shape[1]))
    return max(1, min(_BLOCK_BYTES // part, _MAPPED_BYTES // row))


def _copy(
    place: np.ndarray[Any, Any], tensor: RowReader, rows: Span, others: Sequence[Span]
) -> None:
    """Read rows of a tensor into their place, a few at a time: a transposed copy is then six times
    as fast.
    """
    behind = (slice(None), slice(None), *(slice(*span) for span in others[1:]))[: 1 + len(others)]
    block = tensor.read_rows(*rows, *others[:1])[behind]
    if block.dtype == place.dtype:
        # NumPy copies its own dtypes faster than those of ml_dtypes
        raw = f"u{block.dtype.itemsize}"
        block, place = block.view(raw), place.view(raw)
    for row in range(0, len(block), _STRIP):
        place[row : row + _STRIP] = block[row : row + _STRIP]


def join(tensors: Sequence[RowReader], *, stacked: bool) -> LeafSource:
    """Return the leaf that tensors of one shape and dtype make as they are.

    Args:
        tensors: one, or one a layer.
        stacked: whether the leaf has an axis of layers.
    """
    first = tensors[0]
    shape = (len(tensors), *first.shape) if stacked else first.shape
    return LeafSource(tuple(tensors), shape, first.dtype, stacked, transposed=False)


@dataclass(frozen=True)
class Grown:
    """A tensor with more rows than the file has: those begin as the mean of the others.

    Attributes:
        there: the tensor in the file.
        rows: how many it is to have.
        dtype: of what is read.
    """

    there: RowReader
    rows: int
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""
        return (self.rows, *self.there.shape[1:])

    @property
    def nbytes(self) -> int:
        """Size in bytes of what the file has."""
        return self.there.nbytes

    def read_rows(self, start: int, stop: int, columns: Span | None = None) -> np.ndarray[Any, Any]:
        """Read `tensor[start:stop]` along the first axis, and along the second `columns`, or all of
        it.
        """
        own = self.there.shape[0]
        found = (
            [self.there.read_rows(start, min(stop, own), columns).astype(self.dtype)]
            if start < own
            else []
        )
        if stop > own:
            mean = self._mean(columns)
            found.append(np.broadcast_to(mean, (stop - max(start, own), *mean.shape)))
        return np.concatenate(found)

    def _mean(self, columns: Span | None) -> np.ndarray[Any, Any]:
        """Add up the same rows one after the other whatever the columns are, so that every part has
        the same mean.
        """
        own, total = self.there.shape[0], np.zeros((), np.float64)
        for start in range(0, own, _MEAN_ROWS):
            rows = self.there.read_rows(start, min(start + _MEAN_ROWS, own), columns)
            total = total + rows.astype(np.float64).sum(axis=0)
        return np.asarray(total / own).astype(self.dtype)
