"""What the tests of the hub share: files made byte by byte, copies of a model folder with something wrong in them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxpeft.core import paths

Tensors = dict[str, np.ndarray[Any, Any]]


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """Writes a safetensors file of any header, fitting or not; bytes are taken as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(begin: Any, end: Any, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    """Gives one entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shard(folder: Path, files: dict[str, Tensors]) -> Path:
    """Writes files of tensors and the index that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    where = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def edited(
    source: Path,
    target: Path,
    weights: Callable[[Tensors], Any] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
) -> Path:
    """Copies a model folder; `weights` and `config` change what they are given, in place."""
    shutil.copytree(source, target)
    if weights is not None:
        tensors = load_file(target / "model.safetensors")
        weights(tensors)
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, target / "model.safetensors")
    if config is not None:
        edit_json(target / "config.json", config)
    return target


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_bit_equal(a: Any, b: Any) -> None:
    """Two trees have the same paths, shapes, dtypes and bits."""
    ours, theirs = dict(paths.walk(a)), dict(paths.walk(b))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        one, other = np.asarray(leaf), np.asarray(theirs[path])
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        assert one.tobytes() == other.tobytes(), path


def perturbed(params: Any, mask: Any, seed: int = 0) -> Any:
    """Adds noise to the leaves that are trained, as training would; what is exactly zero padding must be put back."""
    rng = np.random.default_rng(seed)

    def change(path: tuple[str, ...], leaf: Any) -> Any:
        if not paths.get(mask, path):
            return leaf
        return leaf + jax.numpy.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return paths.map_with_path(change, params)
