"""SHA-256 of what files hold, item by item: a flipped bit is found, and told by the name of the
tensor or field that differs.

The items of a safetensors file are its tensors, with shape and dtype; those of a JSON file are its
fields. Where a tensor lies in which file, and how a JSON file is spelled, makes no difference.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxpeft.hub.weights.safetensors_files import Described, Tensor, read_header

Digests = Mapping[str, str]
"""SHA-256 in hexadecimal, by the name of the tensor or field."""
_BLOCK_BYTES = 16 << 20
_THREADS = 8
_SHOWN = 20
"""How many tensors a message names."""


def array_sha256(array: np.ndarray[Any, Any]) -> str:
    """Return the SHA-256 of an array: of its dtype, its shape and its numbers."""
    return _sha256(array, [array])


def tensor_sha256(tensor: Tensor) -> str:
    """Return the same of a tensor in a file, read in blocks, so that it never is in memory whole.

    Raises:
        WeightsError: the file ends too early.
    """
    return _sha256(tensor, _blocks(tensor))


def _sha256(tensor: Described, blocks: Iterable[np.ndarray[Any, Any]]) -> str:
    found = hashlib.sha256(f"{tensor.dtype.name} {list(tensor.shape)} ".encode())
    for block in blocks:
        found.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _blocks(tensor: Tensor) -> Iterator[np.ndarray[Any, Any]]:
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, _BLOCK_BYTES * rows // max(1, tensor.nbytes))
    for start in range(0, rows, step):
        yield tensor.read_rows(start, min(start + step, rows))


def fields_sha256(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each field of a JSON object."""
    plain = {
        name: sorted(map(str, value)) if _is_set(name, value) else value
        for name, value in content.items()
    }
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for name, value in plain.items()
    }


def _is_set(name: str, value: Any) -> bool:
    """Return whether `peft` has a field as a set, and writes it in any order."""
    return name in ("target_modules", "exclude_modules") and isinstance(value, list)


def arrays_sha256(tensors: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    """Return the SHA-256 of each array."""
    return {name: array_sha256(array) for name, array in tensors.items()}


def file_tensors_sha256(path: Path) -> Digests:
    """Return the SHA-256 of each tensor of a safetensors file; once for each state of the file.

    Raises:
        WeightsError: it cannot be read.
    """
    found = path.stat()
    return _file_sha256(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _file_sha256(path: Path, size: int, changed: int) -> Digests:
    del size, changed
    header = read_header(path)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(header, pool.map(tensor_sha256, header.values()), strict=True))


def find_differing(recorded: Mapping[str, Any], found: Digests) -> list[str]:
    """List the names that are recorded with another SHA-256, or are not recorded, or not there;
    sorted.
    """
    return sorted(
        name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name)
    )


def is_record(value: Any) -> bool:
    """Return whether a value of a file can be what was recorded: text by name."""
    return isinstance(value, dict) and all(isinstance(found, str) for found in value.values())


def describe_differing(
    wrong: Sequence[str], where: Callable[[str], Path], record: str, fix: str
) -> list[str]:
    """Return the problems of tensors that differ, the first ones by name.

    Args:
        wrong: their names.
        where: gives the file of a tensor.
        record: the file that has their SHA-256.
        fix: what to do.
    """
    more = [f"... and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
    return [
        *(
            f"{where(name)}: {name}: its SHA-256 is not the one of {record}; {fix}"
            for name in wrong[:_SHOWN]
        ),
        *more,
    ]


class _Readable(Described, Protocol):
    def read(self) -> np.ndarray[Any, Any]: ...


@dataclass(frozen=True)
class Noted:
    """A tensor whose SHA-256 is noted when it is read to be written.

    Attributes:
        name: of the tensor.
        tensor: where its numbers come from.
        into: where its SHA-256 is put.
    """

    name: str
    tensor: _Readable
    into: dict[str, str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.tensor.nbytes

    def read(self) -> np.ndarray[Any, Any]:
        """Return its numbers."""
        array = self.tensor.read()
        self.into[self.name] = array_sha256(array)
        return array
