"""Writing safetensors files one tensor at a time, with shards and their index.

The `safetensors` library is not used because it needs all tensors of a file in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxpeft.hub.weights.safetensors_files import DTYPES, INDEX, SINGLE, Described

SHARD_BYTES = 5_000_000_000
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Readable(Described, Protocol):
    """A tensor that is read when it is written."""

    def read(self) -> np.ndarray[Any, Any]:
        """Return the tensor's values."""
        ...


@dataclass(frozen=True)
class _Array:
    """An array as a tensor of a file."""

    array: np.ndarray[Any, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def read(self) -> np.ndarray[Any, Any]:
        return self.array


def write_arrays(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> None:
    """Write arrays of any memory layout to one safetensors file, with default file permissions."""
    write_file(path, {name: _Array(np.asarray(array)) for name, array in arrays.items()})


def write_model(
    folder: Path, tensors: Mapping[str, Readable], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write the weights of a model: `model.safetensors`, or shards and the index that names them.

    Args:
        folder: destination folder.
        tensors: tensors by name, in the order of the shards.
        shard_bytes: maximum size of the tensors in a file; a larger tensor has its own file.

    Returns:
        The names of the files.
    """
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_file(folder / SINGLE, tensors)
        return [SINGLE]
    files = {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards, 1)
    }
    for file, names in files.items():
        write_file(folder / file, {name: tensors[name] for name in names})
    where = {name: file for file, names in files.items() for name in names}
    size = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    (folder / INDEX).write_text(
        json.dumps({"metadata": size, "weight_map": where}, indent=2) + "\n"
    )
    return [*files, INDEX]


def _shards(tensors: Mapping[str, Readable], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > most:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    return shards


def write_file(path: Path, tensors: Mapping[str, Readable]) -> None:
    """Write one safetensors file, with the widest dtypes first so that every tensor is aligned."""
    ordered = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in ordered:
        tensor = tensors[name]
        offsets = [at, at := at + tensor.nbytes]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in ordered:
            file.write(np.ascontiguousarray(tensors[name].read()).reshape(-1).view(np.uint8).data)
