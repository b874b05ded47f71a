"""Ways to read a slice of each row of a matrix in a file, as for a shard along a tensor's columns:
GB/s of the slice.

    python -m benchmarks.segments [--megabytes 256]

`calls` is one `pread` per row, `mapped` copies from a mapping of a few rows, as `jaxpeft` does
(`hub/weights/safetensors_files.py`), `whole` reads complete rows and keeps the slice, which reads
all bytes. Blocks of a megabyte, one thread, the best of three, alternating; warm is by CPU time,
which excludes other work of the machine, cold, after dropping the file from the page cache, by
wall-clock time. Prints a JSON line for each size.
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

from jaxpeft.hub.weights.safetensors_files import Tensor

SIZES = ((4096, 8), (4096, 4), (14336, 4), (28672, 2))
"""Columns of 2 bytes, and how many devices they are spread over: 1 to 28 KiB of each row."""
REPEATS = 3
_BLOCK = 1 << 20
Read = Callable[[Tensor, int, int, tuple[int, int]], Any]


def calls(tensor: Tensor, start: int, stop: int, columns: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Read with one call per row."""
    row, at = tensor.shape[1] * 2, columns[0] * 2
    out = np.empty((stop - start, columns[1] - columns[0]), np.uint16)
    view, size = out.reshape(-1).view(np.uint8).data, (columns[1] - columns[0]) * 2
    with tensor.file.open("rb") as file:
        for i in range(stop - start):
            os.preadv(file.fileno(), [view[i * size : (i + 1) * size]], (start + i) * row + at)
    return out


def mapped(tensor: Tensor, start: int, stop: int, columns: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Read as jaxpeft does."""
    return tensor.read_rows(start, stop, columns)


def whole(tensor: Tensor, start: int, stop: int, columns: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Read complete rows."""
    return tensor.read_rows(start, stop)[:, slice(*columns)].copy()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=256)
    size = parser.parse_args().megabytes << 20
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "matrix"
        file.write_bytes(np.random.default_rng(0).bytes(size))
        for columns, parts in SIZES:
            tensor = Tensor(file, 0, (size // 2 // columns, columns), np.dtype(np.uint16))
            line: dict[str, Any] = {"row_bytes": 2 * columns, "part_bytes": 2 * columns // parts}
            best: dict[str, float] = {}
            for way in (calls, mapped, whole) * REPEATS:
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                cold = speed(way, tensor, parts, time.perf_counter)
                file.read_bytes()
                warm = speed(way, tensor, parts, time.process_time)
                for name, value in ((f"{way.__name__}_warm", warm), (f"{way.__name__}_cold", cold)):
                    best[name] = max(best.get(name, 0), value)
            line |= {name: round(value, 2) for name, value in best.items()}
            sys.stdout.write(json.dumps(line) + "\n")


def speed(way: Read, tensor: Tensor, parts: int, clock: Callable[[], float]) -> float:
    """Read a slice of all rows, block by block; return GB/s."""
    part = tensor.shape[1] // parts
    step, started = max(1, _BLOCK // (2 * part)), clock()
    for start in range(0, tensor.shape[0], step):
        way(tensor, start, min(start + step, tensor.shape[0]), (0, part))
    return tensor.nbytes / parts / (clock() - started) / 1e9


if __name__ == "__main__":
    main()
