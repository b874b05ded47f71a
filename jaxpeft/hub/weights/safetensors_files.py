"""Reading safetensors files by byte range: the full header is checked, the data is read in slices.

Full rows are read with `pread`: a mapped file counts toward the process's memory once it is
touched, so that the model would take up memory twice. Parts of rows are copied from a mapping of a
few rows, which is closed immediately: one call per row is two to three times as slow from a disk,
and also from the page cache if the parts are short (benchmarks/README.md).

The `safetensors` library is not used because it maps the entire file and does not count the bytes
read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import operator
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxpeft.errors import WeightsError
from jaxpeft.json_files import parse_json, read_json

DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_MAX_HEADER = 100_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PRIVATE = mmap.MAP_PRIVATE
"""Some network file systems reject shared mappings."""
Span = tuple[int, int]
_PICKLES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
    "model.pth",
    "consolidated.00.pth",
)


class Described(Protocol):
    """The common properties of all kinds of tensors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype."""
        ...

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        ...


class Meter:
    """Counts the bytes of tensors that all threads read from files."""

    def __init__(self) -> None:
        self._lock, self._bytes = threading.Lock(), 0

    def add(self, count: int) -> None:
        """Count bytes."""
        with self._lock:
            self._bytes += count

    @property
    def bytes(self) -> int:
        """The number of bytes read so far."""
        return self._bytes


@dataclass(frozen=True)
class Tensor:
    """The location of a tensor's data.

    Attributes:
        file: the file.
        offset: position of its first byte in the file.
        shape: row-major shape.
        dtype: NumPy dtype, with ml_dtypes for bfloat16 and float8.
        meter: counts the bytes read from it; None for no counting.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    meter: Meter | None = field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_rows(self, start: int, stop: int, columns: Span | None = None) -> np.ndarray[Any, Any]:
        """Read `tensor[start:stop]` along the first axis.

        Args:
            start: the first row.
            stop: one past the last row.
            columns: start and stop along the second axis; None for all columns. No other parts of
                the rows are read.

        Raises:
            WeightsError: The file is truncated.
        """
        if columns is not None and columns != (0, self.shape[1]):
            return self._segments(start, stop, columns)
        row = self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return self._read(self.offset + start * row, shape)

    def _segments(self, start: int, stop: int, columns: Span) -> np.ndarray[Any, Any]:
        """Copy a part of each row out of a mapping of these rows."""
        out = aligned_empty((stop - start, columns[1] - columns[0], *self.shape[2:]), self.dtype)
        if not out.size:
            return out
        one = math.prod(self.shape[2:]) * self.dtype.itemsize
        row = self.shape[1] * one
        first, last = self.offset + start * row, self.offset + stop * row
        begin = first - first % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if (
                size < last
                # pages past the end of a file can be mapped, but accessing them kills the process
            ):
                raise WeightsError(_cut_short(self.file, size))
            with mmap.mmap(
                file.fileno(), last - begin, _PRIVATE, mmap.PROT_READ, offset=begin
            ) as mapped:
                rows = np.ndarray(
                    (stop - start, row), np.uint8, buffer=mapped, offset=first - begin
                )
                out.reshape(len(out), -1).view(np.uint8)[...] = rows[
                    :, columns[0] * one : columns[1] * one
                ]
                del rows  # otherwise the mapping cannot be closed
        self._count(out.nbytes)
        return out

    def _count(self, asked: int) -> None:
        if self.meter is not None:
            self.meter.add(asked)

    def read(self) -> np.ndarray[Any, Any]:
        """Read the entire tensor."""
        return self._read(self.offset, self.shape)

    def _read(self, offset: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        out = aligned_empty(shape, self.dtype)
        view = out.reshape(-1).view(np.uint8).data
        self._count(len(view))
        done, fd = 0, os.open(self.file, os.O_RDONLY)
        try:
            while done < len(view):
                got = os.preadv(fd, [view[done : done + (1 << 30)]], offset + done)
                if got == 0:
                    raise WeightsError(_cut_short(self.file, offset + done))
                done += got
        finally:
            os.close(fd)
        return out


def _cut_short(file: Path, size: int) -> str:
    return f"{file}: ends at byte {size}, inside a tensor; fetch it again"


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return an uninitialized 64-byte aligned array, which JAX uses on the CPU without a copy."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def open_folder(folder: Path, meter: Meter | None = None) -> dict[str, Tensor]:
    """Read the headers of a model folder's weight files.

    Args:
        folder: folder with `model.safetensors`, or with `model.safetensors.index.json` and the
            files that it names.
        meter: counts the bytes read from the tensors; None for no counting.

    Returns:
        All tensors by name.

    Raises:
        WeightsError: Files are missing or are not safetensors, or a tensor is in two files; it
            lists all of them.
    """
    found = _open_sharded(folder) if (folder / INDEX).is_file() else None
    if found is None and (folder / SINGLE).is_file():
        found = read_header(folder / SINGLE)
    if found is not None:
        return {name: dataclasses.replace(tensor, meter=meter) for name, tensor in found.items()}
    files = sorted(p.name for p in folder.iterdir())
    pickled = [
        name
        for name in files
        if name in _PICKLES or name.endswith((".bin", ".pt", ".pth", ".ckpt"))
    ]
    if pickled:
        raise WeightsError(
            f"{folder}: contains {pickled[0]}, a pickle, which can run code and is never read; if"
            f" you trust it, convert it to {SINGLE} (in transformers:"
            " model.save_pretrained(folder))"
        )
    raise WeightsError(
        f"{folder}: no {SINGLE} and no {INDEX}; the folder contains"
        f" {', '.join(files[:10]) or 'nothing'}"
    )


def _open_sharded(folder: Path) -> dict[str, Tensor]:
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise WeightsError(f"{folder / INDEX}: has no weight_map")
    where: dict[str, str] = {str(k): str(v) for k, v in index.items()}
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            problems.append(f"{folder / INDEX}: names {file!r}, which is not a file of this folder")
            continue
        try:
            tensors = read_header(folder / file)
        except WeightsError as error:
            problems += error.problems
            continue
        problems += [
            f"{name}: is in both {found[name].file.name} and {file}"
            for name in tensors.keys() & found.keys()
        ]
        found |= tensors
    if not problems:
        problems = [
            f"{name}: {INDEX} says that it is in {file}, but it is not"
            for name, file in where.items()
            if name not in found or found[name].file.name != file
        ]
    if problems:
        raise WeightsError(problems)
    return found


def read_header(path: Path) -> dict[str, Tensor]:
    """Read and check the header of a safetensors file.

    Raises:
        WeightsError: It is not safetensors; the message says what it is instead (a Git LFS pointer,
            HTML, a pickle, a truncated file).
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; fetch the model again")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        length = int.from_bytes(start[:8], "little")
        impostor = None if start[8:9] == b"{" else _impostor(start)
        if impostor:
            raise WeightsError(f"{path}: {impostor}")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise WeightsError(
                f"{path}: not safetensors, or truncated ({size} bytes); fetch it again"
            )
        file.seek(8)
        raw = file.read(length)
    try:
        header = parse_json(raw, "its header", once=True)
    except WeightsError as error:
        raise WeightsError(f"{path}: not safetensors: {error}; fetch it again") from error
    return _tensors(path, header, 8 + length, size)


def _impostor(start: bytes) -> str | None:
    if start.startswith(b"version https://git-lfs"):
        return (
            "a Git LFS pointer, not the weights; run `git lfs pull` in its repository, or fetch the"
            " file from the hub"
        )
    if start.lstrip()[:1] == b"<":
        return (
            "an HTML or XML page, not the weights: the download was refused or redirected; fetch it"
            " again"
        )
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return (
            "a pickle or zip file under another name; pickles can run code and are never read;"
            " convert it to safetensors"
        )
    return None


def _tensors(path: Path, header: Mapping[str, Any], data: int, size: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor = _tensor(path, entry, data)
        if tensor is None:
            problems.append(
                f"{path}: {name}: malformed header entry or unknown dtype ({str(entry)[:80]})"
            )
        elif tensor.offset + tensor.nbytes > size:
            missing = tensor.offset + tensor.nbytes - size
            problems.append(
                f"{path}: {name}: truncated: {missing} bytes are missing; fetch the file again"
            )
        else:
            found[name] = tensor
    problems += _overlaps(path, found)
    if not problems and (left := size - data - sum(tensor.nbytes for tensor in found.values())):
        problems.append(f"{path}: {left} bytes do not belong to a tensor; fetch the file again")
    if problems:
        shown = problems[:20] + (
            [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        )
        raise WeightsError(shown)
    return found


def _overlaps(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    placed = sorted(
        (t.offset, t.offset + t.nbytes, name) for name, t in tensors.items() if t.nbytes
    )
    pairs = itertools.pairwise(placed)
    return [
        f"{path}: {b[2]}: overlaps {a[2]} in the file; fetch it again"
        for a, b in pairs
        if b[0] < a[1]
    ]


def _tensor(path: Path, entry: Any, data: int) -> Tensor | None:
    try:
        begin, end = map(operator.index, entry["data_offsets"])
        shape = tuple(int(n) for n in entry["shape"])
        tensor = Tensor(path, data + begin, shape, np.dtype(DTYPES[entry["dtype"]]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (
        tensor
        if 0 <= begin <= end and end - begin == tensor.nbytes and min(shape, default=0) >= 0
        else None
    )
