"""The disk cache of quantized kernels, so that a base is quantized only once.

    <cache>/quantised/<key>/model.safetensors    one tensor per leaf and layer (or shards and index)
    <cache>/quantised/<key>/quantised.json       the inputs of the key, and each tensor's SHA-256

The key is the SHA-256 of everything that the leaves depend on: the location of each kernel, the
sizes and times of the files (hashing their bytes would cost as much as reading them), the
quantization, the dtype, the platform, and the versions of jaxpeft and of this format. It does not
depend on scanned layers or on the sharding, since the bits are the same. Leaves that are not
quantized are always read from the model's own files.

Several processes do not use the cache: their disks may not be shared, and to check a base each
would have to read all of it, while without a cache it reads and quantizes only its own part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

import jaxpeft
from jaxpeft import atomic, cache
from jaxpeft.core import paths
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.targets import Site
from jaxpeft.errors import WeightsError
from jaxpeft.hub.weights.bitsandbytes import RowReader
from jaxpeft.hub.weights.leaf_sources import LeafSource, UprightTensor, join, spans_of
from jaxpeft.hub.weights.leaf_tensors import WeightPlan
from jaxpeft.hub.weights.safetensors_files import Tensor, open_folder
from jaxpeft.hub.weights.safetensors_writing import write_model
from jaxpeft.json_files import read_json
from jaxpeft.logs import log_time
from jaxpeft.quant.quantize import Quant

FORMAT = 2
LEAST_BYTES = 1 << 30
"""The minimum size of cached kernels; smaller ones are quantized in seconds."""
_RECORD = "quantised.json"
_THREADS = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """The cache entry of one quantized base.

    Attributes:
        folder: its folder, which may not exist.
        what: the inputs of its key, as plain values.
        leaves: for each kernel's path, shape and dtype of the leaves of one layer, by name.
        plan: where the unquantized kernels are read from.
    """

    folder: FilePath
    what: Mapping[str, Any]
    leaves: Mapping[Path, Mapping[str, jax.ShapeDtypeStruct]]
    plan: WeightPlan

    def open(self) -> WeightPlan | None:
        """Return the plan that reads the cached kernels; None if they are missing or damaged."""
        if not self.folder.is_dir():
            return None
        try:
            with log_time(f"reading the quantized kernels from {self.folder}") as log:
                tensors = open_folder(self.folder)
                self._require_intact(tensors)
                log("checked")
        except (WeightsError, OSError) as error:
            _log.warning(
                "%s: the cached kernels are damaged (%s); quantizing again", self.folder, error
            )
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        held = {
            path: {key: self._leaf(tensors, path, key) for key in leaves}
            for path, leaves in self.leaves.items()
        }
        return dataclasses.replace(self.plan, held=held)

    def _leaf(self, tensors: Mapping[str, Tensor], path: Path, key: str) -> LeafSource:
        source = self.plan.sources[path]
        return join([tensors[name] for name in _names(path, key, source)], source.layers)

    def _require_intact(self, tensors: Mapping[str, Tensor]) -> None:
        """Check names, shapes, dtypes and checksums.

        Raises:
            WeightsError: The record or a tensor has changed; it names it.
        """
        record = read_json(self.folder / _RECORD)
        digests: Any = record.get("sha256")
        wanted = {
            name: leaf
            for path, leaves in self.leaves.items()
            for key, leaf in leaves.items()
            for name in _names(path, key, self.plan.sources[path])
        }
        if record.get("what") != self.what or not isinstance(digests, dict):
            raise WeightsError(f"{_RECORD} belongs to another entry")
        for name, leaf in wanted.items():
            tensor = tensors.get(name)
            if tensor is None or (tensor.shape, tensor.dtype) != (leaf.shape, np.dtype(leaf.dtype)):
                raise WeightsError(f"{name} is missing or misshaped")
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            for name, found in zip(
                wanted, pool.map(lambda name: _sha256(tensors[name].read()), wanted), strict=True
            ):
                if found != digests.get(name):
                    raise WeightsError(f"the checksum of {name} does not match")

    def write(self, params: Tree) -> None:
        """Write the quantized kernels of a tree atomically; a failure is only logged.

        Args:
            params: the tree with quantized kernels.
        """
        digests: dict[str, str] = {}
        tensors = {
            name: dataclasses.replace(leaf, digests=digests) for name, leaf in self._tensors(params)
        }
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder.parent).free
            if free < size:
                raise OSError(f"needs {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free")
            text = f"writing {size / 1e9:.1f} GB of quantized kernels to {self.folder}"
            with log_time(text), atomic.replace_when_done(self.folder, unique=True) as temporary:
                temporary.mkdir(mode=0o700)
                write_model(temporary, tensors)
                record = {"what": self.what, "sha256": digests}
                (temporary / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
        except OSError as error:
            if not (self.folder / _RECORD).is_file():  # otherwise another process was faster
                _log.warning(
                    "%s: the quantized kernels could not be cached (%s); continuing without a"
                    " cache",
                    self.folder,
                    error,
                )

    def _tensors(self, params: Tree) -> Iterator[tuple[str, _Layer]]:
        for path, leaves in self.leaves.items():
            node, source = paths.get(params, path[:-1]), self.plan.sources[path]
            for key in leaves:
                names = _names(path, key, source)
                for index, name in zip(np.ndindex(source.layers), names, strict=True):
                    yield name, _Layer(name, node[key], index)


@dataclass(frozen=True)
class _Layer:
    """One layer of a leaf, whose checksum is recorded when it is written."""

    name: str
    leaf: jax.Array
    index: tuple[int, ...]
    digests: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape[len(self.index) :]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.leaf.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray[Any, Any]:
        array = _of_layer(self.leaf, self.index) if self.index else np.asarray(self.leaf)
        self.digests[self.name] = _sha256(array)
        return array


def _of_layer(leaf: jax.Array, index: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return one layer of a leaf, assembled from its shards if it is in host memory, where JAX
    cannot slice.
    """
    if leaf.sharding.memory_kind == jax.local_devices()[0].default_memory().kind:
        return np.asarray(leaf[index])
    array = np.empty(leaf.shape[len(index) :], leaf.dtype)
    for shard in leaf.addressable_shards:
        spans = spans_of(shard.index, leaf.shape)[: len(index)]
        if all(start <= i < stop for i, (start, stop) in zip(index, spans, strict=True)):
            place = tuple(i - start for i, (start, _) in zip(index, spans, strict=True))
            array[shard.index[len(index) :]] = np.asarray(shard.data)[place]
    return array


def entry(plan: WeightPlan, quant: Quant, sites: Mapping[Path, Site]) -> Entry | None:
    """Return the cache entry of a base; None if the base is small or the cache is off.

    Args:
        plan: where its kernels are read from.
        quant: how they are quantized.
        sites: sites of the quantized kernels, by the kernel's path.
    """
    root = cache.folder()
    sources = {path: plan.sources[path] for path in sites if path in plan.sources}
    files = [
        tensor
        for source in sources.values()
        for each in source.tensors
        if (tensor := _file_tensor(each)) is not None
    ]
    if root is None or sum(tensor.nbytes for tensor in files) < LEAST_BYTES:
        return None
    if jax.process_count() > 1:
        _log.info(
            "the quantized kernels are not cached: each of %d processes quantizes its own part",
            jax.process_count(),
        )
        return None
    what = {
        "format": FORMAT,
        "jaxpeft": jaxpeft.__version__,
        "platform": jax.devices()[0].platform,
        "form": quant.form,
        "group": quant.group,
        "files": {
            str(file): _stamp(file) for file in sorted({tensor.file.resolve() for tensor in files})
        },
        "kernels": {
            name: where
            for path, source in sources.items()
            for name, where in _kernels(path, source)
        },
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    leaves = {path: quant.abstract(sites[path].shape, sources[path].dtype) for path in sources}
    return Entry(root / "quantised" / key, what, leaves, plan)


def _file_tensor(tensor: RowReader) -> Tensor | None:
    """Return the tensor in a file from which a kernel is read, or None."""
    found = tensor.stored if isinstance(tensor, UprightTensor) else tensor
    return found if isinstance(found, Tensor) else None


def _stamp(file: FilePath) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _kernels(path: Path, source: LeafSource) -> Iterator[tuple[str, list[Any]]]:
    """Yield the name of each layer of a kernel, and where it is read from."""
    for name, tensor in zip(_names(path, path[-1], source), source.tensors, strict=True):
        if (tensor := _file_tensor(tensor)) is not None:
            where = [str(tensor.file.resolve()), tensor.offset, list(tensor.shape)]
            yield name, [*where, tensor.dtype.name, source.dtype.name]


def _names(path: Path, key: str, source: LeafSource) -> tuple[str, ...]:
    """Return the names of a leaf of a quantized kernel: one, or one per layer and expert."""
    return paths.hf_names((*path[:-1], key), source.layers)


def _sha256(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
