"""Ways to read a part of each row of a matrix in a file, as a shard along a tensor's columns needs: GB/s of the part.

    python -m benchmarks.segments [--megabytes 256]

`calls` is one `pread` for each row, `mapped` copies out of a mapping of a few rows, which is what `jaxpeft` does
(`hub/safetensors_files.py`), `whole` reads the rows whole and keeps the part, which asks for all bytes. Blocks of a megabyte, one
thread, best of three; cold is after the file was dropped from the page cache, once. Prints a JSON line for each size.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.hub.safetensors_files import Tensor

SIZES = ((4096, 8), (4096, 4), (14336, 4), (28672, 2))
"""Columns of 2 bytes, and how many devices they are spread over: 1 to 28 KiB of each row."""
_BLOCK = 1 << 20
Read = Callable[[Tensor, int, int, tuple[int, int]], Any]


def calls(tensor: Tensor, start: int, stop: int, columns: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Reads with a call for each row."""
    row, at = tensor.shape[1] * 2, columns[0] * 2
    out = np.empty((stop - start, columns[1] - columns[0]), np.uint16)
    view, size = out.reshape(-1).view(np.uint8).data, (columns[1] - columns[0]) * 2
    with tensor.file.open("rb") as file:
        for i in range(stop - start):
            os.preadv(file.fileno(), [view[i * size : (i + 1) * size]], (start + i) * row + at)
    return out


def mapped(tensor: Tensor, start: int, stop: int, columns: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Reads as jaxpeft does."""
    return tensor.read_rows(start, stop, columns)


def whole(tensor: Tensor, start: int, stop: int, columns: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Reads the rows whole."""
    return tensor.read_rows(start, stop)[:, slice(*columns)].copy()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=256)
    size = parser.parse_args().megabytes << 20
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "matrix"
        file.write_bytes(np.random.default_rng(0).bytes(size))
        for columns, parts in SIZES:
            tensor = Tensor(file, 0, (size // 2 // columns, columns), np.dtype(np.uint16))
            line: dict[str, Any] = {"row_bytes": 2 * columns, "part_bytes": 2 * columns // parts}
            for way in (calls, mapped, whole):
                line[f"{way.__name__}_warm"] = round(max(speed(way, tensor, parts) for _ in range(3)), 2)
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                line[f"{way.__name__}_cold"] = round(speed(way, tensor, parts), 2)
                speed(way, tensor, 1)
            sys.stdout.write(json.dumps(line) + "\n")


def speed(way: Read, tensor: Tensor, parts: int) -> float:
    """Reads one part of all rows, a block after the other: GB/s."""
    part = tensor.shape[1] // parts
    step, started = max(1, _BLOCK // (2 * part)), time.perf_counter()
    for start in range(0, tensor.shape[0], step):
        way(tensor, start, min(start + step, tensor.shape[0]), (0, part))
    return tensor.nbytes / parts / (time.perf_counter() - started) / 1e9


if __name__ == "__main__":
    main()
