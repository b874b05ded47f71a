"""How the trained leaves of a tree are named and laid out in an adapter file: one list of entries, read and written alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths, targets
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.errors import AdapterError
from jaxpeft.hub.safetensors_files import Tensor
from jaxpeft.methods.lora import LoRA

PREFIX = "base_model.model."
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Entry:
    """One tensor of an adapter file, and the part of a leaf that it is.

    Attributes:
        name: the tensor's name in the file.
        path: of the leaf.
        layer: row of a stacked leaf, None where the leaf is not stacked.
        region: slices of the leaf's (layer's) axes; what lies outside is zero padding.
        transposed: whether the tensor is the transpose of the region.
    """

    name: str
    path: Path
    layer: int | None
    region: tuple[slice, ...]
    transposed: bool

    def take(self, leaf: Array) -> Array:
        """Gives the tensor, C-contiguous, from the leaf: safetensors writes other layouts scrambled."""
        part = (leaf if self.layer is None else leaf[self.layer])[self.region]
        return np.ascontiguousarray(part.T if self.transposed else part)

    def put(self, leaf: Array, tensor: Array) -> None:
        """Writes the tensor into the leaf."""
        part = leaf if self.layer is None else leaf[self.layer]
        part[self.region] = tensor.T if self.transposed else tensor

    def shape(self, leaf: Any) -> tuple[int, ...]:
        """Gives the tensor's shape, from the leaf's."""
        full = leaf.shape if self.layer is None else leaf.shape[1:]
        cut = tuple(len(range(*s.indices(n))) for s, n in zip(self.region, full, strict=True))
        return cut[::-1] if self.transposed else cut


def entries(method: Method, params: Mapping[str, Any]) -> list[Entry]:
    """Lists the tensors of the adapter file of a rewritten tree: whatever is trained, and nothing else.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree; abstract leaves will do.
    """
    mask = trainable_mask(method, params)
    out: list[Entry] = []
    for path, flag in paths.walk(mask):
        if flag:
            out += _leaf_entries(method, path, paths.get(params, path), paths.get(params, path[:-1]))
    return out


def _leaf_entries(method: Method, path: Path, leaf: Any, siblings: Mapping[str, Any]) -> Iterator[Entry]:
    layers = leaf.shape[0] if paths.layer_axis(path) is not None else None
    modules = paths.hf_names(path[:-1], layers)
    where = method.where()
    for row, module in enumerate(modules):
        layer = None if layers is None else row
        ndim = leaf.ndim - (layers is not None)
        if path[-1] in method.leaf_names:
            if where is not None and targets.matches(module, where):
                yield _lora_entry(method, module, path, layer)
        else:
            adapted = any(name in siblings for name in method.leaf_names) and where is not None
            wrapped = adapted and where is not None and targets.matches(module, where)
            leaf_name = paths.hf_names(path[-1:], None)[0]
            middle = "base_layer." if wrapped else ""
            name = f"{PREFIX}{module}.{middle}{leaf_name}"
            yield Entry(name, path, layer, (slice(None),) * ndim, transposed=path[-1] == "kernel")


def _lora_entry(method: Method, module: str, path: Path, layer: int | None) -> Entry:
    if not isinstance(method, LoRA):
        raise AdapterError(f"{method.name}: its adapter has no place in PEFT's file format yet; merge it instead")
    used, full = slice(0, method.site_rank(module)), slice(None)
    if path[-1] == "lora_a":
        return Entry(f"{PREFIX}{module}.lora_A.weight", path, layer, (full, used), transposed=True)
    return Entry(f"{PREFIX}{module}.lora_B.weight", path, layer, (used, full), transposed=True)


def to_tensors(method: Method, params: Mapping[str, Any]) -> dict[str, Array]:
    """Gives the tensors of the adapter file, float32, by name."""
    host: dict[Path, Array] = {}
    out: dict[str, Array] = {}
    for entry in entries(method, params):
        if entry.path not in host:
            host[entry.path] = np.asarray(paths.get(params, entry.path), np.float32)
        out[entry.name] = entry.take(host[entry.path])
    return out


def mismatches(method: Method, params: Mapping[str, Any]) -> list[str]:
    """Lists where a rewritten tree is not as the method would have made it: a file of it would be another adapter.

    Args:
        method: what the tree is to be saved as.
        params: the rewritten tree.
    """
    where = method.where()
    if where is None or not isinstance(method, LoRA):
        return []
    problems: list[str] = []
    for site in targets.find_sites(params):
        leaves = paths.get(params, site.path)
        own = [np.asarray(leaves[leaf]) for leaf in ("lora_a", "lora_b", "lora_scale") if leaf in leaves]
        for row, name in enumerate(site.names):
            wanted = targets.matches(name, where)
            if own:
                problems += _site_mismatches(
                    method, name, wanted, *(leaf[row] if site.stacked else leaf for leaf in own)
                )
            elif wanted:
                problems.append(f"{name}: is not adapted in the tree")
    return problems


def _site_mismatches(method: LoRA, name: str, wanted: bool, a: Array, b: Array, scale: Array) -> list[str]:
    rank = method.site_rank(name) if wanted else 0
    if a.shape[-1] < rank or a[:, rank:].any() or b[rank:].any():
        what = f"the method gives it rank {rank}" if wanted else "the method does not adapt it"
        used = int(np.flatnonzero(a.any(0) | b.any(1)).max(initial=-1)) + 1
        return [f"{name}: has rank {used} in the tree, {what}"] if used or wanted else []
    if wanted and not np.isclose(scale, method.site_scale(name), rtol=1e-5):
        return [f"{name}: has scale {float(scale):g} in the tree, the method gives it {method.site_scale(name):g}"]
    return []


def differences(method: Method, params: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[str]:
    """Lists every tensor that is missing, extra or misshaped in an adapter file for a rewritten tree."""
    wanted = {entry.name: entry for entry in entries(method, params)}
    problems = [f"missing: {name}" for name in wanted if name not in tensors]
    problems += [f"extra: {name}" for name in tensors if name not in wanted]
    for name, tensor in tensors.items():
        if name in wanted and (not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2):
            problems.append(f"not floating: {name} is {tensor.dtype}")
    for name, entry in wanted.items():
        shape = entry.shape(paths.get(params, entry.path))
        if name in tensors and tuple(tensors[name].shape) != shape:
            problems.append(f"misshaped: {name} is {list(tensors[name].shape)}, must be {list(shape)}")
    return problems


def without_copies(header: Mapping[str, Tensor], base: Mapping[str, Any]) -> dict[str, Tensor]:
    """Leaves out what PEFT writes beside an adapter: a saved module's other names, and equal copies of base weights.

    Args:
        header: the tensors of the file.
        base: the parameters that the adapter is for.
    """
    leaves = {name: (path, i) for path, leaf in paths.walk(base) for i, name in enumerate(_names(path, leaf))}
    kept: dict[str, Tensor] = {}
    for name, tensor in header.items():
        plain = re.sub(r"\.modules_to_save\.(default\.)?", ".", name)
        if ".original_module." in name or (plain != name and plain in header):
            continue
        own = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if own.endswith(".weight") and ".base_layer." in name and own in leaves:
            path, row = leaves[own]
            leaf = np.asarray(paths.get(base, path))
            leaf = leaf[row] if paths.layer_axis(path) is not None else leaf
            if np.array_equal(tensor.read(), leaf.T if path[-1] == "kernel" else leaf):
                continue
        kept[name] = tensor
    return kept


def _names(path: Path, leaf: Any) -> tuple[str, ...]:
    return paths.hf_names(path, leaf.shape[0] if paths.layer_axis(path) is not None else None)


def put_tensors(method: Method, params: Mapping[str, Any], tensors: Mapping[str, Array]) -> Tree:
    """Gives the rewritten tree with the leaves of an adapter file in place of the fresh ones.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree.
        tensors: as `differences` found them to fit.
    """
    host: dict[Path, Array] = {}
    for entry in entries(method, params):
        leaf = paths.get(params, entry.path)
        entry.put(host.setdefault(entry.path, np.zeros(leaf.shape, np.float32)), tensors[entry.name])
    return paths.map_with_path(lambda path, leaf: _as_placed(host[path], leaf) if path in host else leaf, params)


def _as_placed(value: Array, leaf: Any) -> Any:
    """Puts an array where a leaf is; a leaf that is free to move, as a fresh one beside a sharded base, stays so."""
    import jax

    return jax.device_put(value, leaf.sharding) if leaf.committed else jnp.asarray(value)
