"""SHA-256 of each item in a file, so that an error can name the changed tensor or field.

The items of a safetensors file are its tensors, with shape and dtype; those of a JSON file are its
fields. The location of a tensor and the formatting of a JSON file do not matter.
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
"""The maximum number of tensors that a message lists."""


def array_sha256(array: np.ndarray[Any, Any]) -> str:
    """Return the SHA-256 of an array's dtype, shape and values."""
    return _sha256(array, [array])


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor in a file, which is read in blocks to save memory.

    Raises:
        WeightsError: The file is truncated.
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
    """Return whether a field is a set in `peft`, which writes it in arbitrary order."""
    return name in ("target_modules", "exclude_modules") and isinstance(value, list)


def arrays_sha256(tensors: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    """Return the SHA-256 of each array."""
    return {name: array_sha256(array) for name, array in tensors.items()}


def file_tensors_sha256(path: Path) -> Digests:
    """Return the SHA-256 of each tensor of a safetensors file, cached until the file changes.

    Raises:
        WeightsError: The file cannot be read.
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
    """Return the sorted names whose SHA-256 differs or is missing on one side."""
    return sorted(
        name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name)
    )


def is_record(value: Any) -> bool:
    """Return whether a value from a file has the type of a record: strings by name."""
    return isinstance(value, dict) and all(isinstance(found, str) for found in value.values())


def describe_differing(
    wrong: Sequence[str], where: Callable[[str], Path], record: str, fix: str
) -> list[str]:
    """Return error messages for tensors that differ, with the names of the first ones.

    Args:
        wrong: their names.
        where: function from a tensor's name to its file.
        record: name of the file with the recorded SHA-256.
        fix: suggested fix.
    """
    more = [f"... and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
    return [
        *(
            f"{where(name)}: {name}: its SHA-256 differs from {record}; {fix}"
            for name in wrong[:_SHOWN]
        ),
        *more,
    ]


class _Readable(Described, Protocol):
    def read(self) -> np.ndarray[Any, Any]: ...


@dataclass(frozen=True)
class RecordedTensor:
    """A tensor whose SHA-256 is recorded when it is read.

    Attributes:
        name: name of the tensor.
        tensor: the tensor to read.
        into: dict that receives its SHA-256.
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
        """Return the tensor's values."""
        array = self.tensor.read()
        self.into[self.name] = array_sha256(array)
        return array
